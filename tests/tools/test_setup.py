"""What the set-up clears away before it installs this package."""

from __future__ import annotations

import venv
from pathlib import Path

import pytest

from tools import setup

Calls = list[tuple[str, ...]]


@pytest.fixture
def pip_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    folder = tmp_path / ".venv"
    venv.create(folder, with_pip=False)
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    monkeypatch.setattr(setup, "VENV", folder)
    monkeypatch.setattr(setup, "PYTHON", folder / "bin" / "python")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    calls: Calls = []
    monkeypatch.setattr(setup, "run_pip", lambda _, *arguments: calls.append(arguments))
    return calls


def test_a_distribution_of_our_packages_name_is_removed(pip_calls: Calls) -> None:
    (site,) = setup.VENV.glob("lib/python*/site-packages")
    (site / "tokenprune-0.1.0.dist-info").mkdir()
    setup.remove_other_name()
    assert pip_calls == [("uninstall", "-y", "tokenprune")]


def test_our_distribution_stays(pip_calls: Calls) -> None:
    (site,) = setup.VENV.glob("lib/python*/site-packages")
    (site / "vllm_tokenprune-0.1.0.dist-info").mkdir()
    setup.remove_other_name()
    assert pip_calls == []


def test_what_an_editable_install_left_in_the_checkout_is_removed(pip_calls: Calls) -> None:
    left = [setup.ROOT / f"{name}.egg-info" for name in ("tokenprune", "vllm_tokenprune")]
    for folder in left:
        folder.mkdir()
    setup.remove_other_name()
    assert [folder.exists() for folder in left] == [False, True]
