"""Physical lengths: properties over random plans and chunkings, and the named edge cases."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plans import is_counted, lengths_of, plan_of
from tokenprune.engine.step import PrunedRequest, known_rows, stage_rows
from tokenprune.lengths import DroppedOfImages, Eviction, Packing, PhysicalLengths, PromptLayout

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True)
NUM_STAGES = 3


@st.composite
def layouts(draw):
    segments = draw(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 6)), max_size=3))
    spans, end = [], 0
    for text, visual in segments:
        spans.append((end + text, end + text + visual))
        end += text + visual
    tail = draw(st.integers(0 if spans else 1, 5))
    return PromptLayout(end + tail, tuple(spans))


@st.composite
def known_plans(draw):
    """A layout, and lengths that name the dropped positions; later stages drop more."""
    layout = draw(layouts())
    visual = layout.visual_positions()
    # per visual token the first stage without it; NUM_STAGES keeps it everywhere
    gone = draw(st.lists(st.integers(0, NUM_STAGES), min_size=len(visual), max_size=len(visual)))
    dropped = tuple(
        tuple(p for p, stage in zip(visual, gone, strict=True) if stage <= s)
        for s in range(NUM_STAGES)
    )
    return layout, lengths_of(layout.num_tokens, dropped)


@st.composite
def counted_plans(draw):
    """A layout, and lengths that name how many are dropped; later stages drop more."""
    layout = draw(layouts())
    counts = st.integers(0, layout.num_visual)
    dropped = sorted(draw(st.lists(counts, min_size=NUM_STAGES, max_size=NUM_STAGES)))
    first = layout.visual_spans[0][0] if layout.visual_spans else 0
    return layout, lengths_of(layout.num_tokens, dropped, first=draw(st.sampled_from([0, first])))


def chunkings(total):
    """Ascending numbers of computed tokens, from 0 to `total`."""
    inner = st.sets(st.integers(1, total - 1)) if total > 1 else st.just(set())
    return inner.map(lambda cuts: [0, *sorted(cuts), total])


@st.composite
def known_plans_and_chunkings(draw):
    layout, lengths = draw(known_plans())
    return lengths, draw(chunkings(layout.num_tokens + draw(st.integers(0, 5))))


@PROPERTY
@given(known_plans_and_chunkings())
def test_increments_of_any_chunking_add_up_to_the_positions_not_dropped(case):
    lengths, computed = case
    for stage, dropped in enumerate(lengths.dropped):
        grown, kept = 0, 0
        for before, after in itertools.pairwise(computed):
            grown += lengths.physical(after, stage) - lengths.physical(before, stage)
            kept += sum(p not in dropped.positions for p in range(before, after))
            assert grown == kept == lengths.physical(after, stage)


@PROPERTY
@given(known_plans())
def test_a_known_plan_grows_by_one_for_a_kept_token_and_by_none_for_a_dropped_one(case):
    layout, lengths = case
    for stage, dropped in enumerate(lengths.dropped):
        for n in range(layout.num_tokens + 4):
            step = lengths.physical(n + 1, stage) - lengths.physical(n, stage)
            assert step == (0 if n in dropped.positions else 1)


@PROPERTY
@given(st.one_of(known_plans(), counted_plans()), st.integers(0, 9))
def test_no_stage_holds_more_than_the_stage_before_nor_less_than_the_text(case, generated):
    layout, lengths = case
    text = layout.num_tokens - layout.num_visual
    for n in (*range(layout.num_tokens + 1), layout.num_tokens + generated):
        held = lengths.all_stages(n)
        assert n >= held[0]
        assert list(held) == sorted(held, reverse=True)
        assert held[-1] >= 0
    assert held[-1] >= text + generated


@PROPERTY
@given(counted_plans())
def test_a_stage_of_a_counted_plan_waits_for_the_prompt_if_it_drops_any(case):
    layout, lengths = case
    end = layout.num_tokens
    waiting = [stage for stage, dropped in enumerate(lengths.dropped) if dropped.count]
    assert lengths.first_waiting == (waiting[0] if waiting else None)
    for stage, dropped in enumerate(lengths.dropped):
        waits = stage in waiting
        expected = [min(n, dropped.first) if waits else n for n in range(end)]
        assert [lengths.physical(n, stage) for n in range(end)] == expected
        after = [lengths.physical(n, stage) for n in range(end, end + 5)]
        assert after == list(range(end - dropped.count, end - dropped.count + 5))


@PROPERTY
@given(known_plans())
def test_known_and_counted_plans_agree_once_the_prompt_is_complete(case):
    layout, known = case
    counted = lengths_of(layout.num_tokens, [len(d.positions) for d in known.dropped])
    for n in range(layout.num_tokens, layout.num_tokens + 4):
        assert counted.all_stages(n) == known.all_stages(n)


@PROPERTY
@given(layouts(), st.data())
def test_images_drop_what_they_do_not_keep_and_no_more_than_their_end(layout, data):
    images = tuple(
        (start, end, data.draw(st.integers(0, end - start))) for start, end in layout.visual_spans
    )
    lengths = PhysicalLengths(layout.num_tokens, (DroppedOfImages(images),))
    for n in range(layout.num_tokens + 4):
        if any(start < n < end for start, end, _ in images):
            continue
        gone = sum(end - start - kept for start, end, kept in images if end <= n)
        assert lengths.physical(n, 0) == n - gone


def test_an_unpruned_request_holds_every_token_at_every_stage():
    lengths = PhysicalLengths.unpruned(7, NUM_STAGES)
    assert not lengths.frees_blocks
    assert [lengths.all_stages(n) for n in range(9)] == [(n,) * NUM_STAGES for n in range(9)]


@pytest.mark.parametrize(
    ("dropped", "expected"),
    [
        pytest.param((), [0, 1, 2, 3, 4, 5, 6], id="nothing-dropped"),
        pytest.param((0,), [0, 0, 1, 2, 3, 4, 5], id="first-position"),
        pytest.param((4,), [0, 1, 2, 3, 4, 4, 5], id="last-prompt-position"),
        pytest.param((1, 2), [0, 1, 1, 1, 2, 3, 4], id="run"),
        pytest.param(0, [0, 1, 2, 3, 4, 5, 6], id="count-of-zero"),
        pytest.param(2, [0, 0, 0, 0, 0, 3, 4], id="count-of-two"),
    ],
)
def test_physical_length_of_a_prompt_of_five(dropped, expected):
    lengths = lengths_of(5, (dropped,))
    assert [lengths.physical(n, 0) for n in range(7)] == expected


def packing(num_prompt=100, block=4, tokens=6, recent=8, generated=True, eviction=None):
    return lengths_of(num_prompt, (0,), eviction, Packing(block, tokens, recent, generated))


@pytest.mark.parametrize(
    ("lengths", "n", "blocks"),
    [
        pytest.param(packing(), 99, 0, id="nothing-before-the-prompt-is-complete"),
        pytest.param(packing(), 100, 15, id="whole-blocks-of-all-but-the-recent"),
        pytest.param(packing(), 103, 15, id="one-token-short-of-a-block"),
        pytest.param(packing(), 104, 16, id="a-block-of-generated-tokens"),
        pytest.param(packing(generated=False), 1000, 15, id="generated-tokens-stay"),
        pytest.param(packing(num_prompt=13), 13, 0, id="shorter-than-block-and-recent"),
        pytest.param(packing(num_prompt=14), 14, 1, id="exactly-block-and-recent"),
        pytest.param(
            packing(eviction=Eviction(4, 10, (5,), True)), 100, (4 + 8 * 5) // 6, id="what-is-cut"
        ),
        pytest.param(
            packing(recent=11, eviction=Eviction(4, 10, (5,), True)),
            100,
            (4 + 7 * 5) // 6,
            id="recent-reaches-into-a-cut-partition",
        ),
        pytest.param(
            packing(30, eviction=Eviction(4, 20, (5,), True)), 30, 0, id="all-may-still-be-evicted"
        ),
    ],
)
def test_how_many_blocks_are_packed(lengths, n, blocks):
    assert lengths.packed_blocks(n, 0) == blocks
    held = lengths.tokens_held(n, 0)
    assert lengths.physical(n, 0) == held - 2 * blocks


@st.composite
def packed_plans(draw):
    num_prompt, block = draw(st.integers(1, 60)), draw(st.integers(1, 5))
    tokens = block + draw(st.integers(1, 4))
    eviction = None
    if draw(st.booleans()):
        lag = draw(st.integers(1, 9))
        keep = draw(st.integers(1, lag))
        eviction = Eviction(draw(st.integers(0, 4)), lag, (keep,), draw(st.booleans()))
    recent, generated = draw(st.integers(0, 14)), draw(st.booleans())
    dropped = draw(st.integers(0, num_prompt - 1))
    return lengths_of(num_prompt, (dropped,), eviction, Packing(block, tokens, recent, generated))


@PROPERTY
@given(packed_plans())
def test_packed_blocks_only_grow_and_leave_the_recent_tokens_alone(lengths):
    packed = 0
    for n in range(lengths.num_prompt_tokens, lengths.num_prompt_tokens + 60):
        assert lengths.packed_blocks(n, 0) >= packed
        packed = lengths.packed_blocks(n, 0)
        dense = lengths.tokens_held(n, 0) - packed * lengths.packing.tokens
        assert dense >= (lengths.packing.recent if packed else 0)
        assert lengths.physical(n, 0) == packed * lengths.packing.block + dense


@PROPERTY
@given(packed_plans())
def test_no_packed_token_is_ever_evicted(lengths):
    if lengths.eviction is None:
        return
    eviction = lengths.eviction
    for n in range(lengths.num_prompt_tokens, lengths.num_prompt_tokens + 60):
        untouched = eviction.sink + lengths.partitions_cut(n, 0) * eviction.keep[0]
        assert lengths.packed_blocks(n, 0) * lengths.packing.tokens <= max(0, untouched)


@PROPERTY
@given(packed_plans(), st.integers(1, 9), st.data())
def test_no_step_needs_more_slots_than_admission_counts(lengths, max_step, data):
    computed = highest = 0
    end = lengths.num_prompt_tokens + data.draw(st.integers(1, 60))
    while computed < end:
        after = min(end, computed + data.draw(st.integers(1, max_step)))
        highest = max(highest, lengths.peak(computed, after, 0))
        computed = after
    assert highest <= lengths.peak_bound(end, max_step, 0)


@PROPERTY
@given(layouts())
def test_a_layout_counts_what_its_spans_hold(layout):
    visual = layout.visual_positions()
    mask = [any(s <= p < e for s, e in layout.visual_spans) for p in range(layout.num_tokens)]
    assert visual == [p for p, is_visual in enumerate(mask) if is_visual]
    assert layout.num_visual == len(visual)
    assert layout.num_text_after == (layout.num_tokens - 1 - visual[-1] if visual else 0)


# eviction


@st.composite
def evictions(draw):
    prompt = draw(st.integers(1, 60))
    lag = draw(st.integers(1, 9))
    keep = (draw(st.integers(1, lag)), draw(st.integers(1, lag)))
    eviction = Eviction(draw(st.integers(0, 6)), lag, keep, draw(st.booleans()))
    dropped = tuple(sorted(draw(st.sets(st.integers(0, prompt - 1), max_size=prompt - 1))))
    # a count, where tokens from `first` on wait for the prompt, or the positions themselves
    first = draw(st.integers(0, prompt - len(dropped)))
    kind = draw(st.sampled_from([((), dropped), (0, len(dropped))]))
    return lengths_of(prompt, kind, eviction, first=first)


def entered_in(lengths, stage, before, after):
    """Tokens that enter a stage in a step, counted one by one."""
    dropped, prompt = lengths.dropped[stage], lengths.num_prompt_tokens
    if not is_counted(lengths):
        return sum(p not in dropped.positions for p in range(before, after))
    if dropped.count == 0 or before >= prompt:
        return after - before
    ahead = min(before, dropped.first)
    return (after - dropped.count if after >= prompt else min(after, dropped.first)) - ahead


def recursion(lengths, stage, steps):
    """Play the published recursion over `steps`; yield tokens computed, slots and their peak."""
    eviction = lengths.eviction
    cache, done, computed = 0, eviction.sink, 0
    for step in steps:
        entered = entered_in(lengths, stage, computed, computed + step)
        computed += step
        cache += entered
        peak = cache
        waits = is_counted(lengths) and lengths.dropped[stage].count > 0
        if computed >= lengths.num_prompt_tokens or not (waits or eviction.after_prompt):
            partitions = (cache - done) // eviction.lag
            if partitions >= 2:
                cache -= (partitions - 1) * (eviction.lag - eviction.keep[stage])
                done += (partitions - 1) * eviction.keep[stage]
        yield computed, cache, peak


@PROPERTY
@given(evictions(), st.lists(st.integers(1, 17), max_size=12))
def test_counts_are_those_of_the_published_recursion_under_any_chunking(lengths, steps):
    for stage in range(2):
        before = 0
        for computed, held, peak in recursion(lengths, stage, steps):
            assert lengths.physical(computed, stage) == held
            assert lengths.peak(before, computed, stage) == peak
            before = computed


@PROPERTY
@given(evictions(), st.lists(st.integers(1, 17), min_size=1, max_size=12))
def test_no_step_needs_more_than_the_bound_of_all_of_them(lengths, steps):
    total = sum(steps)
    for stage in range(2):
        bound = lengths.peak_bound(total, 17, stage)
        assert bound <= lengths.written(total, stage)
        assert max(peak for _, _, peak in recursion(lengths, stage, steps)) <= bound


@PROPERTY
@given(evictions(), st.integers(0, 200))
def test_what_is_held_is_never_less_than_sink_and_newest_nor_more_than_entered(lengths, n):
    eviction = lengths.eviction
    for stage in range(2):
        entered, held = lengths.written(n, stage), lengths.physical(n, stage)
        assert min(entered, eviction.sink + eviction.lag) <= held <= entered
        if held < entered:
            assert entered >= eviction.first_cut_at


def test_evicting_in_chunks_bounds_the_peak_of_a_long_prompt():
    eviction = Eviction(4, 16, (4,), after_prompt=False)
    lengths = lengths_of(1000, ((),), eviction)
    assert lengths.peak_bound(1000, 64, 0) < 400
    whole = lengths_of(1000, ((),), Eviction(4, 16, (4,), after_prompt=True))
    assert whole.peak_bound(1000, 64, 0) == 1000


# the two sides of one engine: blocks by the scheduler's rule, rows by the worker's code


class Served:
    """One request as both sides see it, and what its cache holds."""

    def __init__(self, name, layout, lengths, generated):
        self.layout, self.lengths = layout, lengths
        self.total = layout.num_tokens + generated
        self.is_known = lengths is not None and not is_counted(lengths)
        self.pruned = lengths and PrunedRequest(name, layout, plan_of(lengths))
        self.reset()

    def reset(self):
        self.computed = 0
        self.blocks = [0] * NUM_STAGES
        self.written = [[] for _ in range(NUM_STAGES)]

    def physical(self, n):
        return self.lengths.all_stages(n) if self.lengths else (n,) * NUM_STAGES


@st.composite
def requests(draw):
    kind = draw(st.sampled_from(["known", "counted", "unpruned"]))
    if kind == "unpruned":
        return draw(layouts()), None, draw(st.integers(0, 4))
    return *draw(known_plans() if kind == "known" else counted_plans()), draw(st.integers(0, 4))


@PROPERTY
@given(
    st.lists(requests(), min_size=1, max_size=3),
    st.sampled_from([1, 2, 4, 16]),
    st.data(),
)
def test_the_worker_fills_exactly_the_slots_the_scheduler_counts(drawn, block_size, data):
    served = [Served(str(i), *case) for i, case in enumerate(drawn)]
    preemptions = 0
    while any(s.computed < s.total for s in served):
        batch = [s for s in served if s.computed < s.total]
        if len(batch) > 1:
            batch = [s for s in batch if data.draw(st.booleans())] or batch[:1]
        scheduled = [data.draw(st.integers(1, s.total - s.computed)) for s in batch]
        for s, n in zip(batch, scheduled, strict=True):
            required = [math.ceil(p / block_size) for p in s.physical(s.computed + n)]
            s.blocks = [max(pair) for pair in zip(s.blocks, required, strict=True)]
        step(batch, scheduled, block_size)
        if preemptions < 1 and data.draw(st.booleans()):
            preemptions += 1
            batch[0].reset()
    for s in served:
        assert [len(w) for w in s.written] == list(s.physical(s.total))


def step(batch, scheduled, block_size):
    computed = np.array([s.computed for s in batch], dtype=np.int32)
    counts = np.array(scheduled, dtype=np.int32)
    stages = stage_rows([s.pruned or None for s in batch], computed, counts, NUM_STAGES)
    for stage, rows in enumerate(stages):
        indices, idle = rows.cache_indices(), set(rows.idle.tolist())
        for i, s in enumerate(batch):
            mine = range(int(rows.starts[i]), int(rows.starts[i + 1]))
            s.written[stage] += [int(indices[r]) for r in mine if r not in idle]
            # each slot once, in order, without a gap, and inside the request's blocks
            assert s.written[stage] == list(range(s.physical(s.computed + scheduled[i])[stage]))
            assert len(s.written[stage]) <= s.blocks[stage] * block_size
            assert s.blocks[stage] == math.ceil(len(s.written[stage]) / block_size)
            assert rows.seq_lens[i] == max(1, len(s.written[stage]))
    for s, n in zip(batch, scheduled, strict=True):
        if s.is_known:
            assert_text_stays(s, n)
        s.computed += n


def assert_text_stays(s, scheduled):
    visual = set(s.layout.visual_positions())
    chunk = range(s.computed, s.computed + scheduled)
    for rows in known_rows(s.pruned.plan.visual, s.computed, scheduled):
        kept = {s.computed + int(r) for r in rows}
        assert {p for p in chunk if p not in visual} <= kept
