"""Each case runs in its own process: the switch works once per process."""

import os
import subprocess
import sys

import pytest
import torch

_SWITCHES = ("TRITON_INTERPRET", "VLLM_USE_V2_MODEL_RUNNER", "PYTHONPATH")


def run(code: str, **env: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in _SWITCHES}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=clean | env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return (done.stdout + done.stderr).strip()


_LIST_BACKENDS = (
    "from importlib.metadata import entry_points;"
    "print('cpu' in entry_points(group='triton.backends').names)"
)


def test_an_installed_package_alone_lists_no_cpu_backend():
    assert run(_LIST_BACKENDS) == "False"


def test_activate_lists_the_backend_for_this_process_and_its_children():
    code = (
        "import subprocess, sys; from tokenprune.vllm_on_cpu import activate; activate();"
        f"exec({_LIST_BACKENDS!r}); sys.stdout.flush();"
        f"subprocess.run([sys.executable, '-c', {_LIST_BACKENDS!r}])"
    )
    assert run(code).split() == ["True", "True"]


def test_activate_imports_no_heavy_module():
    code = (
        "import sys; from tokenprune.vllm_on_cpu import activate; activate();"
        "print({'torch', 'triton', 'vllm', 'numpy'} & set(sys.modules))"
    )
    assert run(code) == "set()"


def test_activate_twice_changes_nothing():
    code = (
        "import os, sys; from tokenprune.vllm_on_cpu import activate; activate();"
        "before = dict(os.environ), list(sys.path); activate();"
        "print(before == (dict(os.environ), sys.path))"
    )
    assert run(code) == "True"


def test_activate_keeps_the_python_path_it_finds():
    code = (
        "import os; from tokenprune.vllm_on_cpu import activate; activate();"
        "print(os.environ['PYTHONPATH'].split(os.pathsep)[0])"
    )
    assert run(code, PYTHONPATH="/somewhere") == "/somewhere"


@pytest.mark.parametrize("name", ["TRITON_INTERPRET", "VLLM_USE_V2_MODEL_RUNNER"])
def test_an_opposite_choice_of_the_user_is_refused(name):
    output = run("from tokenprune.vllm_on_cpu import activate; activate()", **{name: "0"})
    assert f"{name} must be 1 on the CPU" in output
    assert "got '0'; unset it" in output


def test_triton_imported_too_early_is_refused():
    output = run("import triton; from tokenprune.vllm_on_cpu import activate; activate()")
    assert "triton must be imported after tokenprune.vllm_on_cpu.activate()" in output


needs_no_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the cpu backend stays inactive beside CUDA"
)


@needs_no_gpu
def test_triton_imported_after_activate_may_be_followed_by_another_activate():
    code = (
        "from tokenprune.vllm_on_cpu import activate; activate();"
        "from triton.runtime import driver; activate();"
        "print(driver.active.get_current_target().backend)"
    )
    assert run(code) == "cpu"


@needs_no_gpu
def test_the_backend_is_inactive_without_the_interpreter():
    code = (
        "import os; from tokenprune.vllm_on_cpu import activate; activate();"
        "from triton.backends import backends; driver = backends['cpu'].driver;"
        "print(driver.is_active()); del os.environ['TRITON_INTERPRET']; print(driver.is_active())"
    )
    assert run(code).split() == ["True", "False"]
