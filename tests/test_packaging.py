"""The layout of the repository survives packaging, and shadows nobody's modules."""

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

from tokenprune.demo import builtin, quiz
from tokenprune.installation import DISTRIBUTION

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    # built from a copy: setuptools leaves a `build` folder that would feed the next wheel
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "tokenprune", "server", "kernels"):
        subprocess.run(["cp", "-R", "-P", ROOT / name, source], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*command, "--no-index", "-w", folder, source], check=True, capture_output=True, cwd=folder
    )
    (wheel,) = folder.glob("vllm_tokenprune-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


@pytest.mark.parametrize("room", ["server", "kernels"])
def test_top_level_rooms_are_no_packages(room: str) -> None:
    assert (ROOT / room).is_dir()
    assert not (ROOT / room / "__init__.py").exists()


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("tokenprune/server", "../server"),
        ("tokenprune/kernels/ops", "../../kernels"),
    ],
)
def test_rooms_are_linked_by_relative_paths(link: str, target: str) -> None:
    assert os.readlink(ROOT / link) == target
    assert (ROOT / link).is_dir()


def test_importing_the_package_loads_no_heavy_library() -> None:
    code = "import json, sys, tokenprune; print(json.dumps(sorted(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)
    loaded = set(json.loads(answer.stdout))
    assert "tokenprune" in loaded
    assert not loaded & {"torch", "vllm", "transformers", "triton", "numpy"}


def test_a_package_called_kernels_wins_over_our_folder(tmp_path: Path) -> None:
    # Hugging Face's `kernels` on a user's machine; transformers imports names from it
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("owner = 'somebody else'\n")
    answer = subprocess.run(
        [sys.executable, "-c", "import kernels, tokenprune; print(kernels.owner)"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,  # `python -c` puts our folder first on the path
    )
    assert answer.stdout.strip() == "somebody else"


@pytest.mark.parametrize(
    ("room", "packaged"), [("server", "tokenprune/server"), ("kernels", "tokenprune/kernels/ops")]
)
def test_wheel_holds_the_linked_rooms_as_files(
    wheel_names: set[str], room: str, packaged: str
) -> None:
    sources = {
        f"{packaged}/{path.relative_to(ROOT / room).as_posix()}"
        for path in (ROOT / room).rglob("*.py")
    }
    assert sources, f"{room}/ holds no Python file"
    assert sources <= wheel_names


def test_wheel_holds_the_interpreter_backend_for_triton(wheel_names: set[str]) -> None:
    site = "tokenprune/vllm_on_cpu/site/"
    files = [name for name in wheel_names if name.startswith(site) and ".dist-info/" in name]
    assert any(name.endswith("/entry_points.txt") for name in files)


def test_wheel_holds_the_built_in_model(wheel_names: set[str]) -> None:
    assert {f"tokenprune/demo/model/{name}" for name in builtin.FILES} <= wheel_names


def test_wheel_holds_the_questions_of_the_demo(wheel_names: set[str]) -> None:
    names = {path.name for path in quiz.FOLDER.iterdir()}
    assert quiz.INDEX in names
    assert {f"tokenprune/demo/pictures/{name}" for name in names} <= wheel_names


def test_wheel_brings_no_other_top_level_name(wheel_names: set[str]) -> None:
    tops = {name.split("/", 1)[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"tokenprune"}
    assert "tokenprune/py.typed" in wheel_names


def test_entry_points_name_things_that_exist() -> None:
    points = distribution(DISTRIBUTION).entry_points
    assert {point.group for point in points} >= {"console_scripts", "vllm.general_plugins"}
    for point in points:
        assert importlib.util.find_spec(point.module) is not None, point
