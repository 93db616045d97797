"""Module paths as a layer and a role in it, so that layers can stand beside one another."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

OTHER = "other"
"""The row of what belongs to no numbered layer."""
_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Place:
    """A module: the stack of layers, the number of the layer (None: in none), and what it is in the layer."""

    stack: str
    layer: int | None
    role: str


def place_of(path: str) -> Place:
    """``encoder.layer.0.output`` as the stack ``encoder.layer``, the layer 0 and the role ``output``."""
    match = _NUMBER.search(path)
    if not match:
        return Place("", None, path)
    return Place(path[: match.start()], int(match[1]), path[match.end() :] or "output")


def layer_name(place: Place, stacks: int) -> str:
    """A row's name: the number, with the stack where there are several."""
    if place.layer is None:
        return OTHER
    return f"{place.stack} {place.layer}" if stacks > 1 and place.stack else f"layer {place.layer}"


def stacks_of(places: Iterable[Place]) -> int:
    """How many stacks of layers there are."""
    return len({place.stack for place in places if place.layer is not None})


def in_order(names: Iterable[str]) -> list[str]:
    """Each name once, as they come first."""
    return list(dict.fromkeys(names))


def ladder(names: Sequence[str], last: str = OTHER) -> list[str]:
    """Rows in order, with ``last`` at the end."""
    ordered = in_order(names)
    return [name for name in ordered if name != last] + [last] * (last in ordered)
