"""Every replacement against the interpreted kernel it stands for, on the same inputs."""

import copy
import importlib

import pytest
import torch

from tokenprune.vllm_on_cpu import kernels
from tokenprune.vllm_on_cpu.kernels import logits as logits_kernels

dispatcher = pytest.importorskip("vllm.triton_utils.dispatcher", reason="needs vLLM")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM-cpu only")

WORKER = "vllm.v1.worker.gpu"
VOCAB, MAX_REQS, MAX_LEN = 2500, 7, 64
INT32, INT64 = torch.int32, torch.int64


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(20)


def original(name):
    module_name, _, attribute = name.rpartition(".")
    kernel = getattr(importlib.import_module(module_name), attribute)
    # another test may have registered the replacement
    return dispatcher._registry.get(name, (kernel,))[0]


def check(name, grid, *args, **constexprs):
    """Run kernel and replacement on copies of `args`; all tensors must end up equal."""
    impl = kernels._OVERRIDES[f"{WORKER}.{name}"]
    expected, actual = copy.deepcopy(args), copy.deepcopy(args)
    original(f"{WORKER}.{name}")[grid](*expected, **constexprs)
    impl(*actual, **constexprs)
    for before, want, got in zip(args, expected, actual, strict=True):
        if isinstance(before, torch.Tensor):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    return args, actual


def ints(*values, dtype=INT32):
    return torch.tensor(values, dtype=dtype)


def make_logits(generator, rows):
    return torch.randn(rows, VOCAB, generator=generator) * 5


def make_tokens(generator):
    return torch.randint(VOCAB, (MAX_REQS, MAX_LEN), generator=generator, dtype=INT32)


# requests of the batch sit in slots 4, 0 and 6; they compute 5, 1 and 3 tokens
IDX = ints(4, 0, 6, dtype=INT64)
STARTS = ints(0, 5, 6, 9)
COMPUTED = ints(20, 0, 0, 0, 10, 0, 30)


def test_prepare_prefill_inputs(generator):
    # slot 4 stops inside its prompt, slot 0 decodes, slot 6 ends its prompt
    prefill_lens = ints(20, 0, 0, 0, 17, 0, 33)
    check(
        "input_batch._prepare_prefill_inputs_kernel",
        (3,),
        torch.full((12,), -7, dtype=INT32),
        torch.full((3, MAX_REQS), -7, dtype=INT32),
        MAX_REQS,
        3,
        IDX,
        STARTS,
        make_tokens(generator),
        MAX_LEN,
        prefill_lens,
        COMPUTED,
        BLOCK_SIZE=1024,
        LOOKAHEAD_BLOCK=4,
    )


def test_prepare_pos_seq_lens():
    check(
        "input_batch._prepare_pos_seq_lens_kernel",
        (4,),
        torch.full((12,), -7),
        torch.full((MAX_REQS,), -7, dtype=INT32),
        IDX,
        STARTS,
        COMPUTED,
        MAX_REQS,
        BLOCK_SIZE=1024,
    )


def test_prepare_rope_positions(generator):
    check(
        "mm.rope._prepare_rope_positions_kernel",
        (3,),
        torch.full((3, 13), -7),
        13,
        torch.randint(99, (MAX_REQS * 3, MAX_LEN), generator=generator, dtype=INT32),
        3 * MAX_LEN,
        MAX_LEN,
        ints(-5, 1, 2, 3, 4, 5, 6),
        IDX,
        STARTS,
        ints(20, 0, 0, 0, 17, 0, 33),
        COMPUTED,
        BLOCK_SIZE=1024,
        NUM_DIMS=3,
    )


@pytest.mark.parametrize(
    ("cu_num_logits", "seq_lens", "num_new"),
    [
        pytest.param([0, 1, 2, 3], [15, 21, 33], 1, id="one-logit-each"),
        pytest.param([0, 3, 4, 6], [25, 21, 40], 1, id="with-drafts"),
        pytest.param([0, 2, 2, 4], [25, 21, 40], 0, id="drafts-only"),
        pytest.param([0, 3, 4, 6], [25, 21, 34], 1, id="prompt-tail-kept"),
    ],
)
def test_combine_sampled_and_draft_tokens(generator, cu_num_logits, seq_lens, num_new):
    check(
        "input_batch._combine_sampled_and_draft_tokens_kernel",
        (3,),
        torch.arange(100, 112, dtype=INT32),
        IDX,
        torch.arange(200, 200 + MAX_REQS).view(-1, 1),
        STARTS,
        ints(*seq_lens, 0, 0, 0, 0),
        ints(20, 0, 0, 0, 17, 0, 33),
        torch.randint(VOCAB, (MAX_REQS, 3), generator=generator),
        3,
        ints(*cu_num_logits),
        torch.full((cu_num_logits[-1],), -7),
        NUM_NEW_SAMPLED_TOKENS=num_new,
        BLOCK_SIZE=4,
    )


