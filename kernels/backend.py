"""What the host side of every kernel shares: which backend runs, and whole-number arithmetic."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("torch", "triton")


def choose_backend(backend: str | None, device: torch.device) -> str:
    """Return the backend that will run: the caller's, else Triton on CUDA and torch elsewhere.

    Raises:
        ValueError: The name is unknown, or Triton cannot run on `device`.
    """
    if backend is None:
        return "triton" if device.type == "cuda" else "torch"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")
    if backend == "triton" and device.type != "cuda" and not _is_interpreted():
        raise ValueError(
            f"tensors must be on a CUDA device for backend='triton', got {device}; use "
            "backend='torch', or set TRITON_INTERPRET=1 before anything imports triton"
        )
    return backend


def _is_interpreted() -> bool:
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return False
    # tl's own functions were decorated when triton was imported; a later switch misses them
    return bool(triton.knobs.runtime.interpret) and not isinstance(tl.sum, triton.JITFunction)


def device_guard(tensor: Tensor) -> AbstractContextManager[None]:
    """Make the tensor's CUDA device the current one, which is where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def describe(value: Any) -> str:
    """Return shape, dtype and device of a tensor, for the `got` half of an error message."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{list(value.shape)} {value.dtype} on {value.device}"


def ceil_div(a: int, b: int) -> int:
    """Return how many steps of `b` cover `a`."""
    return -(-a // b)


def next_power_of_2(x: int) -> int:
    """Return the smallest power of two that is at least `x`."""
    return 1 << max(x - 1, 0).bit_length()
