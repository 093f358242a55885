"""The layout of the repository survives packaging, and shadows nobody's modules."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from tokenprune.demo import builtin, quiz
from tokenprune.installation import DISTRIBUTION

ROOT = Path(__file__).resolve().parent.parent
LINKS = [("tokenprune/server", "../server"), ("tokenprune/kernels/ops", "../../kernels")]
STEM = DISTRIBUTION.replace("-", "_")
NO_LINKS = "must lead to a folder, got a checkout without symbolic links; git config core.symlinks"


def build(kind: str, source: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False
    )


def built(kind: str, source: Path, folder: Path) -> Path:
    done = build(kind, source, folder)
    assert done.returncode == 0, done.stderr
    (path,) = folder.iterdir()
    return path


def files_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def uncopied(_: str, names: list[str]) -> list[str]:
    """What is not of the project: environments, caches, git, and what earlier builds left."""
    return [
        name
        for name in names
        if name in ("build", "dist", "__pycache__")
        or name.endswith(".egg-info")
        or (name.startswith(".") and name not in (".ci", ".gitignore"))
    ]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # a copy: setuptools leaves a `build` folder that would feed the next wheel
    folder = tmp_path_factory.mktemp("source") / "checkout"
    return Path(shutil.copytree(ROOT, folder, symlinks=True, ignore=uncopied))


@pytest.fixture(scope="module")
def unpacked_sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    archive = built("sdist", source, tmp_path_factory.mktemp("sdist"))
    folder = tmp_path_factory.mktemp("unpacked")
    shutil.unpack_archive(archive, folder)
    (unpacked,) = folder.iterdir()
    return unpacked


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def wheel_names(wheel: Path) -> set[str]:
    return files_of(wheel)


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> PathDistribution:
    (info,) = (path for path in zipfile.Path(wheel).iterdir() if path.name.endswith(".dist-info"))
    return PathDistribution(info)


@pytest.mark.parametrize("room", ["server", "kernels", "kernels/triton"])
def test_top_level_rooms_are_no_packages(room: str) -> None:
    # a folder without that file gives way to an installed package of its name
    assert (ROOT / room).is_dir()
    assert not (ROOT / room / "__init__.py").exists()


@pytest.mark.parametrize(("link", "target"), LINKS)
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


@pytest.mark.parametrize("folder", [".", "kernels", "tokenprune/kernels/ops"])
def test_our_folder_of_kernels_does_not_stand_in_for_triton(folder: str) -> None:
    # `python -c` puts the folder it starts in first on the path
    code = "import triton, triton.language; print(triton.__file__)"
    answer = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT / folder
    )
    assert not Path(answer.stdout.strip()).is_relative_to(ROOT / "kernels")
    assert answer.stdout.strip().endswith("triton/__init__.py")


@pytest.mark.build
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


@pytest.mark.build
def test_wheel_holds_the_triton_kernels_beside_their_operators(wheel_names: set[str]) -> None:
    assert "tokenprune/kernels/ops/triton/lag_keep.py" in wheel_names


@pytest.mark.build
def test_wheel_holds_the_interpreter_backend_for_triton(wheel_names: set[str]) -> None:
    site = "tokenprune/vllm_on_cpu/site/"
    files = [name for name in wheel_names if name.startswith(site) and ".dist-info/" in name]
    assert any(name.endswith("/entry_points.txt") for name in files)


@pytest.mark.build
def test_wheel_holds_the_built_in_model(wheel_names: set[str]) -> None:
    assert {f"tokenprune/demo/model/{name}" for name in builtin.FILES} <= wheel_names


@pytest.mark.build
def test_wheel_holds_the_questions_of_the_demo(wheel_names: set[str]) -> None:
    names = {path.name for path in quiz.FOLDER.iterdir()}
    assert quiz.INDEX in names
    assert {f"tokenprune/demo/pictures/{name}" for name in names} <= wheel_names


@pytest.mark.build
def test_wheel_brings_no_other_top_level_name(wheel_names: set[str]) -> None:
    tops = {name.split("/", 1)[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"tokenprune"}
    assert "tokenprune/py.typed" in wheel_names


@pytest.mark.build
def test_entry_points_name_things_that_exist(metadata: PathDistribution) -> None:
    points = metadata.entry_points
    assert {point.group for point in points} >= {"console_scripts", "vllm.general_plugins"}
    for point in points:
        assert importlib.util.find_spec(point.module) is not None, point


@pytest.mark.build
def test_the_distribution_has_a_name_of_its_own(metadata: PathDistribution) -> None:
    assert metadata.metadata["Name"] == DISTRIBUTION
    assert DISTRIBUTION != "tokenprune"


@pytest.mark.build
def test_links_of_the_index_page_lead_somewhere(metadata: PathDistribution) -> None:
    page = metadata.metadata.get_payload()
    assert isinstance(page, str)
    assert page.strip() == (ROOT / "docs" / "package-index.md").read_text().strip()
    links = re.findall(r"\]\(([^)]*)\)", page)
    assert links
    assert [link for link in links if not link.startswith("https://")] == []


@pytest.mark.build
def test_sdist_builds_the_wheel_that_the_checkout_builds(
    unpacked_sdist: Path, wheel_names: set[str], tmp_path: Path
) -> None:
    again = tmp_path / "again"
    shutil.copytree(unpacked_sdist, again, symlinks=True)
    out = tmp_path / "out"
    out.mkdir()
    assert files_of(built("wheel", again, out)) == wheel_names


@pytest.mark.build
def test_sdist_holds_every_tracked_file(unpacked_sdist: Path) -> None:
    git = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if git.returncode:
        pytest.skip("not a git checkout")
    tracked = [name for name in git.stdout.decode().split("\0") if name and (ROOT / name).exists()]
    assert "tests/test_packaging.py" in tracked
    assert [name for name in tracked if not (unpacked_sdist / name).exists()] == []


@pytest.mark.build
@pytest.mark.parametrize(("link", "target"), LINKS)
def test_sdist_keeps_the_links(unpacked_sdist: Path, link: str, target: str) -> None:
    assert os.readlink(unpacked_sdist / link) == target


@pytest.mark.build
def test_sdist_brings_what_its_tests_need(unpacked_sdist: Path) -> None:
    names = ("layering", "packaging", "docs", "lengths")
    tests = [f"tests/test_{name}.py" for name in names]
    options = ["-q", "-p", "no:cacheprovider", "-m", "not build"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=unpacked_sdist,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.fixture
def checkout_without_links(tmp_path: Path) -> Path:
    """What git writes where it may not make links: text files that hold the target."""
    for name in ("pyproject.toml", "setup.py", "LICENSE", "docs/package-index.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for link, target in LINKS:
        (tmp_path / link).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / link).write_text(target)
    shutil.copy(ROOT / "tokenprune" / "__init__.py", tmp_path / "tokenprune")
    return tmp_path


@pytest.mark.parametrize("kind", ["wheel", "sdist", "editable"])
def test_no_build_without_the_links(checkout_without_links: Path, kind: str) -> None:
    out = checkout_without_links / "out"
    out.mkdir()
    done = build(kind, checkout_without_links, out)
    assert done.returncode != 0
    assert f"tokenprune/server {NO_LINKS}" in done.stderr
    assert list(out.iterdir()) == []


def test_no_import_without_the_links(checkout_without_links: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import tokenprune"],
        cwd=checkout_without_links,
        env={**os.environ, "PYTHONPATH": str(checkout_without_links)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"ImportError: tokenprune/server {NO_LINKS}" in done.stderr
