"""What the page of a method shows: its parameters, from the schema, and its measured figures."""

from collections.abc import Mapping, Sequence

from bench.common import table
from bench.publish.equal_work import row_cells
from bench.quality.cells import OFF
from bench.quality.report import Row, is_pool
from tokenprune.policies import Policy

# rows of the quality results that are this method under another name
_ALSO = {"vflowopt": ("vflowopt-cal",)}


def parameters(policy: type[Policy]) -> str:
    """Return the table of a method's parameters."""
    properties = policy.model_json_schema()["properties"]
    lines = ["| parameter | legal | default | meaning |", "|---|---|---|---|"]
    for name, schema in properties.items():
        if name == "method":
            continue
        default = policy.model_fields[name].default
        cells = (
            f"`{name}`",
            _legal(schema),
            "" if default is None else f"`{default}`".lower(),
            schema["description"],
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _legal(schema: Mapping[str, object]) -> str:
    """Return in words what a parameter may be."""
    branches = schema.get("anyOf", [schema])
    assert isinstance(branches, list)
    (branch,) = [b for b in branches if b.get("type") != "null"]
    if "enum" in branch:
        return ", ".join(f"`{value}`" for value in branch["enum"])
    kind = {"number": "number", "integer": "integer", "boolean": "true, false"}
    if branch["type"] == "array":
        return f"list of {kind[branch['items']['type']]}s"
    low, high = branch.get("exclusiveMinimum", branch.get("minimum")), branch.get("maximum")
    if low is None:
        return kind[branch["type"]]
    opening = "(" if "exclusiveMinimum" in branch else "["
    # the largest seed and token count are no limit that anyone meets
    if high is None or high >= 2**31 - 1:
        return f"{kind[branch['type']]} from {low:g}"
    return f"{kind[branch['type']]} in {opening}{low:g}, {high:g}]"


def figures(name: str, rows: Sequence[Row]) -> str:
    """Return what was measured of a method, beside the unpruned model.

    Args:
        name: The method.
        rows: Those of its axis.
    """
    names = (OFF, name, *_ALSO.get(name, ()))
    shown = [row for row in rows if is_pool(row) and row.method in names]
    headings = ["method", "keep_ratio", "held", "right", "95 %"]
    return table([headings, *(row_cells(row.method, row) for row in shown)])
