"""One file per method in a folder per axis; importing this package registers them all.

Methods of other packages are found by their entry points in the group `tokenprune.policies`. They
are loaded here too, because the request's model is built from the registry once, in each process.
"""

import importlib
import pkgutil

from tokenprune.policies.base import (
    AXES,
    Axis,
    PlanSkipped,
    Policy,
    Skipped,
    methods,
    register_policy,
)
from tokenprune.policies.channels.base import ChannelInputs, ChannelPlan, ChannelPolicy
from tokenprune.policies.kv.base import KVPlan, KVPolicy, Segments, cached
from tokenprune.policies.plugins import check_plugins, load_plugins
from tokenprune.policies.visual.base import VisualPlan, VisualPolicy, top_k
from tokenprune.policies.visual.by_image import (
    CropInputs,
    ImageInputs,
    ImagePlan,
    ImagePolicy,
    PerImage,
)
from tokenprune.policies.visual.by_prompt import AfterPrompt, PromptPolicy, SelectInputs
from tokenprune.policies.visual.by_rank import KnownRows, RankPolicy
from tokenprune.policies.visual.schedule import ScheduledPolicy

__all__ = [
    "AXES",
    "AfterPrompt",
    "Axis",
    "ChannelInputs",
    "ChannelPlan",
    "ChannelPolicy",
    "CropInputs",
    "ImageInputs",
    "ImagePlan",
    "ImagePolicy",
    "KVPlan",
    "KVPolicy",
    "KnownRows",
    "PerImage",
    "PlanSkipped",
    "Policy",
    "PromptPolicy",
    "RankPolicy",
    "ScheduledPolicy",
    "Segments",
    "SelectInputs",
    "Skipped",
    "VisualPlan",
    "VisualPolicy",
    "cached",
    "check_plugins",
    "methods",
    "register_policy",
    "top_k",
]

for _module in pkgutil.walk_packages(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
load_plugins()
