"""The check of the served answers: a transformers loop that drops the same rows, in float64.

The loop is the one that the engine's tests believe in, `tests/oracle/`: it takes the kept
counts from the plan and computes scores and forward pass by itself.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers.utils import logging

from bench.quality.ask import messages
from bench.quality.cells import Cell
from bench.quality.store import HF, SERVED, Answers
from bench.tasks.held_out import TASKS, Item
from tokenprune.errors import TokenPruneError
from tokenprune.policies import PlanSkipped, VisualPolicy
from tokenprune.request import parse_pruning
from tokenprune.shape import EngineShape


def greedy(
    score: Callable[[list[int]], list[int]], guess: Sequence[int], end: int, limit: int
) -> list[int]:
    """Return the greedy continuation, by repair of a guess.

    `score` says for each place of a continuation which token is the best after those before it.
    A right guess costs one call, and each call repairs at least one token.

    Args:
        score: The model.
        guess: Where to begin; only speed depends on it.
        end: Token that ends an answer.
        limit: Most tokens in an answer.
    """
    tokens = _until(end, guess or [end])[:limit]
    while True:
        best = score(tokens)
        wrong = next((i for i, token in enumerate(tokens) if best[i] != token), None)
        if wrong is not None:
            tokens = _until(end, best)
        elif tokens[-1] == end or len(tokens) == limit:
            return tokens
        else:
            tokens = [*tokens, end]


def _until(end: int, tokens: Sequence[int]) -> list[int]:
    return list(tokens[: tokens.index(end) + 1] if end in tokens else tokens)


def _without(end: int, tokens: Sequence[int]) -> list[int]:
    return [token for token in tokens if token != end]


class Checker:
    """One checkpoint in transformers, and the shape of the engine that it must imitate."""

    def __init__(self, folder: Path, engine: Mapping[str, Any]) -> None:
        """Load the checkpoint.

        Raises:
            TokenPruneError: This is not a checkout of the repository.
        """
        try:
            from tests.oracle.loop import Oracle
        except ImportError as error:
            raise TokenPruneError(
                f"the HF check must run from the repository root, got {error}; or pass --hf 0"
            ) from error
        # matrices this small lose more to waiting threads than they gain: 20 times, measured on two
        # busy cores
        torch.set_num_threads(1)
        logging.disable_progress_bar()
        self._oracle = Oracle(folder)
        processor = self._oracle.processor
        self._tokenizer = processor.tokenizer
        # the chat template writes the first token itself, as it does in the server
        self._oracle.processor = partial(processor, add_special_tokens=False)
        self._template = processor.apply_chat_template
        self._shape = EngineShape(
            engine["num_layers"],
            (0, *engine["prune_layers"]),
            engine["max_num_batched_tokens"],
            engine["visual_unsupported"],
        )

    def check(self, cell: Cell, item: Item, answers: Answers) -> None:
        """Answer one question again and store the answer.

        Raises:
            TokenPruneError: The cell prunes something that the loop cannot drop.
        """
        served = answers.get(cell, item.index, SERVED, item.digest)
        assert served is not None, "only answered questions are checked"
        chat = [
            {"type": "image"} if part["type"] == "image_url" else part
            for part in messages(item)[0]["content"]
        ]
        prompt = self._template([{"role": "user", "content": chat}], add_generation_prompt=True)
        pictures = [Image.fromarray(pixels) for pixels in item.pictures]
        pruned = self._pruned(cell, item.index, prompt, pictures)

        def score(tokens: list[int]) -> list[int]:
            trace = self._oracle.run(prompt, pictures, tokens, pruned)
            return [int(logprobs.argmax()) for logprobs in trace.logprobs]

        end = self._tokenizer.eos_token_id
        tokens = greedy(score, served["tokens"], end, TASKS[cell.task].max_tokens)
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        # tokens, not text: a server holds back half a character at the end of an answer
        same = _without(end, tokens) == _without(end, served["tokens"])
        fields = {"item": item.digest, "text": text, "tokens": tokens, "same": same}
        answers.add(cell, item.index, HF, **fields)

    def _pruned(self, cell: Cell, index: int, prompt: str, pictures: list[Image.Image]) -> Any:
        from tests.oracle.request import layout_of
        from tests.oracle.visual import Pruned

        pruning = parse_pruning(cell.pruning(index))
        if pruning.is_off:
            return None
        policy = pruning.policy(cell.axis)
        if not isinstance(policy, VisualPolicy):
            raise TokenPruneError(f"the HF check must know {cell.axis} pruning; pass --hf 0")
        _, rows = self._oracle.embed(prompt, pictures)
        try:
            return Pruned.like(policy, layout_of(rows), self._shape)
        except PlanSkipped as skipped:
            raise TokenPruneError(f"the plan must apply, was skipped: {skipped}") from None
