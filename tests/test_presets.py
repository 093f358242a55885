"""Presets from a file: known by name wherever a built-in one is, and refused by name of the key."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from tokenprune.cli import app
from tokenprune.engine import launch
from tokenprune.engine.launch import EngineOptions, engine_arguments, vllm_arguments
from tokenprune.engine.settings import settings
from tokenprune.errors import ConfigurationError, PolicyError
from tokenprune.presets import dump_presets, load_presets
from tokenprune.request import OFF, PRESETS, flatten, parse_flat, parse_pruning
from tokenprune.server.listing import policies_listing
from tokenprune.shape import EngineShape

MINE = {"mine": {"visual": {"method": "uniform", "keep_ratio": 0.3}}}


@pytest.fixture(autouse=True)
def _forget_presets() -> Iterator[None]:
    before = dict(PRESETS)
    yield
    PRESETS.clear()
    PRESETS.update(before)


def write(tmp_path: Path, text: str, name: str = "policy.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        pytest.param(
            "policy.yaml",
            "mine:\n  visual:\n    method: uniform\n    keep_ratio: 0.3\n",
            id="yaml",
        ),
        pytest.param("policy.json", json.dumps(MINE), id="json"),
    ],
)
def test_a_file_makes_its_presets_known_in_every_form(tmp_path: Path, name: str, text: str) -> None:
    assert load_presets(write(tmp_path, text, name)) == MINE
    parsed = parse_pruning("mine")
    assert parsed == parse_pruning(MINE["mine"])
    assert parse_flat({"pruning": "mine"}) == parsed
    assert parse_flat(flatten(parsed)) == parsed


def test_small_numbers_of_a_json_file_are_numbers(tmp_path: Path) -> None:
    text = '{"mine": {"visual": {"method": "uniform", "keep_ratio": 1e-5}}}'
    load_presets(write(tmp_path, text, "policy.json"))
    assert parse_pruning("mine").policy("visual").keep_ratio == 1e-5


def test_what_is_dumped_loads_to_the_same(tmp_path: Path) -> None:
    presets = {"mine": {"visual": {"method": "uniform", "keep_ratio": 1e-5}}}
    text = dump_presets(presets, "two\n\nlines: here")
    assert text.startswith("# two\n#\n# lines: here\n\nmine:")
    assert load_presets(write(tmp_path, text)) == presets


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("a: [", "must be a YAML or JSON file of presets, got", id="not-yaml"),
        pytest.param("", "presets must be an object of names, got None", id="empty"),
        pytest.param("- a", "presets must be an object of names, got", id="list"),
        pytest.param("0.25: {}", "name of a preset must be a word, got 0.25", id="number"),
        pytest.param("off: {}", "must be a word, got False; quote it", id="yaml-false"),
        pytest.param(
            "balanced: {}", "preset 'balanced' must have a name of its own", id="built-in"
        ),
        pytest.param(
            "mine: balanced", "preset 'mine' must be an object with visual | kv", id="a-name"
        ),
        pytest.param(
            "mine: {visual: {method: unifrom}}",
            "preset 'mine': pruning.visual.method must be one of .*uniform",
            id="method",
        ),
        pytest.param(
            "mine: {visual: {method: uniform, keep_ratio: 2}}",
            r"preset 'mine': pruning.visual.keep_ratio must be a number in \(0, 1\], got 2",
            id="range",
        ),
        pytest.param(
            "mine: {visual: {method: uniform, ratio: 2}}",
            "preset 'mine': pruning.visual.ratio is unknown; known keys: keep_ratio",
            id="key",
        ),
    ],
)
def test_an_illegal_file_is_refused_by_file_preset_and_key(
    tmp_path: Path, text: str, message: str
) -> None:
    path = write(tmp_path, "fine: {}\n" + text if text.startswith("mine") else text)
    with pytest.raises(ConfigurationError, match=message) as refused:
        load_presets(path)
    assert str(refused.value).startswith(str(path))
    # nothing of a refused file is known
    assert "fine" not in PRESETS
    with pytest.raises(PolicyError, match="must be one of off, safe"):
        parse_pruning("mine")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"none\.yaml must be a YAML or JSON file"):
        load_presets(tmp_path / "none.yaml")


def test_presets_travel_to_other_processes_in_the_engine_settings() -> None:
    additional = engine_arguments(default="mine", presets=MINE)["additional_config"]
    assert additional == {"tokenprune": {"default": "mine", "presets": MINE}}
    assert (
        json.loads(vllm_arguments(["m"], EngineOptions(default="mine", presets=MINE))[-1])
        == additional
    )
    assert "mine" not in PRESETS
    found = settings(SimpleNamespace(additional_config=additional))
    assert found.default_pruning == parse_pruning("mine")


def test_presets_in_the_engine_settings_are_checked() -> None:
    additional = {"tokenprune": {"presets": {"mine": {"visual": {"method": "x"}}}}}
    with pytest.raises(PolicyError, match=r"preset 'mine': pruning\.visual\.method must be"):
        settings(SimpleNamespace(additional_config=additional))


def test_a_later_value_replaces_an_earlier_one(tmp_path: Path) -> None:
    load_presets(write(tmp_path, "mine: {}"))
    assert parse_pruning("mine").is_off
    load_presets(write(tmp_path, json.dumps(MINE)))
    assert parse_pruning("mine").policy("visual").keep_ratio == 0.3


def test_they_are_listed(tmp_path: Path) -> None:
    load_presets(write(tmp_path, json.dumps(MINE)))
    listing = policies_listing(EngineShape(8, (0, 2), 512), OFF)
    assert listing["presets"] == {**PRESETS, **MINE}
    assert "balanced" in listing["presets"]


def test_the_command_line_reads_them_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = []
    monkeypatch.setattr(launch, "serve", lambda *arguments: calls.append(arguments))
    path = write(tmp_path, json.dumps(MINE))
    flags = ["--pruning-presets", str(path), "--pruning-default", "mine"]
    assert CliRunner().invoke(app, ["serve", "m", *flags]).exit_code == 0
    (arguments,) = calls
    assert arguments[1] == EngineOptions(default="mine", presets=MINE)

    path.write_text("mine: {visual: {method: x}}")
    result = CliRunner().invoke(app, ["serve", "m", "--pruning-presets", str(path)])
    assert result.exit_code == 2
    assert "pruning.visual.method" in result.output.replace("\n", "")
    assert len(calls) == 1