def test_get_num_sampled_and_rejected():
    check(
        "input_batch._get_num_sampled_and_rejected_kernel",
        (3,),
        ints(1, 1, 2),
        ints(-7, -7, -7),
        ints(15, 21, 33),
        ints(0, 1, 2, 5),
        IDX,
        ints(20, 0, 0, 0, 17, 0, 33),
    )


@pytest.mark.parametrize("has_counts", [True, False])
@pytest.mark.parametrize("has_starts", [True, False])
def test_post_update(generator, has_counts, has_starts):
    check(
        "input_batch._post_update_kernel",
        (4,),
        ints(4, -1, 0, 6, dtype=INT64),
        COMPUTED,
        torch.zeros(MAX_REQS, 1, dtype=INT64),
        torch.zeros(MAX_REQS, VOCAB, dtype=INT32) if has_counts else None,
        VOCAB,
        ints(3, 3, 9, 5, 5, 9, 7, 8, 1, 2, 2, 2, dtype=INT64).view(4, 3),
        3,
        ints(1, 1, 0, 3),
        ints(0, 1, 0, 2),
        ints(0, 5, 6, 9, 14) if has_starts else None,
        make_tokens(generator),
        MAX_LEN,
        ints(20, 0, 0, 0, 15, 0, 33),
    )


def pointers_to(tables):
    return torch.tensor([table.data_ptr() for table in tables], dtype=torch.uint64)


STRIDES = torch.tensor([9, 4, 1])


def make_tables(generator):
    shapes = [(MAX_REQS, width) for width in STRIDES.tolist()]
    return [torch.randint(1, 900, shape, generator=generator, dtype=INT32) for shape in shapes]


def test_apply_write_to_one_group(generator):
    # the third write overlaps the first, and wins
    check(
        "buffer_utils._apply_write_kernel",
        (3,),
        make_tokens(generator),
        MAX_LEN,
        ints(4, 6, 4),
        ints(2, 0, 3),
        torch.arange(900, 909, dtype=INT32),
        ints(4, 5, 9),
        None,
        BLOCK_SIZE=1024,
        MULTI_GROUP=False,
    )


def test_apply_write_to_many_groups(generator):
    name = f"{WORKER}.buffer_utils._apply_write_kernel"
    expected = make_tables(generator)
    actual = copy.deepcopy(expected)
    contents, ends = torch.arange(900, 907, dtype=INT32), ints(5, 6, 7)
    args = (STRIDES, ints(4, 6, 4), ints(2, 0, 0), contents, ends, ints(0, 2, 1))
    tiles = {"BLOCK_SIZE": 1024, "MULTI_GROUP": True}
    original(name)[(3,)](pointers_to(expected), *args, **tiles)
    kernels._OVERRIDES[name](pointers_to(actual), *args, **tiles)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_gather_block_tables(generator):
    name = f"{WORKER}.block_table._gather_block_tables_kernel"
    sources = make_tables(generator)
    expected, actual = ([torch.full_like(table, -7) for table in sources] for _ in range(2))
    num_blocks = ints(9, 0, 0, 0, 5, 0, 2, 4, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 1).view(3, -1)
    grid = (3, 5)
    args = (STRIDES, num_blocks, MAX_REQS, 3, 1024)
    original(name)[grid](IDX, pointers_to(sources), pointers_to(expected), *args)
    kernels._OVERRIDES[name](grid, IDX, pointers_to(sources), pointers_to(actual), *args)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_compute_slot_mappings(generator):
    # the middle request is a dummy; the last group has its mapping switched off
    tables = make_tables(generator)
    check(
        "block_table._compute_slot_mappings_kernel",
        (3, 4),
        12,
        ints(4, -1, 6, dtype=INT64),
        STARTS,
        ints(10, 11, 12, 13, 14, 99, 30, 31, 32, -7, -7, -7, dtype=INT64),
        pointers_to(tables),
        STRIDES,
        ints(8, 16, 8),
        torch.tensor([True, True, False]),
        torch.tensor([True, True, True]),
        torch.full((3, 12), -7),
        12,
        0,
        CP_SIZE=1,
        CP_INTERLEAVE=1,
        PAD_ID=-1,
        TRITON_BLOCK_SIZE=1024,
    )


def test_temperature(generator):
    check(
        "sample.gumbel._temperature_kernel",
        (3, 1),
        make_logits(generator, 3),
        VOCAB,
        IDX,
        torch.tensor([0.7, 0, 0, 0, 0.0, 0, 1.3]),
        VOCAB,
        BLOCK_SIZE=8192,
    )


