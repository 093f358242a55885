"""Documents of filler text with facts at any depth, and questions that ask for the facts."""

from dataclasses import dataclass

import numpy as np

from bench.tasks.questions import Question
from bench.tasks.words import ADJECTIVES, DIGITS, ITEMS, NAMES, NOUNS, VERBS

TEXT_FAMILIES = ("passkey", "multikey", "list", "copy")
ORDINALS = "123456789"
# tokens: the longest fact sentence besides its digits or items, and one filler sentence
_FACT_TOKENS, _FILLER_TOKENS = 7, 9


@dataclass(frozen=True)
class Document:
    """A text and what can be asked about it, each question with its family."""

    text: str
    questions: list[tuple[str, Question]]


def _number(rng: np.random.Generator, digits: int) -> str:
    return "".join(DIGITS[i] for i in rng.integers(10, size=digits).tolist())


def _pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[rng.integers(len(words))]


def _filler(rng: np.random.Generator) -> str:
    first = f"the {_pick(rng, ADJECTIVES)} {_pick(rng, NOUNS)} {_pick(rng, VERBS)}"
    return f"{first} the {_pick(rng, ADJECTIVES)} {_pick(rng, NOUNS)}."


def _copy(rng: np.random.Generator, most: int) -> Question:
    words = [
        _number(rng, int(rng.integers(1, 5))) if rng.random() < 0.3 else _pick(rng, NOUNS + ITEMS)
        for _ in range(rng.integers(2, most + 1))
    ]
    text = " ".join(words)
    return f"repeat: {text}", text


def write(
    rng: np.random.Generator,
    *,
    families: tuple[str, ...] = TEXT_FAMILIES,
    tokens: int,
    most_digits: int,
    most_keys: int,
    most_items: int,
    most_words: int,
    num_copies: int = 2,
    fewest_digits: int = 5,
) -> Document:
    """Write one document of about `tokens` tokens.

    Args:
        rng: Source of every choice.
        families: What to ask about; facts that no family asks for are left out.
        tokens: Length to fill up to; facts alone may be longer.
        most_digits: Upper bound of the passkey's digits.
        most_keys: Upper bound of named keys.
        most_items: Upper bound of list items, at most 9.
        most_words: Upper bound of the words to copy.
        num_copies: Texts to copy; they stand in the question, not in the document.
        fewest_digits: Lower bound of the passkey's digits.
    """
    facts: list[str] = []
    questions: list[tuple[str, Question]] = []
    used = 0
    if "passkey" in families:
        number = _number(rng, int(rng.integers(fewest_digits, most_digits + 1)))
        facts.append(f"the passkey is {number}.")
        questions.append(("passkey", ("what is the passkey?", number)))
        used += _FACT_TOKENS + len(number)
    if "multikey" in families:
        owners = rng.permutation(len(NAMES))[: rng.integers(2, most_keys + 1)].tolist()
        for owner in owners:
            number = _number(rng, int(rng.integers(3, 7)))
            facts.append(f"the key of {NAMES[owner]} is {number}.")
            questions.append(("multikey", (f"what is the key of {NAMES[owner]}?", number)))
            used += _FACT_TOKENS + len(number)
    if "list" in families:
        chosen = rng.permutation(len(ITEMS))[: rng.integers(2, most_items + 1)].tolist()
        items = [ITEMS[i] for i in chosen]
        facts.append(f"the list is {', '.join(items)}.")
        place = int(rng.integers(len(items)))
        questions.append(("list", (f"what is item {place + 1} of the list?", items[place])))
        place = int(rng.integers(len(items) - 1))
        questions.append(("list", (f"which item comes after {items[place]}?", items[place + 1])))
        used += _FACT_TOKENS + 2 * len(items)
    if "copy" in families:
        questions += [("copy", _copy(rng, most_words)) for _ in range(num_copies)]
    filler = [_filler(rng) for _ in range(max(0, tokens - used) // _FILLER_TOKENS)]
    # facts keep a random order; each goes to a random depth
    sentences = [facts[i] for i in rng.permutation(len(facts))] + filler
    text = " ".join(sentences[i] for i in rng.permutation(len(sentences)))
    return Document(text, [questions[i] for i in rng.permutation(len(questions))])
