"""Refuses bad `pruning_*` keys at vLLM's own door, whichever way the request came in.

vLLM lets every class of `--logits-processors` validate a request's parameters before the engine
sees it, and our launcher names this one there. That covers `vllm_xargs` on every route and
offline `LLM`. As a logits processor it does nothing: it declines each request, so it never makes
vLLM process logits it would not process anyway.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

from tokenprune.errors import PolicyError
from tokenprune.request import has_flat, parse_flat

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.sampling_params import SamplingParams


class PruningValidator(LogitsProcessor):
    """Validates; processes nothing."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Check the flat keys.

        Raises:
            VLLMValidationError: With the offending key as `parameter`; an HTTP 400.
        """
        if not has_flat(sampling_params.extra_args):
            return
        try:
            parse_flat(sampling_params.extra_args)
        except PolicyError as error:
            raise VLLMValidationError(str(error), parameter=error.param) from None

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Decline the request."""
        return False

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """Return the logits unchanged."""
        return logits
