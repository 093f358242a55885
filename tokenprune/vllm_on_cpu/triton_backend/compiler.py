"""The compiler half of the `cpu` backend: it exists to be listed, the interpreter never asks it."""

from types import ModuleType
from typing import Any, NoReturn

# as a module, because Triton takes every concrete class it finds here for the backend itself
from triton.backends import compiler as triton_compiler


class CPUBackend(triton_compiler.BaseBackend):
    """Refuses to compile, so that a kernel that escapes the interpreter fails with a reason."""

    @staticmethod
    def supports_target(target: Any) -> bool:
        """Whether `target` is the one that `CPUDriver` reports."""
        return target.backend == "cpu"

    def hash(self) -> str:
        """Constant: nothing is compiled, so nothing is cached."""
        return "cpu-interpreter"

    def parse_options(self, options: dict[str, Any]) -> NoReturn:
        """Refuse: options are parsed only for a compilation."""
        raise _not_interpreted()

    def add_stages(self, stages: dict[str, Any], options: object, language: Any = None) -> NoReturn:
        """Refuse: there are no compiler stages."""
        raise _not_interpreted()

    def load_dialects(self, context: Any) -> None:
        """Nothing to load."""

    def get_module_map(self) -> dict[str, ModuleType]:
        """No interface module has a CPU implementation."""
        return {}


def _not_interpreted() -> RuntimeError:
    return RuntimeError(
        "a kernel on the cpu backend must be interpreted, got a request to compile it; "
        "set TRITON_INTERPRET=1 before the kernel is imported"
    )
