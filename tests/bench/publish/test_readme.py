"""The README's figures are those of the committed results, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.publish import readme
from bench.publish.readme import blocks, with_block
from tokenprune.errors import TokenPruneError

BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"
NAMES = ["demo", "quality-visual", "quality-kv", "quality-channels", "capacity"]


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    return blocks()


def test_every_measured_part_of_the_readme_has_a_name_here(texts: dict[str, str]) -> None:
    assert list(texts) == NAMES
    assert readme.README.read_text().count(":begin -->") == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_shows_the_committed_results(name: str, texts: dict[str, str]) -> None:
    page = readme.README.read_text()
    assert page == with_block(page, name, texts[name]), "write it with: python -m bench.publish"


@pytest.mark.parametrize("name", NAMES)
def test_tables_fit_eighty_columns(name: str, texts: dict[str, str]) -> None:
    tables = [line for line in texts[name].splitlines() if line.startswith(("|", " "))]
    assert tables
    assert [line for line in tables if len(line) > 80] == []


def test_the_text_goes_between_the_marks_and_nowhere_else() -> None:
    page = f"# Title\n\n{BEGIN}\nold\n{END}\n\nmore\n"
    once = with_block(page, "demo", "new\n")
    assert once == f"# Title\n\n{BEGIN}\nnew\n{END}\n\nmore\n"
    assert with_block(once, "demo", "new") == once


@pytest.mark.parametrize(
    "page", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}", f"{BEGIN}{END}{END}"]
)
def test_a_page_without_its_marks_is_refused(page: str) -> None:
    with pytest.raises(TokenPruneError, match="once each, in this order"):
        with_block(page, "demo", "new")


def test_the_tool_writes_all_blocks_or_none(
    texts: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "README.md"
    marks = [f"<!-- {name}:begin -->old<!-- {name}:end -->\n" for name in NAMES]
    page.write_text("".join(marks))
    assert readme.main(["--readme", str(page)]) == 0
    assert all(text in page.read_text() for text in texts.values())
    page.write_text(marks[0])
    assert readme.main(["--readme", str(page)]) == 2
    assert "must hold <!-- quality-visual:begin -->" in capsys.readouterr().err
    assert page.read_text() == marks[0]
