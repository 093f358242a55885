"""Write the pictures and questions that `tokenprune demo` asks, from the test split.

    python -m bench.tasks.demo_questions [FOLDER]

The package cannot draw pictures itself: it ships these. Prompts, pictures and difficulty are those
of the hardest level of training, so the set is a small sample of what `bench.quality` measures. No
question is left out for being hard.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from bench.tasks import data, questions
from tokenprune.demo.quiz import FOLDER, INDEX

SEED = 12
PICTURES_PER_PROMPT = (1,) * 8 + (2,) * 2
QUESTIONS_PER_PICTURE = 4


def write(folder: Path) -> int:
    """Write the set into a folder, over an older one, and return its size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    level = data.PICTURE_LEVELS[-1]
    asked: list[dict[str, Any]] = []
    for step, number in enumerate(PICTURES_PER_PROMPT):
        rng = data.generator(SEED, "test", "picture", step)
        shown = [data.draw_picture(rng, "test", level) for _ in range(number)]
        names = [f"{step:02}{chr(ord('a') + place)}.png" for place in range(number)]
        for place, (name, picture) in enumerate(zip(names, shown, strict=True), 1):
            Image.fromarray(picture.pixels).save(folder / name, optimize=True)
            lead = f"in picture {place} " if number > 1 else ""
            # the families take turns: four questions are of four families
            drawn = questions.ask(rng, picture, level.families, QUESTIONS_PER_PICTURE)
            asked += [
                {"pictures": names, "family": family, "question": lead + text, "answer": answer}
                for family, (text, answer) in drawn
            ]
    (folder / INDEX).write_text(json.dumps({"seed": SEED, "questions": asked}, indent=1) + "\n")
    return sum(path.stat().st_size for path in folder.iterdir())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    args = parser.parse_args(arguments)
    print(f"wrote {args.folder}, {write(args.folder) / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
