"""The built-in model's folder: whole as shipped, and anything else is refused by name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tokenprune.demo import builtin
from tokenprune.errors import InstallationError

WEIGHTS = b"\x01\x02" * 500


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in builtin.FILES:
        (tmp_path / name).write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    record = {"weights": {"sha256": hashlib.sha256(WEIGHTS).hexdigest()}}
    (tmp_path / "accuracy.json").write_text(json.dumps(record))
    return tmp_path


def test_a_whole_folder_is_returned(folder: Path) -> None:
    assert builtin.model_folder(folder) == folder


@pytest.mark.parametrize("name", builtin.FILES)
def test_a_missing_file_is_named_with_the_way_to_get_it_again(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(InstallationError, match=f"{name} must come with tokenprune.*reinstall"):
        builtin.model_folder(folder)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(WEIGHTS[:-1], id="cut"),
        pytest.param(b"", id="empty"),
        pytest.param(WEIGHTS[:-1] + b"\x03", id="one-bit"),
    ],
)
def test_damaged_weights_are_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    found = hashlib.sha256(content).hexdigest()[:12]
    with pytest.raises(InstallationError, match=f"safetensors must have.*{found}; reinstall"):
        builtin.model_folder(folder)


@pytest.mark.parametrize("content", ["", '{"a": ', "[]", "\udc80"], ids=repr)
@pytest.mark.parametrize("name", ["config.json", "accuracy.json"])
def test_a_file_of_settings_that_is_no_json_object_is_refused(
    folder: Path, name: str, content: str
) -> None:
    (folder / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InstallationError, match=f"{name} must hold.*reinstall"):
        builtin.model_folder(folder)


@pytest.mark.parametrize("record", [{}, {"weights": {}}, {"weights": "abc"}], ids=str)
def test_a_record_without_a_hash_vouches_for_nothing(folder: Path, record: object) -> None:
    (folder / "accuracy.json").write_text(json.dumps(record))
    with pytest.raises(InstallationError, match="must have the sha256"):
        builtin.model_folder(folder)


def test_the_shipped_model_is_whole_and_small() -> None:
    folder = builtin.model_folder()
    assert {path.name for path in folder.iterdir()} == set(builtin.FILES)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 16_000_000


def test_the_shipped_card_is_about_the_shipped_weights() -> None:
    assert builtin.recorded_sha256() in (builtin.FOLDER / builtin.CARD).read_text()


@pytest.mark.parametrize(("gpu", "dtype"), [(False, "float32"), (True, "bfloat16")])
def test_flags_suit_the_device(gpu: bool, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    flags = builtin.serve_flags()
    assert flags["--served-model-name"] == "tokenprune-demo"
    assert flags["--dtype"] == dtype
    assert ("--enforce-eager" in flags) == ("--block-size" in flags) == (not gpu)
