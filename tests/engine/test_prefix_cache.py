"""Random requests through the real scheduler, block pool and evictor, with the prefix cache on.

The model is simulated: what a token writes is a function of all tokens before it, and of the
request too from where a pruned request sees less than an unpruned one would. Beside the shared
cache every request has a private copy of its rows, which are evicted from in place. Before every
forward pass each row of each stage must equal its copy, bit for bit.
"""

import random
from collections import Counter, deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM")
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from tests.oracle.asks import kv, visual
from tokenprune.demo.checkpoint import build_checkpoint
from tokenprune.engine.kv.cache_layers import cache_layers
from tokenprune.engine.kv.evictor import Evictor
from tokenprune.engine.kv.moved_rows import MovedRows
from tokenprune.engine.kv_cache import StagedAttentionSpec, StagedManager, register_specs
from tokenprune.engine.launch import engine_arguments
from tokenprune.engine.private_rows import PrivateRows
from tokenprune.engine.request_table import RequestTable
from tokenprune.engine.stats import WorkerStats
from tokenprune.engine.step import PrunedStep, known_rows
from tokenprune.errors import DivergenceError
from tokenprune.plan import RequestPlan
from tokenprune.policies import KnownRows

BLOCK, HEADS, WIDTH = 8, 2, 8
MAX_REQS, MAX_LEN, MAX_STEP = 8, 320, 72
MAX_BLOCKS = MAX_LEN // BLOCK
PICTURE = 40
NUM_REQUESTS = 40
ALIEN = "holds rows that are not its own"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    model = build_checkpoint(tmp_path_factory.mktemp("checkpoint") / "llama")
    register_specs()
    init_none_hash(sha256)
    if torch.get_num_threads() > 1:
        # operations this small lose more to waiting threads than they gain
        torch.set_num_threads(1)
    return EngineArgs(
        model=str(model),
        dtype="float32",
        max_model_len=MAX_LEN,
        max_num_batched_tokens=MAX_STEP,
        max_num_seqs=MAX_REQS,
        enable_prefix_caching=True,
        **engine_arguments(prune_layers=[2, 4]),
    ).create_engine_config()


class Tables:
    """vLLM's block tables, as far as they are used."""

    def __init__(self, num_groups):
        self.block_sizes = [BLOCK] * num_groups
        self.block_tables = [
            SimpleNamespace(gpu=torch.zeros(MAX_REQS, MAX_BLOCKS, dtype=torch.int32))
            for _ in range(num_groups)
        ]
        self.num_blocks = SimpleNamespace(np=np.zeros((num_groups, MAX_REQS), dtype=np.int32))

    def append(self, row, ids, *, overwrite):
        for group, new in enumerate(ids):
            begin = 0 if overwrite else int(self.num_blocks.np[group, row])
            end = begin + len(new)
            self.block_tables[group].gpu[row, begin:end] = torch.tensor(new, dtype=torch.int32)
            self.num_blocks.np[group, row] = end


def own_tables(num_groups):
    """Every row's own blocks, one after the other."""
    tables = Tables(num_groups)
    for table in tables.block_tables:
        table.gpu[:] = torch.arange(MAX_REQS * MAX_BLOCKS).view(MAX_REQS, -1).int()
    return tables


