"""Packed questions give the logits that each prompt gives alone, in transformers' own forward."""

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from bench.tasks import data, vocabulary
from bench.training import attention
from bench.training.model import build_config, normalise
from bench.training.recipe import Recipe
from bench.training.trainer import Trainer
from tests.bench.training.small import SMALL

ASKED = [
    ("digit", ("which digit is red?", "7")),
    ("where", ("where is the box?", "top left")),
    ("copy", ("repeat: lamp 31", "lamp 31")),
]
# the same sums in another order, in float32
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def trainer():
    return Trainer(Recipe(half=False), SMALL, "cpu")


@pytest.fixture(scope="module")
def plain(trainer):
    model = LlavaForConditionalGeneration(build_config(SMALL))
    model.load_state_dict(trainer.model.llava.state_dict())
    return model.eval()


def _alone(plain, context, asked, pixels):
    """Logits of the answer tokens of one prompt after another."""
    found = []
    for _, (question, answer) in asked:
        answering = [*vocabulary.encode(f" {answer}"), vocabulary.EOS]
        ids = [*context, *vocabulary.encode(f" {question}\nASSISTANT:"), *answering]
        images = {} if pixels is None else {"pixel_values": normalise(torch.from_numpy(pixels))}
        logits = plain(input_ids=torch.tensor([ids]), **images).logits[0]
        found.append(logits[-len(answering) - 1 : -1])
    return torch.cat(found)


@torch.no_grad()
@pytest.mark.parametrize("num_pictures", [0, 1, 2])
def test_packed_questions_have_the_logits_of_separate_prompts(trainer, plain, num_pictures):
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 256, (num_pictures, 96, 96, 3), np.uint8) if num_pictures else None
    context = data.prompt(num_pictures, "" if num_pictures else "the key of anna is 4821.")
    # a shorter row first, so that padding is there too
    one, two = ASKED[:1], ASKED
    both = None if pixels is None else np.concatenate([pixels, pixels])
    batch = data.pack([(context, one), (context, two)], both)
    packed = trainer._logits(batch)[0]
    expected = [_alone(plain, context, asked, pixels) for asked in (one, two)]
    torch.testing.assert_close(packed, torch.cat(expected), **TOLERANCE)


@torch.no_grad()
def test_a_chat_has_the_logits_of_one_long_prompt(trainer, plain):
    context = data.prompt(0, "the key of anna is 4821.")
    batch = data.pack([(context, ASKED)], None, chat=True)
    length = int((batch.ids[0] != vocabulary.PAD).sum())
    logits = plain(input_ids=torch.from_numpy(batch.ids[:, :length])).logits[0]
    expected = logits[np.flatnonzero(batch.answers[0]) - 1]
    torch.testing.assert_close(trainer._logits(batch)[0], expected, **TOLERANCE)


@torch.no_grad()
def test_patches_left_out_leave_the_others_in_place(trainer):
    rng = np.random.default_rng(4)
    pixels = rng.integers(0, 256, (1, 96, 96, 3), np.uint8)
    shown = np.zeros((1, 144), np.bool_)
    shown[0, [5, 77]] = True
    batch = data.pack([(data.prompt(1, ""), ASKED)], pixels, shown=shown)
    where = batch.ids[0] == vocabulary.IMAGE
    first = data.prompt(1, "").index(vocabulary.IMAGE)
    assert batch.positions[0][where].tolist() == [first + 5, first + 77]
    whole = data.pack([(data.prompt(1, ""), ASKED)], pixels)
    assert batch.positions[0][batch.answers[0]].tolist() == (
        whole.positions[0][whole.answers[0]].tolist()
    )
    changed = pixels.copy()
    changed[0, :8, 5 * 8 : 6 * 8] ^= 255  # a patch that is shown
    logits = [
        trainer._logits(data.pack([(data.prompt(1, ""), ASKED)], p, shown=shown))[0]
        for p in (pixels, changed)
    ]
    assert not torch.allclose(*logits)


@pytest.mark.parametrize("length", [8, 1032], ids=["plain-products", "fused"])
def test_attention_is_pytorchs(length):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, length, 16, generator=generator) for heads in (4, 2, 2)
    )
    mask = torch.zeros(2, 1, length, length)
    mask.masked_fill_(torch.ones(length, length).triu(1).bool(), -torch.inf)
    found, _ = attention.attend(torch.nn.Identity(), query, key, value, mask)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, enable_gqa=True
    )
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)
