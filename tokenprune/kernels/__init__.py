"""Scoring operators: a readable torch reference and a Triton kernel behind one function each.

Importing this package imports torch only; Triton follows when a kernel first runs.
"""

from tokenprune.kernels.ops.attention_importance import (
    attention_importance,
    attention_importance_reference,
)
from tokenprune.kernels.ops.channel_scores import channel_scores, channel_scores_reference
from tokenprune.kernels.ops.instruction_attention import (
    instruction_attention,
    instruction_attention_reference,
)
from tokenprune.kernels.ops.lag_compact import lag_compact, lag_compact_reference
from tokenprune.kernels.ops.lag_keep import lag_keep, lag_keep_reference
from tokenprune.kernels.ops.lag_scores import lag_scores, lag_scores_reference
from tokenprune.kernels.ops.packed_decode_attention import (
    ROW_FIELDS,
    pack,
    packed_decode_attention,
    packed_decode_attention_reference,
    places_of,
)
from tokenprune.kernels.ops.patch_entropy import patch_entropy, patch_entropy_reference
from tokenprune.kernels.ops.recycle import recycle, recycle_reference
from tokenprune.kernels.ops.transition_scores import (
    transition_scores,
    transition_scores_reference,
    transition_terms,
    transition_terms_reference,
)

__all__ = [
    "ROW_FIELDS",
    "attention_importance",
    "attention_importance_reference",
    "channel_scores",
    "channel_scores_reference",
    "instruction_attention",
    "instruction_attention_reference",
    "lag_compact",
    "lag_compact_reference",
    "lag_keep",
    "lag_keep_reference",
    "lag_scores",
    "lag_scores_reference",
    "pack",
    "packed_decode_attention",
    "packed_decode_attention_reference",
    "patch_entropy",
    "patch_entropy_reference",
    "places_of",
    "recycle",
    "recycle_reference",
    "transition_scores",
    "transition_scores_reference",
    "transition_terms",
    "transition_terms_reference",
]
