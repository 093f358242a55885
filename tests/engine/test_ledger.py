"""The ledger of what we touch of vLLM names what the code touches, no more and no less."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEDGER = (ROOT / "docs" / "ledger.md").read_text()
ROOMS = ("tokenprune/engine", "tokenprune/vllm_on_cpu", "server")
# what of these calls is no object of vLLM's, or is a door that vLLM opens itself
OURS = ("sys.argv", "response.body")


def files() -> Iterator[tuple[str, ast.Module]]:
    for room in ROOMS:
        for file in sorted((ROOT / room).rglob("*.py")):
            name = file.relative_to(ROOT).as_posix().removeprefix("tokenprune/")
            yield name, ast.parse(file.read_text())


def section(title: str) -> list[list[str]]:
    """Return the cells of a table, without head and rule."""
    text = LEDGER.partition(f"## {title}\n")[2].partition("\n## ")[0]
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def named(cell: str) -> str:
    (name,) = re.findall(r"`([^`]+)`", cell)[:1]
    return name


def targets(tree: ast.AST) -> Iterator[ast.Attribute]:
    """Yield every attribute that is assigned to."""
    for node in ast.walk(tree):
        assigned: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            assigned = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            assigned = [node.target]
        for target in assigned:
            parts = target.elts if isinstance(target, ast.Tuple) else [target]
            yield from (part for part in parts if isinstance(part, ast.Attribute))


def own_attributes() -> set[str]:
    """Names of attributes that classes of ours have."""
    found = set()
    for folder in ("tokenprune", "server"):
        for file in (ROOT / folder).rglob("*.py"):
            for cls in ast.walk(ast.parse(file.read_text())):
                if isinstance(cls, ast.ClassDef):
                    found |= {t.attr for t in targets(cls) if ast.unparse(t.value) == "self"}
                    fields = (n for n in cls.body if isinstance(n, ast.AnnAssign))
                    found |= {ast.unparse(field.target) for field in fields}
    return found


def test_the_classes_we_derive_from_are_those_of_the_ledger() -> None:
    found = set()
    for _, tree in files():
        imported = {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm")
            for alias in node.names
        }
        for cls in ast.walk(tree):
            if isinstance(cls, ast.ClassDef):
                bases = (ast.unparse(base) for base in cls.bases)
                found |= {(imported[base], cls.name) for base in bases if base in imported}
    listed = section("Classes of vLLM that ours derive from")
    assert {(named(row[0]), named(row[1])) for row in listed} == found


def test_the_hooks_are_those_of_the_ledger() -> None:
    found = {
        (ast.unparse(call.func), name)
        for name, tree in files()
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and re.search(r"register\w*_hook$", ast.unparse(call.func))
    }
    listed = section("Hooks on modules of the model")
    assert {(named(row[1]), named(row[2])) for row in listed} == found


def test_the_attributes_we_set_are_those_of_the_ledger() -> None:
    own = own_attributes()
    found = set()
    for name, tree in files():
        for target in targets(tree):
            text = ast.unparse(target)
            if ast.unparse(target.value) != "self" and target.attr not in own and text not in OURS:
                found.add((text, name))
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "setattr":
                found.add((ast.unparse(call), name))
    # putting back what was there needs no entry of its own
    found.discard(("setattr(module, name, original)", "engine/worker.py"))
    listed = section("Attributes of vLLM's objects that we set")
    assert {(named(row[0]), named(row[1])) for row in listed} == found


@pytest.mark.parametrize("folder", ["tokenprune/policies", "tokenprune/demo", "kernels"])
def test_other_rooms_touch_nothing(folder: str) -> None:
    for file in (ROOT / folder).rglob("*.py"):
        assert not re.search(r"_hook\(|^\s*(from|import) vllm\b", file.read_text(), re.M), file
