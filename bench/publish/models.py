"""The table of supported models, from the families that the engine knows."""

from tokenprune.engine.families import families
from tokenprune.policies import ImagePolicy, methods


def models() -> str:
    """Return a table with a line per family."""
    lines = [
        "| family | architectures | decoders | visual methods | scored towers |",
        "|---|---|---|---|---|",
    ]
    for family in families():
        scored = bool(family.towers)
        visual = [
            name
            for name, policy in methods("visual").items()
            if scored or not issubclass(policy, ImagePolicy)
        ]
        cells = (
            family.name,
            ", ".join(f"`{a}`" for a in family.architectures),
            ", ".join(f"`{d}`" for d in family.decoders),
            ", ".join(f"`{name}`" for name in visual),
            ", ".join(f"`{tower}`" for tower in family.towers) or "none",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
