"""Pictures of handwritten digits, coloured shapes and a text box, with labels for every patch.

A picture is 96 x 96 pixels: 3 x 3 cells of 4 x 4 patches of 8 x 8 pixels. A cell holds at most one
object. A digit, a shape or a letter is as large as a patch and sits exactly on one. The background
is plain on clutter level 0, a noisy slope of colours on level 1, and has strokes too on level 2.
"""

import functools
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bench.tasks.words import COLOURS, DIGITS, LETTERS, PLACES, SHAPES

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

PATCH, GRID, CELLS = 8, 12, 3
SIDE = PATCH * GRID
CELL = SIDE // CELLS
NUM_PATCHES = GRID * GRID
BOX_LETTERS = 3

# labels of one patch: heads of the tower's auxiliary loss, with the number of classes of each
PATCH_LABELS = {
    "kind": 4,  # background, digit, shape, letter
    "digit": len(DIGITS),
    "shape": len(SHAPES),
    "letter": len(LETTERS),
    "order": BOX_LETTERS,  # of a letter in its box
    "colour": len(COLOURS),
    "cell": CELLS * CELLS,
}
NO_LABEL = -100

# rows of 5 x 7 pixels, the leftmost pixel in the highest bit
_FONT = {
    "A": (14, 17, 17, 31, 17, 17, 17),
    "C": (14, 17, 16, 16, 16, 17, 14),
    "E": (31, 16, 16, 30, 16, 16, 31),
    "F": (31, 16, 16, 30, 16, 16, 16),
    "H": (17, 17, 17, 31, 17, 17, 17),
    "K": (17, 18, 20, 24, 20, 18, 17),
    "L": (16, 16, 16, 16, 16, 16, 31),
    "N": (17, 25, 25, 21, 19, 19, 17),
    "P": (30, 17, 17, 30, 16, 16, 16),
    "T": (31, 4, 4, 4, 4, 4, 4),
    "U": (17, 17, 17, 17, 17, 17, 14),
    "X": (17, 17, 10, 4, 10, 17, 17),
}


@dataclass(frozen=True)
class Thing:
    """A digit or a shape in a picture; `value` is what it is, `cell` counts row by row."""

    kind: Literal["digit", "shape"]
    value: str
    colour: str
    cell: int

    @property
    def place(self) -> str:
        """Name of the cell, such as `top-left`."""
        return PLACES[self.cell]


@dataclass(frozen=True)
class Picture:
    """Pixels and what they show.

    Attributes:
        pixels: `[96, 96, 3]` uint8.
        things: Digits and shapes; no two digits share a value or a colour, nor do two shapes.
        box: Letters of the text box, or None.
        box_place: Name of the box's cell, or None.
        labels: `[144]` int64 for each name in `PATCH_LABELS`, `NO_LABEL` where it has no meaning.
    """

    pixels: NDArray[np.uint8]
    things: tuple[Thing, ...]
    box: str | None
    box_place: str | None
    labels: dict[str, NDArray[np.int64]] = field(repr=False)


