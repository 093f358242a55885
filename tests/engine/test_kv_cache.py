"""The staged KV spec and its manager, on vLLM's own block pool and registry."""

import dataclasses
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plans import lengths_of, plan_of
from tokenprune.lengths import Eviction, Packing
from tokenprune.plan import RequestPlan
from tokenprune.policies import KnownRows
from tokenprune.policies.visual.uniform import UniformVisual
from tokenprune.shape import EngineShape

pytest.importorskip("vllm", reason="needs vLLM")
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1 import kv_cache_spec_registry as registry
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SlidingWindowManager
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.request import Request

from tokenprune.engine.kv_cache import (
    StagedAttentionSpec,
    StagedManager,
    register_specs,
    shape_of_cache,
)
from tokenprune.engine.private_rows import PrivateRows, row_checksum

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
BLOCK = 4
PLAIN = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=8, dtype=torch.float32)


def staged(stage, **changes):
    return StagedAttentionSpec.of(dataclasses.replace(PLAIN, **changes), stage)


# the spec


def test_a_staged_spec_keeps_every_field_and_the_page_size():
    spec = FullAttentionSpec(
        block_size=32,
        num_kv_heads=3,
        head_size=16,
        head_size_v=8,
        dtype=torch.bfloat16,
        page_size_padded=65536,
        non_causal=True,
    )
    ours = StagedAttentionSpec.of(spec, 2)
    assert ours.stage == 2
    assert isinstance(ours, FullAttentionSpec)
    for field in dataclasses.fields(spec):
        assert getattr(ours, field.name) == getattr(spec, field.name), field.name
    assert ours.page_size_bytes == spec.page_size_bytes


def test_specs_of_one_stage_merge_to_that_stage():
    merged = StagedAttentionSpec.merge([staged(3), staged(3), staged(3)])
    assert merged == staged(3)
    assert type(merged) is StagedAttentionSpec


@pytest.mark.parametrize(
    "specs",
    [
        pytest.param([staged(0), staged(1)], id="stages"),
        pytest.param([staged(1), staged(1, head_size=16)], id="shapes"),
    ],
)
def test_specs_that_differ_do_not_merge(specs):
    # vLLM catches AssertionError and makes groups of its own then
    with pytest.raises(AssertionError):
        StagedAttentionSpec.merge(specs)


@pytest.mark.parametrize(
    ("others", "uniform"),
    [
        pytest.param([staged(1)], True, id="same-stage"),
        pytest.param([staged(0)], False, id="earlier-stage"),
        pytest.param([staged(1), staged(2)], False, id="one-other"),
        pytest.param([PLAIN], False, id="no-stage"),
    ],
)
def test_layers_are_uniform_within_a_stage_only(others, uniform):
    specs = {str(i): spec for i, spec in enumerate([staged(1), *others])}
    assert staged(1).is_uniform_with_collection(specs) is uniform
    assert (UniformTypeKVCacheSpecs.from_specs(specs) is not None) is uniform


def test_a_spec_survives_pickling_and_copying():
    # engine and workers are processes, and vLLM resizes specs with dataclasses.replace
    spec = staged(2)
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert dataclasses.replace(spec, block_size=8).stage == 2
    assert spec.copy_with_new_block_size(8) == staged(2, block_size=8)


def test_specs_of_different_stages_are_different_keys():
    assert len({staged(0), staged(1), staged(1)}) == 2


# the registry


def test_registering_twice_changes_nothing():
    register_specs()
    before = dict(registry._REGISTRY_KVCACHESPEC_LIST)
    register_specs()
    assert before == registry._REGISTRY_KVCACHESPEC_LIST


