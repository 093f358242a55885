"""The figures and tables of the pages are those of the committed results and of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.publish.equal_work import equal_work, held
from bench.publish.pages import ROOT, blocks, main, with_block
from bench.quality.report import Row
from tokenprune.errors import TokenPruneError
from tokenprune.policies import AXES, methods

BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"
NAMES = [
    "README.md",
    *("docs/quality.md", "docs/capacity.md", "docs/models.md", "docs/support.md"),
    *(f"docs/methods/{axis}-{name}.md" for axis in AXES for name in methods(axis)),
]


@pytest.fixture(scope="module")
def texts() -> dict[str, dict[str, str]]:
    return blocks()


def test_every_page_with_marks_has_its_blocks_here(texts: dict[str, dict[str, str]]) -> None:
    assert list(texts) == NAMES
    marked = {
        str(page.relative_to(ROOT))
        for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))
        if ":begin -->" in page.read_text()
    }
    assert marked == set(NAMES)
    for name, page in texts.items():
        found = re.findall(r"<!-- ([\w-]+):begin -->", (ROOT / name).read_text())
        assert sorted(found) == sorted(page), name


@pytest.mark.parametrize("name", NAMES)
def test_a_page_shows_the_committed_results(name: str, texts: dict[str, dict[str, str]]) -> None:
    page = (ROOT / name).read_text()
    for block, text in texts[name].items():
        assert page == with_block(page, block, text), "write it with: python -m bench.publish"


@pytest.mark.parametrize("name", NAMES[:3])
def test_tables_of_figures_fit_eighty_columns(name: str, texts: dict[str, dict[str, str]]) -> None:
    lines = [line for text in texts[name].values() for line in text.splitlines()]
    tables = [line for line in lines if line.startswith(("|", " "))]
    assert tables
    assert [line for line in tables if len(line) > 80] == []


def row(axis: str, method: str, keep_ratio: float, right: int, kept: float) -> Row:
    return Row(f"all {axis}", axis, method, keep_ratio, 100, right, 200.0, kept, 0, 0, 0)


def test_rows_at_equal_work_hold_about_as_many_tokens() -> None:
    rows = {
        "visual": [
            row("visual", "off", 1.0, 90, 200),
            row("visual", "transprune", 0.5, 89, 140),
            row("visual", "transprune", 0.25, 80, 100),
            row("visual", "vflowopt", 0.5, 70, 102),
            row("visual", "vflowopt", 0.25, 60, 50),
            row("visual", "uniform", 0.5, 50, 120),
            row("visual", "all-axes", 0.25, 85, 100),
        ],
        "kv": [row("kv", "off", 1.0, 90, 200), row("kv", "lagkv", 0.5, 80, 120)],
    }
    lines = [
        [cell.strip() for cell in line.split("|")[1:4]] for line in equal_work(rows).split("\n")
    ]
    assert lines[2:] == [
        ["visual: off", "", "100 %"],
        ["visual: transprune", "0.25", "50 %"],
        ["visual: vflowopt", "0.5", "51 %"],
        ["kv: off", "", "100 %"],
        ["kv: lagkv", "0.5", "60 %"],
    ]
    assert held(rows["visual"][1]) == 0.7


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


def test_the_tool_writes_all_pages_or_none(
    texts: dict[str, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def marks(name: str) -> str:
        return "".join(f"<!-- {b}:begin -->old<!-- {b}:end -->\n" for b in texts[name])

    for name in NAMES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(marks(name))
    assert main(["--root", str(tmp_path)]) == 0
    for name, page in texts.items():
        assert all(text in (tmp_path / name).read_text() for text in page.values())
    (tmp_path / NAMES[0]).write_text(marks(NAMES[0]))
    (tmp_path / NAMES[-1]).write_text("")
    assert main(["--root", str(tmp_path)]) == 2
    assert f"{NAMES[-1]}: the page must hold <!--" in capsys.readouterr().err
    assert (tmp_path / NAMES[0]).read_text() == marks(NAMES[0])
