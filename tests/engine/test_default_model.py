"""Which arguments name a model, and what is put before those that do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenprune.engine.default_model import DefaultModel, names_model

MODEL = DefaultModel(
    Path("built-in"),
    {"--dtype": "float32", "--kv-cache-memory-bytes": "64", "--enforce-eager": None},
)
FLAGS = ["--dtype", "float32", "--kv-cache-memory-bytes", "64", "--enforce-eager"]


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([], id="nothing"),
        pytest.param(["--port", "9000"], id="value"),
        pytest.param(["--port=9000", "-tp", "2", "-O3"], id="short"),
        pytest.param(["--enforce_eager", "--max_model_len", "2k"], id="underscores"),
        pytest.param(["--served-model-name", "x"], id="name-without-a-model"),
        pytest.param(["--limit-mm-per-prompt.image", "2"], id="dotted"),
        pytest.param(["--config", "serve.yaml", "--port", "9000"], id="file"),
    ],
)
def test_flags_alone_name_no_model(arguments: list[str]) -> None:
    assert not names_model(arguments, ["--port"])


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["m"], id="alone"),
        pytest.param(["m", "--port", "9000"], id="first"),
        pytest.param(["--port", "9000", "m"], id="behind-a-value"),
        pytest.param(["--enforce-eager", "m", "-tp", "2"], id="behind-a-switch"),
        pytest.param(["--model", "m"], id="flag"),
        pytest.param(["--port", "9000", "--model=m"], id="flag-in-one-word"),
        pytest.param(["--config", "serve.yaml", "m"], id="behind-a-file"),
        pytest.param(["--model", "Qwen/Qwen3-0.6B"], id="vllms-own-default"),
    ],
)
def test_a_model_is_found_wherever_it_stands(arguments: list[str]) -> None:
    assert names_model(arguments)


def test_a_file_may_name_the_model() -> None:
    assert names_model(["--config", "serve.yaml"], ["--port", "--model"])


def test_arguments_that_vllm_refuses_end_the_process(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        names_model(["--prot", "9000"])
    assert stop.value.code == 2
    assert "--prot" in capsys.readouterr().err


def test_the_model_comes_first_with_its_flags() -> None:
    assert MODEL.before([]) == ["built-in", *FLAGS]
    assert MODEL.before(["--port", "9000"], ["--seed"]) == ["built-in", *FLAGS]


@pytest.mark.parametrize(
    ("arguments", "left_out"),
    [
        pytest.param(["--dtype", "auto"], "--dtype", id="value"),
        pytest.param(["--dtype=auto"], "--dtype", id="one-word"),
        pytest.param(["--no-enforce-eager"], "--enforce-eager", id="negated"),
        pytest.param(["--kv_cache_memory_bytes", "1G"], "--kv-cache-memory-bytes", id="underscore"),
        pytest.param(
            ["--gpu-memory-utilization", "0.5"], "--kv-cache-memory-bytes", id="same-subject"
        ),
    ],
)
def test_what_the_user_sets_is_left_to_the_user(arguments: list[str], left_out: str) -> None:
    words = MODEL.before(arguments)
    assert left_out not in words
    assert len(words) >= len(FLAGS) - 1
    flags = [word.partition("=")[0].replace("_", "-") for word in arguments]
    assert MODEL.before([], flags) == words
