"""packed_decode_attention: the golden example, and kernel and reference against float64."""

import json
import math
from pathlib import Path

import pytest
import torch

from tokenprune.kernels import ROW_FIELDS, pack, packed_decode_attention, places_of

# one rounding of the inputs and one of the output; sums are in float32
TOLERANCES = {
    torch.float32: {"rtol": 1e-4, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
}


class Paged:
    """A paged cache of some requests, and the same tokens with dropped elements zeroed."""

    def __init__(self, generator, device, *, heads=2, group=2, d=16, block=8, dtype=torch.float32):
        self.generator, self.device, self.dtype = generator, device, dtype
        self.heads, self.hq, self.d, self.block = heads, heads * group, d, block
        self.num_blocks = 96
        # what no request owns is never read: NaN would show
        self.cache = torch.full((self.num_blocks, heads, block, 2 * d), math.nan, dtype=dtype)
        self.free = torch.randperm(self.num_blocks, generator=generator).tolist()
        self.tables, self.places, self.rows, self.tokens = [], [], [], []

    def randn(self, *shape):
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def take(self, count):
        taken, self.free = self.free[:count], self.free[count:]
        return taken

    def add(self, token, packed, dense, keys, values=None):
        """Add a request of `packed` blocks and `dense` tokens that keeps so many channels."""
        values = self.d if values is None else values
        width = keys + values
        per_block = self.block * 2 * self.d // width
        kept = torch.stack(
            [
                torch.cat([self.choose(keys), self.d + self.choose(values)])
                for _ in range(self.heads)
            ]
        )
        old, new = (
            self.randn(self.heads, packed * per_block, 2 * self.d),
            self.randn(self.heads, dense, 2 * self.d),
        )
        blocks = self.take(packed + -(-dense // self.block))
        self.cache[blocks[:packed]] = pack(old, kept, self.block)
        for i in range(dense):
            self.cache[blocks[packed + i // self.block], :, i % self.block] = new[:, i]
        zeroed = torch.zeros_like(old)
        index = kept[:, None].expand(-1, old.shape[1], -1)
        zeroed.scatter_(2, index, old.gather(2, index))
        self.rows.append([token, len(self.tables), packed, dense, width])
        self.tables.append(blocks)
        self.places.append(places_of(kept, 2 * self.d))
        self.tokens.append(torch.cat([zeroed, new], dim=1))

    def choose(self, count):
        return torch.randperm(self.d, generator=self.generator)[:count].sort().values

    def attend(self, query, out, *, cache=None, scale=0.3, **kwargs):
        longest = max(map(len, self.tables))
        tables = torch.tensor(
            [t + [0] * (longest - len(t)) for t in self.tables], dtype=torch.int32
        )
        rows = torch.tensor(self.rows, dtype=torch.int32).view(-1, ROW_FIELDS)
        cache = self.cache.to(self.device) if cache is None else cache
        inputs = (query.to(self.device), cache, tables, rows, torch.stack(self.places))
        inputs = (x.to(self.device) for x in inputs)
        return packed_decode_attention(*inputs, out.to(self.device), scale=scale, **kwargs).cpu()

    def expected(self, query, out, scale=0.3):
        out = out.clone().double()
        for (token, *_), tokens in zip(self.rows, self.tokens, strict=True):
            if token < 0:
                continue
            keys, values = tokens.double().chunk(2, dim=2)
            q = query[token].double().view(self.heads, -1, self.d)
            probs = (q @ keys.transpose(1, 2) * scale).softmax(-1)
            out[token] = (probs @ values).flatten(0, 1)
        return out


@pytest.fixture
def paged(generator, device):
    return lambda **shape: Paged(generator, device, **shape)


def test_the_golden_example():
    path = Path(__file__).parents[1] / "golden" / "think.json"
    golden = json.loads(path.read_text())
    keys = [[1, 0.5, -2, 0.1], [0, -0.5, 1, 0.2], [2, 0.5, 0, -0.1]]
    keys += [[-1, 1, 1, 0], [1, 0, 2, 0.3], [0.5, -1, -1, 0.4]]
    values = [[1, 0, 0, 2], [0, 1, 0, 1], [0, 0, 1, 0], [1, 1, 0, 0], [0, 1, 1, 1], [1, 0, 1, 0.5]]
    tokens = torch.cat([torch.tensor(keys), torch.tensor(values)], dim=1).double()[None]
    queries = torch.tensor([[[0.3, -1, 0.4, 2], [1, 0.5, -1, 0.2]]]).double()
    kept = torch.tensor([[*golden["think.group.kept_channels"], 4, 5, 6, 7]])
    # blocks of three slots hold four tokens of six elements
    cache = torch.full((2, 1, 3, 8), math.nan, dtype=torch.float64)
    cache[0] = pack(tokens[:, :4], kept, 3)[0]
    cache[1, :, :2] = tokens[:, 4:]
    stored = cache[0].flatten().view(4, 6)[:, :2]
    assert stored.tolist() == golden["think.pruned_block(4x2)"]
    rows = torch.tensor([[0, 0, 1, 2, 6]], dtype=torch.int32)
    out = packed_decode_attention(
        queries,
        cache,
        torch.tensor([[0, 1]], dtype=torch.int32),
        rows,
        places_of(kept, 8)[None],
        torch.zeros(1, 2, 4, dtype=torch.float64),
        scale=0.5,
    )
    for head in range(2):
        expected = golden[f"think.h{head}.decode_out(composed)"]
        assert out[0, head].tolist() == pytest.approx(expected, rel=1e-6)


CASES = [
    pytest.param([(0, 1, 5, 16)], id="one-block"),
    pytest.param([(2, 3, 0, 16)], id="no-dense-token"),
    pytest.param([(2, 0, 9, 16)], id="no-packed-block"),
    pytest.param([(1, 9, 17, 16), (3, 1, 1, 32), (0, 4, 40, 16)], id="several-widths"),
    pytest.param([(-1, 2, 3, 16), (1, 2, 3, 16)], id="a-row-to-skip"),
    pytest.param([(0, 2, 9, 16, 16), (4, 3, 8, 32, 48)], id="values-too"),
]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_packed_and_dense_blocks_are_one_softmax(paged, assert_matches, case, backend, splits):
    if backend == "torch" and splits > 1:
        pytest.skip("the reference has no splits")
    made = paged(d=64)
    for request in case:
        made.add(*request)
    query, out = made.randn(5, made.hq, 64), made.randn(5, made.hq, 64)
    found = made.attend(query, out, backend=backend, splits=splits)
    assert_matches(found, made.expected(query, out), **TOLERANCES[torch.float32])
    untouched = [i for i in range(5) if i not in [row[0] for row in made.rows]]
    assert torch.equal(found[untouched], out[untouched])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("group", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("d", [64, 96, 128])
def test_groups_and_head_sizes(paged, assert_matches, d, group, dtype, backend):
    made = paged(heads=1, group=group, d=d, block=16, dtype=dtype)
    made.add(1, 3, 21, 48)
    made.add(0, 2, 5, 32, 64)
    query, out = made.randn(2, made.hq, d), made.randn(2, made.hq, d)
    found = made.attend(query, out, backend=backend, splits=2 if backend == "triton" else None)
    assert_matches(found.double(), made.expected(query, out), **TOLERANCES[dtype])


def test_more_splits_than_tiles_leave_some_without_keys(paged, assert_matches):
    made = paged()
    made.add(0, 1, 1, 16, 8)
    query, out = made.randn(1, made.hq, 16), made.randn(1, made.hq, 16)
    found = made.attend(query, out, backend="triton", splits=16)
    assert_matches(found, made.expected(query, out), **TOLERANCES[torch.float32])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_blocks_may_be_laid_out_slot_by_slot(paged, assert_matches, backend):
    # FLASH_ATTN's default: the heads of one slot lie together, so a block's bytes do not
    made = paged(d=32)
    made.add(0, 3, 9, 16)
    cache = made.cache.transpose(1, 2).contiguous().transpose(1, 2).to(made.device)
    query, out = made.randn(1, made.hq, 32), made.randn(1, made.hq, 32)
    found = made.attend(query, out, cache=cache, backend=backend)
    assert_matches(found, made.expected(query, out), **TOLERANCES[torch.float32])


def test_dense_blocks_may_have_an_order_of_their_own(paged, assert_matches):
    made = paged(d=16)
    made.add(0, 2, 13, 8, 16)
    order = torch.randperm(8 * 32, generator=made.generator).view(8, 32)
    cache = made.cache.clone()
    for block in made.tables[0][2:]:
        # element i of a row in order is stored at order[i]
        stored = cache[block].reshape(2, -1).clone()
        shuffled = stored.clone()
        shuffled[:, order.flatten()] = stored
        cache[block] = shuffled.view(2, 8, 32)
    query, out = made.randn(1, made.hq, 16), made.randn(1, made.hq, 16)
    found = made.attend(
        query, out, cache=cache.to(made.device), backend="torch", dense_order=order.to(made.device)
    )
    assert_matches(found, made.expected(query, out), **TOLERANCES[torch.float32])
    with pytest.raises(ValueError, match="dense_order must be None"):
        made.attend(query, out, backend="triton", dense_order=order)


def test_large_logits_do_not_overflow(paged, assert_matches):
    made = paged(d=32)
    made.add(0, 4, 20, 16)
    query, out = 400 * made.randn(1, made.hq, 32), made.randn(1, made.hq, 32)
    for splits in (1, 4):
        found = made.attend(query, out, backend="triton", splits=splits)
        assert_matches(found, made.expected(query, out), rtol=1e-3, atol=1e-3)


def test_packing_keeps_what_places_say(generator):
    tokens = torch.randn(2, 8, 8, generator=generator)
    kept = torch.tensor([[0, 3, 4, 5, 7], [1, 2, 3, 6, 7]])
    blocks = pack(tokens, kept, 3)  # 24 elements hold four tokens of five
    assert blocks.shape == (2, 2, 3, 8)
    places = places_of(kept, 8)
    for head in range(2):
        stored = blocks[:, head].flatten(1)
        assert (stored[:, 20:] == 0).all()
        for j, place in enumerate(places[head].tolist()):
            assert (place >= 0) == (j in kept[head])
            if place >= 0:
                assert torch.equal(stored[:, place:20:5].flatten(), tokens[head, :, j])


BAD = [
    pytest.param("cache", lambda x: x[0], "cache must be 4-D", id="cache-of-one-block"),
    pytest.param("query", lambda x: x[..., :-2], "query must be 3-D", id="query-too-narrow"),
    pytest.param("query", lambda x: x.half(), "dense rows of torch.float32", id="query-dtype"),
    pytest.param("out", lambda x: x[:-1], "out must be like query", id="out-too-short"),
    pytest.param("blocks", lambda x: x.long(), "blocks must be 2-D int32", id="blocks-int64"),
    pytest.param("rows", lambda x: x[:, :-1], "rows must be int32", id="rows-too-narrow"),
    pytest.param("places", lambda x: x[:, :-1], "places must be int16", id="places-one-head-less"),
]


@pytest.mark.parametrize(("name", "spoil", "message"), BAD)
def test_wrong_inputs_are_refused(paged, device, name, spoil, message):
    made = paged()
    inputs = {
        "query": torch.zeros(2, 4, 16),
        "cache": made.cache,
        "blocks": torch.zeros(1, 3, dtype=torch.int32),
        "rows": torch.zeros(1, ROW_FIELDS, dtype=torch.int32),
        "places": torch.zeros(1, 2, 32, dtype=torch.int16),
        "out": torch.zeros(2, 4, 16),
    }
    inputs = {k: (spoil(v) if k == name else v).to(device) for k, v in inputs.items()}
    with pytest.raises(ValueError, match=message):
        packed_decode_attention(**inputs, scale=1.0)