def test_min_p(generator):
    check(
        "sample.min_p._min_p_kernel",
        (3,),
        make_logits(generator, 3),
        VOCAB,
        IDX,
        torch.tensor([0.01, 0, 0, 0, 0.0, 0, 0.2]),
        VOCAB,
        BLOCK_SIZE=1024,
    )


@pytest.mark.parametrize("use_fp64", [False, True])
@pytest.mark.parametrize("apply_temperature", [False, True])
def test_gumbel_noise_is_the_kernels_to_the_last_bit(generator, use_fp64, apply_temperature):
    dtype = torch.float64 if use_fp64 else torch.float32
    logits = make_logits(generator, 4)
    logits[2, :1024] = -torch.inf
    check(
        "sample.gumbel._gumbel_sample_kernel",
        (4, 3),
        torch.zeros(4, 3, dtype=INT64),
        3,
        torch.zeros(4, 3, dtype=dtype),
        3,
        None,
        0,
        0,
        None,
        None,
        0,
        logits,
        VOCAB,
        ints(4, 0, 6, -1, dtype=INT64),
        ints(-(2**62) + 5, 0, 0, 0, 42, 0, 2**33 + 1, dtype=INT64),
        ints(3, 70000, 5, 9, dtype=INT64),
        torch.tensor([0.7, 0, 0, 0, 1.0, 0, 1.3]),
        VOCAB,
        BLOCK_SIZE=1024,
        IS_DRAFTING=False,
        APPLY_TEMPERATURE=apply_temperature,
        USE_FP64=use_fp64,
        PER_TOKEN_COL=False,
    )


def test_gumbel_sample_refuses_to_draft():
    nothing = [None] * 17
    with pytest.raises(NotImplementedError, match="speculative decoding must be off"):
        kernels.sampling.gumbel_sample(*nothing, 1024, True, False, False, False)


def test_penalties(generator):
    # rows 2 and 3 belong to one request; row 3 comes after a drafted token
    check(
        "sample.penalties._penalties_kernel",
        (4, 1),
        make_logits(generator, 4),
        VOCAB,
        ints(4, 0, 6, 6, dtype=INT64),
        ints(11, 12, 13, 14),
        ints(0, 0, 0, 1),
        torch.tensor([1.0, 1, 1, 1, 1.3, 1, 0.8]),
        torch.tensor([0.0, 0, 0, 0, 0.3, 0, -0.2]),
        torch.tensor([0.0, 0, 0, 0, 0.1, 0, 0.7]),
        torch.randint(-(2**31), 2**31, (MAX_REQS, 79), generator=generator, dtype=INT32),
        79,
        torch.randint(3, (MAX_REQS, VOCAB), generator=generator, dtype=INT32),
        VOCAB,
        VOCAB,
        BLOCK_SIZE=8192,
    )


def test_bincount(generator):
    check(
        "sample.penalties._bincount_kernel",
        (3, 1),
        IDX,
        make_tokens(generator) % 50,
        MAX_LEN,
        ints(10, 0, 0, 0, 17, 0, 33),
        ints(20, 0, 0, 0, 17, 0, 60),
        torch.zeros(MAX_REQS, 79, dtype=INT32),
        79,
        torch.zeros(MAX_REQS, VOCAB, dtype=INT32),
        VOCAB,
        BLOCK_SIZE=1024,
    )


@pytest.mark.parametrize("is_all_masked", [False, True])
@pytest.mark.parametrize("can_restore", [False, True])
def test_bias(generator, is_all_masked, can_restore):
    logits = make_logits(generator, 3)
    if is_all_masked:
        logits[2] = -torch.inf
        logits[2, 5:8] = torch.tensor([1.0, torch.inf, -torch.inf])
    unique = torch.stack([torch.randperm(16, generator=generator) for _ in range(MAX_REQS)])
    token_ids = unique.to(INT32)
    check(
        "sample.logit_bias._bias_kernel",
        (3,),
        logits,
        VOCAB,
        VOCAB,
        IDX,
        ints(0, 0, 0, 0, 9, 0, 0),
        token_ids,
        16,
        ints(7, 0, 0, 0, 3, 0, 0),
        token_ids,
        16,
        torch.randn(MAX_REQS, 16, generator=generator),
        16,
        ints(10, 20, 30, dtype=INT64),
        ints(21, 0, 0, 0, 12, 0, 40),
        ints(4, 0, 0, 0, 2, 0, 16),
        ints(0, 0, 0, 0, 0, 0, 1),
        token_ids,
        16,
        BLOCK_SIZE=16,
        LOGITS_BLOCK_SIZE=8192,
        CHECK_ALL_MASKED_ROWS=can_restore,
    )


