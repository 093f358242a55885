"""The prompts that calibration asks: pictures of a folder, and questions of a file."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tokenprune.errors import ConfigurationError

_MOST_NAMED = 3


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt.

    Attributes:
        pictures: Image files, in their order in the prompt.
        text: The question.
    """

    pictures: tuple[Path, ...]
    text: str

    def open(self) -> list[Image.Image]:
        """Return the pictures in RGB.

        Raises:
            ConfigurationError: One is broken.
        """
        return [_open(path) for path in self.pictures]


def draw_samples(images: Path, prompts: Path, count: int, seed: int) -> list[Sample]:
    """Return `count` prompts drawn at random, or all there are if they are fewer.

    Args:
        images: Folder of pictures.
        prompts: A `.jsonl` file, each line an object with `image`, the name of a file in `images`
            or a list of names, and `prompt`; or a text file with a prompt a line. These have no
            pictures of their own: both are shuffled, and the n-th prompt goes with the n-th
            picture, beginning anew where one of the two ends.
        count: At least 1.
        seed: Seed of the draw.

    Raises:
        ConfigurationError: A file or folder is missing, empty or not as above.
    """
    names = _picture_names(images)
    if prompts.suffix == ".jsonl":
        pairs = _read_pairs(prompts, names, images)
        return random.Random(seed).sample(pairs, min(count, len(pairs)))
    lines = [line.strip() for line in _read(prompts).splitlines()]
    texts = sorted({line for line in lines if line})
    if not texts:
        raise ConfigurationError(f"{prompts} must hold a prompt a line, got an empty file")
    generator = random.Random(seed)
    generator.shuffle(names)
    generator.shuffle(texts)
    return [
        Sample((images / names[i % len(names)],), texts[i % len(texts)])
        for i in range(min(count, math.lcm(len(names), len(texts))))
    ]


def digest(samples: Sequence[Sample]) -> str:
    """Return a hash of what the samples show and ask."""
    total = hashlib.sha256()
    for sample in samples:
        pictures = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sample.pictures]
        total.update(json.dumps([pictures, sample.text]).encode())
    return total.hexdigest()


def open_all(samples: Sequence[Sample]) -> list[tuple[list[Image.Image], str]]:
    """Return pictures and text of each sample.

    Raises:
        ConfigurationError: Pictures are broken; the message names some of them.
    """
    opened: list[tuple[list[Image.Image], str]] = []
    broken: dict[str, None] = {}
    for sample in samples:
        try:
            opened.append((sample.open(), sample.text))
        except ConfigurationError as error:
            broken[str(error)] = None
    if broken:
        more = len(broken) - _MOST_NAMED
        rest = f"; and {more} more" if more > 0 else ""
        raise ConfigurationError("; ".join(list(broken)[:_MOST_NAMED]) + rest)
    return opened


def _picture_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise ConfigurationError(f"{folder} must be a folder of pictures, got no such folder")
    known = Image.registered_extensions()
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in known)
    if not names:
        raise ConfigurationError(
            f"{folder} must hold pictures (.png, .jpg, .webp, ...), got "
            f"{'other files only' if any(folder.iterdir()) else 'an empty folder'}"
        )
    return names


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} must be a text file of prompts, got: {error}") from None


def _read_pairs(path: Path, names: Sequence[str], images: Path) -> list[Sample]:
    pairs: dict[Sample, None] = {}
    known = set(names)
    for number, line in enumerate(_read(path).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ConfigurationError(f"{where} must be a JSON object, got: {error}") from None
        if not isinstance(entry, dict) or set(entry) != {"image", "prompt"}:
            got = sorted(entry) if isinstance(entry, dict) else entry
            raise ConfigurationError(
                f"{where} must be an object with image and prompt, got {got!r:.60}"
            )
        pictures, text = entry["image"], entry["prompt"]
        pictures = [pictures] if isinstance(pictures, str) else pictures
        if not isinstance(text, str) or not text.strip():
            raise ConfigurationError(f"prompt in {where} must be a text, got {text!r:.60}")
        if not isinstance(pictures, list) or not pictures:
            raise ConfigurationError(
                f"image in {where} must be a file name or a list of them, got {pictures!r:.60}"
            )
        for name in pictures:
            if not isinstance(name, str) or name not in known:
                raise ConfigurationError(
                    f"image in {where} must name pictures in {images}, got {name!r}"
                )
        pairs[Sample(tuple(images / name for name in pictures), text.strip())] = None
    if not pairs:
        raise ConfigurationError(f"{path} must hold an image and a prompt a line, got none")
    return list(pairs)


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    # what Pillow's decoders raise for files they do not understand
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigurationError(f"{path} must be a whole picture, got: {error}") from None
