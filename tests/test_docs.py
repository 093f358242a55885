"""The pages say what the code has: methods, presets, metrics, files; and their examples work."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tokenprune import kernels
from tokenprune.demo.local_server import LocalServer
from tokenprune.policies import AXES, methods
from tokenprune.request import PRESETS, parse_pruning

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [
    page.relative_to(ROOT)
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))
    if page.is_file()
]
METHODS = [(axis, name) for axis in AXES for name in methods(axis)]
# what else may name a method, with the reason
NAMED_ELSEWHERE = {
    "tokenprune/request.py": "the presets",
    "tokenprune/demo/quiz.py": "the demo's choice of rows",
    "tokenprune/calibration/methods.py": "the search space of vflowopt",
}
# commands that no test runs, by how they begin
NOT_RUN = {
    "make ": "it builds an environment, and the tests run inside it",
    "pip ": "it changes the environment",
    "python -m bench.": "it measures for minutes",
    "source .venv/bin/activate": "the tests run inside that environment",
    "tokenprune serve llava-hf/": "it downloads a model",
    "tokenprune calibrate MODEL": "it stands for the user's model",
    "tokenprune serve MODEL": "it stands for the user's model",
}
SERVE = "tokenprune serve"


def test_there_are_pages():
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= {page.name for page in PAGES}


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 180


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    text = (ROOT / page).read_text()
    broken = []
    for link, heading in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        target = (ROOT / page).parent / link if link else ROOT / page
        if not target.exists() or (heading and heading not in _headings(target)):
            broken.append(f"{link}#{heading}")
    assert broken == []


def _headings(page: Path) -> set[str]:
    """Return the anchors that code hosts give the headings of a page."""
    found = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}


def test_nothing_says_to_install_the_other_projects_tokenprune():
    files = [ROOT / page for page in PAGES]
    files += [f for room in ("tokenprune", "server", "bench") for f in (ROOT / room).rglob("*.py")]
    assert [
        f for f in files if re.search(r'pip install(?: -\S+)* "?tokenprune', f.read_text())
    ] == []


@pytest.mark.parametrize("page", ["README.md", "docs/methods/README.md"])
def test_tables_of_methods_list_exactly_the_methods(page):
    links = re.findall(
        r"^\| \[`?\w+`?\]\(\S*?(\w+)-(\w+)\.md\) \|", (ROOT / page).read_text(), re.M
    )
    assert sorted(links) == sorted(METHODS)


@pytest.mark.parametrize(("axis", "name"), METHODS)
def test_a_method_has_every_file_that_contributing_names(axis, name):
    assert (ROOT / f"tokenprune/policies/{axis}/{name}.py").is_file()
    assert (ROOT / f"tests/policies/{axis}/test_{name}.py").is_file()
    page = (ROOT / f"docs/methods/{axis}-{name}.md").read_text()
    # the files themselves exist, as every link does
    for file in (f"tokenprune/policies/{axis}/{name}.py", f"tests/policies/{axis}/test_{name}.py"):
        assert f"(../../{file})" in page
    assert f"`{name}`" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(("axis", "name"), METHODS)
def test_the_page_of_a_method_names_its_operators(axis, name):
    source = (ROOT / f"tokenprune/policies/{axis}/{name}.py").read_text()
    used = {
        # by the file it lives in
        getattr(kernels, alias.name).__module__.rpartition(".")[2]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.module == "tokenprune.kernels"
        for alias in node.names
    }
    page = (ROOT / f"docs/methods/{axis}-{name}.md").read_text()
    # lag_keep is a choice of the highest in each row, which others borrow
    assert {op for op in used - {"lag_keep"} if f"(../../kernels/{op}.py)" not in page} == set()


def test_no_other_file_names_a_method():
    names = {name for _, name in METHODS}
    naming = set()
    for room in ("tokenprune", "server", "kernels"):
        for file in (ROOT / room).rglob("*.py"):
            path = file.relative_to(ROOT).as_posix()
            constants = (n.value for n in ast.walk(ast.parse(file.read_text())) if _is_word(n))
            if names.intersection(constants) and path not in {
                f"tokenprune/policies/{axis}/{name}.py" for axis, name in METHODS
            }:
                naming.add(path)
    assert naming == set(NAMED_ELSEWHERE)


def _is_word(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_the_pages_name_every_preset(name):
    assert f"| `{name}` |" in (ROOT / "docs" / "api.md").read_text()
    assert f"`{name}`" in README


def test_the_examples_of_the_field_are_legal():
    examples = []
    for page in PAGES:
        for block in re.findall(
            r"^```json\n(\{\"pruning\".*?)^```", (ROOT / page).read_text(), re.M | re.S
        ):
            examples.append((page, json.loads(block)["pruning"]))
    assert len(examples) >= 2
    for page, example in examples:
        if "plugins" not in page.parts:
            assert not parse_pruning(example).is_off


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


def test_the_table_of_metrics_lists_every_metric_and_no_other():
    from prometheus_client import REGISTRY

    from tokenprune.server import metrics

    assert metrics.NONE  # imported for its registrations
    ours = {f.name for f in REGISTRY.collect() if f.name.startswith("tokenprune_")}
    page = (ROOT / "docs" / "operations.md").read_text()
    listed = set(re.findall(r"^\| `(tokenprune_\w+)` \|", page, re.MULTILINE))
    assert {name.removesuffix("_total") for name in listed} == ours


def test_every_reason_to_skip_is_explained():
    reasons = set()
    for room in ("tokenprune", "server"):
        for file in (ROOT / room).rglob("*.py"):
            text = file.read_text()
            reasons |= set(re.findall(r"PlanSkipped\(\s*\"(\w+)\"", text))
            for bypasses in re.findall(r"^_BYPASSES = \{(.*)\}", text, re.MULTILINE):
                reasons |= set(re.findall(r": \"(\w+)\"", bypasses))
            reasons |= set(re.findall(r"^DEFAULT_REFUSED = \"(\w+)\"", text, re.MULTILINE))
    page = (ROOT / "docs" / "api.md").read_text().partition("Reasons in `skipped`")[2]
    listed = re.findall(r"^\| `(\w+)` \|", page.partition("A request that")[0], re.MULTILINE)
    assert set(listed) == reasons


def blocks(language: str) -> Iterator[tuple[Path, str]]:
    """Yield the code blocks of a language, by page."""
    for page in PAGES:
        text = (ROOT / page).read_text()
        for block in re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            yield page, block


def commands() -> Iterator[tuple[Path, str]]:
    """Yield each command of the pages; one that goes on over several lines is one."""
    for page, block in blocks("sh"):
        if block.startswith("curl"):
            yield page, block
        else:
            yield from ((page, line.partition("  #")[0].strip()) for line in block.splitlines())


COMMANDS = [*commands()]
QUICK = [
    (page, command)
    for page, command in COMMANDS
    if command != SERVE and not command.startswith(("curl", *NOT_RUN))
]
ASKED = [(page, command) for page, command in COMMANDS if command.startswith("curl")]
CLIENTS = [(page, block) for page, block in blocks("python") if "OpenAI(" in block]
OFFLINE = [(page, block) for page, block in blocks("python") if "LLM(" in block]


def pasted(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command from the checkout, as in an active environment."""
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "TRITON_"))}
    environment |= {
        "PATH": os.pathsep.join(paths),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        # a proxy of the environment does not know our loopback
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_every_reason_not_to_run_a_command_is_needed():
    assert QUICK
    assert ASKED
    for start in NOT_RUN:
        assert any(command.startswith(start) for _, command in COMMANDS), start


def test_blocks_of_commands_say_their_language():
    for page in PAGES:
        text = re.sub(r"^```\w+\n.*?^```", "", (ROOT / page).read_text(), flags=re.M | re.S)
        plain = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        plain += re.findall(r"^    (?:pip|make|tokenprune|curl|python) .*$", text, re.MULTILINE)
        assert [b for b in plain if re.match(r"\s*(pip|make|tokenprune|curl|python) ", b)] == [], (
            page
        )


@pytest.mark.parametrize(("page", "command"), QUICK, ids=str)
def test_a_command_works_when_it_is_pasted(page, command):
    done = pasted(["bash", "-c", command])
    assert done.returncode == 0, done.stderr


def test_the_help_names_a_command_that_works():
    help_text = pasted(["tokenprune", "serve", "--help"]).stdout
    assert "tokenprune serve --vllm-help" in " ".join(help_text.split())
    done = pasted(["tokenprune", "serve", "--vllm-help"])
    assert done.returncode == 0, done.stderr
    assert "--max-num-batched-tokens" in done.stdout


def test_the_contributors_example_registers_and_plans():
    ((_, example),) = [(p, b) for p, b in blocks("python") if p.name == "CONTRIBUTING.md"]
    use = (
        "from tokenprune.lengths import PromptLayout\n"
        "from tokenprune.shape import EngineShape\n"
        "policy = First(keep_ratio=0.5)\n"
        "plan = policy.plan(PromptLayout(9, ((1, 7),)), EngineShape(8, (0, 2), 99))\n"
        "print(plan.ranks[-1])\n"
    )
    done = pasted([sys.executable, "-c", example + use])
    assert done.stdout == "(0, 1, 2)\n", done.stderr


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """`tokenprune serve`, as the pages start it."""
    assert any(command == SERVE for _, command in COMMANDS)
    kept = {k: os.environ.pop(k) for k in [*os.environ] if k == "VLLM_ENABLE_V1_MULTIPROCESSING"}
    try:
        with LocalServer(None, [], tmp_path_factory.mktemp("pages") / "log") as running:
            running.wait_until_ready()
            yield running
    finally:
        os.environ.update(kept)


@pytest.mark.vllm
@pytest.mark.parametrize(("page", "command"), ASKED, ids=str)
def test_a_request_is_answered_when_it_is_pasted(page, command, server):
    assert shutil.which("curl")
    done = pasted(["bash", "-c", command.replace("http://localhost:8000", server.url)])
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert "error" not in answer, answer
    shown = [json.loads(block) for other, block in blocks("json") if other == page]
    for example in shown:
        if "choices" in example:
            message = answer["choices"][0]["message"]
            assert example["choices"][0]["message"].items() <= message.items()
            assert example["usage"]["pruning"] == answer["usage"]["pruning"]
            assert example["pruning"] == answer["pruning"]


@pytest.mark.vllm
@pytest.mark.parametrize(("page", "code"), CLIENTS, ids=["-".join(p.parts) for p, _ in CLIENTS])
def test_a_client_works_when_it_is_pasted(page, code, server):
    done = pasted([sys.executable, "-c", code.replace("http://localhost:8000", server.url)])
    assert done.returncode == 0, done.stderr
    assert "transprune" in done.stdout


@pytest.mark.vllm
@pytest.mark.parametrize(("page", "code"), OFFLINE, ids=["-".join(p.parts) for p, _ in OFFLINE])
def test_the_offline_recipe_works_when_it_is_pasted(page, code, tmp_path):
    (tmp_path / "recipe.py").write_text(code)
    done = pasted([sys.executable, str(tmp_path / "recipe.py")])
    assert done.returncode == 0, done.stderr
    # the answer to the question, among the engine's own lines
    assert " diamond" in done.stdout.splitlines()
