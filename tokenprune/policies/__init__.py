"""One file per method; importing this package registers them all."""

import importlib
import pkgutil

from tokenprune.policies.base import EngineShape, PlanSkipped, Policy, policies
from tokenprune.policies.channels import ChannelInputs, ChannelPlan, ChannelPolicy
from tokenprune.policies.eviction import KVPlan, KVPolicy, PartitionInputs
from tokenprune.policies.visual import (
    CropInputs,
    ImageInputs,
    ImagePlan,
    SelectInputs,
    VisualPlan,
    VisualPolicy,
)

__all__ = [
    "ChannelInputs",
    "ChannelPlan",
    "ChannelPolicy",
    "CropInputs",
    "EngineShape",
    "ImageInputs",
    "ImagePlan",
    "KVPlan",
    "KVPolicy",
    "PartitionInputs",
    "PlanSkipped",
    "Policy",
    "SelectInputs",
    "VisualPlan",
    "VisualPolicy",
    "policies",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
