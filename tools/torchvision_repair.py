"""Let `import torchvision` succeed when its compiled operators do not match torch.

The registry's Linux torchvision is a CUDA build. Beside a CPU torch its operator library cannot
be loaded, so `torchvision/_meta_registrations.py` finds no schema for `nms` and `qnms`, and the
whole import fails. vLLM's multimodal models import torchvision without using either operator:
declaring the two schemas is enough.

`tools/setup.py` copies this file into the environment's site-packages, with a `.pth` line that
imports it at interpreter start, and only where `import torchvision` failed. It imports neither
torch nor torchvision itself; it acts when torchvision reaches the failing module, and does nothing
when the operators are there, so a matching torchvision installed later works as usual.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

_FAILING_MODULE = "torchvision._meta_registrations"
_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_libraries: list[object] = []  # torch withdraws the schemas when their library is collected


def _declare_operators() -> None:
    import torch

    missing = [op for op in ("nms", "qnms") if not hasattr(torch.ops.torchvision, op)]
    if missing:
        library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for op in missing:
            library.define(op + _SIGNATURE)
        _libraries.append(library)


class _DeclaringLoader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        _declare_operators()
        super().exec_module(module)


class _TorchvisionFinder:
    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _FAILING_MODULE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _DeclaringLoader(spec.loader.name, spec.loader.path)
        return spec


sys.meta_path.insert(0, _TorchvisionFinder)
