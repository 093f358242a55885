"""Rows of a step per stage: worked cases, then properties over random plans and chunks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plans import is_counted, lengths_of, plan_of
from tokenprune.engine.step import (
    PrunedRequest,
    eviction_due,
    known_rows,
    packing_due,
    stage_rows,
    window_rows,
)
from tokenprune.lengths import Eviction, Packing, PromptLayout
from tokenprune.policies.channels.think import Think

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True)


def pruned(num_tokens, *dropped):
    """A request whose plan drops `dropped` (positions or a count) at each stage."""
    plan = plan_of(lengths_of(num_tokens, dropped))
    return PrunedRequest("r", PromptLayout(num_tokens), plan)


def rows_of(requests, computed, scheduled):
    num_stages = next(r.lengths.num_stages for r in requests if r is not None)
    as_array = [np.array(x, dtype=np.int32) for x in (computed, scheduled)]
    return stage_rows(requests, *as_array, num_stages)


# prompt of eight: text 0, image 1-5, text 6-7; the second stage keeps 3, the third none
KNOWN = pruned(8, (), (1, 2, 4, 5), (1, 2, 3, 4, 5))
COUNTED = pruned(8, 0, 4, 5)


@pytest.mark.parametrize(
    ("request_", "computed", "scheduled", "counts", "base", "seq_lens", "idle"),
    [
        pytest.param(KNOWN, 0, 8, [8, 4, 3], [0, 0, 0], [8, 4, 3], [0, 0, 0], id="whole-prompt"),
        pytest.param(COUNTED, 0, 8, [8, 4, 3], [0, 0, 0], [8, 4, 3], [0, 0, 0], id="counted"),
        pytest.param(KNOWN, 0, 2, [2, 1, 1], [0, 0, 0], [2, 1, 1], [0, 0, 0], id="first-chunk"),
        pytest.param(KNOWN, 2, 2, [2, 1, 1], [2, 1, 1], [4, 2, 1], [0, 0, 1], id="one-stage-idle"),
        pytest.param(KNOWN, 4, 2, [2, 1, 1], [4, 2, 1], [6, 2, 1], [0, 1, 1], id="two-stages-idle"),
        pytest.param(KNOWN, 6, 2, [2, 2, 2], [6, 2, 1], [8, 4, 3], [0, 0, 0], id="last-chunk"),
        pytest.param(KNOWN, 8, 1, [1, 1, 1], [8, 4, 3], [9, 5, 4], [0, 0, 0], id="decode"),
        pytest.param(COUNTED, 8, 1, [1, 1, 1], [8, 4, 3], [9, 5, 4], [0, 0, 0], id="count-decode"),
        pytest.param(KNOWN, 6, 5, [5, 5, 5], [6, 2, 1], [11, 7, 6], [0, 0, 0], id="past-prompt"),
        pytest.param(COUNTED, 0, 9, [9, 5, 4], [0, 0, 0], [9, 5, 4], [0, 0, 0], id="resumed"),
        pytest.param(None, 3, 2, [2, 2, 2], [3, 3, 3], [5, 5, 5], [0, 0, 0], id="unpruned"),
    ],
)
def test_rows_of_one_request(request_, computed, scheduled, counts, base, seq_lens, idle):
    stages = stage_rows([request_], np.array([computed]), np.array([scheduled]), 3)
    assert [int(s.counts[0]) for s in stages] == counts
    assert [int(s.base[0]) for s in stages] == base
    assert [int(s.seq_lens[0]) for s in stages] == seq_lens
    assert [len(s.idle) for s in stages] == idle
    assert [s.num_rows for s in stages] == counts


def test_an_image_first_in_the_prompt_leaves_an_idle_row_without_any_cache():
    (rows,) = rows_of([pruned(4, (0, 1))], [0], [2])
    assert rows.counts.tolist() == [1]
    assert rows.idle.tolist() == [0]
    assert rows.seq_lens.tolist() == [1]


def test_requests_of_a_batch_lie_one_behind_the_other():
    # the second request has nothing to compute in the last stage
    stages = rows_of([None, KNOWN, COUNTED], [5, 4, 8], [3, 2, 1])
    assert [s.starts.tolist() for s in stages] == [[0, 3, 5, 6], [0, 3, 4, 5], [0, 3, 4, 5]]
    assert [s.idle.tolist() for s in stages] == [[], [3], [3]]
    indices = [s.cache_indices().tolist() for s in stages]
    assert indices[0] == [5, 6, 7, 4, 5, 8]
    assert indices[1][:3] + indices[1][4:] == [5, 6, 7, 4]
    assert indices[2][:3] + indices[2][4:] == [5, 6, 7, 3]


def test_dtypes_are_those_of_vllm_buffers():
    (rows, *_) = rows_of([KNOWN, None], [0, 3], [8, 1])
    for array in (rows.counts, rows.starts, rows.base, rows.seq_lens):
        assert array.dtype == np.int32
    assert rows.cache_indices().dtype == np.int64


def test_decode_lies_behind_by_what_the_prompt_dropped():
    assert KNOWN.index_offset(8) == (0, 4, 5)
    assert COUNTED.index_offset(8) == (0, 4, 5)


@pytest.mark.parametrize(
    ("computed", "scheduled", "expected"),
    [
        pytest.param(0, 8, [range(8), [0, 3, 6, 7], [0, 6, 7]], id="whole-prompt"),
        pytest.param(2, 2, [[0, 1], [1], [1]], id="last-stage-idle"),
        pytest.param(4, 2, [[0, 1], [1], [1]], id="idle-takes-the-last-row"),
        pytest.param(3, 3, [[0, 1, 2], [0], [0]], id="idle-stands-on-a-row-of-the-stage-before"),
        pytest.param(7, 3, [[0, 1, 2], [0, 1, 2], [0, 1, 2]], id="past-the-prompt"),
    ],
)
def test_known_rows_of_a_chunk(computed, scheduled, expected):
    rows = known_rows(KNOWN.plan.visual, computed, scheduled)
    assert [r.tolist() for r in rows] == [list(e) for e in expected]


@st.composite
def batches(draw):
    """Random requests of three stages, each with a random chunk."""
    requests, computed, scheduled = [], [], []
    for _ in range(draw(st.integers(1, 4))):
        num_tokens = draw(st.integers(1, 12))
        # per position the first stage without it; 3 stays everywhere
        gone = draw(st.lists(st.integers(0, 3), min_size=num_tokens, max_size=num_tokens))
        dropped = [tuple(p for p, g in enumerate(gone) if g <= s) for s in range(3)]
        kind = draw(st.sampled_from(["known", "counted", "unpruned"]))
        before = draw(st.integers(0, num_tokens + 2))
        least = 1
        if kind == "counted":
            dropped = [len(d) for d in dropped]
            before = draw(st.sampled_from([0, num_tokens, num_tokens + 2]))
            least = max(1, num_tokens - before)
        requests.append(pruned(num_tokens, *dropped) if kind != "unpruned" else None)
        computed.append(before)
        scheduled.append(draw(st.integers(least, least + 8)))
    return requests, computed, scheduled


@PROPERTY
@given(batches())
def test_rows_follow_the_physical_lengths(batch):
    requests, computed, scheduled = batch
    stages = stage_rows(requests, np.array(computed), np.array(scheduled), 3)
    for stage, rows in enumerate(stages):
        assert rows.starts.tolist() == [0, *np.cumsum(rows.counts).tolist()]
        assert rows.counts.min() >= 1
        indices, idle = rows.cache_indices(), rows.idle.tolist()
        for i, request in enumerate(requests):
            before, after = computed[i], computed[i] + scheduled[i]
            if request is not None:
                before, after = (request.lengths.physical(n, stage) for n in (before, after))
            mine = range(rows.starts[i], rows.starts[i + 1])
            assert [int(indices[r]) for r in mine if r not in idle] == list(range(before, after))
            assert sum(r in idle for r in mine) == (1 if before == after else 0)
            assert rows.seq_lens[i] == max(after, 1)


@PROPERTY
@given(batches())
def test_requests_do_not_influence_each_other(batch):
    requests, computed, scheduled = batch
    together = stage_rows(requests, np.array(computed), np.array(scheduled), 3)
    for i, request in enumerate(requests):
        alone = stage_rows([request], np.array([computed[i]]), np.array([scheduled[i]]), 3)
        for a, b in zip(alone, together, strict=True):
            assert (a.counts[0], a.base[0], a.seq_lens[0]) == (
                b.counts[i],
                b.base[i],
                b.seq_lens[i],
            )


@PROPERTY
@given(batches())
def test_known_rows_are_the_counted_rows_and_each_stage_is_part_of_the_one_before(batch):
    requests, computed, scheduled = batch
    stages = stage_rows(requests, np.array(computed), np.array(scheduled), 3)
    for i, request in enumerate(requests):
        if request is None or is_counted(request.lengths):
            continue
        before = set(range(scheduled[i]))
        for stage, rows in enumerate(known_rows(request.plan.visual, computed[i], scheduled[i])):
            offsets = rows.tolist()
            assert len(offsets) == stages[stage].counts[i]
            assert offsets == sorted(set(offsets))
            assert set(offsets) <= before
            before = set(offsets)
            dropped = request.lengths.dropped[stage].positions
            kept = [r for r in range(scheduled[i]) if computed[i] + r not in dropped]
            assert offsets == (kept or offsets[:1])


@st.composite
def evicting(draw):
    """A request that evicts at two stages, the second of which may drop positions, and chunks."""
    num_tokens = draw(st.integers(1, 40))
    dropped = tuple(sorted(draw(st.sets(st.integers(0, num_tokens - 1), max_size=num_tokens))))
    lag = draw(st.integers(1, 6))
    keep = (draw(st.integers(1, lag)), draw(st.integers(1, lag)))
    eviction = Eviction(draw(st.integers(0, 3)), lag, keep, draw(st.booleans()))
    plan = plan_of(lengths_of(num_tokens, ((), dropped), eviction), visual=bool(dropped))
    chunks = draw(st.lists(st.integers(1, 15), min_size=1, max_size=8))
    return PrunedRequest("r", PromptLayout(num_tokens), plan), chunks


@PROPERTY
@given(evicting())
def test_a_step_appends_behind_what_is_held_and_then_gives_up_what_is_due(case):
    request, chunks = case
    computed = 0
    for chunk in chunks:
        lengths = request.lengths
        held, peak = lengths.all_stages(computed), lengths.all_peaks(computed, computed + chunk)
        stages = stage_rows([request], np.array([computed]), np.array([chunk]), 2)
        for stage, rows in enumerate(stages):
            written = rows.cache_indices()[: 0 if len(rows.idle) else None].tolist()
            assert written == list(range(held[stage], peak[stage]))
            assert rows.seq_lens[0] == max(1, peak[stage])
            work = eviction_due(lengths, computed, computed + chunk, stage)
            left = lengths.physical(computed + chunk, stage)
            assert peak[stage] - (work.evicted if work else 0) == left
            if work:
                # what is cut down lies behind the sink and before the newest tokens
                assert work.begin >= lengths.eviction.sink
                assert work.begin + (work.count + 1) * work.lag <= work.end == peak[stage]
        if not request.drops_rows(computed):
            # all stages have the same rows, and only the cache index lies behind
            offsets = request.index_offset(computed)
            assert [computed - o for o in offsets] == list(held)
        computed += chunk


@st.composite
def packing(draw):
    """A request that packs, may evict, and may drop positions at its second stage; and chunks."""
    num_tokens = draw(st.integers(1, 40))
    dropped = tuple(sorted(draw(st.sets(st.integers(0, num_tokens - 1), max_size=num_tokens))))
    block = draw(st.integers(1, 4))
    eviction = None
    if draw(st.booleans()):
        lag = draw(st.integers(1, 6))
        keep = (draw(st.integers(1, lag)), draw(st.integers(1, lag)))
        eviction = Eviction(draw(st.integers(0, 3)), lag, keep, draw(st.booleans()))
    pack = Packing(
        block, block + draw(st.integers(1, 4)), draw(st.integers(0, 9)), draw(st.booleans())
    )
    lengths = lengths_of(num_tokens, ((), dropped), eviction, pack)
    think = Think(window=draw(st.integers(1, 9)), keep_ratio=0.5)
    plan = plan_of(lengths, visual=bool(dropped), channels=think)
    chunks = draw(st.lists(st.integers(1, 15), min_size=1, max_size=8))
    return PrunedRequest("r", PromptLayout(num_tokens), plan), chunks


def evicted(rows, work, saved):
    """Return the tokens left of `rows`, of each partition due the first `keep`."""
    begin = work.begin + saved
    kept = rows[:begin]
    for p in range(work.count):
        kept += rows[begin + p * work.lag :][: work.keep]
    return kept + rows[begin + work.count * work.lag :]


@PROPERTY
@given(packing())
def test_a_row_of_tokens_goes_through_steps_as_counted(case):
    request, chunks = case
    lengths = request.lengths
    rows = [[], []]  # positions held, oldest first
    packed = [0, 0]
    computed = 0
    for chunk in chunks:
        after = computed + chunk
        stages = stage_rows([request], np.array([computed]), np.array([chunk]), 2)
        for stage, counted in enumerate(stages):
            saved = packed[stage] * (lengths.packing.tokens - lengths.packing.block)
            gone = set(lengths.dropped[stage].positions)
            entering = [p for p in range(computed, after) if p not in gone]
            written = counted.cache_indices()[: 0 if len(counted.idle) else None].tolist()
            assert written == [len(rows[stage]) - saved + j for j in range(len(entering))]
            rows[stage] += entering
            if packed[stage]:
                assert counted.seq_lens[0] == counted.counts[0]
            if lengths.eviction and (work := eviction_due(lengths, computed, after, stage)):
                oldest = packed[stage] * lengths.packing.tokens
                # partitions are counted among tokens, and cache indices lie behind those
                eviction = lengths.eviction
                assert work.begin + saved == eviction.sink + work.first * eviction.keep[stage]
                assert work.begin + saved >= oldest, "a packed token is never evicted"
                rows[stage] = evicted(rows[stage], work, saved)
            if work := packing_due(lengths, computed, after, stage):
                assert work.first == packed[stage]
                assert work.end == len(rows[stage]) - saved
                packed[stage] += work.count
            assert packed[stage] == lengths.packed_blocks(after, stage)
            saved = packed[stage] * (lengths.packing.tokens - lengths.packing.block)
            assert len(rows[stage]) - saved == lengths.physical(after, stage)
        computed = after


@PROPERTY
@given(packing())
def test_the_windows_of_a_prompts_chunks_are_its_last_rows(case):
    request, chunks = case
    prompt = request.layout.num_tokens
    computed, seen = 0, [[], []]
    for chunk in (*chunks, prompt):
        for stage in range(2):
            gone = set(request.lengths.dropped[stage].positions)
            entering = [p for p in range(computed, computed + chunk) if p not in gone]
            rows = window_rows(request, computed, computed + chunk, stage)
            seen[stage] += [entering[r] for r in rows]
        computed += chunk
    window = request.plan.query_window
    for stage in range(2):
        gone = set(request.lengths.dropped[stage].positions)
        assert seen[stage] == [p for p in range(prompt) if p not in gone][-window:]


def test_what_frees_blocks_is_named_after_all_of_its_methods():
    eviction, packing = Eviction(0, 1, (1,), True), Packing(1, 2, 0, True)

    def name(*parts):
        plan = plan_of(lengths_of(9, ((),), *parts), visual=False)
        return PrunedRequest("r", PromptLayout(9), plan).freeing_method

    assert name(eviction, packing) == "lagkv+think"
    assert name(eviction) == "lagkv"
    assert name(None, packing) == "think"
