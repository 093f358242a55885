"""The pages name what the code has: methods, presets, variables and files."""

import json
import re
from pathlib import Path

import pytest

from tokenprune.policies import AXES, methods
from tokenprune.request import PRESETS, parse_pruning

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [
    page.relative_to(ROOT)
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))
    if page.is_file()
]


def test_there_are_pages():
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= {page.name for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_relative_link_leads_to_a_file(page):
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    broken = [
        link
        for link in links
        if not re.match(r"[a-z]+:", link) and not ((ROOT / page).parent / link).exists()
    ]
    assert broken == []


def test_nothing_says_to_install_the_other_projects_tokenprune():
    files = [ROOT / page for page in PAGES]
    files += [f for room in ("tokenprune", "server", "bench") for f in (ROOT / room).rglob("*.py")]
    assert [
        f for f in files if re.search(r'pip install(?: -\S+)* "?tokenprune', f.read_text())
    ] == []


def test_the_readme_table_lists_exactly_the_methods():
    listed = README.partition("| method | keeps")[2].partition("\n\n")[0]
    table = re.findall(r"^\| `(\w+)` \|", listed, re.MULTILINE)
    assert sorted(table) == sorted(m for axis in AXES for m in methods(axis))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_the_readme_names_every_preset(name):
    assert f"`{name}`" in README


def test_the_readme_example_is_legal():
    examples = re.findall(r'"pruning": (\{.*\}\})', README)
    assert examples
    for example in examples:
        parsed = parse_pruning(json.loads(example.rstrip("}") + "}}"))
        assert not parsed.is_off


def test_every_environment_variable_of_ours_is_documented():
    sources = [
        file
        for folder in ("tokenprune", "server", "kernels")
        for file in (ROOT / folder).rglob("*.py")
    ]
    used = {v for f in sources for v in re.findall(r"\bTOKENPRUNE_[A-Z_]+\b", f.read_text())}
    text = "".join((ROOT / page).read_text() for page in PAGES)
    assert used
    assert {variable for variable in used if variable not in text} == set()


def test_the_readme_lists_every_metric_and_no_other():
    from prometheus_client import REGISTRY

    from tokenprune.server import metrics

    assert metrics.NONE  # imported for its registrations
    ours = {f.name for f in REGISTRY.collect() if f.name.startswith("tokenprune_")}
    listed = set(re.findall(r"^\| `(tokenprune_\w+)` \|", README, re.MULTILINE))
    assert {name.removesuffix("_total") for name in listed} == ours
