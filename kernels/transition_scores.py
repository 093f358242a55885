"""transition_scores: how much one sub-module turns and stretches each visual token (TTV).

    m_i = |x_out_i| / |x_in_i|        d_i = cos(x_out_i, x_in_i)
    score_i = m_i * softmax_i(1 - |d_i|)

`signed` takes 1 - d instead, `scope="all"` a softmax over every row: together the released code.
An all-zero input row has m = 0 here; the released code divides 0 by 0.

Source: TransPrune, arXiv 2507.20630; code liaolea/TransPrune@c9e8284. The paper is the default.
The kernel reads each row once and sums in float32; it differs from the reference by rounding only.
"""

import functools
from typing import TYPE_CHECKING, no_type_check

import torch
from torch import Tensor

from tokenprune.kernels.ops.backend import (
    ceil_div,
    choose_backend,
    describe,
    device_guard,
    next_power_of_2,
)

if TYPE_CHECKING:
    import triton.language as tl  # noqa: F401 - mypy resolves the annotations of the kernels

# lower bound of each norm inside the cosine, as in torch.nn.functional.cosine_similarity
EPS = 1e-8
SCOPES = ("visual", "all")


def transition_scores(
    x_in: Tensor,
    x_out: Tensor,
    visual: Tensor,
    *,
    signed: bool = False,
    scope: str = "visual",
    backend: str | None = None,
) -> Tensor:
    """Score the visual tokens by the transition of one sub-module.

    Args:
        x_in: `[n, d]` input of the sub-module, after its norm; any float dtype, any strides.
        x_out: `[n, d]` output before the residual is added.
        visual: `[n]` bool, true for visual tokens. Counting them synchronises with the GPU.
        signed: Take `1 - d` (released code) instead of `1 - |d|` (paper).
        scope: Rows in the softmax: `visual` (paper) or `all` given rows (released code).
        backend: `torch`, `triton` (CUDA, or the interpreter), or None to choose by device.

    Returns:
        `[n_visual]` float32 in the order of the rows; empty without visual tokens.

    Raises:
        ValueError: A shape, dtype, device or name is not as above.
    """
    _check(x_in, x_out, visual, scope)
    if choose_backend(backend, x_in.device) == "torch":
        return transition_scores_reference(x_in, x_out, visual, signed=signed, scope=scope).float()
    return _transition_scores_triton(x_in, x_out, visual, signed=signed, scope=scope)


def transition_scores_reference(
    x_in: Tensor, x_out: Tensor, visual: Tensor, *, signed: bool = False, scope: str = "visual"
) -> Tensor:
    """Compute `transition_scores` in torch: in float32, or in float64 for float64 inputs."""
    if scope == "visual":
        x_in, x_out, visual = x_in[visual], x_out[visual], visual[visual]
    dtype = torch.promote_types(torch.promote_types(x_in.dtype, x_out.dtype), torch.float32)
    x_in, x_out = x_in.to(dtype), x_out.to(dtype)

    norm_in = torch.linalg.vector_norm(x_in, dim=-1)
    norm_out = torch.linalg.vector_norm(x_out, dim=-1)
    cosine = (x_in * x_out).sum(-1) / (norm_in.clamp_min(EPS) * norm_out.clamp_min(EPS))
    magnitude = torch.where(norm_in > 0, norm_out / norm_in, 0.0)
    direction = 1 - (cosine if signed else cosine.abs())
    return (torch.softmax(direction, dim=0) * magnitude)[visual]


