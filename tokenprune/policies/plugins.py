"""Policies of other packages, found by entry point."""

from __future__ import annotations

from importlib.metadata import entry_points

from tokenprune.errors import ConfigurationError
from tokenprune.policies.base import AXES, methods

GROUP = "tokenprune.policies"
_failures: list[str] = []


def load_plugins() -> None:
    """Import what the entry points of the group name; importing a policy's module registers it.

    A failure is kept for `check_plugins`, so that importing this package never raises.
    """
    for entry in sorted(entry_points(group=GROUP), key=lambda e: e.name):
        before = _num_methods()
        try:
            entry.load()
            problem = None if _num_methods() > before else "it registers no policy"
        # whatever a stranger's module raises while it is imported
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if problem is not None:
            package = entry.dist.name if entry.dist is not None else "unknown"
            _failures.append(f"{entry.name} of package {package} ({entry.value}): {problem}")


def check_plugins() -> None:
    """Refuse to start with a plugin that did not load.

    Raises:
        ConfigurationError: It names every such plugin, its package and what went wrong.
    """
    if _failures:
        raise ConfigurationError(
            f"policy plugins must load, got {'; '.join(_failures)}; mend or uninstall them"
        )


def _num_methods() -> int:
    return sum(len(methods(axis)) for axis in AXES)
