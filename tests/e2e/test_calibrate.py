"""Calibration on the real engine: what it measures, and that it improves and repeats itself."""

import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from tokenprune.calibration.run import Options, calibrate
from tokenprune.calibration.samples import Sample, open_all
from tokenprune.demo import builtin, quiz
from tokenprune.engine.default_model import DefaultModel
from tokenprune.engine.launch import EngineOptions, start_offline
from tokenprune.engine.offline_probe import LastHiddenProbe, _message
from tokenprune.errors import ConfigurationError
from tokenprune.request import OFF, parse_pruning

pytestmark = pytest.mark.vllm

TOLERANCE = 1e-4
QUARTER = parse_pruning(
    {"visual": {"method": "uniform", "prune_layers": [0, 3, 5], "keep_ratios": [0.5, 0.2, 0.1]}}
)


@pytest.fixture(scope="module")
def llm():
    before = dict(os.environ)
    # prompts longer than a step come in chunks
    arguments = ["--max-num-batched-tokens", "512"]
    yield start_offline(
        arguments,
        EngineOptions(),
        lambda: DefaultModel(builtin.model_folder(), builtin.serve_flags()),
    )
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def samples():
    questions = quiz.load_questions()
    two = next(q for q in questions if len(q.pictures) == 2)
    chosen = [*questions[:5], two]
    return open_all([Sample(q.pictures, q.text) for q in chosen])


def test_it_is_the_state_that_the_first_token_is_predicted_from(llm, samples):
    from vllm import SamplingParams

    head = load_file(builtin.FOLDER / "model.safetensors")["language_model.lm_head.weight"]
    answers = LastHiddenProbe(llm, samples).ask(OFF)
    outputs = llm.chat(
        [_message(*sample) for sample in samples],
        SamplingParams(temperature=0, max_tokens=1, logprobs=5),
        use_tqdm=False,
    )
    for answer, output in zip(answers, outputs, strict=True):
        logits = head.float() @ torch.from_numpy(answer.hidden)
        expected = torch.log_softmax(logits, 0)
        for token, found in output.outputs[0].logprobs[0].items():
            assert found.logprob == pytest.approx(float(expected[token]), abs=TOLERANCE)


def test_answers_come_in_order_and_say_what_was_kept(llm, samples):
    probe = LastHiddenProbe(llm, samples)
    full, pruned = probe.ask(OFF), probe.ask(QUARTER)
    for (pictures, _), whole, answer in zip(samples, full, pruned, strict=True):
        assert whole.num_visual == answer.num_visual == 144 * len(pictures)
        assert whole.kept is None
        total = answer.num_visual
        assert answer.kept == (total // 2, total // 2, total // 5, total // 10)
        assert not np.allclose(whole.hidden, answer.hidden, atol=1e-2)
    for i, sample in enumerate(samples):
        (alone,) = LastHiddenProbe(llm, [sample]).ask(QUARTER)
        assert np.allclose(alone.hidden, pruned[i].hidden, atol=TOLERANCE)


def test_a_second_pass_gives_the_same_numbers(llm, samples):
    probe = LastHiddenProbe(llm, samples)
    probe.ask(OFF)
    once, again = probe.ask(QUARTER), probe.ask(QUARTER)
    assert all((a.hidden == b.hidden).all() for a, b in zip(once, again, strict=True))


def test_a_prompt_that_is_too_long_is_refused(llm, samples):
    probe = LastHiddenProbe(llm, [(samples[0][0], "what " * 5000)])
    with pytest.raises(ConfigurationError, match="a prompt must be one the model takes, got"):
        probe.ask(OFF)


def test_calibration_improves_on_its_start_and_repeats_itself(llm, tmp_path: Path):
    prompts = tmp_path / "prompts.jsonl"
    lines = [
        {"image": [path.name for path in q.pictures], "prompt": q.text}
        for q in quiz.load_questions()
    ]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    options = Options(quiz.FOLDER, prompts, 0.25, tmp_path / "a.yaml", 6, 13, 0)

    def run(options):
        return calibrate(
            options, lambda asked: LastHiddenProbe(llm, asked), Console(file=io.StringIO())
        )

    found = run(options)
    assert found.best.score > found.start.score + 1e-3
    # whole tokens: at most one of 144 less in each stage
    assert 0.25 - 1 / 144 < found.kept_share <= 0.25 + 1e-9
    assert run(replace(options, output=tmp_path / "b.yaml")) == found
    assert (tmp_path / "a.yaml").read_text().replace("a.yaml", "b.yaml") == (
        tmp_path / "b.yaml"
    ).read_text()
