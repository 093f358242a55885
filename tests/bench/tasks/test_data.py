"""Generated pictures and documents: repeatable, disjoint between splits, answered rightly."""

import numpy as np
import pytest

from bench.tasks import data, documents, pictures, questions, vocabulary
from bench.tasks.data import FAMILIES, PICTURE_LEVELS, TEXT_LEVELS


def _arrays(batch):
    return [array for array in vars(batch).values() if array is not None]


@pytest.mark.parametrize("make", [data.picture_batch, data.text_batch])
def test_a_batch_is_the_same_each_time_and_another_for_another_seed_split_or_step(make):
    first = make(0, "train", 3, 2, 4)
    again = make(0, "train", 3, 2, 4)
    assert all(np.array_equal(a, b) for a, b in zip(_arrays(first), _arrays(again), strict=True))
    for other in (make(1, "train", 3, 2, 4), make(0, "test", 3, 2, 4), make(0, "train", 4, 2, 4)):
        assert not np.array_equal(first.ids, other.ids)


def test_splits_share_no_handwritten_digit():
    indices = [set(pictures.handwriting(split)[2].tolist()) for split in pictures.SPLITS]
    assert sum(len(part) for part in indices) == len(set.union(*indices)) == 1797


def test_splits_share_no_document():
    seen = [
        {
            documents.write(
                data.generator(0, split, "text", step),
                tokens=64,
                most_digits=8,
                most_keys=4,
                most_items=5,
                most_words=6,
            ).text
            for step in range(200)
        }
        for split in pictures.SPLITS
    ]
    assert len(set.union(*seen)) == 600


@pytest.mark.parametrize("clutter", [0, 1, 2])
def test_labels_say_what_the_picture_shows(clutter):
    rng = np.random.default_rng(5)
    picture = pictures.draw(rng, "test", clutter=clutter, num_digits=4, num_shapes=3, box=True)
    kinds = np.bincount(picture.labels["kind"], minlength=4)
    assert kinds.tolist() == [134, 4, 3, 3]
    assert len({t.place for t in picture.things} | {picture.box_place}) == 8
    for thing in picture.things:
        values = {"digit": pictures.DIGITS, "shape": pictures.SHAPES}[thing.kind]
        patch = np.flatnonzero(picture.labels[thing.kind] == values.index(thing.value)).item()
        assert list(pictures.COLOURS)[picture.labels["colour"][patch]] == thing.colour
        assert picture.labels["cell"][patch] == thing.cell
    letters = np.flatnonzero(picture.labels["kind"] == 3)
    assert picture.box == "".join(pictures.LETTERS[i] for i in picture.labels["letter"][letters])


def test_questions_have_the_answers_that_the_picture_gives():
    things = (
        pictures.Thing("digit", "7", "red", 0),
        pictures.Thing("shape", "circle", "red", 5),
    )
    picture = pictures.Picture(np.zeros((96, 96, 3), np.uint8), things, "AXE", "bottom", {})
    drawn = questions.ask(np.random.default_rng(0), picture, questions.PICTURE_FAMILIES, 99)
    answers = {question: answer for _, (question, answer) in drawn}
    assert {family for family, _ in drawn} == set(questions.PICTURE_FAMILIES)
    assert len(answers) == len(drawn)
    expected = {
        "which digit is red?": "7",
        "which shape is red?": "circle",
        "what colour is digit 7?": "red",
        "where is the red shape?": "right",
        "where is the box?": "bottom",
        "what is at the top-left?": "7",
        "what is at the bottom?": "box",
        "what is at the top?": "nothing",
        "how many objects are red?": "2",
        "how many objects are green?": "0",
        "read the box.": "AXE",
    }
    assert expected.items() <= answers.items()


@pytest.mark.parametrize("level", range(len(TEXT_LEVELS)))
def test_documents_hold_every_asked_fact_once_and_fit_the_context(level):
    batch = data.text_batch(0, "test", 0, level, 2)
    assert batch.positions.max() < 2048 < vocabulary.MAX_POSITIONS
    assert {FAMILIES[i] for i in batch.families} == set(documents.TEXT_FAMILIES)
    rules = vars(TEXT_LEVELS[level])
    names = ("most_digits", "most_keys", "most_items", "most_words", "tokens")
    document = documents.write(
        np.random.default_rng(level), **{name: rules[name] for name in names}
    )
    for family, (question, answer) in document.questions:
        if family == "multikey":
            owner = question.removeprefix("what is the ").removesuffix("?")
            assert document.text.count(f"the {owner} is {answer}.") == 1
        elif family == "passkey":
            assert document.text.count(f"the passkey is {answer}.") == 1
            assert len(answer) <= rules["most_digits"]
        elif family == "list":
            assert document.text.count(f" {answer}") == 1


def test_the_deepest_picture_level_asks_about_two_pictures():
    level = len(PICTURE_LEVELS) - 1
    batches = [data.picture_batch(0, "train", step, level, 4) for step in range(8)]
    pictures_each = {(batch.ids == vocabulary.IMAGE).sum(1).max() for batch in batches}
    assert pictures_each == {144, 288}


@pytest.mark.parametrize("chat", [False, True])
def test_packed_questions_are_the_prompts_that_are_served(chat):
    batch = data.text_batch(0, "train", 0, 1, 2, chat=chat)
    text = vocabulary.decode(batch.ids[0].tolist())
    assert text.startswith("USER: ")
    assert text.count("USER:") == (text.count("ASSISTANT:") if chat else 1)
    own = (batch.segments[0] == 0) | (batch.segments[0] == 1)
    ids, positions = batch.ids[0][own], batch.positions[0][own]
    assert positions[ids != vocabulary.PAD].tolist() == list(range((ids != vocabulary.PAD).sum()))
    last = np.flatnonzero(batch.answers[0])
    assert batch.ids[0][last[-1]] == vocabulary.EOS