class Caches:
    """One layer per group, and the evictor of a worker on them."""

    def __init__(self, kv_config, tables, shape, num_blocks):
        named = SimpleNamespace(get_name=lambda: "TRITON_ATTN")
        self.layers = {
            group.layer_names[0]: SimpleNamespace(
                kv_cache=torch.zeros(num_blocks, HEADS, BLOCK, WIDTH),
                get_attn_backend=lambda: named,
                impl=SimpleNamespace(scale=1.0),
            )
            for group in kv_config.kv_cache_groups
        }
        stages = [[group] for group in range(shape.num_stages)]
        self.tables = tables
        self.moved_rows = MovedRows(tables, CPU)
        layers = cache_layers(kv_config, stages, self.layers, tables)
        self.evictor = Evictor(layers, shape, WorkerStats(CPU, len(layers)), self.moved_rows)

    def rows(self, group, row, indices):
        """Return block ids and offsets of cache indices."""
        return self.tables.block_tables[group].gpu[row][indices // BLOCK].long(), indices % BLOCK

    def read(self, group, row, count):
        blocks, offsets = self.rows(group, row, torch.arange(count))
        return list(self.layers.values())[group].kv_cache[blocks, :, offsets]

    def write(self, group, row, begin, values):
        blocks, offsets = self.rows(group, row, begin + torch.arange(len(values)))
        list(self.layers.values())[group].kv_cache[blocks, :, offsets] = values


class Live:
    """A request as the worker knows it: its tokens, and a chain of hashes over them."""

    def __init__(self, new):
        self.tokens = list(new.prefill_token_ids)
        self.pictures = {
            p: f.identifier
            for f in new.mm_features
            for p in range(f.mm_position.offset, f.mm_position.offset + f.mm_position.length)
        }
        self.chain = []

    def names(self, begin, end):
        """Return a number for each token that says what is before it."""
        while len(self.chain) < end:
            place = len(self.chain)
            before = self.chain[-1] if self.chain else 1
            self.chain.append(
                hash((before, self.tokens[place], self.pictures.get(place))) & 0xFFFFFFFF
            )
        return np.array(self.chain[begin:end], dtype=np.uint64)


def written(names, group):
    """Return `[n, HEADS, WIDTH]`, what tokens of these names write."""
    salt = np.arange(1, HEADS * WIDTH + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (names[:, None] + np.uint64(group)) * salt >> np.uint64(40)
    return torch.from_numpy(mixed.astype(np.float32)).view(-1, HEADS, WIDTH)


class Run:
    """A scheduler and the worker that is simulated for it."""

    def __init__(self, config, seed):
        self.rng = random.Random(seed)
        spec = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=HEADS, head_size=WIDTH // 2, dtype=torch.float32
        )
        groups = [
            KVCacheGroupSpec([f"layers.{2 * s}.attn"], StagedAttentionSpec.of(spec, s, True))
            for s in range(3)
        ]
        self.kv_config = KVCacheConfig(
            num_blocks=self.rng.choice([125, 160, 250, 500]),
            kv_cache_tensors=[],
            kv_cache_groups=groups,
        )
        config.cache_config.num_gpu_blocks = self.kv_config.num_blocks
        self.scheduler = config.scheduler_config.get_scheduler_cls()(
            vllm_config=config,
            kv_cache_config=self.kv_config,
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
            hash_block_size=BLOCK,
            log_stats=False,
        )
        self.shape = self.scheduler._shape
        self.late = self.rng.randint(0, 1)
        self.rows, self.live, self.free = {}, {}, list(range(MAX_REQS))
        self.tables = Tables(3)
        self.table = RequestTable(self.shape, MAX_REQS, CPU, WorkerStats(CPU, 3))
        self.shared = Caches(self.kv_config, self.tables, self.shape, self.kv_config.num_blocks)
        own = own_tables(3)
        self.private = Caches(self.kv_config, own, self.shape, MAX_REQS * MAX_BLOCKS)
        self.computed = np.zeros(MAX_REQS, dtype=np.int64)
        self.seen = Counter()
        self.documents = [[self.rng.randrange(300) for _ in range(MAX_LEN)] for _ in range(3)]
        self.sent = []
        self.count = 0

    def prompt(self):
        """Draw a prompt: of a document, one that was sent before, or one that goes on with it."""
        rng = self.rng
        kind = rng.random()
        if self.sent and kind < 0.35:
            tokens, features, live = rng.choice(self.sent)
            if kind < 0.25 and live in self.live:
                tokens = self.live[live].tokens
            return tokens[: MAX_LEN - 80] + [rng.randrange(300) for _ in range(5)], features
        document = rng.choice(self.documents)
        tokens = document[: rng.randint(10, 200)] + [rng.randrange(300) for _ in range(5)]
        if rng.random() < 0.6:
            return tokens, []
        at = rng.choice([3, 16, 29])
        tokens = tokens[:at] + [0] * PICTURE + tokens[at:] + [1]
        picture = f"picture {rng.randrange(2)}"
        where = PlaceholderRange(at, PICTURE)
        return tokens, [MultiModalFeatureSpec(None, "image", picture, where, picture)]

    def send(self):
        rng = self.rng
        tokens, features = self.prompt()
        when, lag = rng.choice(["prompt_end", "chunk"]), rng.choice([16, 16, 24, 40])
        keep = rng.choice([0.1, 0.5, 0.8, 1.0])
        pruning = {}
        if rng.random() < 0.7:
            method = rng.choice(["lagkv", "streaming", "random"])
            sink = rng.choice([0, 4, 8, 21, 40])
            pruning |= kv(method, keep, sink=sink, lag=lag, when=when)
        if features and rng.random() < 0.6:
            pruning |= visual(rng.choice(["uniform", "random"]), rng.choice([0.2, 0.6]))
        self.count += 1
        self.sent.append((tokens, features, f"r{self.count}"))
        params = SamplingParams(
            max_tokens=rng.randint(1, 60), ignore_eos=True, extra_args=pruning or None
        )
        self.scheduler.add_request(
            Request(
                request_id=f"r{self.count}",
                prompt_token_ids=tokens,
                sampling_params=params,
                pooling_params=None,
                mm_features=features,
                block_hasher=get_request_block_hasher(BLOCK, sha256),
            )
        )

    def serve(self, num_requests):
        """Send requests and run steps until all have ended."""
        outputs = deque()
        while self.count < num_requests or self.scheduler.has_requests():
            while self.count < num_requests and self.rng.random() < 0.4:
                self.send()
            if self.rng.random() < 0.03 and self.scheduler.requests:
                victim = self.rng.choice(list(self.scheduler.requests))
                self.scheduler.finish_requests(victim, RequestStatus.FINISHED_ABORTED)
            step = self.scheduler.schedule()
            outputs.append((step, self.execute(step)))
            while len(outputs) > self.late or (outputs and not step.num_scheduled_tokens):
                self.scheduler.update_from_output(*outputs.popleft())
            # an aborted request must not wait for a step that nobody needs
            self.seen["steps"] += 1
            assert self.seen["steps"] < 100 * num_requests, "nothing goes on"
        pool = self.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        assert not self.scheduler._plans
        for manager in self.scheduler._managers:
            assert not manager.moved_rows
            assert not manager._closed
            assert not manager._rewritten
        rows = self.scheduler._private_rows
        assert [rows._closed, rows._lengths, rows._checksums] == [set(), {}, {}]

    def execute(self, step):
        """Do what the runner does in a step."""
        for gone in (*step.finished_req_ids, *(step.preempted_req_ids or ())):
            if gone in self.rows:
                self.table.remove(self.rows[gone])
                self.free.append(self.rows.pop(gone))
        self.seen["preempted"] += len(step.preempted_req_ids or ())
        for new in step.scheduled_new_reqs:
            row = self.rows[new.req_id] = self.free.pop()
            self.live[new.req_id] = Live(new)
            self.computed[row] = new.num_computed_tokens
            self.tables.append(row, new.block_ids, overwrite=True)
            self.seen["hits"] += new.num_computed_tokens > 0
        self.table.add(step, self.rows, self.shape)
        for new in step.scheduled_new_reqs:
            self.copy_hit(new)
        groups = [[group] for group in range(3)]
        self.table.drop_emptied_blocks(step, self.rows, self.tables, groups)
        cached = step.scheduled_cached_reqs
        for name, computed, blocks in zip(
            cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True
        ):
            self.computed[self.rows[name]] = computed
            if blocks is not None:
                self.tables.append(self.rows[name], blocks, overwrite=False)
        self.table.update(step, self.rows, self.computed, self.tables)
        moved = self.table.moved_rows(step, self.rows)
        self.shared.moved_rows.begin_step(moved)
        self.seen["moves"] += len(moved)
        self.forward(step)
        return self.sample(step)

    def copy_hit(self, new):
        """Give the private copy what the prefix cache must have brought."""
        names = self.live[new.req_id].names(0, new.num_computed_tokens)
        for group in range(3):
            self.private.write(group, self.rows[new.req_id], 0, written(names, group))
        request = self.table.requests[self.rows[new.req_id]]
        self.seen["pruned hits"] += request is not None and new.num_computed_tokens > 0

    def forward(self, step):
        scheduled = list(step.num_scheduled_tokens.items())
        for name, count in scheduled:
            row = self.rows[name]
            begin = int(self.computed[row])
            for group in range(3):
                values, first = self.new_rows(name, begin, count, group)
                for caches in (self.shared, self.private):
                    caches.write(group, row, first, values)
        for name, count in scheduled:
            row = self.rows[name]
            request, begin = self.table.requests[row], int(self.computed[row])
            for group in range(3):
                held = begin + count
                if request is not None:
                    held = request.lengths.peak(begin, begin + count, group)
                found, copy = (c.read(group, row, held) for c in (self.shared, self.private))
                assert torch.equal(found, copy), f"{name} {ALIEN}"
        indices = np.array([self.rows[name] for name, _ in scheduled])
        done = PrunedStep(
            [self.table.requests[row] for row in indices],
            indices,
            self.computed[indices] if len(indices) else indices,
            np.array([count for _, count in scheduled]),
            np.zeros(0),
        )
        for caches in (self.shared, self.private):
            caches.evictor.after_forward(done)

    def new_rows(self, name, begin, count, group):
        """Return what a request's tokens of the step write at a group's stage, and where."""
        row = self.rows[name]
        names = self.live[name].names(begin, begin + count)
        request = self.table.requests[row]
        if request is None:
            return written(names, group), begin
        lengths, plan = request.lengths, request.plan
        own = np.arange(begin, begin + count) >= plan.shared_tokens
        if any(lengths.is_rewritten(begin, stage) for stage in range(3)):
            own[:] = True
        names = names + own.astype(np.uint64) * np.uint64(hash(name) & 0xFFFFFFFF)
        first = lengths.physical(begin, group)
        grown = lengths.peak(begin, begin + count, group) - first
        if isinstance(plan.visual, KnownRows) and request.drops_rows(begin):
            names = names[known_rows(plan.visual, begin, count)[group]]
        # where a chunk is dropped altogether a row runs that writes nothing
        return written(names, group)[:grown], first

    def sample(self, step):
        names = list(step.num_scheduled_tokens)
        sampled = []
        for name in names:
            tokens = self.live[name].tokens
            after = int(self.computed[self.rows[name]]) + step.num_scheduled_tokens[name]
            sampled.append([])
            if after == len(tokens):
                sampled[-1] = [self.rng.randrange(300)]
                tokens += sampled[-1]
        return ModelRunnerOutput(names, {n: i for i, n in enumerate(names)}, sampled)


@pytest.mark.parametrize("seed", range(8))
def test_every_row_is_that_of_a_request_with_blocks_of_its_own(config, seed):
    run = Run(config, seed)
    run.serve(NUM_REQUESTS)
    assert min(run.seen["moves"], run.seen["pruned hits"]) > 3


def test_so_it_is_where_the_pool_has_no_room_to_leave_blocks_to_others(config, monkeypatch):
    monkeypatch.setattr(PrivateRows, "has_room", lambda *_: False)
    run = Run(config, 0)
    run.serve(NUM_REQUESTS)
    assert run.seen["moves"] > 0, "blocks that others hold are left to them all the same"


def in_place(manager, request_id, num_tokens, moving, has_room):
    """Rewrite blocks where they are, whoever may find them."""


def stay(manager, request_id):
    """Leave a row where it was, on the side of the scheduler."""
    return manager.moved_rows.pop(request_id, None) is not None


@pytest.mark.parametrize(
    ("changed", "has_room", "message"),
    [
        pytest.param((StagedManager, "_move", in_place), True, ALIEN, id="in-place"),
        pytest.param((BlockPool, "evict_blocks", lambda *_: None), False, ALIEN, id="hashed"),
        pytest.param((RequestPlan, "longest_hit", MAX_LEN), True, ALIEN, id="longer-hits"),
        pytest.param((RequestPlan, "shared_tokens", MAX_LEN), True, ALIEN, id="images"),
        pytest.param((StagedManager, "close", lambda *_: None), True, ALIEN, id="answers"),
        pytest.param((MovedRows, "settle", lambda *_: None), True, ALIEN, id="table"),
        pytest.param(
            (StagedManager, "take_moved_row", stay), True, "the scheduler counts", id="checksum"
        ),
    ],
)
def test_what_would_give_rows_to_others_is_noticed(config, monkeypatch, changed, has_room, message):
    monkeypatch.setattr(PrivateRows, "has_room", lambda *_: has_room)
    monkeypatch.setattr(*changed)
    with pytest.raises((AssertionError, DivergenceError), match=message):  # noqa: PT012
        for seed in range(8):
            Run(config, seed).serve(NUM_REQUESTS)
