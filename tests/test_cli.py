"""The command line: what is ours, what goes to vLLM, and what is refused before anything starts."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tokenprune import __version__
from tokenprune.cli import app, main
from tokenprune.engine import launch
from tokenprune.engine.launch import (
    SCHEDULER_CLS,
    VALIDATOR,
    WORKER_CLS,
    EngineOptions,
    allowed_plugins,
    engine_arguments,
    vllm_arguments,
)
from tokenprune.errors import ConfigurationError

Call = tuple[list[str], EngineOptions]
CLASSES = ["--scheduler-cls", SCHEDULER_CLS, "--worker-cls", WORKER_CLS]
EIGHT = EngineOptions([8])
OURS = ["--logits-processors", VALIDATOR, *CLASSES]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    calls: list[Call] = []

    def record(arguments: list[str], options: EngineOptions, _: object) -> None:
        calls.append((list(arguments), options))

    monkeypatch.setattr(launch, "serve", record)
    return calls


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


def test_version_is_printed() -> None:
    assert run("--version") == (0, f"tokenprune {__version__}\n")


def test_help_explains_ours_and_points_to_vllm() -> None:
    code, output = run("serve", "--help")
    assert code == 0
    assert "--prune-layers" in output
    assert "tokenprune serve --vllm-help" in output
    assert "Without MODEL" in output


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["m", "--port", "8001", "--enforce-eager"], id="long"),
        pytest.param(["--port=8001", "m", "-tp", "2", "-O3"], id="short-and-model-late"),
        pytest.param(["m", "--compilation-config.mode", "3"], id="dotted"),
        pytest.param(["m", "--limit-mm-per-prompt", '{"image": 2}'], id="json"),
        pytest.param([], id="nothing"),
    ],
)
def test_other_arguments_pass_in_order(served: list[Call], arguments: list[str]) -> None:
    assert run("serve", *arguments)[0] == 0
    assert served == [(arguments, EngineOptions())]


def test_our_arguments_are_taken_out(served: list[Call]) -> None:
    code, _ = run(
        "serve", "m", "--prune-layers", "8,12", "--port", "1", "--pruning-default=balanced"
    )
    assert code == 0
    assert served == [(["m", "--port", "1"], EngineOptions([8, 12], "balanced"))]


@pytest.mark.parametrize("value", ["", "none", " none "])
def test_no_prune_layers_means_kv_methods_only(served: list[Call], value: str) -> None:
    assert run("serve", "m", "--prune-layers", value)[0] == 0
    assert served == [(["m"], EngineOptions([]))]


@pytest.mark.parametrize("flag", ["--allow-channel-pruning", "--allow_channel_pruning"])
def test_channel_pruning_is_allowed_by_a_flag(served: list[Call], flag: str) -> None:
    assert run("serve", "m", flag)[0] == 0
    assert served == [(["m"], EngineOptions(allow_channel_pruning=True))]


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--prune-layers", "x"], id="word"),
        pytest.param(["--prune-layers", "8,x"], id="one-word"),
        pytest.param(["--prune-layers", "8,8"], id="repeated"),
        pytest.param(["--prune-layers", "12,8"], id="descending"),
        pytest.param(["--prune-layers", "0,8"], id="zero"),
        pytest.param(["--prune-layers", "-1"], id="negative"),
        pytest.param(["--prune-layers", "1.5"], id="fraction"),
        pytest.param(["--pruning-default", "fast"], id="preset"),
    ],
)
def test_bad_values_end_with_status_2_before_anything_starts(
    served: list[Call], arguments: list[str]
) -> None:
    code, output = run("serve", "m", *arguments)
    assert code == 2
    assert "must be" in output
    assert arguments[0] in output
    assert served == []


def test_our_own_errors_are_one_line_with_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["tokenprune", "serve", "m", "--worker-cls", "their.Worker"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: --worker-cls must be left to tokenprune")
    assert "their.Worker" in error


@pytest.mark.parametrize(
    ("arguments", "environment", "named"),
    [
        pytest.param(["--grpc"], {}, "--grpc", id="grpc"),
        pytest.param([], {"VLLM_USE_RUST_FRONTEND": "1"}, "VLLM_USE_RUST_FRONTEND=1", id="rust"),
    ],
)
def test_a_front_end_that_does_not_read_pruning_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    environment: dict[str, str],
    named: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match="must be vLLM's Python server") as refused:
        launch.serve(["m", *arguments], EIGHT)
    assert named in str(refused.value)


def test_a_front_end_may_be_asked_for_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("grpc: true\n")
    with pytest.raises(ConfigurationError, match="--grpc"):
        launch.serve(["m", "--config", str(tmp_path / "c.yaml")], EIGHT)


def test_a_node_without_an_api_server_says_where_requests_are_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "_prepare", lambda command, *_: command)
    monkeypatch.setattr(launch, "_run_serve", lambda: None)
    # which `serve` sets
    monkeypatch.setattr("sys.argv", [])
    launch.serve(["m"], EIGHT)
    assert capsys.readouterr().err == ""
    launch.serve(["m", "--headless"], EIGHT)
    assert "start the one with the API server by tokenprune serve too" in capsys.readouterr().err


def test_an_error_may_hold_brackets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise ConfigurationError('pip install ".[cpu]"')

    monkeypatch.setattr(launch, "serve", refuse)
    monkeypatch.setattr("sys.argv", ["tokenprune", "serve", "m"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err == 'Error: pip install ".[cpu]"\n'


def test_vllm_gets_our_classes_and_settings() -> None:
    assert vllm_arguments(["m", "--port", "1"], EngineOptions([8, 12], "safe")) == [
        *("m", "--port", "1"),
        *OURS,
        "--additional-config",
        json.dumps({"tokenprune": {"prune_layers": [8, 12], "default": "safe"}}),
    ]


def test_offline_users_get_the_same_from_one_function() -> None:
    assert engine_arguments() == {
        "scheduler_cls": SCHEDULER_CLS,
        "worker_cls": WORKER_CLS,
        "logits_processors": [VALIDATOR],
        "additional_config": {"tokenprune": {}},
    }
    assert engine_arguments(prune_layers=(), default="safe")["additional_config"] == {
        "tokenprune": {"prune_layers": [], "default": "safe"}
    }
    assert engine_arguments(allow_channel_pruning=True)["additional_config"] == {
        "tokenprune": {"allow_channel_pruning": True}
    }


@pytest.mark.parametrize(
    "theirs",
    [
        pytest.param(["--additional-config", '{"a": 1, "tokenprune": {"x": 2}}'], id="two-words"),
        pytest.param(['--additional_config={"a": 1, "tokenprune": {"x": 2}}'], id="one-word"),
    ],
)
def test_their_additional_config_is_merged(theirs: list[str]) -> None:
    *rest, flag, value = vllm_arguments(["m", *theirs], EIGHT)
    assert rest == ["m", *OURS]
    assert flag == "--additional-config"
    assert json.loads(value) == {"a": 1, "tokenprune": {"x": 2, "prune_layers": [8]}}


def test_their_dotted_additional_config_is_joined_by_a_dotted_one() -> None:
    arguments = ["m", "--additional-config.a", "1"]
    assert vllm_arguments(arguments, EIGHT) == [
        *arguments,
        *OURS,
        "--additional-config.tokenprune",
        '{"prune_layers": [8]}',
    ]


def test_a_config_file_keeps_its_additional_config(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("port: 1\nadditional_config:\n  a: 1\n")
    *rest, flag, value = vllm_arguments(["m", "--config", str(file)], EIGHT)
    assert rest == ["m", "--config", str(file), *OURS]
    assert flag == "--additional-config"
    assert json.loads(value) == {"a": 1, "tokenprune": {"prune_layers": [8]}}


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        pytest.param(["--logits-processors", "a:B", "c:D"], ["a:B", "c:D"], id="words"),
        pytest.param(["--logits_processors=a:B"], ["a:B"], id="one-word"),
    ],
)
def test_their_logits_processors_stay(theirs: list[str], expected: list[str]) -> None:
    arguments = vllm_arguments(["m", *theirs, "--port", "1"], EngineOptions())
    assert arguments[:-2] == [
        *("m", "--logits-processors", VALIDATOR),
        *(*expected, "--port", "1"),
        *CLASSES,
    ]


def test_logits_processors_of_a_config_file_stay(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("logits-processors: ['a:B']\n")
    arguments = vllm_arguments(["m", "--config", str(file)], EngineOptions())
    at = arguments.index("--logits-processors")
    assert arguments[at + 1 : at + 3] == [VALIDATOR, "a:B"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        pytest.param(["--worker-cls", "their.Worker"], "--worker-cls", id="worker"),
        pytest.param(["--scheduler_cls=their.Scheduler"], "--scheduler-cls", id="underscore"),
        pytest.param(["--additional-config", "[1]"], "--additional-config", id="not-an-object"),
        pytest.param(["--additional-config", "{"], "--additional-config", id="not-json"),
    ],
)
def test_what_only_we_can_set_is_refused(arguments: list[str], named: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{named} must be"):
        vllm_arguments(["m", *arguments], EngineOptions())


def test_a_config_file_cannot_set_our_classes(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("worker-cls: their.Worker\n")
    with pytest.raises(ConfigurationError, match=r"their\.Worker"):
        vllm_arguments(["m", "--config", str(file)], EngineOptions())


def test_our_routes_load_and_nothing_else_is_lost() -> None:
    names = allowed_plugins(None).split(",")
    assert "tokenprune" in names
    # vLLM ships this one and loads it by default
    assert "lora_filesystem_resolver" in names
    # vLLM reads a mention of this one as consent to download
    assert "lora_hf_hub_resolver" not in names


@pytest.mark.parametrize(
    ("current", "expected"),
    [
        pytest.param("a,b", "a,b,tokenprune", id="appended"),
        pytest.param("tokenprune,a", "tokenprune,a", id="already-there"),
        pytest.param("", "tokenprune", id="none-allowed"),
    ],
)
def test_a_given_allow_list_stays_one(current: str, expected: str) -> None:
    assert allowed_plugins(current) == expected