def test_bad_words(generator):
    tokens = make_tokens(generator)
    tokens[4, 8:10] = ints(5, 6)
    tokens[0, 19] = 5
    words = torch.zeros(MAX_REQS, 8, dtype=INT32)
    words[4, :7] = ints(1, 5, 6, 2, 6, 5, 3)  # [1], [5, 6, 2], [6, 5, 3]
    words[0, :7] = ints(1, 5, 11, 2, 6, 5, 3)  # the second goes on into the drafts
    offsets = torch.zeros(MAX_REQS, 5, dtype=INT32)
    offsets[4, :4] = offsets[0, :4] = ints(0, 1, 4, 7)
    args, actual = check(
        "sample.bad_words._bad_words_kernel",
        (4, 3),
        make_logits(generator, 4),
        VOCAB,
        ints(4, 0, 0, 6, dtype=INT64),
        words,
        8,
        offsets,
        5,
        ints(3, 0, 0, 0, 3, 0, 0),
        tokens,
        MAX_LEN,
        ints(19, 0, 0, 0, 8, 0, 0),
        ints(20, 0, 0, 0, 10, 0, 3),
        ints(9, 10, 11, 12),
        ints(0, 0, 1, 0),
    )
    assert (actual[0] != args[0]).sum(1).tolist() == [2, 1, 2, 0]


def test_apply_grammar_bitmask_forbids_what_the_grammar_does_not_accept():
    # no comparison: Triton 3.9 cannot interpret this kernel's mask
    logits = torch.zeros(3, 40)
    # token 33 for the first request, all but token 0 for the second draft of the next
    bitmask = ints(0, 2, -2, -1).view(2, 2)
    mapping, cu_num_logits = ints(0, 3), ints(0, 1, 3)
    logits_kernels.apply_grammar_bitmask(logits, 40, mapping, cu_num_logits, bitmask, 2, 40, 2, 64)
    assert logits[0].isfinite().nonzero().flatten().tolist() == [33]
    assert logits[1].isfinite().all()
    assert logits[2].isinf().nonzero().flatten().tolist() == [0]


def test_ranks(generator):
    check(
        "sample.logprob._ranks_kernel",
        (3,),
        torch.zeros(3, dtype=INT64),
        make_logits(generator, 3).round(),
        VOCAB,
        ints(0, 7, 2499, dtype=INT64),
        VOCAB,
        BLOCK_SIZE=8192,
    )


def test_topk_log_softmax_differs_only_by_the_order_of_its_sum(generator):
    kernel = original(f"{WORKER}.sample.logprob._topk_log_softmax_kernel")
    logits = make_logits(generator, 70)
    logits[1, 3:] = -torch.inf
    token_ids = torch.randint(VOCAB, (70, 5), generator=generator)
    args = (logits, VOCAB, token_ids, 5, 5, VOCAB)
    tiles = {"BLOCK_SIZE": 1024, "TOPK_BLOCK_SIZE": 8}
    expected, actual = torch.zeros(70, 5), torch.zeros(70, 5)
    kernel[(70,)](expected, *args, **tiles)
    kernels.sampling.topk_log_softmax(actual, *args, **tiles)
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-6)


def test_prompt_logprobs_token_ids(generator):
    check(
        "sample.prompt_logprob._prompt_logprobs_token_ids_kernel",
        (3,),
        torch.full((9,), -7),
        STARTS,
        IDX,
        COMPUTED,
        make_tokens(generator),
        MAX_LEN,
        BLOCK_SIZE=1024,
    )


def test_top_k_and_top_p_keep_the_likeliest_tokens():
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0], [0.0, 9.0, 1.0, 2.0]])
    k, p = ints(2, 4), torch.tensor([1.0, 0.9])
    kept = logits_kernels.apply_top_k_top_p(logits, k, p).isfinite()
    assert kept.tolist() == [[False, True, True, False], [False, True, False, False]]


def test_register_reaches_copies_and_keeps_the_grid():
    kernels.register()
    kernels.register()
    block_table = importlib.import_module(f"{WORKER}.block_table")
    sampler = importlib.import_module("vllm.v1.sample.ops.topk_topp_sampler")
    launch = block_table._gather_block_tables_kernel[(2, 3)]
    assert launch.func is kernels.block_tables.gather_block_tables
    assert launch.args == ((2, 3),)
    assert sampler.apply_top_k_top_p_triton.func is logits_kernels.apply_top_k_top_p
    for name in kernels._OVERRIDES:
        module, _, attribute = name.rpartition(".")
        override = getattr(importlib.import_module(module), attribute)
        assert isinstance(override, dispatcher.KernelOverride), name
