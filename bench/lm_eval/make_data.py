"""Write the question files of the two lm-eval tasks in this folder; nothing is downloaded.

    python -m bench.lm_eval [-n 100] [--seed 0] [--picture-level 5] [--text-level 6]

The files are JSON lines: `question`, `answer` and, for pictures, `pictures` as base64 PNG.
"""

import argparse
import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from bench.common import write_whole
from bench.tasks import documents, questions
from bench.tasks.held_out import Item, Levels, item

# the task files name these paths, from the repository root
FOLDER = Path("build/lm_eval")
FILES = {
    "pictures.jsonl": questions.PICTURE_FAMILIES,
    "documents.jsonl": documents.TEXT_FAMILIES,
}


def line(asked: Item) -> dict[str, Any]:
    """Return one question as a document of lm-eval."""
    fields: dict[str, Any] = {
        "family": asked.task,
        "question": asked.text,
        "answer": asked.answer,
    }
    if asked.pictures:
        fields["pictures"] = [_png(pixels) for pixels in asked.pictures]
    return fields


def _png(pixels: Any) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def main(arguments: Sequence[str] | None = None) -> int:
    hardest = Levels()
    parser = argparse.ArgumentParser("bench.lm_eval")
    parser.add_argument("-n", type=int, default=100, help="questions a file, over its families")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture-level", type=int, default=hardest.picture)
    parser.add_argument("--text-level", type=int, default=hardest.text)
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args(arguments)
    levels = Levels(options.picture_level, options.text_level)
    for name, families in FILES.items():
        asked = [
            item(families[i % len(families)], i // len(families), options.seed, levels)
            for i in range(options.n)
        ]
        lines = "".join(json.dumps(line(question)) + "\n" for question in asked)
        write_whole(options.out / name, lines)
        print(f"{options.out / name}: {options.n} questions")
    return 0
