"""Questions about a picture and their answers, by family."""

from collections.abc import Callable

import numpy as np

from bench.tasks.pictures import Picture
from bench.tasks.words import COLOURS, PLACES

Question = tuple[str, str]
"""What is asked, and the answer in the fewest words."""

# content first: positions and counting are learnt after the tokens' content is
PICTURE_FAMILIES = ("digit", "shape", "colour", "where", "at", "count", "read")


def _name(kind: str, value: str) -> str:
    return f"digit {value}" if kind == "digit" else f"the {value}"


def _which(kind: str) -> Callable[[Picture], list[Question]]:
    def ask(picture: Picture) -> list[Question]:
        return [(f"which {kind} is {t.colour}?", t.value) for t in picture.things if t.kind == kind]

    return ask


def _colour(picture: Picture) -> list[Question]:
    return [(f"what colour is {_name(t.kind, t.value)}?", t.colour) for t in picture.things]


def _where(picture: Picture) -> list[Question]:
    named = [(f"where is {_name(t.kind, t.value)}?", t.place) for t in picture.things]
    painted = [(f"where is the {t.colour} {t.kind}?", t.place) for t in picture.things]
    if picture.box_place is None:
        return named + painted
    return [*named, *painted, ("where is the box?", picture.box_place)]


def _at(picture: Picture) -> list[Question]:
    content = {thing.place: thing.value for thing in picture.things}
    if picture.box_place is not None:
        content[picture.box_place] = "box"
    # few empty cells: "nothing" should not become the usual answer
    content |= dict.fromkeys([place for place in PLACES if place not in content][:2], "nothing")
    return [(f"what is at the {place}?", answer) for place, answer in content.items()]


def _count(picture: Picture) -> list[Question]:
    kinds = [t.kind for t in picture.things]
    colours = [t.colour for t in picture.things]
    present = list(dict.fromkeys(colours))
    absent = [colour for colour in COLOURS if colour not in present][:1]
    return [
        ("how many digits are there?", str(kinds.count("digit"))),
        ("how many shapes are there?", str(kinds.count("shape"))),
        *((f"how many objects are {c}?", str(colours.count(c))) for c in present + absent),
    ]


def _read(picture: Picture) -> list[Question]:
    return [] if picture.box is None else [("read the box.", picture.box)]


_ASK: dict[str, Callable[[Picture], list[Question]]] = {
    "digit": _which("digit"),
    "shape": _which("shape"),
    "colour": _colour,
    "where": _where,
    "at": _at,
    "count": _count,
    "read": _read,
}


def ask(
    rng: np.random.Generator, picture: Picture, families: tuple[str, ...], number: int
) -> list[tuple[str, Question]]:
    """Draw questions, the families in turn, none twice.

    Returns:
        At most `number` pairs of family and question; fewer when the picture shows too little.
    """
    pools = {}
    for family in families:
        pool = _ASK[family](picture)
        pools[family] = [pool[i] for i in rng.permutation(len(pool))]
    drawn: list[tuple[str, Question]] = []
    while len(drawn) < number and any(pools.values()):
        for index in rng.permutation(len(families)).tolist():
            family = families[index]
            if pools[family] and len(drawn) < number:
                drawn.append((family, pools[family].pop()))
    return drawn