def _transition_scores_triton(
    x_in: Tensor, x_out: Tensor, visual: Tensor, *, signed: bool, scope: str
) -> Tensor:
    n, d = x_in.shape
    stats_kernel, normalise_kernel = _kernels()
    block_d = min(next_power_of_2(d), 8192)
    # wide rows get a program each, narrow ones share it
    block_n = min(max(4096 // block_d, 1), 16)
    num_partials = ceil_div(n, block_n)
    weights = torch.empty(n, dtype=torch.float32, device=x_in.device)
    partials = torch.empty(num_partials, dtype=torch.float32, device=x_in.device)
    with device_guard(x_in):
        stats_kernel[(num_partials,)](
            *(x_in, x_out, visual.contiguous()),  # inputs
            *(weights, partials),  # outputs
            *(n, d, *x_in.stride(), *x_out.stride()),
            SIGNED=signed,
            ALL_ROWS=scope == "all",
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            num_warps=8 if block_d >= 4096 else 4,
        )
        # waits for the stream, so it comes after the launch that reads the large tensors
        rows = visual.nonzero().squeeze(1)
        scores = torch.empty(len(rows), dtype=torch.float32, device=x_in.device)
        normalise_kernel[(ceil_div(len(rows), 256),)](
            *(weights, partials, rows),  # inputs
            scores,  # output
            *(len(rows), num_partials),
            BLOCK=256,
        )
    return scores


@functools.cache
@no_type_check
def _kernels():
    # triton is imported and its kernels are decorated on first use: the torch form needs neither
    global tl
    import triton
    import triton.language as tl

    @triton.jit
    def stats_kernel(
        x_in_ptr,
        x_out_ptr,
        visual_ptr,
        weights_ptr,
        partials_ptr,
        n,
        d,
        stride_in_n,
        stride_in_d,
        stride_out_n,
        stride_out_d,
        SIGNED: tl.constexpr,
        ALL_ROWS: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        tile = tl.program_id(0).to(tl.int64)
        rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        in_scope = rows < n
        if not ALL_ROWS:
            in_scope = tl.load(visual_ptr + rows, mask=in_scope, other=0) != 0

        square_in = tl.zeros([BLOCK_N], tl.float32)
        square_out = tl.zeros([BLOCK_N], tl.float32)
        inner = tl.zeros([BLOCK_N], tl.float32)
        for start in range(0, d, BLOCK_D):
            cols = start + tl.arange(0, BLOCK_D).to(tl.int64)  # [BLOCK_D]
            in_tile = in_scope[:, None] & (cols < d)[None, :]
            at_in = rows[:, None] * stride_in_n + cols[None, :] * stride_in_d
            at_out = rows[:, None] * stride_out_n + cols[None, :] * stride_out_d
            a = tl.load(x_in_ptr + at_in, mask=in_tile, other=0.0).to(tl.float32)
            b = tl.load(x_out_ptr + at_out, mask=in_tile, other=0.0).to(tl.float32)
            square_in += tl.sum(a * a, axis=1)
            square_out += tl.sum(b * b, axis=1)
            inner += tl.sum(a * b, axis=1)

        norm_in = tl.sqrt(square_in)
        norm_out = tl.sqrt(square_out)
        cosine = inner / (tl.maximum(norm_in, 1e-8) * tl.maximum(norm_out, 1e-8))
        is_zero = norm_in == 0
        magnitude = tl.where(is_zero, 0.0, norm_out / tl.where(is_zero, 1.0, norm_in))
        # the largest direction term is known beforehand, so the softmax needs no pass for its max
        exponent = -1.0 - cosine if SIGNED else -tl.abs(cosine)
        weight = tl.where(in_scope, tl.exp(exponent), 0.0)
        tl.store(weights_ptr + rows, weight * magnitude, mask=rows < n)
        tl.store(partials_ptr + tile, tl.sum(weight, axis=0))

    @triton.jit
    def normalise_kernel(
        weights_ptr,
        partials_ptr,
        rows_ptr,
        scores_ptr,
        num_visual,
        num_partials,
        BLOCK: tl.constexpr,
    ):
        # every program adds the same few partial sums in the same order: deterministic, one launch
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, num_partials, BLOCK):
            at = start + tl.arange(0, BLOCK)
            total += tl.load(partials_ptr + at, mask=at < num_partials, other=0.0)
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        rows = tl.load(rows_ptr + at, mask=at < num_visual, other=0)
        weight = tl.load(weights_ptr + rows, mask=at < num_visual, other=0.0)
        tl.store(scores_ptr + at, weight / tl.sum(total, axis=0), mask=at < num_visual)

    return stats_kernel, normalise_kernel


def _check(x_in: Tensor, x_out: Tensor, visual: Tensor, scope: str) -> None:
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    if x_in.ndim != 2 or not x_in.is_floating_point():
        raise ValueError(f"x_in must be 2-D [n, d] of a float dtype, got {describe(x_in)}")
    if x_out.shape != x_in.shape or x_out.device != x_in.device or not x_out.is_floating_point():
        raise ValueError(
            f"x_out must be float with the shape and device of x_in, {describe(x_in)}, "
            f"got {describe(x_out)}"
        )
    if visual.shape != x_in.shape[:1] or visual.dtype != torch.bool:
        raise ValueError(
            f"visual must be a bool mask [{len(x_in)}], one entry per row of x_in, "
            f"got {describe(visual)}"
        )
    if visual.device != x_in.device:
        raise ValueError(f"visual must be on {x_in.device} like x_in, got {visual.device}")
