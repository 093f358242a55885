"""The exported folder loads, gives the trained model's answers, and says what it can do."""

import json

import pytest
import torch
from safetensors.torch import load_file

from bench.tasks import data
from bench.training import export, state
from bench.training.recipe import Recipe
from bench.training.trainer import Trainer
from tests.bench.training.small import SMALL

RECIPE = Recipe(tower_steps=1, steps=1, tower_size=2, picture_tokens=300, text_tokens=300)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    trainer = Trainer(RECIPE, SMALL, "cpu")
    state.save_state(folder / "state", trainer.state_dict())
    record = export.export(folder / "state", folder / "weights", contexts=2)
    return folder, record


def test_transformers_loads_it_with_the_trained_logits(exported):
    _, record = exported
    assert record["logits_difference"] < 1e-4


def test_names_are_those_of_published_checkpoints(exported):
    folder, _ = exported
    names = load_file(folder / "weights" / export.WEIGHTS)
    starts = ("vision_tower.vision_model.", "multi_modal_projector.", "language_model.model.")
    assert all(name.startswith((*starts, "language_model.lm_head.")) for name in names)
    assert {tensor.dtype for tensor in names.values()} == {torch.bfloat16}


def test_generation_gives_the_answer_that_one_pass_counts_as_right(exported):
    from transformers import AutoModelForImageTextToText

    folder, _ = exported
    model = AutoModelForImageTextToText.from_pretrained(folder / "weights", dtype=torch.float32)
    prompt = data.prompt(0, "the passkey is 12345.")
    ids = torch.tensor([prompt])
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4)
    first = answer[0, len(prompt) :].tolist()
    with torch.no_grad():
        logits = model(answer[:, :-1]).logits[0, len(prompt) - 1 :]
    assert logits.argmax(-1).tolist() == first


def test_the_record_belongs_to_the_weights(exported):
    folder, record = exported
    stored = json.loads((folder / "weights" / export.RECORD).read_text())
    assert stored["weights"]["sha256"] == export.digest(folder / "weights" / export.WEIGHTS)
    assert stored["reached"] == record["reached"]
    card = (folder / "weights" / "README.md").read_text()
    assert stored["weights"]["sha256"] in card
    assert all(family in card for family in stored["reached"]["families"])
    assert "apache-2.0" in card


def test_nothing_is_overwritten_or_left_behind(exported, tmp_path, capsys):
    folder, _ = exported
    assert export.main([str(folder / "weights"), "--state", str(folder / "state")]) == 1
    assert "must be new" in capsys.readouterr().err
    assert export.main([str(tmp_path / "out" / "model"), "--state", str(tmp_path)]) == 1
    assert "no training state" in capsys.readouterr().err
    assert not (tmp_path / "out" / "model").exists()


def test_a_model_that_loads_with_other_logits_is_refused(exported):
    folder, _ = exported
    trainer = Trainer(RECIPE, SMALL, "cpu")
    trainer.model.llava.lm_head.weight.data.mul_(1.5)
    with pytest.raises(export.ExportError, match="logits"):
        export.check_checkpoint(trainer, folder / "weights")
