"""The matrix of support says what the marks of the tests say, and nothing else."""

from pathlib import Path

from bench.publish.pages import ROOT
from bench.publish.support import FEATURES, Proof, proofs, support
from tokenprune.policies import AXES, methods

NAMES = {name for axis in AXES for m in methods(axis) for name in (m, f"{axis}/{m}", f"{axis}/")}


def test_the_marks_of_the_tests_name_columns_and_methods_that_there_are() -> None:
    found = list(proofs(ROOT / "tests"))
    assert len(found) > 10
    for proof in found:
        assert proof.feature in FEATURES, proof.test
        assert set(proof.methods) <= NAMES, proof.test


def test_a_mark_counts_for_its_methods_alone() -> None:
    assert Proof("n", (), None, "t").is_about("kv", "lagkv")
    assert Proof("n", ("kv/",), None, "t").is_about("kv", "random")
    assert not Proof("n", ("kv/",), None, "t").is_about("visual", "random")
    assert not Proof("n", ("visual/random",), None, "t").is_about("kv", "random")


def test_cells_say_proved_refused_or_untested(tmp_path: Path) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_a.py").write_text(
        '@pytest.mark.proves("n", "lagkv")\n'
        '@pytest.mark.proves("beam search", refused="no")\n'
        "def test_x(): ...\n"
    )
    lines = support(tests).splitlines()
    (row,) = [line for line in lines if line.startswith("| n |")]
    assert row.count("proved 1") == 1
    assert row.count("untested") == row.count("|") - 3
    (row,) = [line for line in lines if line.startswith("| beam search |")]
    assert row.count("refused 2") == row.count("|") - 2
    assert lines[-1] == "2. `tests/test_a.py::test_x`: *no*"
