"""The matrix of methods against what an engine can do besides, from the marks of the tests.

    @pytest.mark.proves("tensor parallel", "uniform", "transprune")
    @pytest.mark.proves("beam search", refused="use_beam_search must be false with pruning")

names a column, and the methods for which the test shows it; without any, all methods. `refused`
is how the 400 begins. What no test names is untested.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenprune.policies import AXES, methods

FEATURES = (
    "tensor parallel",
    "data parallel",
    "chunked prefill",
    "prefix cache",
    "preemption",
    "CUDA graphs",
    "async scheduling",
    "LoRA",
    "structured output",
    "fp8 KV cache",
    "speculative decoding",
    "sliding window",
    "n",
    "beam search",
)


@dataclass(frozen=True)
class Proof:
    """What one mark says.

    Attributes:
        feature: One of `FEATURES`.
        methods: For which methods, as `axis/method` or `method`; none for all.
        refused: How the refusal reads, or None where it works.
        test: Id of the test.
    """

    feature: str
    methods: tuple[str, ...]
    refused: str | None
    test: str

    def is_about(self, axis: str, method: str) -> bool:
        """Return whether it is about a method; `axis/` alone names all of an axis."""
        names = (method, f"{axis}/{method}", f"{axis}/")
        return not self.methods or any(name in self.methods for name in names)


def proofs(tests: Path) -> Iterator[Proof]:
    """Yield what the marks of all tests say."""
    for file in sorted(tests.rglob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                test = f"{file.relative_to(tests.parent)}::{node.name}"
                for mark in node.decorator_list:
                    if isinstance(mark, ast.Call) and ast.unparse(mark.func).endswith(".proves"):
                        words = [ast.literal_eval(word) for word in mark.args]
                        named = {k.arg: ast.literal_eval(k.value) for k in mark.keywords}
                        yield Proof(words[0], tuple(words[1:]), named.get("refused"), test)


def support(tests: Path) -> str:
    """Return the matrix, and the tests that its cells name."""
    found = list(proofs(tests))
    columns = [(axis, method) for axis in AXES for method in methods(axis)]
    lines = [f"| | {' | '.join(f'{axis} `{method}`' for axis, method in columns)} |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    numbers = {proof: number for number, proof in enumerate(found, 1)}
    for feature in FEATURES:
        cells = [feature]
        for axis, method in columns:
            here = [p for p in found if p.feature == feature and p.is_about(axis, method)]
            words = [f"{'refused' if p.refused else 'proved'} {numbers[p]}" for p in here]
            cells.append(", ".join(words) or "untested")
        lines.append(f"| {' | '.join(cells)} |")
    notes = [
        f"{number}. `{proof.test}`" + (f": *{proof.refused}*" if proof.refused else "")
        for proof, number in numbers.items()
    ]
    return "\n".join([*lines, "", *notes])
