"""Segments to be scored, made by hand."""

import torch

from tokenprune.policies import Segments


def segments(**changes):
    values = {
        "num_partitions": 3,
        "first": 0,
        "lag": 8,
        "layer": 1,
        "num_heads": 2,
        "device": torch.device("cpu"),
    }
    return Segments(**(values | changes))
