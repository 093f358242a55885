"""The real scheduler under random load: it never stands still while somebody waits.

Steps are scheduled as in the engine; what the worker would answer is made up. Requests bring
pictures, prune on every axis, come in any order and priority, and go at any time, under every
limit that vLLM knows, with pools and encoder caches that are hardly large enough.
"""

from __future__ import annotations

import copy
import random
from collections import deque
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM")

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from tokenprune.demo.checkpoint import build_checkpoint
from tokenprune.engine.kv_cache import StagedAttentionSpec
from tokenprune.engine.launch import engine_arguments
from tokenprune.engine.scheduler import PruningScheduler

BOUNDARIES = (0, 2, 3, 5)
BLOCK = 16
MAX_MODEL_LEN = 640
IMAGE = 144
RUNS = range(30)
NUM_REQUESTS = 60
# a step may only take somebody's blocks away; the one after it must have a use for them
MOST_IDLE_STEPS = 2
MOST_STEPS = 20_000

CUT: list[dict[str, Any]] = [
    {},
    {"pruning_visual_method": "uniform", "pruning_visual_keep_ratio": 0.25},
    {"pruning_visual_method": "transprune", "pruning_visual_keep_ratio": 0.25},
    {"pruning_visual_method": "vflowopt", "pruning_visual_keep_ratio": 0.25},
]
EVICT: list[dict[str, Any]] = [
    {},
    {"pruning_kv_method": "lagkv", "pruning_kv_sink": 4, "pruning_kv_lag": 16},
    {"pruning_kv_method": "streaming", "pruning_kv_sink": 0, "pruning_kv_lag": 33},
    {"pruning_kv_method": "random", "pruning_kv_lag": 20, "pruning_kv_when": "prompt_end"},
]
PACK: list[dict[str, Any]] = [
    {},
    {
        "pruning_channels_method": "think",
        "pruning_channels_keep_ratio": 0.5,
        "pruning_channels_window": 8,
        "pruning_channels_recent": 8,
    },
]


@pytest.fixture(scope="module")
def configured(tmp_path_factory: pytest.TempPathFactory) -> VllmConfig:
    checkpoint = Path(build_checkpoint(tmp_path_factory.mktemp("schedules") / "checkpoint"))
    arguments = engine_arguments(prune_layers=list(BOUNDARIES[1:]), allow_channel_pruning=True)
    init_none_hash(sha256)
    return EngineArgs(
        str(checkpoint),
        max_model_len=MAX_MODEL_LEN,
        block_size=BLOCK,
        dtype="float32",
        enforce_eager=True,
        max_num_batched_tokens=MAX_MODEL_LEN,
        kv_cache_memory_bytes=1 << 24,
        **arguments,
    ).create_engine_config()


