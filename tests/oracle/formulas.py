"""What several parts of the oracle need: attention's weights, rotation, the best of a score."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import torch
from torch import Tensor


def attention_weights(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """Return the softmax of queries `[n, HQ, D]` on keys `[m, H, D]`: `[HQ, n, m]`."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    if causal:
        # the last query sees every key
        mask = torch.ones(logits.shape[1:], dtype=torch.bool).triu(1 + len(k) - len(q))
        logits = logits.masked_fill(mask, -torch.inf)
    return logits.softmax(-1)


def rotate_half(x: Tensor) -> Tensor:
    """Return the other part of the rotation by position."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def best(score: Tensor, keep: int) -> Tensor:
    """Return the indices of the `keep` highest scores, ascending; of equal ones the first."""
    order = sorted(range(len(score)), key=lambda i: (-float(score[i]), i))
    return torch.tensor(sorted(order[:keep]))


def entropy(pixels: np.ndarray, patch: int) -> Tensor:
    """Return the bits of the grey values of each patch of uint8 `[3, height, width]`."""
    grey = pixels.astype(int).sum(axis=0) // 3
    height, width = grey.shape
    bits = []
    for top in range(0, height - height % patch, patch):
        for left in range(0, width - width % patch, patch):
            counts = Counter(grey[top : top + patch, left : left + patch].flatten().tolist())
            shares = [count / patch**2 for count in counts.values()]
            bits.append(-sum(p * math.log2(p) for p in shares))
    return torch.tensor(bits, dtype=torch.float64)
