"""The one order in which every operator that chooses puts its scores."""

import math

import torch
from torch import Tensor


def descending_order(scores: Tensor) -> Tensor:
    """Return int64 indices that sort the last dimension from the highest score to the lowest.

    NaN ranks lowest, after -inf; ties keep the lower index first.
    """
    # sorts put NaN last where they ascend; a radix sort reads the sign of a NaN, so it is set
    ascending = torch.where(scores.isnan(), math.nan, -scores)
    return ascending.sort(dim=-1, stable=True).indices
