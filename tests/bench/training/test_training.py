"""Training learns, goes on where it stopped, and takes nothing damaged for whole."""

import json
import signal
import threading

import pytest
import torch

from bench.training import state, train
from bench.training.curriculum import Curriculum
from bench.training.recipe import Recipe, decoder_batches, make_batches, windows
from bench.training.trainer import Trainer
from tests.bench.training.small import SMALL

RECIPE = Recipe(tower_steps=3, steps=5, tower_size=2, picture_tokens=300, text_tokens=300, warmup=1)
FLAGS = [
    *("--device", "cpu", "--layers", "2", "--hidden", "32", "--heads", "2", "--kv-heads", "1"),
    *("--intermediate", "48", "--vision-hidden", "32", "--vision-heads", "2", "--warmup", "1"),
    *("--tower-steps", "3", "--steps", "5", "--tower-size", "2", "--picture-tokens", "300"),
    *("--text-tokens", "300", "--no-half"),
]


def _run(trainer, last):
    for steps in windows(trainer.step, last):
        for plan in trainer.plan(steps):
            trainer.train_step(make_batches(plan))


def _same_state(first, second):
    one, two = first.state_dict(), second.state_dict()
    assert one["curriculum"] == two["curriculum"]
    assert one["window"] == two["window"]
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, two["model"][name]), name
    for ours, theirs in zip(one["optimizers"], two["optimizers"], strict=True):
        assert ours["state"].keys() == theirs["state"].keys()
        for index, moments in ours["state"].items():
            assert all(torch.equal(moments[k], theirs["state"][index][k]) for k in moments)


@pytest.mark.parametrize("phase", ["tower", "decoder"])
def test_steps_on_one_batch_lower_its_loss(phase):
    recipe = Recipe(tower_steps=99 if phase == "tower" else 0, steps=99, warmup=1, rate=3e-3)
    trainer = Trainer(recipe, SMALL, "cpu")
    if phase == "tower":
        batches = make_batches(("tower", 0, 0, (0,), 2))
    else:
        small = Recipe(picture_tokens=300, text_tokens=300)
        batches = decoder_batches(small, 0, {"picture": 0, "text": 0})
    losses = []
    for _ in range(6):
        trainer.train_step(batches)
        names = ("loss_tower",) if phase == "tower" else ("loss_picture", "loss_text")
        losses.append([trainer._window.pop(name) for name in names])
    assert all(last < first for first, last in zip(losses[0], losses[-1], strict=True))


def test_the_decoder_phase_leaves_the_tower_alone():
    trainer = Trainer(RECIPE, SMALL, "cpu")
    _run(trainer, 3)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    _run(trainer, 5)
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert any("language_model" in name for name in changed)
    assert not any("vision_tower" in name or "patch_heads" in name for name in changed)


@pytest.mark.parametrize("stop", [2, 3, 6], ids=["tower", "between-phases", "decoder"])
def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, stop):
    whole = Trainer(RECIPE, SMALL, "cpu")
    _run(whole, 8)
    first = Trainer(RECIPE, SMALL, "cpu")
    _run(first, stop)
    state.save_state(tmp_path, first.state_dict())
    second = Trainer(RECIPE, SMALL, "cpu")
    second.load_state_dict(state.load_state(tmp_path))
    _run(second, 8)
    _same_state(whole, second)


def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, capsys):
    arguments = ["--state", str(tmp_path), *FLAGS, "--steps", "100000"]
    timer = threading.Timer(1.5, signal.raise_signal, [signal.SIGINT])
    timer.start()
    assert train.main(arguments) == 0
    timer.join()
    first = state.load_state(tmp_path)["step"]
    assert 0 < first < 100_003
    assert train.main([*arguments, "--stop-at", str(first + 2)]) == 0
    assert state.load_state(tmp_path)["step"] == first + 2


def test_the_log_has_a_line_a_window_and_no_line_twice(tmp_path):
    log = train.Log(tmp_path / "log.jsonl", 0)
    for step in (50, 100, 150):
        log.add({"step": step})
    train.Log(tmp_path / "log.jsonl", 120).add({"step": 150})
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [50, 100, 150]


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_damaged_state_is_refused_with_a_way_out(tmp_path, damage, capsys):
    trainer = Trainer(RECIPE, SMALL, "cpu")
    state.save_state(tmp_path, trainer.state_dict())
    state.save_state(tmp_path, trainer.state_dict())
    path = state.state_path(tmp_path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"cut": data[:-100], "changed": data, "empty": b""}[damage])
    assert train.main(["--state", str(tmp_path), *FLAGS]) == 1
    message = capsys.readouterr().err
    assert "must be whole" in message
    assert "state.previous.bin" in message
    state.previous_path(tmp_path).rename(path)
    assert state.load_state(tmp_path)["step"] == 0


def test_another_recipe_is_refused_unless_asked_for(tmp_path, capsys):
    state.save_state(tmp_path, Trainer(RECIPE, SMALL, "cpu").state_dict())
    changed = ["--state", str(tmp_path), *FLAGS, "--picture-tokens", "700", "--stop-at", "1"]
    assert train.main(changed) == 1
    assert "picture_tokens=700 instead of 300" in capsys.readouterr().err
    assert train.main([*changed, "--change-recipe"]) == 0
    assert train.main(["--state", str(tmp_path), *FLAGS, "--hidden", "64"]) == 1


def test_nothing_to_evaluate_is_a_clear_error(tmp_path, capsys):
    assert train.main(["--evaluate", "--state", str(tmp_path / "none")]) == 1
    assert "no training state" in capsys.readouterr().err


def test_a_track_goes_up_when_its_worst_family_is_good_enough():
    curriculum = Curriculum(threshold=0.9, patience=1000)
    curriculum.count("text", 0, {"passkey": 95, "copy": 80}, {"passkey": 100, "copy": 100})
    curriculum.advance()
    assert curriculum.levels == {"picture": 0, "text": 0}
    curriculum.count("text", 0, {"passkey": 95, "copy": 90}, {"passkey": 100, "copy": 100})
    curriculum.advance()
    assert curriculum.levels == {"picture": 0, "text": 1}
    curriculum.count("text", 0, {"passkey": 100}, {"passkey": 100})  # an easier level
    curriculum.advance()
    assert curriculum.levels == {"picture": 0, "text": 1}


def test_a_track_goes_up_after_its_patience():
    curriculum = Curriculum(threshold=0.9, patience=2)
    for _ in range(2):
        curriculum.count("picture", 0, {"digit": 0}, {"digit": 10})
    curriculum.advance()
    assert curriculum.levels["picture"] == 1
