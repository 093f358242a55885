"""What a model family says: which of its models are supported, and where their parts are.

The first half of `Family` reads configurations and runs in every process, without torch. The other
half is asked in the worker, with the loaded model.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor, nn
    from vllm.config import VllmConfig


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One decoder layer and its parts.

    Attributes:
        module: The layer; its forward takes `positions`, whose last dimension are rows, and other
            tensors whose first dimension are.
        attention: Its attention sub-module, norm and residual not included.
        core: vLLM's attention layer inside, which is called with queries and keys, RoPE applied.
        mlp: Its MLP sub-module, or mixture of experts.
    """

    module: nn.Module
    attention: nn.Module
    core: Any
    mlp: nn.Module


@dataclass(frozen=True, slots=True)
class Decoder:
    """A decoder.

    Attributes:
        layers: Its layers in order.
        norm: The final norm, which is called with rows of the whole step.
    """

    layers: Sequence[DecoderLayer]
    norm: nn.Module


@dataclass(frozen=True, slots=True)
class ImageScores:
    """The importance of one image's tokens, laid out as its features are.

    Attributes:
        importance: `[N]` float32; infinite for tokens that separate rows.
        grids: `(tokens, width)` of the grids of tokens one after the other.
        is_video: Whether these are the frames of a video.
    """

    importance: Tensor
    grids: tuple[tuple[int, int], ...]
    is_video: bool


@dataclass(frozen=True, slots=True)
class Picture:
    """An image or a video on its way into the tower.

    Attributes:
        modality: `image` or `video`.
        inputs: What the processor made of it, by the names of the model's arguments.
    """

    modality: str
    inputs: Mapping[str, Any]


class Tower(abc.ABC):
    """A vision tower whose attention can be read.

    Attributes:
        module: The tower; called with the pixels of all crops of an image.
        attention: The attention layer whose queries and keys are scored: the last executed one.
        scale: What its logits are multiplied with.
        patch: Side of a patch in pixels.
    """

    module: nn.Module
    attention: nn.Module
    scale: float
    patch: int

    @abc.abstractmethod
    def heads(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], picture: Picture
    ) -> tuple[Tensor, Tensor]:
        """Return queries and keys of a call of `attention`.

        Returns:
            `[crops, H, N, D]` each, heads of this rank, without a class token, patches in the order
            of `pixels`: row by row.
        """

    @abc.abstractmethod
    def pixels(self, args: Sequence[Any], crop: int, picture: Picture) -> Tensor:
        """Return a crop of a call of `module` before normalisation, uint8 `[3, height, width]`."""

    @abc.abstractmethod
    def lay_out(self, scores: Tensor, picture: Picture) -> ImageScores:
        """Lay scores `[crops, N]` out as the model lays out the features of an image.

        Args:
            scores: Importance of the patches of each crop.
            picture: The image.
        """


def before_normalisation(model_config: Any, pixels: Tensor, modality: str) -> Tensor:
    """Undo the normalisation of the model's processor; in bfloat16 to about one level.

    Args:
        model_config: vLLM's, of the model.
        pixels: `[3, ...]` as they reach the tower: normalised, unless the tower does that itself
            (`mm_device_do_normalize`).
        modality: `image` or `video`.

    Returns:
        `[3, ...]` uint8.
    """
    import torch
    from vllm.transformers_utils.processor import cached_processor_from_config

    if model_config.multimodal_config.mm_device_do_normalize:
        return pixels.to(torch.uint8)
    processor: Any = cached_processor_from_config(model_config)
    images = processor.video_processor if modality == "video" else processor.image_processor
    pixels = pixels.float()
    if images.do_normalize:
        mean, std = (
            torch.tensor(x, device=pixels.device).view(-1, *(1,) * (pixels.ndim - 1))
            for x in (images.image_mean, images.image_std)
        )
        pixels = pixels * std + mean
    if images.do_rescale:
        pixels = pixels / images.rescale_factor
    return pixels.round().clamp(0, 255).to(torch.uint8)


def llama_like(decoder: Any) -> Decoder:
    """Find the parts of a decoder built like Llama's."""
    layers = [
        DecoderLayer(layer, layer.self_attn, layer.self_attn.attn, layer.mlp)
        for layer in decoder.layers
    ]
    return Decoder(layers, decoder.norm)


class Family:
    """Models of one kind.

    Attributes:
        name: What people call them.
        architectures: Class names in `config.json`.
        decoders: Types of text model that were compared with an independent implementation.
        towers: Types of vision tower that can be scored; none unless a family says so.
    """

    name: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]]
    decoders: ClassVar[tuple[str, ...]]
    towers: ClassVar[tuple[str, ...]] = ()

    def visual_unsupported(self, vllm_config: VllmConfig) -> str | None:
        """Return why visual tokens of this model cannot be pruned, or None if they can."""
        decoder = vllm_config.model_config.hf_text_config.model_type
        if decoder not in self.decoders:
            return f"decoder type {decoder!r} is not among {', '.join(self.decoders)}"
        return None

    def importance_unsupported(self, vllm_config: VllmConfig) -> str | None:
        """Return why images cannot be scored in the vision tower, or None if they can."""
        return f"vision towers of {self.name} models cannot be scored yet"

    def num_late(self, vllm_config: VllmConfig) -> int:
        """Return after how many first layers the model adds rows of the step, outside any module.

        They are image features (DeepStack), the same of a token whatever else is in the step.
        """
        return 0

    def patch_grid(self, vllm_config: VllmConfig) -> int | None:
        """Return the side of the grid of patches of a crop, or None where crops differ.

        Asked only where the tower can be scored.
        """
        vision = vllm_config.model_config.hf_config.vision_config
        return int(vision.image_size) // int(vision.patch_size)

    def decoder(self, model: Any) -> Decoder:
        """Find the decoder's parts; this default fits decoders built like Llama's."""
        return llama_like(model.get_language_model().model)

    def tower(self, vllm_config: VllmConfig, model: Any) -> Tower | None:
        """Find the vision tower; asked only where `importance_unsupported` returns None."""
        return None
