"""Scoring operators: a readable torch reference and a Triton kernel behind one function each.

Importing this package imports torch only; Triton follows when a kernel first runs.
"""

from tokenprune.kernels.ops.instruction_attention import (
    instruction_attention,
    instruction_attention_reference,
)
from tokenprune.kernels.ops.transition_scores import (
    transition_scores,
    transition_scores_reference,
)

__all__ = [
    "instruction_attention",
    "instruction_attention_reference",
    "transition_scores",
    "transition_scores_reference",
]
