"""The model: transformers' LLaVA with a CLIP-type tower, small enough to live in a package."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.tasks import vocabulary
from bench.tasks.pictures import NUM_PATCHES, PATCH, PATCH_LABELS, SIDE
from bench.training import attention

# what CLIPImageProcessor subtracts and divides by
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_DEVIATION = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ModelSpec:
    """Sizes of the model.

    Attributes:
        layers: Decoder layers.
        hidden: Width of the decoder.
        heads: Query heads of the decoder.
        kv_heads: KV heads of the decoder.
        intermediate: Width of the decoder's MLP.
        vision_layers: Layers of the tower; the last one is never used, because LLaVA reads the
            output of the one before it.
        vision_hidden: Width of the tower.
        vision_heads: Heads of the tower.
        seed: Seed of the initial weights.
    """

    layers: int = 8
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 384
    vision_layers: int = 4
    vision_hidden: int = 96
    vision_heads: int = 3
    seed: int = 0


def build_config(spec: ModelSpec) -> Any:
    """Return the `LlavaConfig` of a model."""
    from transformers import LlavaConfig

    text = {
        "model_type": "llama",
        "vocab_size": vocabulary.vocabulary_size(),
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.hidden // spec.heads,
        "max_position_embeddings": vocabulary.MAX_POSITIONS,
        "initializer_range": spec.hidden**-0.5 / 2,
        "tie_word_embeddings": False,
        "bos_token_id": vocabulary.BOS,
        "eos_token_id": vocabulary.EOS,
        "pad_token_id": vocabulary.PAD,
    }
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": spec.vision_hidden,
        "intermediate_size": spec.vision_hidden * 2,
        "projection_dim": spec.vision_hidden,
        "num_hidden_layers": spec.vision_layers,
        "num_attention_heads": spec.vision_heads,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    return LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=vocabulary.IMAGE,
        image_seq_length=NUM_PATCHES,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        tie_word_embeddings=False,
        architectures=["LlavaForConditionalGeneration"],
    )


def normalise(pixels: Tensor) -> Tensor:
    """Turn `[N, 96, 96, 3]` uint8 into `[N, 3, 96, 96]`, as CLIPImageProcessor does."""
    mean, deviation = pixels.new_tensor(_MEAN, dtype=torch.float32), torch.tensor(_DEVIATION)
    scaled = (pixels.float() / 255 - mean) / deviation.to(pixels.device)
    return scaled.permute(0, 3, 1, 2).contiguous()


class DemoModel(nn.Module):
    """A LLaVA model with the heads that its training needs and its checkpoint does not.

    Attributes:
        llava: The `LlavaForConditionalGeneration` that is exported.
        patch_heads: Linear probes of the tower's auxiliary loss.
    """

    def __init__(self, spec: ModelSpec):
        super().__init__()
        from transformers import LlavaForConditionalGeneration

        torch.manual_seed(spec.seed)
        self.spec = spec
        self.llava = LlavaForConditionalGeneration(build_config(spec))
        self.llava.model.language_model.config._attn_implementation = attention.register()
        for name, weight in self.llava.named_parameters():
            # two writes a layer: keep the residual stream's variance near one
            if name.endswith(("o_proj.weight", "down_proj.weight")) and "language" in name:
                weight.data.mul_((2 * spec.layers) ** -0.5)
        self.patch_heads = nn.ModuleDict(
            {name: nn.Linear(spec.vision_hidden, size) for name, size in PATCH_LABELS.items()}
        )
        # nothing reads these
        self.tower.post_layernorm.requires_grad_(False)
        self.tower.encoder.layers[-1].requires_grad_(False)

    @property
    def tower(self) -> Any:
        """The CLIP tower."""
        return self.llava.model.vision_tower

    def spec_dict(self) -> dict[str, int]:
        """Return the sizes as plain data."""
        return asdict(self.spec)

    def patches(self, pixels: Tensor) -> Tensor:
        """Return what the projector reads: `[N, 144, vision_hidden]` of `[N, 96, 96, 3]`."""
        tower = self.tower
        hidden = tower.pre_layrnorm(tower.embeddings(normalise(pixels)))
        for layer in tower.encoder.layers[:-1]:
            hidden = layer(hidden, attention_mask=None)
        return hidden[:, 1:]

    def patch_logits(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return `[N, 144, classes]` for each head."""
        features = self.patches(pixels)
        return {name: head(features) for name, head in self.patch_heads.items()}

    def answer_logits(
        self, ids: Tensor, positions: Tensor, mask: Tensor, answers: Tensor, features: Tensor | None
    ) -> Tensor:
        """Return the logits that predict the answer tokens.

        Args:
            ids: `[B, L]` tokens.
            positions: `[B, L]` position of each token.
            mask: `[B, 1, L, L]`, 0 where a query may see a key and minus infinity elsewhere.
            answers: `[B, L]` bool, the tokens to predict.
            features: `[N, vision_hidden]` of `patches`, one for each image token, or None.
        """
        embeddings = self.llava.get_input_embeddings()(ids)
        if features is not None:
            tokens = self.llava.model.multi_modal_projector(features).to(embeddings.dtype)
            where = (ids == vocabulary.IMAGE).unsqueeze(-1)
            embeddings = embeddings.masked_scatter(where, tokens)
        hidden = self.llava.model.language_model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        # a token is predicted at the one before it; a segment's first token is never an answer
        return self.llava.lm_head(hidden[:, :-1][answers[:, 1:]])
