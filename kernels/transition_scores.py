"""transition_scores: how much one sub-module turns and stretches each visual token (TTV).

    m_i = |x_out_i| / |x_in_i|        d_i = cos(x_out_i, x_in_i)
    score_i = m_i * softmax_i(1 - |d_i|)

The softmax needs no largest term, since 1 - |d| is at most 1. So its numerators and its sum can be
had of any part of the rows, and those of all parts make the scores: see `transition_terms`.

`signed` takes 1 - d instead, `scope="all"` a softmax over every row: together the released code.
An all-zero input row has m = 0 here; the released code divides 0 by 0. A row whose d is undefined,
because it holds NaN or infinity, scores 0 and takes no part in the softmax.

Source: TransPrune, arXiv 2507.20630; code liaolea/TransPrune@c9e8284. The paper is the default.
The kernel reads each row once and sums in float32; it differs from the reference by rounding only.
"""

import torch
from torch import Tensor

from tokenprune.kernels.ops.backend import choose_backend, describe

# lower bound of each norm inside the cosine, as in torch.nn.functional.cosine_similarity
EPS = 1e-8
SCOPES = ("visual", "all")


def transition_terms(
    x_in: Tensor,
    x_out: Tensor,
    visual: Tensor,
    *,
    signed: bool = False,
    scope: str = "visual",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return numerators and denominator of the scores, of some rows of a sub-module.

    Args:
        x_in: `[n, d]` input of the sub-module, after its norm; any float dtype, any strides.
        x_out: `[n, d]` output before the residual is added.
        visual: `[n]` bool, true for visual tokens. Counting them synchronises with the GPU.
        signed: Take `1 - d` (released code) instead of `1 - |d|` (paper).
        scope: Rows in the softmax: `visual` (paper) or `all` given rows (released code).
        backend: `torch`, `triton` (CUDA, or the interpreter), or None to choose by device.

    Returns:
        `[n_visual]` float32 in the order of the rows, empty without visual tokens; and `[]`
        float32, 0 where no row is defined. Divided by the sum of the second over all parts, the
        first are the scores.

    Raises:
        ValueError: A shape, dtype, device or name is not as above.
    """
    _check(x_in, x_out, visual, scope)
    if choose_backend(backend, x_in.device) == "torch":
        weighted, total = transition_terms_reference(
            x_in, x_out, visual, signed=signed, scope=scope
        )
        return weighted.float(), total.float()
    from tokenprune.kernels.ops.triton.transition_scores import transition_terms_triton

    return transition_terms_triton(x_in, x_out, visual, signed=signed, scope=scope)


def transition_scores(
    x_in: Tensor,
    x_out: Tensor,
    visual: Tensor,
    *,
    signed: bool = False,
    scope: str = "visual",
    backend: str | None = None,
) -> Tensor:
    """Score the visual tokens by the transition of one sub-module, all rows given.

    Arguments and errors are those of `transition_terms`.

    Returns:
        `[n_visual]` float32 in the order of the rows; empty without visual tokens.
    """
    return _quotient(
        *transition_terms(x_in, x_out, visual, signed=signed, scope=scope, backend=backend)
    )


def _quotient(weighted: Tensor, total: Tensor) -> Tensor:
    """Return the scores of `transition_terms`; zeros where no row is defined."""
    return weighted / torch.where(total > 0, total, 1.0)


def transition_terms_reference(
    x_in: Tensor, x_out: Tensor, visual: Tensor, *, signed: bool = False, scope: str = "visual"
) -> tuple[Tensor, Tensor]:
    """Compute `transition_terms` in torch: in float32, or in float64 for float64 inputs."""
    if scope == "visual":
        x_in, x_out, visual = x_in[visual], x_out[visual], visual[visual]
    dtype = torch.promote_types(torch.promote_types(x_in.dtype, x_out.dtype), torch.float32)
    x_in, x_out = x_in.to(dtype), x_out.to(dtype)

    norm_in = torch.linalg.vector_norm(x_in, dim=-1)
    norm_out = torch.linalg.vector_norm(x_out, dim=-1)
    cosine = (x_in * x_out).sum(-1) / (norm_in.clamp_min(EPS) * norm_out.clamp_min(EPS))
    magnitude = torch.where(norm_in > 0, norm_out / norm_in, 0.0)
    # the direction less its largest value
    exponent = -1 - cosine if signed else -cosine.abs()
    undefined = exponent.isnan()
    weight = exponent.exp().masked_fill(undefined, 0.0)
    return (weight * magnitude).masked_fill(undefined, 0.0)[visual], weight.sum()


def transition_scores_reference(
    x_in: Tensor, x_out: Tensor, visual: Tensor, *, signed: bool = False, scope: str = "visual"
) -> Tensor:
    """Compute `transition_scores` in torch: in float32, or in float64 for float64 inputs."""
    return _quotient(*transition_terms_reference(x_in, x_out, visual, signed=signed, scope=scope))


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
