"""Write a trained model as a checkpoint folder that transformers and vLLM load.

    python -m bench.training.export FOLDER [--state FOLDER] [--contexts 200]

Weights are stored in bfloat16 under the names of the published LLaVA checkpoints. The folder comes
with a model card and `accuracy.json`: the accuracies measured on the test split with exactly the
stored weights, and the hash of the file they belong to. It appears in one rename, after
transformers has loaded it and given the trained model's logits.
"""

import argparse
import dataclasses
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.tasks import data, vocabulary
from bench.tasks.pictures import PATCH, SIDE
from bench.training import state
from bench.training.card import model_card
from bench.training.evaluate import evaluate
from bench.training.model import DemoModel, ModelSpec
from bench.training.recipe import Recipe
from bench.training.train import show
from bench.training.trainer import Trainer
from tokenprune.demo.checkpoint import published_name

MOST_BYTES = 16_000_000
WEIGHTS, RECORD = "model.safetensors", "accuracy.json"
_MOST_DIFFERENCE = 1e-3
"""Largest difference of logits between the trained and the loaded model, both in float32."""


class ExportError(RuntimeError):
    """The folder cannot be written, or does not give the trained model back."""


def build_processor() -> Any:
    """Return the processor: tokenizer, and pictures resized to one tile."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    square = {"height": SIDE, "width": SIDE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=square),
        tokenizer=vocabulary.build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=vocabulary.CHAT_TEMPLATE,
    )


def write_checkpoint(model: DemoModel, folder: Path) -> None:
    """Write config, tokenizer, processor and weights into an existing folder."""
    from safetensors.torch import save_file

    build_processor().save_pretrained(folder)
    # the attention that trained it is not the one to serve it with
    config = type(model.llava.config).from_dict(model.llava.config.to_dict())
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    weights = {
        published_name(name): tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.llava.state_dict().items()
        if not name.endswith("position_ids")
    }
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    generation = {
        "bos_token_id": vocabulary.BOS,
        "eos_token_id": vocabulary.EOS,
        "pad_token_id": vocabulary.PAD,
        "do_sample": False,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@torch.no_grad()
def check_checkpoint(trainer: Trainer, folder: Path) -> float:
    """Return the largest difference of logits between trained and loaded model.

    The loaded one gets a picture and a chat message through its processor, as a user gives them.

    Raises:
        ExportError: The prompts differ, or the logits by more than rounding.
    """
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    rng = data.generator(0, "test", "picture", 0)
    level = data.PICTURE_LEVELS[2]
    picture = data.draw_picture(rng, "test", level)
    question = "which digit is red?"
    batch = data.pack([(data.prompt(1, ""), [("digit", (question, "7"))])], picture.pixels[None])
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    shown = Image.fromarray(picture.pixels)
    inputs = processor(text=text, images=shown, return_tensors="pt", add_special_tokens=False)
    asked = inputs["input_ids"][0].tolist()
    if asked != batch.ids[0, : len(asked)].tolist():
        raise ExportError("the processor's prompt must be the one trained on, got other tokens")
    theirs = loaded(**inputs).logits[0, -1]
    ours = trainer.first_logits(batch)
    difference = float((theirs - ours).abs().max())
    if difference > _MOST_DIFFERENCE:
        raise ExportError(
            f"logits of the loaded model must differ by at most {_MOST_DIFFERENCE}, "
            f"got {difference:.2g}"
        )
    return difference


def export(source: Path, target: Path, contexts: int) -> dict[str, Any]:
    """Write the folder and return its accuracy record.

    Raises:
        ExportError: `target` exists, the weights are too large, or a check failed.
        StateError: There is no whole training state.
    """
    if target.exists():
        raise ExportError(f"target folder must be new, got {target}; remove it first")
    saved = state.load_state(source)
    if saved is None:
        raise state.StateError(f"no training state in {source}; train one, or name --state")
    # full precision: what is measured is the stored weights, not the autocast of training
    recipe = dataclasses.replace(Recipe(**saved["recipe"]), half=False)
    trainer = Trainer(recipe, ModelSpec(**saved["spec"]), "cpu")
    trainer.load_state_dict(saved, change_recipe=True)
    rounded = {name: value.bfloat16().float() for name, value in saved["model"].items()}
    trainer.model.load_state_dict(rounded)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        write_checkpoint(trainer.model, scratch)
        size = (scratch / WEIGHTS).stat().st_size
        if size > MOST_BYTES:
            raise ExportError(f"weights must be at most {MOST_BYTES} bytes, got {size}")
        difference = check_checkpoint(trainer, scratch)
        levels = trainer.curriculum.levels
        reached = evaluate(trainer, contexts=contexts)
        easier = evaluate(
            trainer,
            contexts=contexts,
            picture_level=max(0, levels["picture"] - 1),
            text_level=max(0, levels["text"] - 2),
        )
        record = {
            "weights": {"file": WEIGHTS, "sha256": digest(scratch / WEIGHTS), "bytes": size},
            "step": trainer.step,
            "minutes": round(trainer.seconds / 60, 1),
            "recipe": saved["recipe"],
            "model": saved["spec"],
            "logits_difference": difference,
            "reached": reached,
            "easier": easier,
        }
        (scratch / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        (scratch / "README.md").write_text(model_card(record))
        # mkdtemp and safetensors make them private
        scratch.chmod(0o755)
        (scratch / WEIGHTS).chmod(0o644)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return record


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--state", type=Path, default=Path(".demo_model"))
    parser.add_argument("--contexts", type=int, default=200, help="pictures and documents to ask")
    args, console = parser.parse_args(arguments), Console()
    try:
        record = export(args.state, args.folder, args.contexts)
    except (ExportError, state.StateError) as error:
        print(error, file=sys.stderr)
        return 1
    show(record["reached"], console)
    show(record["easier"], console)
    size = record["weights"]["bytes"] / 1e6
    console.print(f"wrote {args.folder}, {size:.1f} MB, sha256 {record['weights']['sha256'][:12]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
