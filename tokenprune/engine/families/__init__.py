"""What is known of models: one file per family, looked up by architecture.

A new family is one file here and a test checkpoint; the table of supported models, the listing and
the error texts follow from the class.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil

from tokenprune.engine.families.base import Family


@functools.cache
def families() -> tuple[Family, ...]:
    """Return one of each family, by name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return tuple(cls() for cls in sorted(Family.__subclasses__(), key=lambda cls: cls.__name__))


def family_of(architecture: str) -> Family | None:
    """Return the family of an architecture, e.g. `LlavaForConditionalGeneration`, or None."""
    return next((f for f in families() if architecture in f.architectures), None)


def known_architectures() -> tuple[str, ...]:
    """Architectures whose visual tokens can be pruned."""
    return tuple(name for family in families() for name in family.architectures)
