"""A model that trains in seconds."""

from bench.training.model import ModelSpec

SMALL = ModelSpec(
    layers=2, hidden=32, heads=2, kv_heads=1, intermediate=48, vision_hidden=32, vision_heads=2
)
