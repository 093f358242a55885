"""Training states on disk: whole or refused.

A file is a line of magic, a line with the SHA-256 of the rest, and the rest. It is written beside
its place, synced and renamed, and the one before it is kept under another name.
"""

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch

_MAGIC = b"tokenprune-demo-training 1\n"
_DIGEST_LENGTH = 65


class StateError(RuntimeError):
    """A training state is missing, damaged or from another recipe."""


def state_path(folder: Path) -> Path:
    """Return the file of the newest state."""
    return folder / "state.bin"


def previous_path(folder: Path) -> Path:
    """Return the file of the state before it."""
    return folder / "state.previous.bin"


def save_state(folder: Path, payload: dict[str, Any]) -> None:
    """Write a state; whoever reads meanwhile sees the old one or the new one."""
    prepare(folder)
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    body = buffer.getvalue()
    target = state_path(folder)
    scratch = target.with_suffix(f".{os.getpid()}.part")
    with scratch.open("wb") as file:
        file.write(_MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n")
        file.write(body)
        file.flush()
        os.fsync(file.fileno())
    if target.exists():
        # a second link, so that `target` exists at every moment
        link = target.with_suffix(f".{os.getpid()}.link")
        link.unlink(missing_ok=True)
        os.link(target, link)
        os.replace(link, previous_path(folder))
    os.replace(scratch, target)


def load_state(folder: Path) -> dict[str, Any] | None:
    """Return the newest state, or None where none was written.

    Raises:
        StateError: The file is not a whole state.
    """
    path = state_path(folder)
    if not path.exists():
        return None
    data = path.read_bytes()
    body = data[len(_MAGIC) + _DIGEST_LENGTH :]
    expected = data[len(_MAGIC) : len(_MAGIC) + _DIGEST_LENGTH - 1]
    if not data.startswith(_MAGIC) or hashlib.sha256(body).hexdigest().encode() != expected:
        previous = previous_path(folder)
        way_out = (
            f"rename {previous.name} beside it to go on from there"
            if previous.exists()
            else "delete it to start again"
        )
        raise StateError(
            f"training state must be whole, got {path} with a wrong checksum; {way_out}"
        )
    return torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)


def prepare(folder: Path) -> None:
    """Make the folder, and keep git from seeing it."""
    folder.mkdir(parents=True, exist_ok=True)
    ignore = folder / ".gitignore"
    if not ignore.exists():
        ignore.write_text("*\n")