def test_registering_first_leaves_the_built_in_specs_known(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY_KVCACHESPEC_LIST", {})
    register_specs()
    window = SlidingWindowSpec(
        block_size=BLOCK, num_kv_heads=2, head_size=8, dtype=torch.float32, sliding_window=8
    )
    expected = {
        staged(1): (StagedManager, StagedAttentionSpec),
        PLAIN: (FullAttentionManager, FullAttentionSpec),
        window: (SlidingWindowManager, SlidingWindowSpec),
    }
    known = registry.KVCacheSpecRegistry
    for spec, (manager, base) in expected.items():
        assert known.get_manager_class(spec) is manager
        assert known.get_uniform_type_base_spec(spec) is base
    known.check_kv_cache_spec_registry({"layer": staged(0)})


# the manager


class Side:
    """A manager on its own pool, driven as vLLM's KV cache manager drives it."""

    def __init__(self, cls, spec, num_blocks=64, caching=True, plans=None):
        self.pool = BlockPool(num_blocks, enable_caching=caching, hash_block_size=BLOCK)
        self.manager = cls(
            spec,
            block_pool=self.pool,
            enable_caching=caching,
            kv_cache_group_id=0,
            scheduler_block_size=BLOCK,
        )
        if plans is not None:
            self.manager.plans = plans
        self.empty = self.pool.get_num_free_blocks()

    def needed(self, request_id, num_tokens):
        return self.manager.get_num_blocks_to_allocate(request_id, num_tokens, (), 0, 0, num_tokens)

    def grow(self, request_id, num_tokens):
        """Allocate up to `num_tokens` if the pool can; return the new block ids."""
        needed = self.needed(request_id, num_tokens)
        if needed > self.pool.get_num_free_blocks():
            return None
        if request_id not in self.manager.num_cached_block and not self.held(request_id):
            self.manager.add_local_computed_blocks(request_id, (), 0, 0)
        new = self.manager.allocate_new_blocks(request_id, num_tokens, num_tokens)
        assert len(new) == needed, "the admission check must count what is allocated"
        return [block.block_id for block in new]

    def cache(self, request, num_tokens):
        self.manager.cache_blocks(request, num_tokens, replay_boundaries=())

    def held(self, request_id):
        return [b.block_id for b in self.manager.req_to_blocks.get(request_id, ())]

    @property
    def num_cached(self):
        return len(self.pool.cached_block_hash_to_block)


def plan(num_tokens, *dropped):
    return plan_of(lengths_of(num_tokens, dropped))


def request(request_id, num_tokens):
    init_none_hash(sha256)
    return Request(
        request_id=request_id,
        prompt_token_ids=list(range(num_tokens)),
        sampling_params=SamplingParams(max_tokens=8),
        pooling_params=None,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )


# a prompt of 16 of which the stage holds 6, by name and by count
BY_NAME = plan(16, (), tuple(range(3, 13)))
BY_COUNT = plan(16, 0, 10)


@pytest.mark.parametrize(
    ("plan_", "stage", "steps", "held"),
    [
        pytest.param(BY_NAME, 0, [16, 17], [4, 5], id="stage-that-drops-nothing"),
        pytest.param(BY_NAME, 1, [16, 17, 18, 19], [2, 2, 2, 3], id="whole-prompt-then-decode"),
        pytest.param(BY_NAME, 1, [4, 8, 12, 16], [1, 1, 1, 2], id="chunks"),
        pytest.param(BY_COUNT, 1, [16, 17, 18, 19], [2, 2, 2, 3], id="counted"),
        pytest.param(plan(16, (), ()), 1, [15, 16, 17], [4, 4, 5], id="keeps-everything"),
    ],
)
def test_a_request_holds_blocks_of_its_physical_length(plan_, stage, steps, held):
    side = Side(StagedManager, staged(stage), plans={"r": plan_})
    for num_tokens, expected in zip(steps, held, strict=True):
        side.grow("r", num_tokens)
        assert len(side.held("r")) == expected
        assert side.needed("r", num_tokens) == 0
    assert side.pool.get_num_free_blocks() == side.empty - held[-1]
    side.manager.free("r")
    assert side.pool.get_num_free_blocks() == side.empty


def test_a_chunk_that_is_dropped_entirely_gets_no_block_from_an_empty_pool():
    # 3 blocks, one of them the null block
    side = Side(StagedManager, staged(1), num_blocks=3, plans={"r": BY_NAME})
    assert side.grow("r", 4) is not None
    assert side.grow("other", 4) is not None
    assert side.pool.get_num_free_blocks() == 0
    assert side.grow("r", 12) == []
    assert side.grow("r", 16) is None


def test_the_admission_check_counts_by_physical_length():
    side = Side(StagedManager, staged(1), plans={"r": BY_COUNT})
    arguments = ((), 0, 0, 16)
    assert side.manager.get_num_blocks_to_allocate("r", 16, *arguments) == 2
    assert side.manager.get_num_blocks_to_allocate("x", 16, *arguments) == 4
    capped = side.manager.get_num_blocks_to_allocate("r", 16, *arguments, apply_admission_cap=True)
    assert capped == 2


def test_plans_that_come_and_go_are_seen_at_once():
    # the scheduler shares its own mapping
    plans = {}
    side = Side(StagedManager, staged(1), plans=plans)
    assert side.needed("r", 16) == 4
    plans["r"] = BY_NAME
    assert side.needed("r", 16) == 2
    del plans["r"]
    assert side.needed("r", 16) == 4


def test_a_manager_starts_without_plans_and_shares_none():
    managers = [Side(StagedManager, staged(1)).manager for _ in range(2)]
    assert [dict(m.plans) for m in managers] == [{}, {}]


def test_blocks_of_a_step_are_those_of_its_peak_and_come_back_before_the_next():
    lengths = lengths_of(40, ((), ()), Eviction(2, 8, (2, 2), after_prompt=True))
    evicting = plan_of(lengths, visual=False)
    side = Side(StagedManager, staged(1), plans={"r": evicting})
    computed = {"r": 0}
    side.manager.num_computed = computed.__getitem__
    side.manager.max_step = 40
    arguments = ((), 0, 0, 40)
    for step in (32, 8, *[1] * 30):
        after = computed["r"] + step
        side.manager.free_emptied("r", lengths.all_stages(computed["r"]))
        held = math.ceil(lengths.physical(computed["r"], 1) / BLOCK)
        assert len(side.held("r")) == held
        assert side.grow("r", after) is not None
        assert len(side.held("r")) == math.ceil(lengths.peak(computed["r"], after, 1) / BLOCK)
        # another call changes nothing: the request may have to wait for its step
        assert side.grow("r", after) == []
        computed["r"] = after
    assert side.empty - side.pool.get_num_free_blocks() == len(side.held("r"))
    # a new request must fit with its whole prompt
    computed["r"] = 0
    side.manager.free("r")
    needed = side.manager.get_num_blocks_to_allocate("r", 40, *arguments, apply_admission_cap=True)
    assert needed == 40 // BLOCK
    assert side.pool.get_num_free_blocks() == side.empty


@pytest.mark.parametrize("evicts", [False, True])
def test_blocks_that_tokens_are_packed_out_of_come_back_before_the_next_step(evicts):
    eviction = Eviction(2, 8, (4, 4), after_prompt=True) if evicts else None
    lengths = lengths_of(40, ((), ()), eviction, Packing(BLOCK, BLOCK + 2, 3, True))
    packing = plan_of(lengths, visual=False)
    side = Side(StagedManager, staged(1), plans={"r": packing})
    computed = {"r": 0}
    side.manager.num_computed = computed.__getitem__
    side.manager.max_step = 40
    highest = 0
    for step in (32, 8, *[1] * 50):
        after = computed["r"] + step
        side.manager.free_emptied("r", lengths.all_stages(computed["r"]))
        held = math.ceil(lengths.physical(computed["r"], 1) / BLOCK)
        assert len(side.held("r")) == held
        assert side.grow("r", after) is not None
        assert len(side.held("r")) == math.ceil(lengths.peak(computed["r"], after, 1) / BLOCK)
        highest = max(highest, len(side.held("r")))
        computed["r"] = after
    # packed blocks hold half again as many tokens, so the row stays short of one slot per token
    assert len(side.held("r")) < 0.8 * 90 / BLOCK
    computed["r"] = 0
    side.manager.free("r")
    admitted = side.manager.get_num_blocks_to_allocate(
        "r", 90, (), 0, 0, 90, apply_admission_cap=True
    )
    assert highest <= admitted <= math.ceil(90 / BLOCK)
    assert side.pool.get_num_free_blocks() == side.empty


def shape_of(**flags):
    return [StagedAttentionSpec.of(PLAIN, stage, **flags) for stage in range(2)]


@pytest.mark.parametrize(
    ("specs", "kv", "channels"),
    [
        pytest.param(shape_of(evicts=True, packs=True), None, None, id="both"),
        pytest.param(shape_of(evicts=True), None, "sinks of its own", id="cannot-pack"),
        pytest.param(shape_of(), "layout", "layout", id="cannot-move"),
        pytest.param([PLAIN], "layout", "layout", id="not-ours"),
    ],
)
def test_every_process_reads_from_the_specs_what_the_worker_can_do(specs, kv, channels):
    shape = shape_of_cache(EngineShape(2, (0,), 9, head_size=8, block_size=99), specs)
    assert shape.block_size == BLOCK
    found_channels = shape.unsupported.get("channels")
    for found, expected in ((shape.unsupported.get("kv"), kv), (found_channels, channels)):
        assert found is None if expected is None else expected in found


def test_what_is_before_the_first_image_reaches_the_prefix_cache_and_nothing_else():
    # the first visual token is at 6: one block of four is before it
    positions = tuple(range(6, 13))
    lengths = lengths_of(16, ((), positions))
    visual = KnownRows(UniformVisual(), (), (7, 0), (tuple(range(7)), ()), positions)
    plans = {"known": RequestPlan(lengths, visual=visual), "counted": BY_COUNT}
    for name, expected in (("known", 1), ("counted", 0), ("plain", 4)):
        side = Side(StagedManager, staged(1), plans=plans)
        side.grow(name, 16)
        side.cache(request(name, 17), 16)
        assert side.num_cached == expected


class Evicting(Side):
    """A side whose request `r` evicts from its prompt of 41 at the end of it, among others."""

    LENGTHS = lengths_of(41, ((), ()), Eviction(6, 8, (2, 2), after_prompt=True))

    def __init__(self, num_blocks=64):
        plans = {"r": plan_of(self.LENGTHS, visual=False)}
        super().__init__(StagedManager, staged(1), num_blocks, plans=plans)
        self.private_rows = PrivateRows([self.manager], plans, lambda: 0)
        self.manager.private_rows = self.private_rows
        self.computed = {"r": 0}
        self.manager.num_computed = self.computed.__getitem__
        self.request = request("r", 60)

    def step(self, num_tokens):
        """Schedule a step of `r` as vLLM does."""
        self.private_rows.begin_step()
        if self.computed["r"]:
            self.private_rows.settle("r", self.computed["r"])
        needed = self.needed("r", num_tokens)
        assert needed <= self.pool.get_num_free_blocks()
        if self.computed["r"] == 0:
            self.manager.add_local_computed_blocks("r", (), 0, 0)
        free = self.pool.get_num_free_blocks()
        self.manager.allocate_new_blocks("r", num_tokens, num_tokens)
        self.cache(self.request, num_tokens)
        self.computed["r"] = num_tokens
        return free - self.pool.get_num_free_blocks() - needed


def test_a_row_that_is_cut_leaves_its_hashed_blocks_to_others():
    side = Evicting()
    # the last step adds a block that will be full and hashed, and one that will not
    assert side.step(36) == 0
    moved = side.step(41)
    raw = side.held("r")
    assert len(raw) == 11
    # 6 sink + 3 * 2 kept + 11 that nothing follows for long enough: 23 slots, six blocks, of
    # which the first is all sink
    (target,) = side.private_rows.of_step()["r"]
    assert len(target) == 6
    assert moved == 5
    assert target[0] == raw[0]
    assert not set(target[1:]) & set(raw)
    hashed = side.num_cached
    assert hashed == 41 // BLOCK
    # the output of the step may still be hashed before the next one is scheduled
    side.cache(side.request, 41)
    side.step(42)
    assert side.held("r") == target
    assert side.private_rows.take_checksum("r") == row_checksum([target])
    assert side.private_rows.take_checksum("r") is None
    # all but the sink's block is free again, and can still be found
    assert side.pool.get_num_free_blocks() == side.empty - 6
    assert side.num_cached == hashed
    side.cache(side.request, 42)
    side.step(48)
    side.cache(side.request, 48)
    assert side.num_cached == hashed, "nothing is hashed of what saw an evicted context"
    side.manager.free("r")
    assert side.pool.get_num_free_blocks() == side.empty


def test_without_room_a_row_is_cut_in_place_and_found_by_nobody():
    # the prompt, the null block, and two blocks to spare
    side = Evicting(num_blocks=11 + 1 + 2)
    side.step(36)
    other = side.manager.req_to_blocks["r"][3]
    side.pool.touch([other])
    # one block more than without sharing: the one that someone else reads
    assert side.needed("r", 41) == 2 + 1
    side.step(41)
    raw = side.held("r")
    (target,) = side.private_rows.of_step()["r"]
    assert [j for j in range(6) if target[j] != raw[j]] == [3]
    # of the row only the sink's block and the one that is left can be found
    known = [side.pool.blocks[b].block_hash is not None for b in raw[:6]]
    assert known == [True, False, False, True, False, False]
    side.step(42)
    side.cache(side.request, 42)
    assert side.held("r") == target
    assert other.ref_cnt == 1


def test_a_request_that_goes_while_its_row_moves_gives_both_rows_back():
    side = Evicting()
    side.step(36)
    side.step(41)
    assert side.private_rows.of_step()
    side.manager.free("r")
    assert side.pool.get_num_free_blocks() == side.empty
    assert not side.private_rows.of_step()
    # it comes again, and is hashed again
    side.computed["r"] = 0
    before = side.num_cached
    side.step(36)
    assert side.num_cached >= before


operations = st.lists(
    st.tuples(
        st.sampled_from(["grow", "grow", "grow", "cache", "free"]),
        st.integers(0, 3),
        st.integers(1, 9),
    ),
    max_size=30,
)


@PROPERTY
@given(operations, st.booleans())
def test_requests_without_a_plan_are_served_as_by_full_attention(operations, caching):
    plans = {"someone else": BY_NAME}
    ours = Side(StagedManager, staged(1), num_blocks=24, caching=caching, plans=plans)
    theirs = Side(FullAttentionManager, PLAIN, num_blocks=24, caching=caching)
    requests = {i: request(str(i), 400) for i in range(4)}
    tokens = dict.fromkeys(requests, 0)
    for operation, i, amount in operations:
        if operation == "grow":
            new = ours.grow(str(i), tokens[i] + amount)
            assert new == theirs.grow(str(i), tokens[i] + amount)
            if new is not None:
                tokens[i] += amount
        elif operation == "free":
            for side in (ours, theirs):
                side.manager.free(str(i))
            tokens[i] = 0
        elif caching:
            for side in (ours, theirs):
                side.cache(requests[i], tokens[i])
        for r in tokens:
            assert ours.held(str(r)) == theirs.held(str(r))
        assert ours.num_cached == theirs.num_cached
        assert ours.pool.get_num_free_blocks() == theirs.pool.get_num_free_blocks()


@PROPERTY
@given(operations, st.lists(st.integers(0, 12), min_size=2, max_size=2, unique=True).map(sorted))
def test_every_block_comes_back_whatever_the_mix(operations, dropped):
    pruned = plan(16, (), tuple(range(*dropped)))
    side = Side(StagedManager, staged(1), num_blocks=24, plans={"0": pruned, "1": pruned})
    tokens = dict.fromkeys("0123", 0)
    for operation, i, amount in operations:
        name = str(i)
        if operation == "grow" and side.grow(name, tokens[name] + amount) is not None:
            tokens[name] += amount
        elif operation == "free":
            side.manager.free(name)
            tokens[name] = 0
        elif operation == "cache":
            side.cache(request(name, 400), tokens[name])
        for other, n in tokens.items():
            physical = pruned.lengths.physical(n, 1) if other in "01" else n
            assert len(side.held(other)) == math.ceil(physical / BLOCK)
    for name in tokens:
        side.manager.free(name)
    assert side.pool.get_num_free_blocks() == side.empty