@functools.cache
def handwriting(split: Split) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """Return scikit-learn's digits that belong to a split.

    Returns:
        Strokes `[N, 8, 8]` in [0, 1], values `[N]`, and indices `[N]` into `load_digits`. The
        splits share no index. Training digits come several times, slightly turned and moved.
    """
    from scipy import ndimage
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(1797).permutation(len(data.target))
    parts = np.split(order, [len(order) * 7 // 10, len(order) * 8 // 10])
    index = parts[SPLITS.index(split)]
    strokes = (data.images[index] / 16).astype(np.float32)
    if split == "train":
        rng = np.random.default_rng(8)
        variants = [strokes]
        for _ in range(7):
            turned = []
            for stroke in strokes:
                angle, shear = rng.uniform(-0.2, 0.2, 2)
                scale = rng.uniform(0.92, 1.1, 2)
                matrix = (
                    np.array(
                        [[np.cos(angle), -np.sin(angle) + shear], [np.sin(angle), np.cos(angle)]]
                    )
                    * scale
                )
                offset = 3.5 - matrix @ np.full(2, 3.5) + rng.uniform(-0.5, 0.5, 2)
                turned.append(ndimage.affine_transform(stroke, matrix, offset, order=1))
            variants.append(np.stack(turned))
        strokes, index = np.concatenate(variants), np.tile(index, len(variants))
    return strokes, data.target[index].astype(np.int64), index.astype(np.int64)


@functools.cache
def _by_value(split: Split) -> dict[str, NDArray[np.float32]]:
    strokes, values, _ = handwriting(split)
    return {digit: strokes[values == int(digit)] for digit in DIGITS}


@functools.cache
def _shape_masks() -> dict[str, NDArray[np.float32]]:
    y, x = np.mgrid[0:8, 0:8] - 3.5
    masks = {
        "square": (abs(x) < 3) & (abs(y) < 3),
        "circle": x**2 + y**2 < 13,
        "triangle": abs(x) <= (y + 4) / 2,
        "cross": (abs(x) < 1) | (abs(y) < 1),
        "diamond": abs(x) + abs(y) <= 4,
    }
    return {name: mask.astype(np.float32) for name, mask in masks.items()}


@functools.cache
def _letter_masks() -> dict[str, NDArray[np.float32]]:
    masks = {}
    for letter, rows in _FONT.items():
        mask = np.zeros((8, 8), np.float32)
        mask[:7, 1:6] = [[row >> (4 - bit) & 1 for bit in range(5)] for row in rows]
        masks[letter] = mask
    return masks


def _background(rng: np.random.Generator, clutter: int) -> NDArray[np.float32]:
    base = rng.uniform(5, 30, 3)
    canvas = np.empty((SIDE, SIDE, 3), np.float32)
    canvas[:] = base
    if clutter >= 1:
        ramp = np.linspace(-1, 1, SIDE, dtype=np.float32)
        slope = rng.uniform(-12, 12, (2, 3)).astype(np.float32)
        canvas += ramp[:, None, None] * slope[0] + ramp[None, :, None] * slope[1]
        canvas += rng.standard_normal(canvas.shape, np.float32) * rng.uniform(2, 8)
    if clutter >= 2:
        for _ in range(rng.integers(2, 7)):
            start, step = rng.uniform(0, SIDE, 2), rng.uniform(-1, 1, 2)
            length = rng.integers(5, 25)
            steps = np.arange(length)[:, None]
            path = (start + steps * step / max(abs(step).max(), 0.1)).astype(int)
            path = path[((path >= 0) & (path < SIDE)).all(1)]
            canvas[path[:, 0], path[:, 1]] += rng.uniform(10, 60, 3).astype(np.float32)
    return canvas


def draw(
    rng: np.random.Generator,
    split: Split,
    *,
    clutter: int,
    num_digits: int,
    num_shapes: int,
    box: bool,
) -> Picture:
    """Draw one picture; equal arguments and generator states give equal pictures."""
    canvas = _background(rng, clutter)
    labels = {name: np.full(NUM_PATCHES, NO_LABEL, np.int64) for name in PATCH_LABELS}
    cells = np.arange(GRID) // (GRID // CELLS)
    labels["kind"][:] = 0
    labels["cell"][:] = (cells[:, None] * CELLS + cells).ravel()

    def put(mask: NDArray[np.float32], colour: NDArray[np.float32], y: int, x: int) -> int:
        window = canvas[y : y + PATCH, x : x + PATCH]
        window += mask[:, :, None] * (colour - window)
        return y // PATCH * GRID + x // PATCH

    def corner(cell: int, width: int) -> tuple[int, int]:
        patches = CELL // PATCH
        y, x = int(rng.integers(patches)), int(rng.integers(patches - width + 1))
        return cell // CELLS * CELL + y * PATCH, cell % CELLS * CELL + x * PATCH

    places = iter(rng.permutation(CELLS * CELLS).tolist())
    things = []
    names = list(COLOURS)
    for kind, number, values in (("digit", num_digits, DIGITS), ("shape", num_shapes, SHAPES)):
        chosen = rng.permutation(len(values))[:number]
        paints = rng.permutation(len(names))[:number]
        for value, paint in zip(chosen.tolist(), paints.tolist(), strict=True):
            cell = next(places)
            variants = _by_value(split)[DIGITS[value]] if kind == "digit" else None
            mask = (
                _shape_masks()[SHAPES[value]]
                if variants is None
                else variants[rng.integers(len(variants))]
            )
            colour = np.asarray(COLOURS[names[paint]], np.float32) + rng.uniform(-12, 12, 3)
            patch = put(mask, colour.clip(0, 255).astype(np.float32), *corner(cell, 1))
            labels["kind"][patch] = 1 if kind == "digit" else 2
            labels[kind][patch], labels["colour"][patch] = value, paint
            things.append(Thing(kind, values[value], names[paint], cell))
    text = place = None
    if box:
        cell = next(places)
        place = PLACES[cell]
        y, x = corner(cell, BOX_LETTERS)
        ink = rng.uniform(0, 60, 3).astype(np.float32)
        canvas[y : y + PATCH, x : x + BOX_LETTERS * PATCH] = rng.uniform(190, 250)
        letters = rng.integers(len(LETTERS), size=BOX_LETTERS).tolist()
        for order, letter in enumerate(letters):
            patch = put(_letter_masks()[LETTERS[letter]], ink, y, x + order * PATCH)
            labels["kind"][patch] = 3
            labels["letter"][patch], labels["order"][patch] = letter, order
        text = "".join(LETTERS[letter] for letter in letters)
    pixels = canvas.clip(0, 255).astype(np.uint8)
    return Picture(pixels, tuple(things), text, place, labels)
