"""Asks an offline engine for the final hidden states of prompts; see `hidden_recorder`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tokenprune.engine.families import family_of
from tokenprune.engine.hidden_recorder import SAMPLE
from tokenprune.engine.shape import engine_shape
from tokenprune.errors import ConfigurationError
from tokenprune.request import Axes, flatten
from tokenprune.shape import EngineShape

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class LastHidden:
    """What the model made of one prompt.

    Attributes:
        hidden: `[C]` float32, the last token's hidden state after the final norm.
        num_visual: Visual tokens of the prompt.
        kept: Visual tokens kept per engine stage, or None where the prompt was not pruned.
    """

    hidden: np.ndarray
    num_visual: int
    kept: tuple[int, ...] | None


class LastHiddenProbe:
    """Asks an offline engine the same prompts again and again, with one pruning or another."""

    def __init__(self, llm: Any, samples: Iterable[tuple[Sequence[Image], str]]) -> None:
        """Prepare the prompts.

        Args:
            llm: vLLM's `LLM` with our worker.
            samples: Pictures and text of each prompt; the model's chat template joins them.

        Raises:
            ConfigurationError: The model's visual tokens cannot be pruned.
        """
        self._llm = llm
        self._config = llm.llm_engine.vllm_config
        self.engine: EngineShape = engine_shape(self._config)
        unsupported = self.engine.unsupported.get("visual")
        if unsupported is not None:
            raise ConfigurationError(
                f"the model must take pictures and allow pruning them: {unsupported}"
            )
        self._messages = [_message(pictures, text) for pictures, text in samples]
        llm.collective_rpc("tokenprune_record_last_hidden")

    @property
    def model(self) -> dict[str, Any]:
        """What names the model and how it is run, as plain data."""
        model = self._config.model_config
        return {
            "model": model.model,
            "revision": model.revision,
            "dtype": str(model.dtype),
            "quantization": model.quantization,
            "prune_layers": list(self.engine.prune_layers),
        }

    @property
    def patch_grid(self) -> int:
        """Side of the vision tower's square grid of patches.

        Raises:
            ConfigurationError: Pictures of this model have grids of their own.
        """
        family = family_of(self._config.model_config.architecture)
        assert family is not None, "models without a family were refused"
        side = family.patch_grid(self._config)
        if side is None:
            raise ConfigurationError(
                f"the vision tower must see crops of one size to be calibrated, got a model of "
                f"{family.name}, which sees every picture at a size of its own; give the method's "
                "parameters in a preset instead"
            )
        return side

    def ask(self, pruning: Axes) -> list[LastHidden]:
        """Run every prompt once and return what the model made of it, in order.

        Raises:
            ConfigurationError: vLLM does not take a prompt, e.g. because it is too long.
        """
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError

        params = [
            SamplingParams(temperature=0, max_tokens=1, extra_args={SAMPLE: i, **flatten(pruning)})
            for i in range(len(self._messages))
        ]
        try:
            self._llm.chat(self._messages, params, use_tqdm=False)
        except VLLMValidationError as error:
            raise ConfigurationError(
                f"a prompt must be one the model takes, got: {error}"
            ) from None
        # the hidden states of all ranks are equal
        found = self._llm.collective_rpc("tokenprune_take_last_hidden")[0]
        by_sample = {entry["sample"]: entry for entry in found}
        assert len(by_sample) == len(self._messages), "every prompt must be recorded once"
        return [
            LastHidden(
                np.asarray(entry["hidden"], dtype=np.float32),
                entry["num_visual"],
                entry["kept"] and tuple(entry["kept"]),
            )
            for _, entry in sorted(by_sample.items())
        ]


def _message(pictures: Sequence[Image], text: str) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image_pil", "image_pil": p} for p in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
