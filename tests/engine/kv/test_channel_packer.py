"""Packing in a cache by hand: what attention finds there, step after step, in both layouts."""

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM")

from tests.engine.kv.caches import (
    attention_layer,
    cpu_isa,
    layers_of,
    moved_rows_of,
    named,
    step_of,
)
from tokenprune.engine.kv.channel_packer import ChannelPacker
from tokenprune.engine.kv.evictor import Evictor
from tokenprune.engine.kv.query_observer import QueryObserver
from tokenprune.engine.stats import WorkerStats
from tokenprune.engine.step import PrunedRequest
from tokenprune.lengths import PromptLayout
from tokenprune.plan import make_plan
from tokenprune.request import parse_pruning
from tokenprune.shape import EngineShape

HEADS, GROUP, D, BLOCK = 2, 2, 32, 32
SHAPE = EngineShape(2, (0,), 4096, allow_channel_pruning=True, head_size=D, block_size=BLOCK)
SCALE = 0.2


class Attention:
    """Stands in for vLLM's implementation: it writes what must be overwritten."""

    scale = SCALE

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output):
        output.fill_(7)
        return output


class Bench:
    """One request in two layers, served step by step; every other request's row is garbage."""

    def __init__(self, backend, n, max_tokens=400, kv=None, *, shared=False, **parameters):
        axes = {"channels": {"method": "think", "keep_ratio": 0.5, "window": 4, **parameters}}
        pruning = parse_pruning(axes if kv is None else axes | {"kv": kv})
        layout = PromptLayout(n)
        plan = make_plan(pruning, layout, SHAPE, max_tokens=max_tokens)
        assert plan.channels is not None
        self.backend, self.index, self.computed = backend, 3, 0
        self.request = PrunedRequest("r", layout, plan)
        self.generator = torch.Generator().manual_seed(n)
        self.isa = cpu_isa(torch.float32, BLOCK, D) if backend == "CPU_ATTN" else ""
        self.layers = named(
            attention_layer(
                backend,
                torch.randn(60, HEADS, BLOCK, 2 * D, generator=self.generator),
                self.isa,
                Attention(),
            )
            for _ in range(2)
        )
        self.table = torch.zeros(5, 40, dtype=torch.int32)
        order = torch.randperm(60, generator=self.generator).int()
        self.table[self.index] = order[:40]
        # where the row goes when it is first rewritten, if others read its blocks
        self.spare = order[40:].tolist() if shared else []
        self.blocks = self.table[self.index]
        self.make_actors(self.table)
        # what a cache of zeroed channels would hold: [n, H, 2 * D] per layer
        self.held = [torch.zeros(0, HEADS, 2 * D) for _ in self.layers]
        self.kept = [None, None]
        self.queries = [[], []]

    def make_actors(self, table):
        stats = WorkerStats(torch.device("cpu"), 2)
        layers = layers_of(self.layers, table, BLOCK)
        self.observer = QueryObserver(layers, 1)
        self.moved_rows = moved_rows_of(table)
        self.packer = ChannelPacker(layers, self.observer, 1, 5, stats, self.moved_rows)
        evictor = Evictor(layers, SHAPE, stats, self.moved_rows, self.observer)
        self.actors = [evictor, self.packer, self.observer]

    def randn(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def step(self, count):
        """Run a step; return per layer the attention's rows and what they must be."""
        lengths, before = self.request.plan.lengths, self.computed
        after = before + count
        # a row of someone else comes first
        step = step_of(self.request, self.index, before, count, others=[None])
        for actor in self.actors:
            actor.begin_step(step)
        results = []
        for i, layer in enumerate(self.layers.values()):
            key, value = self.randn(2, count, HEADS, D)
            slots = lengths.physical(before, 0) + torch.arange(count)
            shifted = self.blocks.long()[slots // BLOCK]
            self.put(layer.kv_cache, shifted, slots % BLOCK, key, value)
            query = self.randn(1 + count, HEADS * GROUP, D)
            out = torch.zeros_like(query)
            layer.impl.forward(layer, query, key, value, layer.kv_cache, object(), output=out)
            self.held[i] = torch.cat([self.held[i], torch.cat([key, value], dim=2)])
            self.queries[i] += list(query[1:])
            results.append((out, self.expected(i, query[1:])))
        left = self.leave(before, after)
        for actor in self.actors:
            actor.after_forward(step)
        for layer, (ids, rows) in zip(self.layers.values(), left, strict=False):
            assert torch.equal(layer.kv_cache[ids], rows), "others read these"
        for actor in self.actors:
            actor.end_step()
        self.computed = after
        self.age(before, after)
        return results

    def leave(self, before, after):
        """Let the row move if it is first rewritten; return what it leaves, per layer."""
        lengths = self.request.plan.lengths
        if not self.spare or lengths.is_rewritten(before, 0) or not lengths.is_rewritten(after, 0):
            return []
        raw = self.blocks[: -(-after // BLOCK)].tolist()
        target = [self.spare.pop() for _ in range(-(-lengths.rewritten_until(after, 0) // BLOCK))]
        self.moved_rows.begin_step({self.index: (target,)})
        self.spare = []
        return [(raw, layer.kv_cache[raw].clone()) for layer in self.layers.values()]

    def put(self, cache, blocks, offsets, key, value):
        for j in range(len(key)):
            # one token at a time, as the backend stores it at that slot of that block
            if self.backend == "CPU_ATTN":
                from vllm import _custom_ops as ops

                parts = cache.view(len(cache), HEADS, 2 * BLOCK, D).chunk(2, dim=2)
                slot = blocks[j : j + 1] * BLOCK + offsets[j : j + 1]
                ops.cpu_attn_reshape_and_cache(
                    key[j : j + 1], value[j : j + 1], *parts, slot, self.isa
                )
            else:
                cache[blocks[j], :, offsets[j]] = torch.cat([key[j], value[j]], dim=1)

    def expected(self, i, query):
        rows = []
        for j, q in enumerate(query):
            seen = self.held[i][: len(self.held[i]) - len(query) + j + 1]
            keys, values = seen.transpose(0, 1).chunk(2, dim=2)
            probs = (q.view(HEADS, GROUP, D) @ keys.transpose(1, 2) * SCALE).softmax(-1)
            rows.append((probs @ values).flatten(0, 1))
        return torch.stack(rows)

    def age(self, before, after):
        """Zero the channels of packed tokens in the cache that stands for theirs."""
        plan = self.request.plan
        if after < self.request.layout.num_tokens or plan.kv is not None:
            return
        for i in range(2):
            if self.kept[i] is None:
                prompt = self.held[i][: self.request.layout.num_tokens]
                window = torch.stack(self.queries[i][len(prompt) - 4 : len(prompt)])
                q = window.view(4, HEADS, GROUP, D).square().mean((0, 2))
                score = q * prompt[..., :D].square().mean(0)
                self.kept[i] = [set(s.argsort()[-plan.channels.keys :].tolist()) for s in score]
            packed = plan.lengths.packed_blocks(after, 0) * plan.lengths.packing.tokens
            for head, kept in enumerate(self.kept[i]):
                gone = [c for c in range(D) if c not in kept]
                self.held[i][:packed, head, gone] = 0


@pytest.mark.parametrize("backend", ["TRITON_ATTN", "CPU_ATTN"])
@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param([150], id="whole-prompt"),
        pytest.param([64, 84, 2], id="a-window-of-four-in-two-chunks"),
        pytest.param([100, 49, 1], id="a-last-chunk-of-one"),
        pytest.param([170], id="replayed-with-generated-tokens"),
    ],
)
@pytest.mark.parametrize("max_read", [1, 1 << 20], ids=["one-by-one", "all-at-once"])
@pytest.mark.parametrize("shared", [False, True], ids=["own-blocks", "shared-blocks"])
def test_packed_rows_attend_as_to_zeroed_channels(monkeypatch, backend, chunks, max_read, shared):
    monkeypatch.setattr("tokenprune.engine.kv.channel_packer.MAX_READ", max_read)
    bench = Bench(backend, 150, shared=shared)
    for chunk in chunks:
        for out, _ in bench.step(chunk):
            assert (out == 7).all(), "a prompt is vLLM's own"
    packed = []
    for count in (*[1] * 50, 30, *[1] * 20):
        before = bench.request.lengths.packed_blocks(bench.computed, 0)
        for out, expected in bench.step(count):
            assert (out[0] == 7).all(), "someone else's row"
            torch.testing.assert_close(out[1:], expected, rtol=1e-4, atol=1e-5)
        packed.append(before)
    assert packed[0] >= 2
    assert packed[-1] > packed[0]


@pytest.mark.parametrize("backend", ["TRITON_ATTN", "CPU_ATTN"])
@pytest.mark.parametrize("shared", [False, True], ids=["own-blocks", "shared-blocks"])
def test_eviction_and_packing_leave_what_lengths_count(backend, shared):
    kv = {"method": "lagkv", "lag": 16, "sink": 3, "keep_ratio": 0.5}
    bench = Bench(backend, 150, kv=kv, recent=4, shared=shared)
    lengths = bench.request.plan.lengths
    bench.step(150)
    for _ in range(120):
        held = lengths.physical(bench.computed, 0)
        rows = [
            layer.layout.read(layer.cache, bench.blocks, 0, held) for layer in bench.packer._layers
        ]
        packed = lengths.packed_blocks(bench.computed, 0)
        # dense rows are tokens that were written, in the order in which they were
        for i, (keys, values) in enumerate(rows):
            written = bench.held[i]
            for head in range(HEADS):
                dense = torch.cat([keys, values], dim=2)[head, packed * BLOCK :]
                match = (written[:, head][None] == dense[:, None]).all(-1)
                assert (match.sum(1) == 1).all()
                positions = match.int().argmax(1)
                assert (positions.diff() > 0).all()
        bench.step(1)
    assert lengths.packed_blocks(150, 0) == 1
    assert lengths.packed_blocks(bench.computed, 0) == 2


def known(bench, packer=None, observer=None):
    """Return what is kept of the request: queries per layer, and choices per layer."""
    queries = [kept.get(bench.index) for kept in (observer or bench.observer)._queries]
    choices = (packer or bench.packer)._choices.values()
    return queries, [choice.kept.get(bench.index) for choice in choices]


def test_what_is_known_of_a_request_is_forgotten():
    bench = Bench("TRITON_ATTN", 150)
    bench.step(148)
    queries, _ = known(bench)
    assert all(queries)
    bench.observer.forget(bench.index)
    assert known(bench)[0] == [None, None]
    bench = Bench("TRITON_ATTN", 150)
    bench.step(150)
    queries, choices = known(bench)
    assert queries == [None, None], "queries are of no use once channels are chosen"
    assert all(choice is not None for choice in choices)
    bench.packer.forget(bench.index)
    assert known(bench)[1] == [None, None]


def test_a_graph_reads_the_rows_of_the_step_at_one_place():
    bench = Bench("TRITON_ATTN", 150)
    bench.step(150)
    bench.packer.begin_step(step_of(bench.request, bench.index, 150, 1, others=[None]))
    fresh = bench.packer._rows[0].tolist()
    assert len(fresh) == 1
    bench.packer.persist(4)
    buffer = bench.packer._rows[0]
    assert buffer[0].tolist() == fresh[0]
    assert (buffer[1:, 0] == -1).all()
    # the next step has no such row: the same place must say so
    bench.packer.end_step()
    bench.packer.persist(4)
    assert bench.packer._rows[0].data_ptr() == buffer.data_ptr()
    assert (buffer[:, 0] == -1).all()


def test_a_second_packer_takes_the_place_of_the_first():
    # vLLM makes a cache to measure its graphs with, and then the real one
    bench = Bench("TRITON_ATTN", 150)
    packer, observer = bench.packer, bench.observer
    bench.make_actors(bench.table)
    for layer in bench.layers.values():
        assert type(layer.impl).__mro__[1] is Attention
    bench.step(150)
    assert all(choice is not None for choice in known(bench)[1])
    assert known(bench, packer, observer) == ([None, None], [None, None])


def test_an_observed_implementation_is_still_one_of_its_kind():
    bench = Bench("TRITON_ATTN", 150)
    for layer in bench.layers.values():
        assert isinstance(layer.impl, Attention)
        assert type(layer.impl).forward is not Attention.forward
        out = torch.zeros(1, HEADS * GROUP, D)
        # a run without metadata is a dummy
        layer.impl.forward(layer, out, None, None, layer.kv_cache, None, output=out)
        assert (out == 7).all()