class Load:
    """One scheduler, and requests that come, run and go as a seed says."""

    def __init__(self, configured: VllmConfig, seed: int) -> None:
        rng = self.rng = random.Random(seed)
        # one kind of method at a time shows more than all of them in turn
        self.cuts = rng.choice((CUT, CUT[:2], CUT[2:3], CUT[3:]))
        config = copy.deepcopy(configured)
        limits = config.scheduler_config
        limits.policy = rng.choice(("fcfs", "priority"))
        limits.max_num_seqs = rng.choice((1, 2, 4, 16))
        limits.max_num_batched_tokens = rng.choice((160, 200, 320, 640))
        limits.max_num_scheduled_tokens = rng.choice(
            (limits.max_num_batched_tokens, max(IMAGE, limits.max_num_batched_tokens // 2))
        )
        limits.long_prefill_token_threshold = rng.choice((0, 0, 150, 300))
        limits.disable_chunked_mm_input = rng.random() < 0.5
        limits.async_scheduling = rng.random() < 0.5
        specs = {
            stage: StagedAttentionSpec(
                block_size=BLOCK,
                num_kv_heads=2,
                head_size=32,
                dtype=config.model_config.dtype,
                stage=stage,
                evicts=True,
                packs=True,
            )
            for stage in range(len(BOUNDARIES))
        }
        # the longest request fits, and not much beside it
        longest = len(specs) * -(-MAX_MODEL_LEN // BLOCK)
        self.num_blocks = 1 + longest + rng.choice((0, 3, longest // 2, 4 * longest))
        groups = [KVCacheGroupSpec([f"layer.{stage}"], spec) for stage, spec in specs.items()]
        config.cache_config.num_gpu_blocks = self.num_blocks
        self.scheduler: Any = PruningScheduler(
            config,
            KVCacheConfig(self.num_blocks, [], groups),
            StructuredOutputManager(config),
            BLOCK,
            hash_block_size=BLOCK,
        )
        # as vLLM sets them, without asking a model's processor: no more than one step takes
        room = max(limits.max_num_batched_tokens, IMAGE)
        self.scheduler.encoder_cache_manager = EncoderCacheManager(room)
        self.scheduler.max_num_encoder_input_tokens = room
        self.hasher = get_request_block_hasher(BLOCK, sha256)
        # answers that come a step late, as under async scheduling
        self.late: deque[tuple[Any, ModelRunnerOutput]] = deque()
        self.depth = 2 if limits.async_scheduling else 1
        self.waits = 0
        self.finished = 0

    def request(self, number: int) -> Request:
        rng = self.rng
        num_images = rng.choice((0, 1, 2, 2, 3))
        tokens, features = [1] * rng.randint(1, 30), []
        for _ in range(num_images):
            identifier = f"picture-{rng.randrange(20)}"
            place = PlaceholderRange(offset=len(tokens), length=IMAGE)
            features.append(MultiModalFeatureSpec(None, "image", identifier, place))
            tokens += [2] * IMAGE + [rng.randrange(3, 9)] * rng.randint(0, 20)
        tokens += [rng.randrange(3, 9)] * rng.randint(1, 60)
        tokens = tokens[: MAX_MODEL_LEN - 1]
        keys = rng.choice(self.cuts) | rng.choice(EVICT) | rng.choice(PACK)
        params = SamplingParams(
            max_tokens=min(rng.choice((1, 2, 20, 100)), MAX_MODEL_LEN - len(tokens)),
            ignore_eos=True,
            extra_args=dict(keys) or None,
        )
        return Request(
            f"r{number}",
            tokens,
            params,
            None,
            mm_features=features,
            priority=rng.randint(-1, 1),
            arrival_time=float(number),
            block_hasher=self.hasher,
        )

    def step(self) -> None:
        scheduler = self.scheduler
        output = scheduler.schedule()
        answered = {}
        for request_id in output.num_scheduled_tokens:
            request = scheduler.requests[request_id]
            # after a preemption what was generated is computed again before anything new
            done = request.num_computed_tokens >= request.num_tokens
            answered[request_id] = [7] if done else []
        ids = list(answered)
        result = ModelRunnerOutput(
            ids, {name: i for i, name in enumerate(ids)}, [answered[name] for name in ids]
        )
        self.late.append((output, result))
        nothing = output.total_num_scheduled_tokens == 0
        while self.late and (len(self.late) >= self.depth or nothing):
            scheduler.update_from_output(*self.late.popleft())
        stands_still = nothing and scheduler.has_unfinished_requests()
        self.waits = self.waits + 1 if stands_still else 0
        assert self.waits <= MOST_IDLE_STEPS, self.state()

    def state(self) -> str:
        waiting = [*self.scheduler.waiting, *self.scheduler.kv_holding_waiting]
        pool = self.scheduler.kv_cache_manager.block_pool
        return (
            f"nothing is scheduled; running {len(self.scheduler.running)}, waiting "
            f"{[(r.request_id, r.num_tokens, r.sampling_params.extra_args) for r in waiting]}, "
            f"free blocks {pool.get_num_free_blocks()} of {self.num_blocks}, free encoder room "
            f"{self.scheduler.encoder_cache_manager.num_freeable_slots}"
        )

    def run(self) -> None:
        rng, scheduler, number = self.rng, self.scheduler, 0
        for _ in range(MOST_STEPS):
            while number < NUM_REQUESTS and rng.random() < 0.4:
                scheduler.add_request(self.request(number))
                number += 1
            if scheduler.requests and rng.random() < 0.03:
                leaving = rng.choice(sorted(scheduler.requests))
                scheduler.finish_requests(leaving, RequestStatus.FINISHED_ABORTED)
            self.step()
            if number == NUM_REQUESTS and not scheduler.has_unfinished_requests():
                break
        else:
            pytest.fail(f"requests are left after {MOST_STEPS} steps: {self.state()}")
        while self.late:
            scheduler.update_from_output(*self.late.popleft())
        # who was aborted last is told to the worker with one more step
        scheduler.schedule()


@pytest.mark.parametrize("seed", RUNS)
def test_somebody_is_always_served_and_everything_comes_back(
    configured: VllmConfig, seed: int
) -> None:
    load = Load(configured, seed)
    load.run()
    scheduler = load.scheduler
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == load.num_blocks - 1
    assert not scheduler._plans
    assert not scheduler.requests
    assert not any(scheduler.encoder_cache_manager.cached.values()), "nobody uses a picture now"
