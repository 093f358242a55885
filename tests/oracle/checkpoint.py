"""One checkpoint in transformers and float64, up to the rows that its decoder reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

# an image, or the frames of a video as `[frames, height, width, 3]`
Picture = Image.Image | np.ndarray


def film_metadata(frames: np.ndarray) -> dict[str, Any]:
    """Return what a processor asks of a video whose frames are all taken, two a second."""
    return {
        "fps": 2.0,
        "total_num_frames": len(frames),
        "frames_indices": list(range(len(frames))),
    }


class Checkpoint:
    """A model with its processor."""

    def __init__(self, checkpoint: Path) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(
            checkpoint,
            dtype=torch.float64,
            attn_implementation="eager",
            # grouped products know no float64
            experts_implementation="eager",
        ).eval()
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        self.image_processor = self.processor.image_processor
        self.video_processor = getattr(self.processor, "video_processor", None)
        inner = self.model.model
        self.decoder = (
            inner.language_model if hasattr(inner, "language_model") else inner.text_model
        )

    @torch.inference_mode()
    def embed(self, prompt: str, images: list[Picture]) -> tuple[Tensor, Tensor]:
        """Return input embeddings `[n, C]` and the bool mask of visual rows `[n]`."""
        inputs = self.inputs(prompt, images)
        for key, value in inputs.items():
            if value.is_floating_point():
                inputs[key] = value.double()
        captured: dict[str, Tensor] = {}

        def stop(module: object, args: object, kwargs: dict[str, Tensor]) -> None:
            captured.update(kwargs)
            raise StopIteration

        handle = self.decoder.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.model(**inputs)
        except (StopIteration, RuntimeError):
            pass
        finally:
            handle.remove()
        config, ids = self.model.config, inputs["input_ids"][0]
        visual = ids == config.image_token_id
        if hasattr(config, "video_token_id"):
            visual |= ids == config.video_token_id
        self._captured = captured
        return captured["inputs_embeds"][0], visual

    def positions(self, num_rows: int) -> Tensor:
        """Return the positions of the prompt embedded last: `[n]`, or `[3, n]` of M-RoPE."""
        found = self._captured.get("position_ids")
        # in front of the three, some models pass the plain ones
        return torch.arange(num_rows) if found is None or found.ndim == 2 else found[-3:, 0]

    def late_rows(self) -> list[Tensor]:
        """Return what is added to the visual rows after each of the first layers (DeepStack)."""
        found = self._captured.get("deepstack_visual_embeds")
        return [] if found is None else list(found)

    def inputs(self, prompt: str, images: list[Picture]) -> Any:
        """Return what the processor makes of a prompt and its images and videos."""
        kinds: dict[str, Any] = {}
        if pictures := [x for x in images if isinstance(x, Image.Image)]:
            kinds["images"] = pictures
        if videos := [x for x in images if not isinstance(x, Image.Image)]:
            metadata = [film_metadata(x) for x in videos]
            kinds |= {"videos": videos, "video_metadata": metadata, "do_sample_frames": False}
        return self.processor(text=prompt, return_tensors="pt", **kinds)
