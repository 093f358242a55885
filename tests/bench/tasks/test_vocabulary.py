"""The tokenizer: small, lossless on ASCII, one token a digit, the same through every door."""

import numpy as np
import pytest

from bench.tasks import data, documents, vocabulary
from bench.tasks.words import WORDS

TEXTS = [
    pytest.param(" which digit is red?\nASSISTANT: 7", id="prompt"),
    pytest.param(" the passkey is 0123456789.", id="digits"),
    pytest.param(" KXB Zebra-crossing (100%)  two spaces", id="characters"),
    pytest.param("USER: in picture 2 where is digit 7?\n", id="turn"),
]


def test_the_vocabulary_is_small():
    assert vocabulary.vocabulary_size() <= 300
    assert len(vocabulary.build_tokenizer()) == vocabulary.vocabulary_size()


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_a_round_trip(text):
    assert vocabulary.decode(vocabulary.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_the_fast_encoder_agrees_with_the_tokenizer(text):
    tokenizer = vocabulary.build_tokenizer()
    assert vocabulary.encode(text) == tokenizer.encode(text, add_special_tokens=False)


def test_every_word_and_every_digit_is_one_token():
    assert all(len(vocabulary.encode(f" {word}")) == 1 for word in WORDS)
    assert len(vocabulary.encode(" 8351245")) == 7


def test_task_text_needs_no_single_letters():
    rng = np.random.default_rng(0)
    text = documents.write(
        rng, tokens=400, most_digits=20, most_keys=9, most_items=9, most_words=9
    ).text
    letters = set(vocabulary.encode("abcdefghijklmnopqrstuvwxyz"))
    assert not letters & set(vocabulary.encode(f" {text}"))


def test_the_chat_template_gives_the_trained_prompt():
    tokenizer = vocabulary.build_tokenizer()
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "read the box."}]
    turns = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "AXE"},
        {"role": "user", "content": "which digit is red?"},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<s>USER:<image>\n<image>\n read the box.\nASSISTANT: AXE</s>"
        "USER: which digit is red?\nASSISTANT:"
    )
    context = [i for i in data.prompt(2, "") if i != vocabulary.IMAGE]
    asking = vocabulary.encode(" read the box.\nASSISTANT: AXE")
    ids = [i for i in tokenizer(text, add_special_tokens=False)["input_ids"] if i != 3]
    assert ids[: len(context + asking)] == context + asking
