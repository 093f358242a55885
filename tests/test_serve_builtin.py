"""`tokenprune serve` without a model: the built-in one, with flags that every user's flag beats."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tokenprune.cli import main
from tokenprune.demo import builtin
from tokenprune.engine import launch
from tokenprune.engine.launch import EngineOptions, vllm_arguments
from tokenprune.errors import InstallationError


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[str]]:
    """Runs `tokenprune serve` up to vLLM and returns what vLLM would be given."""
    monkeypatch.setattr(launch, "_is_cpu_build", lambda: False)
    monkeypatch.setattr(launch, "_run_serve", lambda: None)
    monkeypatch.setattr(builtin, "model_folder", lambda: tmp_path)
    monkeypatch.setattr(builtin, "serve_flags", lambda: {"--dtype": "float32", "--seed": "1"})
    monkeypatch.setenv("VLLM_PLUGINS", "tokenprune")

    def serve(*arguments: str) -> list[str]:
        monkeypatch.setattr("sys.argv", ["tokenprune", "serve", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code
        return sys.argv

    return serve


@pytest.mark.parametrize("theirs", [[], ["--port", "9000"], ["--served-model-name", "x"]])
def test_without_a_model_the_built_in_one_is_served(
    command_line: Callable[..., list[str]],
    theirs: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--dtype", "float32", "--seed", "1"]
    command = command_line(*theirs)
    assert command[: 3 + len(flags + theirs)] == ["vllm", "serve", str(tmp_path), *flags, *theirs]
    (line,) = capsys.readouterr().out.splitlines()
    assert "built-in tokenprune-demo" in line
    assert str(tmp_path / "README.md") in line


def test_what_a_user_or_a_file_sets_wins_over_the_built_in_flags(
    command_line: Callable[..., list[str]], tmp_path: Path
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("seed: 3\n")
    theirs = ["--config", str(file), "--dtype", "auto"]
    command = command_line(*theirs)
    assert command[: 3 + len(theirs)] == ["vllm", "serve", str(tmp_path), *theirs]


@pytest.mark.parametrize("theirs", [["m", "--port", "1"], ["--port", "1", "m"], ["--model", "m"]])
def test_a_named_model_is_served_as_before(
    command_line: Callable[..., list[str]], theirs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line(*theirs) == ["vllm", "serve", *vllm_arguments(theirs, EngineOptions())]
    assert capsys.readouterr().out == ""


def test_a_config_file_may_name_the_model(
    command_line: Callable[..., list[str]], tmp_path: Path
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("model: m\n")
    theirs = ["--config", str(file)]
    assert command_line(*theirs) == ["vllm", "serve", *vllm_arguments(theirs, EngineOptions())]


def test_damaged_weights_stop_it_with_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise InstallationError("model.safetensors must have the sha256 a, got b; reinstall it")

    monkeypatch.setattr(launch, "_is_cpu_build", lambda: False)
    monkeypatch.setattr(builtin, "model_folder", refuse)
    monkeypatch.setenv("VLLM_PLUGINS", "tokenprune")
    monkeypatch.setattr("sys.argv", ["tokenprune", "serve"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("Error: model.safetensors must have")
