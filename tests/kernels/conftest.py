"""Where the kernels run in these tests: on the GPU if there is one, else in the interpreter."""

import importlib
import importlib.util
import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # read when triton is imported and when a kernel is decorated
    os.environ.setdefault("TRITON_INTERPRET", "1")

# kernel and reference read the same rounded inputs and add in float32, so the inputs' dtype does
# not matter: what is left is the order of the sums and the error of exp for logits of about 10
TOLERANCE = {"rtol": 1e-5, "atol": 1e-7}


@pytest.fixture(autouse=True)
def _poison():
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device():
    return torch.device(DEVICE)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(20)


@pytest.fixture
def golden():
    path = Path(__file__).parents[1] / "golden" / "transprune.json"
    return json.loads(path.read_text())


@pytest.fixture
def assert_matches():
    def check(actual, expected, **tolerance):
        expected = torch.as_tensor(expected, dtype=actual.dtype, device=actual.device)
        torch.testing.assert_close(actual, expected, **(tolerance or TOLERANCE))

    return check


@pytest.fixture
def make_mask():
    def make(kind, n):
        mask = torch.zeros(n, dtype=torch.bool)
        if kind == "all":
            mask[:] = True
        elif kind == "one":
            mask[n // 2] = True
        elif kind == "mixed":
            mask[: 2 * n // 3] = True
            mask[::5] = False
            mask[n // 4] = True
        return mask

    return make


@pytest.fixture(scope="module")
def kvpress():
    """Import modules of kvpress by name.

    It pins other versions of half the world, so `make setup` installs it without its dependencies
    and only the files that hold a press are imported.
    """
    spec = importlib.util.find_spec("kvpress")
    assert spec is not None, "make setup installs kvpress"
    root = next(iter(spec.submodule_search_locations or ()))
    saved = {name: m for name, m in sys.modules.items() if name.partition(".")[0] == "kvpress"}
    # the packages' own __init__ files import every press and all of their dependencies
    for name, path in (("kvpress", root), ("kvpress.presses", f"{root}/presses")):
        package = types.ModuleType(name)
        package.__path__ = [path]
        sys.modules[name] = package
    try:
        yield lambda name: importlib.import_module(f"kvpress.{name}")
    finally:
        for name in [n for n in sys.modules if n.partition(".")[0] == "kvpress"]:
            del sys.modules[name]
        sys.modules.update(saved)
