"""TransPrune: drop the visual tokens that change little and that the question ignores.

Two scores are mixed at each cut:

* TTV, token transition variation: how far a sub-module (attention or MLP) turns and stretches a
  token, `softmax(direction) * |x_out| / |x_in|`, summed over both sub-modules of the layers from
  the first published layer up to the cut.
* IGA, instruction-guided attention: the mean attention, over heads and over all text rows
  after the last image, that a visual token gets in the layer after the cut.

Source: Li et al. 2025, arXiv 2507.20630, eq. 2 to 7; code liaolea/TransPrune@c9e8284. We follow
the code by default, because the published numbers come from it: direction `1 - cos`, softmax
over all tokens, both scores divided by their sum before mixing. `form: "paper"`
gives `1 - |cos|`, softmax over the visual tokens, no rescaling.

Where we leave the code: positions stay original (the code closes them up after each cut, so
later layers see shifted RoPE positions); scores are float32 (the code: model dtype); several
images form one candidate set (the code tracks the first image only); and the softmax begins at the
first visual token, so that a choice is the same whether text before it was cached or not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tokenprune.lengths import PromptLayout
from tokenprune.policies.base import register_policy
from tokenprune.policies.visual.base import VisualPlan, top_k
from tokenprune.policies.visual.by_prompt import PromptPolicy, SelectInputs
from tokenprune.policies.visual.schedule import ScheduledPolicy
from tokenprune.shape import EngineShape, ModelShape

if TYPE_CHECKING:
    from torch import Tensor

_EPS = 1e-8  # the released code's guard of the rescaling


@register_policy
class TransPrune(ScheduledPolicy, PromptPolicy):
    """Keep the top tokens by `alpha * TTV + (1 - alpha) * IGA`.

    The scores need the whole prompt: layers after the first cut wait for it, and the prompt may
    not be longer than the engine's `max_num_waiting_tokens`. There must be text after the last
    image.
    """

    method: Literal["transprune"] = "transprune"
    alpha: float = Field(
        default=0.5, ge=0, le=1, description="Weight of TTV; 1 - alpha is the weight of IGA."
    )
    form: Literal["code", "paper"] = Field(
        default="code", description="Which form of the scores: the released code's or the paper's."
    )

    def observed_layers(self, engine: EngineShape) -> range:
        """Layers from the first published one (scaled to the model) up to the last cut."""
        cuts = self.cuts(engine)
        scaled = round(self.published_layers[0] * engine.num_layers / self.published_depth)
        # layers are counted from 1 in the paper: "after layer 7" ends with 0-based layer 6
        first = max(1, min(scaled, cuts[0][0]))
        return range(first - 1, cuts[-1][0])

    def observe(self, x_in: Tensor, x_out: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the terms of TTV of one sub-module."""
        from tokenprune.kernels import transition_terms

        code = self.form == "code"
        return transition_terms(x_in, x_out, visual, signed=code, scope="all" if code else "visual")

    def select(self, inputs: SelectInputs) -> Tensor:
        """Return the top `keep` by the mixed score."""
        return top_k(self.score(inputs), inputs.keep)

    def score(self, inputs: SelectInputs) -> Tensor:
        """Return the mixed score, float32 `[N]`."""
        iga = inputs.instruction_attention()
        ttv = inputs.accumulated
        if ttv is None:  # a cut before layer 0 has seen no layer
            return iga
        if self.form == "code":
            ttv, iga = ttv / (ttv.sum() + _EPS), iga / (iga.sum() + _EPS)
        return self.alpha * ttv + (1 - self.alpha) * iga

    def score_macs(
        self, plan: VisualPlan, prompt: PromptLayout, engine: EngineShape, model: ModelShape
    ) -> int:
        """Return the multiply-accumulates of both scores, for one prompt.

        TTV takes one dot product and two norms per token from the first image on and sub-module
        of an observed layer, `3 n C`. IGA takes, at each cut, keys of all `n` tokens, queries of
        the `t` text rows after the last image, and their products.
        """
        text = prompt.num_tokens - prompt.num_visual

        def tokens_at(layer: int) -> int:
            return text + plan.kept[engine.stage_of(layer)]

        width, rows = model.hidden_size, prompt.num_text_after
        before = prompt.visual_spans[0][0]
        transitions = sum(
            2 * 3 * (tokens_at(b) - before) * width for b in self.observed_layers(engine)
        )
        attention = 0
        for layer, _ in plan.cuts:
            n = tokens_at(layer - 1) if layer else prompt.num_tokens
            attention += n * width * model.kv_size + rows * width * model.q_size
            attention += rows * n * model.q_size
        return transitions + attention
