"""The `pruning` field of a request: parsing, presets, and flat keys.

A request says what it wants in one of three forms, all equal:

* nested: `"pruning": {"visual": {"method": "transprune", "keep_ratio": 0.25}}`
* a preset by name: `"pruning": "balanced"`; `"off"` turns the server's default off
* flat scalars for `vllm_xargs`: `{"pruning_visual_method": "transprune", ...}` or
  `{"pruning": "balanced"}`
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from tokenprune.errors import PolicyError, shown
from tokenprune.policies import AXES, Axis, Policy, methods

FLAT_PREFIX = "pruning_"
FLAT_PRESET = "pruning"
# characters of a key that messages repeat
MAX_NAME = 60


def _axis_union(axis: Axis) -> Any:
    members = tuple(methods(axis).values())
    union = Union[members] if len(members) > 1 else members[0]  # noqa: UP007 (built at run time)
    return Annotated[union, Field(discriminator="method")] if len(members) > 1 else union


class Axes(BaseModel):
    """The parsed field; `Pruning` below adds one attribute per axis that has methods."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def policy(self, axis: str) -> Policy | None:
        """Return the policy asked for on `axis`, or None."""
        return getattr(self, axis, None)

    @property
    def is_off(self) -> bool:
        """True when nothing is to be pruned."""
        return all(self.policy(axis) is None for axis in AXES)


Pruning: type[Axes] = create_model(  # type: ignore[call-overload]
    "Pruning",
    __base__=Axes,
    __doc__="What to prune, per axis; an axis left out is not pruned.",
    __module__=__name__,
    **{
        axis: (_axis_union(axis) | None, Field(default=None, description=f"How to prune {axis}."))
        for axis in AXES
        if methods(axis)
    },
)
PRESETS: dict[str, dict[str, Any]] = {
    "off": {},
    "safe": {"visual": {"method": "transprune", "keep_ratio": 0.5}},
    "balanced": {"visual": {"method": "transprune", "keep_ratio": 0.25}},
    "aggressive": {"visual": {"method": "transprune", "keep_ratio": 0.125}},
}
_BUILT_IN = frozenset(PRESETS)
PresetName = Annotated[str, Field(examples=list(PRESETS))]
PruningField = PresetName | Pruning
OFF = Pruning()


def parse_pruning(value: object) -> Axes:
    """Return the parsed field.

    Args:
        value: A preset's name, a mapping of axes, a parsed field, or None for off.

    Raises:
        PolicyError: Anything unknown or out of range; `param` names the key.
    """
    if value is None:
        return OFF
    if isinstance(value, Axes):
        return value
    if isinstance(value, str):
        if value not in PRESETS:
            raise PolicyError(
                f"pruning must be one of {', '.join(PRESETS)} or an object, got {shown(value)}"
            )
        return parse_pruning(PRESETS[value])
    if not isinstance(value, Mapping):
        raise PolicyError(
            f"pruning must be a preset name ({', '.join(PRESETS)}) or an object, "
            f"got {type(value).__name__}"
        )
    try:
        return Pruning.model_validate(dict(value))
    except ValidationError as error:
        raise _policy_error(error, value) from None


def add_presets(presets: object) -> None:
    """Make presets known by name to this process, beside the built-in ones; the last value holds.

    Args:
        presets: A mapping of each name to what `parse_pruning` takes as an object.

    Raises:
        PolicyError: It names the preset and the key; none of the presets is known then.
    """
    if not isinstance(presets, Mapping):
        raise PolicyError(f"presets must be an object of names, got {shown(presets)}")
    for name, value in presets.items():
        if not isinstance(name, str) or not name:
            raise PolicyError(f"the name of a preset must be a word, got {shown(name)}; quote it")
        if name in _BUILT_IN:
            raise PolicyError(
                f"preset {name!r} must have a name of its own, got a built-in one; those are "
                f"{', '.join(sorted(_BUILT_IN))}"
            )
        if not isinstance(value, Mapping):
            raise PolicyError(
                f"preset {name!r} must be an object with {' | '.join(Pruning.model_fields)}, "
                f"got {shown(value)}"
            )
        try:
            parse_pruning(value)
        except PolicyError as error:
            raise PolicyError(f"preset {name!r}: {error}", error.param) from None
    PRESETS.update({name: dict(value) for name, value in presets.items()})


def flatten(pruning: Axes) -> dict[str, Any]:
    """Return the flat scalar and list keys that `parse_flat` reads back."""
    if pruning.is_off:
        return {FLAT_PRESET: "off"}
    return {
        f"{FLAT_PREFIX}{axis}_{key}": value
        for axis in AXES
        if (policy := pruning.policy(axis)) is not None
        for key, value in {
            "method": policy.name,
            **policy.model_dump(exclude_unset=True),
        }.items()
        if value is not None
    }


def has_flat(extra_args: Mapping[str, Any] | None) -> bool:
    """Return whether `extra_args` say anything about pruning."""
    return any(k == FLAT_PRESET or k.startswith(FLAT_PREFIX) for k in extra_args or ())


