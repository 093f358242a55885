"""Methods of other packages: found by entry point, named and refused where they do not load."""

import io
import os
import re
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tokenprune.demo.checkpoint import build_checkpoint
from tokenprune.demo.local_server import LocalServer

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "docs" / "plugins" / "tokenprune-attended"


def package(folder: Path, name: str, source: str) -> None:
    """Install a package of one module by hand, as pip would leave it."""
    module = f"plugin_{name}"
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[tokenprune.policies]\n{name} = {module}\n")


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"PYTHONPATH": path, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


LAST = """
from typing import Literal
from tokenprune.policies import RankPolicy, ScheduledPolicy, register_policy

@register_policy
class Last(ScheduledPolicy, RankPolicy):
    \"\"\"Keep the last tokens.\"\"\"
    method: Literal["last"] = "last"
    def keep_ranks(self, num_visual, keep):
        return list(range(num_visual - keep, num_visual))
"""


def test_a_method_of_another_package_is_one_like_any_other(tmp_path: Path) -> None:
    package(tmp_path, "last", LAST)
    done = run(
        tmp_path,
        "-c",
        "from tokenprune.lengths import PromptLayout\n"
        "from tokenprune.plan import make_plan\n"
        "from tokenprune.request import parse_pruning\n"
        "from tokenprune.shape import EngineShape\n"
        "asked = parse_pruning({'visual': {'method': 'last', 'keep_ratio': 0.5}})\n"
        "plan = make_plan(asked, PromptLayout(9, ((1, 7),)), EngineShape(8, (0, 2), 99))\n"
        "print(plan.visual.ranks[-1])",
    )
    assert done.stdout == "(3, 4, 5)\n", done.stderr


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        pytest.param("import no_such_module", "ModuleNotFoundError", id="cannot-be-imported"),
        pytest.param("1 / 0", "ZeroDivisionError: division by zero", id="raises"),
        pytest.param("x = 1", "it registers no policy", id="registers-nothing"),
        pytest.param(
            LAST.replace("keep_ranks", "ranks"), "must define keep_ranks", id="leaves-one-out"
        ),
        pytest.param(LAST.replace('"last"', '"uniform"'), "already registered", id="taken-name"),
    ],
)
def test_a_plugin_that_does_not_load_is_named_and_refused_at_start(
    tmp_path: Path, source: str, problem: str
) -> None:
    package(tmp_path, "other", source)
    # nothing may break for those who only import the package
    assert run(tmp_path, "-c", "import tokenprune.request").returncode == 0
    assert run(tmp_path, "-m", "tokenprune.cli", "--version").returncode == 0
    done = run(tmp_path, "-m", "tokenprune.cli", "serve", "m")
    assert done.returncode == 2, done.stderr
    assert "policy plugins must load, got other of package plugin_other" in done.stderr
    assert problem in done.stderr
    # engines refuse it in each of their processes, whoever starts them
    config = "types.SimpleNamespace(additional_config={})"
    code = f"import types\nfrom tokenprune.engine.settings import settings\nsettings({config})"
    done = run(tmp_path, "-c", code)
    assert "ConfigurationError: policy plugins must load, got other" in done.stderr


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """`tokenprune serve` with the example that pip has installed, and that of CONTRIBUTING."""
    folder = tmp_path_factory.mktemp("plugin")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    # from a copy: a build leaves files beside its source
    source = folder / "source"
    source.mkdir()
    for file in EXAMPLE.iterdir():
        if file.is_file():
            (source / file.name).write_text(file.read_text())
    subprocess.run([*pip, "--target", str(folder / "site"), str(source)], check=True, timeout=300)
    page = (ROOT / "CONTRIBUTING.md").read_text()
    package(folder / "site", "first", re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)[0])
    model = folder / "model"
    build_checkpoint(model)
    arguments = [
        *("--enforce-eager", "--dtype", "float32", "--max-model-len", "1024"),
        *("--served-model-name", "tiny", "--kv-cache-memory-bytes", str(64 << 20)),
    ]
    before = os.environ.get("PYTHONPATH")
    paths = [str(folder / "site"), str(ROOT), *([before] if before else [])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    try:
        with LocalServer(model, arguments, folder / "log") as running:
            running.wait_until_ready()
            yield running
    finally:
        os.environ.pop("PYTHONPATH")
        if before:
            os.environ["PYTHONPATH"] = before


def ask(server: LocalServer, **fields: object) -> httpx.Response:
    body = {
        "model": "tiny",
        "prompt": "It was a day. " * 60,
        "max_tokens": 20,
        "temperature": 0,
        **fields,
    }
    with httpx.Client(trust_env=False, timeout=120) as client:
        return client.post(f"{server.url}/v1/completions", json=body)


@pytest.mark.vllm
def test_the_example_package_is_installed_and_served(server: LocalServer) -> None:
    with httpx.Client(trust_env=False, timeout=30) as client:
        listing = client.get(f"{server.url}/v1/pruning/policies").json()
    described = listing["policies"]["kv"]["attended"]
    assert described["defaults"]["window"] == 16
    assert "maximum" in described["schema"]["properties"]["window"]

    kv = {"method": "attended", "keep_ratio": 0.25, "lag": 32, "sink": 4}
    plain, answer = ask(server), ask(server, pruning={"kv": kv})
    assert plain.status_code == answer.status_code == 200, answer.text
    usage = answer.json()["usage"]["pruning"]
    assert answer.json()["pruning"]["applied"]["kv"] == "attended"
    assert usage["kv_tokens_physical"] < usage["kv_tokens_logical"]
    assert answer.headers["x-tokenprune-applied"] == "kv=attended;keep_ratio=0.25;lag=32"
    # the method's choice is its own
    streaming = ask(server, pruning={"kv": kv | {"method": "streaming"}})
    same = [r.json()["choices"][0]["text"] for r in (answer, streaming)]
    assert same[0] != same[1]

    refused = ask(server, pruning={"kv": kv | {"window": 0}})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "pruning.kv.window"

    samples = server.metrics()
    named = {labels for labels in map(str, samples) if "attended" in labels}
    assert any("tokenprune_requests_total" in name for name in named)
    assert any("tokenprune_kv_tokens_total" in name for name in named)


@pytest.mark.vllm
def test_the_contributors_example_is_served(server: LocalServer) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(picture, "PNG")
    url = f"data:image/png;base64,{b64encode(picture.getvalue()).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "What is it?"},
    ]
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 4,
        "pruning": {"visual": {"method": "first", "keep_ratio": 0.25}},
    }
    with httpx.Client(trust_env=False, timeout=120) as client:
        answer = client.post(f"{server.url}/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]["pruning"]
    assert answer.json()["pruning"]["applied"]["visual"] == "first"
    assert list(usage["visual_tokens_kept"].values())[-1] == usage["visual_tokens"] // 4
