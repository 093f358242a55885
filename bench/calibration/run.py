"""Calibrate vflowopt for the built-in model, as `bench.quality` asks it.

    python -m bench.calibration [--out DIR]

Writes the presets that the rows `vflowopt-cal` are measured with, one for each keep ratio of
the visual axis, by running `tokenprune calibrate` on pictures and questions that training saw.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from bench.quality.cells import AXES, CALIBRATED
from bench.quality.gate import levels_of, read_record
from bench.tasks import data, questions
from tokenprune.demo.builtin import FOLDER

SAMPLES, SEED = 30, 0


def write_samples(folder: Path) -> Path:
    """Draw pictures and a question about each; return the file of prompts."""
    level = data.PICTURE_LEVELS[levels_of(read_record(FOLDER)).picture]
    lines = []
    for index in range(SAMPLES):
        rng = data.generator(SEED, "train", "picture", index)
        picture = data.draw_picture(rng, "train", level)
        _, (text, _) = questions.ask(rng, picture, level.families, 1)[0]
        Image.fromarray(picture.pixels).save(folder / f"{index:02}.png")
        lines.append(json.dumps({"image": f"{index:02}.png", "prompt": text}))
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(lines) + "\n")
    return prompts


def main() -> int:
    parser = argparse.ArgumentParser("bench.calibration", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=CALIBRATED)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        prompts = write_samples(Path(name))
        for ratio in AXES["visual"].keep_ratios:
            started = time.monotonic()
            command = [sys.executable, "-m", "tokenprune.cli", "calibrate", "--images", name]
            command += ["--prompts", str(prompts), "--keep-ratio", f"{ratio:g}"]
            subprocess.run([*command, "-o", str(out / f"vflowopt-{ratio:g}.yaml")], check=True)
            print(f"{time.monotonic() - started:.0f} s, engine start included", flush=True)
    return 0