def parse_flat(extra_args: Mapping[str, Any] | None) -> Axes:
    """Parse the flat keys among a request's `extra_args`; other keys are ignored.

    Raises:
        PolicyError: A key is unknown or a value out of range.
    """
    flat = {k: v for k, v in (extra_args or {}).items() if k.startswith(FLAT_PREFIX)}
    preset = (extra_args or {}).get(FLAT_PRESET)
    if preset is not None:
        if flat:
            raise PolicyError(f"pruning and {_short(min(flat))} exclude each other; leave one out")
        return parse_pruning(preset)
    nested: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        axis, _, name = key.removeprefix(FLAT_PREFIX).partition("_")
        if not axis or not name:
            name = _short(key)
            raise PolicyError(f"{name} is unknown; flat keys read pruning_<axis>_<key>", name)
        nested.setdefault(axis, {})[name] = value
    for axis, parameters in nested.items():
        for name in parameters.keys() & _booleans(axis, parameters):
            # vLLM's own type for these values knows numbers only, so false arrives as 0
            if type(parameters[name]) is int and parameters[name] in (0, 1):
                parameters[name] = bool(parameters[name])
    try:
        return parse_pruning(nested)
    except PolicyError as error:
        flat_key = error.param.replace(".", "_")
        raise PolicyError(str(error).replace(error.param, flat_key), flat_key) from None


def _booleans(axis: str, asked: Mapping[str, Any]) -> set[str]:
    cls = methods(axis).get(str(asked.get("method")))
    fields = cls.model_fields if cls is not None else {}
    return {name for name, field in fields.items() if field.annotation is bool}


def asked(extra_args: Mapping[str, Any] | None, default: Axes) -> tuple[Axes, bool]:
    """Return what a request's `extra_args` ask for, else `default`; and whether they say anything.

    Raises:
        PolicyError: A key is unknown or a value out of range.
    """
    return (parse_flat(extra_args), True) if has_flat(extra_args) else (default, False)


def _policy_error(error: ValidationError, value: Mapping[str, Any]) -> PolicyError:
    first = error.errors(include_url=False)[0]
    location = [_short(str(part)) for part in first["loc"]]
    axis = location[0] if location else ""
    asked = value.get(axis)
    # pydantic names the union member after the axis; users never wrote it
    if len(location) > 1 and location[1] in methods(axis):
        location.pop(1)
    param = ".".join(["pruning", *location])
    got = first.get("input")
    kind, context = first["type"], first.get("ctx", {})
    if kind == "extra_forbidden":
        known = Pruning.model_fields
        if isinstance(asked, Mapping) and len(location) > 1:
            known = _asked_policy(axis, asked).model_fields
        message = f"{param} is unknown; known keys: {', '.join(sorted(known))}"
    elif kind == "union_tag_invalid":
        param += ".method"
        message = f"{param} must be one of {', '.join(methods(axis))}, got {_short(context['tag'])}"
    elif kind == "union_tag_not_found":
        param += ".method"
        message = f"{param} must be given; known: {', '.join(methods(axis))}"
    elif kind in ("model_attributes_type", "model_type"):
        message = f"{param} must be an object with method {' | '.join(methods(axis))}, "
        message += f"got {shown(got)}"
    elif kind == "too_short":
        message = f"{param} must have at least {context['min_length']} value, got {shown(got)}"
    elif kind == "too_long":
        message = f"{param} must have at most {context['max_length']} values, got {shown(got)}"
    elif kind == "value_error":
        # our own validators' messages begin with the key they are about
        message = f"{param}.{context['error']}"
        param = message.split()[0]
    else:
        rule = first["msg"].removeprefix("Input should be ").removeprefix("Value should be ")
        message = f"{param} must be {_interval(axis, asked, location) or rule}, got {shown(got)}"
    return PolicyError(message, param)


def _short(name: str) -> str:
    """Return a name that a client chose, cut where nobody would read on."""
    return name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}..."


def _interval(axis: str, asked: object, location: list[str]) -> str | None:
    """Return the legal interval of a numeric parameter, e.g. `in (0, 1]`."""
    if not isinstance(asked, Mapping) or len(location) != 2:
        return None
    # a key that is no string is no property
    schema = _asked_policy(axis, asked).model_json_schema()["properties"].get(location[1], {})
    branches = schema.get("anyOf", [schema])
    numeric = [s for s in branches if s.get("type") in ("number", "integer")]
    if not numeric:
        return None
    schema = numeric[0]
    low, high = schema.get("exclusiveMinimum", schema.get("minimum")), schema.get("maximum")
    if low is None:
        return None
    kind = "an integer" if schema["type"] == "integer" else "a number"
    opening = "(" if "exclusiveMinimum" in schema else "["
    return f"{kind} in {opening}{low}, " + ("inf)" if high is None else f"{high}]")


def _asked_policy(axis: str, asked: Mapping[str, Any]) -> type[Policy]:
    """Return the policy named by `method`, or the first where the axis needs no name."""
    known = methods(axis)
    return known.get(str(asked.get("method")), next(iter(known.values())))
