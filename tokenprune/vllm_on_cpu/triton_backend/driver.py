"""The driver half of the `cpu` backend: reports the CPU as Triton's device."""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

# as modules, because Triton takes every concrete class it finds here for the driver itself
from triton.backends import compiler as triton_compiler
from triton.backends import driver as triton_driver


class CPUDriver(triton_driver.DriverBase):
    """The driver of a machine without a GPU whose kernels are interpreted."""

    @classmethod
    def is_active(cls) -> bool:
        """Never beside CUDA: Triton refuses to start with two active drivers."""
        return os.environ.get("TRITON_INTERPRET") == "1" and not torch.cuda.is_available()

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Refuse: only a compiled launcher needs C++ types."""
        raise NotImplementedError(f"the cpu backend has no compiled launcher, got type {ty!r}")

    def get_current_target(self) -> Any:
        """The one target; no architecture, warps of one thread."""
        return triton_compiler.GPUTarget("cpu", "interpreter", 1)

    def get_active_torch_device(self) -> torch.device:
        """Where tensors of kernels live."""
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable[..., list[float]]:
        """A timer for `triton.autotune`, which measures even under the interpreter."""
        return _time_once


def _time_once(
    kernel_call: Callable[[], Any], *, quantiles: Sequence[float], **_: Any
) -> list[float]:
    start = time.perf_counter()
    kernel_call()
    return [(time.perf_counter() - start) * 1e3] * len(quantiles)
