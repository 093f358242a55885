"""Which room may import which: every door is one-way, and the rules are this file.

Rules read the source, so an import inside a function or under `TYPE_CHECKING` counts too.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

HEAVY = frozenset({"vllm", "fastapi", "starlette"})
HTTP_ROOMS = frozenset({"tokenprune.server", "tokenprune.cli"})

# the rooms that know vLLM: what prunes in it, and what lets it run without a GPU
VLLM_ROOMS = ("tokenprune/engine", "tokenprune/vllm_on_cpu")
# every file outside of them that names vLLM, with the reason
VLLM_EXCEPTIONS = {
    "server/endpoints.py": "the endpoint plugin joins vLLM's metrics registry and reads its dtypes",
    "server/admission.py": "a refusal is an error of vLLM's, which its routes answer with a 400",
}

# under which names the folders are imported
PACKAGES = {
    "bench": "bench",
    "kernels": "tokenprune.kernels.ops",
    "server": "tokenprune.server",
    "tokenprune": "tokenprune",
}


@dataclass(frozen=True)
class Rule:
    """What the files below `path` may import.

    Attributes:
        path: File or folder, relative to the repository.
        only: Third-party packages and modules of ours that are allowed; the standard library
            always is. None means anything that is not forbidden.
        never: Packages and modules that are forbidden.
    """

    path: str
    only: frozenset[str] | None = None
    never: frozenset[str] = frozenset()

    def allows(self, module: str) -> bool:
        """Tell whether the rule lets `module` in."""
        if _is_below(module, self.never):
            return False
        if self.only is None or module.partition(".")[0] in sys.stdlib_module_names:
            return True
        return _is_below(module, self.only)


RULES = [
    Rule("kernels", only=frozenset({"torch", "triton", "tokenprune.kernels"})),
    # launch code and kernels know no operator: what they need is handed to them
    Rule("kernels/triton", only=frozenset({"torch", "triton", "tokenprune.kernels.ops.backend"})),
    Rule("tokenprune/kernels", only=frozenset({"torch", "tokenprune.kernels"})),
    Rule("tokenprune/__init__.py", only=frozenset()),
    Rule("tokenprune/errors.py", only=frozenset()),
    Rule("tokenprune/figures.py", only=frozenset({"pydantic"})),
    Rule("tokenprune/installation.py", only=frozenset({"tokenprune.errors"})),
    Rule("tokenprune/lengths.py", only=frozenset()),
    Rule("tokenprune/shape.py", only=frozenset()),
    Rule("tokenprune/cost.py", only=frozenset({"tokenprune.lengths", "tokenprune.shape"})),
    Rule(
        "tokenprune/policies",
        only=frozenset(
            {
                "pydantic",
                "torch",
                "tokenprune.errors",
                "tokenprune.kernels",
                "tokenprune.lengths",
                "tokenprune.policies",
                "tokenprune.shape",
            }
        ),
    ),
    Rule(
        "tokenprune/request.py",
        only=frozenset({"pydantic", "tokenprune.errors", "tokenprune.policies"}),
    ),
    Rule(
        "tokenprune/plan.py",
        only=frozenset(
            {
                "tokenprune.errors",
                "tokenprune.lengths",
                "tokenprune.policies",
                "tokenprune.request",
                "tokenprune.shape",
            }
        ),
    ),
    Rule(
        "tokenprune/presets.py",
        only=frozenset({"yaml", "tokenprune.errors", "tokenprune.request"}),
    ),
    # nothing of pruning: stock vLLM runs on it as well
    Rule(
        "tokenprune/vllm_on_cpu",
        only=frozenset(
            {"numpy", "torch", "triton", "vllm", "tokenprune.errors", "tokenprune.vllm_on_cpu"}
        ),
    ),
    Rule(
        "tokenprune/engine",
        never=HTTP_ROOMS | {"fastapi", "starlette", "tokenprune.calibration", "tokenprune.demo"},
    ),
    Rule(
        "tokenprune/calibration",
        never=HEAVY | HTTP_ROOMS | {"torch", "tokenprune.demo", "tokenprune.engine"},
    ),
    Rule(
        "tokenprune/demo",
        never=HEAVY | HTTP_ROOMS | {"tokenprune.calibration", "tokenprune.engine"},
    ),
    Rule(
        "server",
        never=frozenset(
            {
                *("torch", "triton"),
                *("tokenprune.calibration", "tokenprune.demo", "tokenprune.kernels"),
            }
        ),
    ),
]


def _is_below(module: str, parents: frozenset[str]) -> bool:
    return any(module == parent or module.startswith(f"{parent}.") for parent in parents)


def _python_files(path: str) -> list[Path]:
    start = ROOT / path
    # links are not followed: server/ and kernels/ are visited under their own names
    return [start] if start.is_file() else sorted(start.rglob("*.py"))


def _modules(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif node.module is not None:
        # `from tokenprune import engine` imports a module as well
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _imports(source: str) -> Iterator[tuple[int, ast.Import | ast.ImportFrom]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node.lineno, node


def _violations(source: str, rule: Rule) -> list[tuple[int, str]]:
    return [
        (line, module)
        for line, node in _imports(source)
        for module in _modules(node)
        if not rule.allows(module)
    ]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.path)
def test_room_imports_only_what_it_may(rule: Rule) -> None:
    files = _python_files(rule.path)
    assert files, f"{rule.path} holds no Python file"
    found = [
        f"{file.relative_to(ROOT)}:{line} imports {module}"
        for file in files
        for line, module in _violations(file.read_text(), rule)
    ]
    assert found == []


def _says(rule: Rule) -> str:
    if rule.only is None:
        return "all but " + ", ".join(f"`{module}`" for module in sorted(rule.never))
    return ", ".join(f"`{module}`" for module in sorted(rule.only)) or "nothing"


def test_the_table_of_rooms_says_the_same() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    table = page.partition("## Rooms")[2].partition("\n\n`tokenprune/cli.py`")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    assert [(path, imports) for path, _, imports in rows] == [
        (f"`{rule.path}`", _says(rule)) for rule in RULES
    ]


def test_only_two_rooms_know_vllm() -> None:
    files = [*_python_files("tokenprune"), *_python_files("server"), *_python_files("kernels")]
    knowing = {
        file.relative_to(ROOT).as_posix()
        for file in files
        for _, node in _imports(file.read_text())
        if any(_is_below(module, frozenset({"vllm"})) for module in _modules(node))
    }
    for room in VLLM_ROOMS:
        assert any(name.startswith(f"{room}/") for name in knowing), f"{room} names no vLLM"
    outside = {name for name in knowing if not name.startswith(tuple(f"{r}/" for r in VLLM_ROOMS))}
    assert outside == set(VLLM_EXCEPTIONS), "the list of exceptions must match the code"


def test_triton_waits_until_a_kernel_runs() -> None:
    """Operators reach it through `kernels/triton/` and from inside a function only."""
    files = [path for path in (ROOT / "kernels").glob("*.py") if path.name != "backend.py"]
    assert files, "kernels holds no operator"
    for file in files:
        source = file.read_text()
        assert _violations(source, Rule("kernels", never=frozenset({"triton"}))) == [], file.name
        early = [
            module
            for node in ast.parse(source).body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for module in _modules(node)
            if _is_below(module, frozenset({"tokenprune.kernels.ops.triton"}))
        ]
        assert early == [], f"{file.name} imports its kernels before one runs"
    # whether Triton interprets is a question to Triton, asked when a backend is chosen
    body = ast.parse((ROOT / "kernels" / "backend.py").read_text()).body
    early = [m for n in body if isinstance(n, ast.Import | ast.ImportFrom) for m in _modules(n)]
    assert not any(_is_below(module, frozenset({"triton"})) for module in early)


def _parents(module: str, depth: int | None) -> str:
    return ".".join(module.split(".")[:depth])


def _circle(sources: dict[str, str], depth: int | None) -> list[str]:
    """Return modules that import each other in a circle, or nothing where there is none.

    Args:
        sources: Source by module.
        depth: How many parts of a module's name name its room; None keeps modules apart.
    """
    arrows: dict[str, set[str]] = {}
    for module, source in sources.items():
        room = arrows.setdefault(_parents(module, depth), set())
        for whole in (name for _, node in _imports(source) for name in _modules(node)):
            # the last part may be a name in a module
            found = [name for name in (whole, whole.rpartition(".")[0]) if name in sources]
            room.update(_parents(name, depth) for name in found[:1])
        room.discard(_parents(module, depth))
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("depth", [pytest.param(2, id="rooms"), pytest.param(None, id="modules")])
def test_imports_make_no_circle(depth: int | None) -> None:
    sources = {}
    for path, package in PACKAGES.items():
        for file in _python_files(path):
            parts = file.relative_to(ROOT / path).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            sources[name] = file.read_text()
    assert _circle(sources, depth) == []


@pytest.mark.parametrize("path", ["tokenprune", "server", "kernels", "tests"])
def test_imports_are_absolute_and_through_the_package(path: str) -> None:
    files = _python_files(path)
    assert files, f"{path} holds no Python file"
    for file in files:
        for line, node in _imports(file.read_text()):
            where = f"{file.relative_to(ROOT)}:{line}"
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{where} is relative"
            for module in _modules(node):
                assert not _is_below(module, frozenset({"server", "kernels"})), (
                    f"{where} must name tokenprune.{module}"
                )


@pytest.mark.parametrize(
    ("source", "modules"),
    [
        pytest.param("import vllm.v1", ["vllm.v1"], id="plain"),
        pytest.param("def f():\n    from vllm import LLM", ["vllm.LLM"], id="in-a-function"),
        pytest.param("from tokenprune import engine", ["tokenprune.engine"], id="from-package"),
        pytest.param("import vllm_other, json", [], id="prefix-of-a-name"),
    ],
)
def test_rules_see_every_way_to_import(source: str, modules: list[str]) -> None:
    rule = Rule("x", never=frozenset({"vllm", "tokenprune.engine"}))
    assert [module for _, module in _violations(source, rule)] == modules


@pytest.mark.parametrize(
    ("back", "depth", "circle"),
    [
        pytest.param("", 2, [], id="one-way"),
        pytest.param("import a.two.z", None, ["a.two.z", "a.one.x", "a.two.z"], id="modules"),
        pytest.param("from a.two import y", None, [], id="rooms-seen-as-modules"),
        pytest.param("from a.two.y import f", 2, ["a.two", "a.one", "a.two"], id="rooms"),
    ],
)
def test_circles_are_seen(back: str, depth: int | None, circle: list[str]) -> None:
    sources = {"a.one.x": back, "a.two.y": "", "a.two.z": "def f():\n    from a.one import x"}
    found = _circle(sources, depth)
    assert (len(found), set(found)) == (len(circle), set(circle))
