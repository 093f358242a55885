"""Under which name this project is installed, how, and whether somebody else's files mix with it.

The distribution is `vllm-tokenprune`; its package and its command are `tokenprune`. On the public
index the distribution `tokenprune` is a stranger's, whose package has the same name: where both are
installed, files of the one lie in the place of the other's.
"""

from __future__ import annotations

from importlib.metadata import Distribution, distributions

from tokenprune.errors import InstallationError

DISTRIBUTION = "vllm-tokenprune"
REINSTALL = "pip install --force-reinstall --no-deps . in a checkout of tokenprune"

_STRANGER = "tokenprune"
# what every distribution of ours declares, also those that were still called `tokenprune`
_PLUGIN_GROUP, _PLUGIN_MODULE = "vllm.general_plugins", "tokenprune.plugin"


def install_command(extra: str) -> str:
    """Return the command that installs the libraries of an extra, and where to run it."""
    return f'pip install ".[{extra}]" in a checkout of tokenprune'


def check_distributions() -> None:
    """Refuse an environment that holds the stranger's distribution as well.

    Raises:
        InstallationError: It does; the message says where, and how to get rid of it.
    """
    for found in distributions(name=_STRANGER):
        if not _is_ours(found):
            raise InstallationError(
                f"the package tokenprune must come from {DISTRIBUTION} alone, got another "
                f"project's distribution {_STRANGER} in {found.locate_file('')}, whose files take "
                f"the place of ours; pip uninstall {_STRANGER}, then {REINSTALL}"
            )


def _is_ours(distribution: Distribution) -> bool:
    return any(
        point.group == _PLUGIN_GROUP and point.module == _PLUGIN_MODULE
        for point in distribution.entry_points
    )
