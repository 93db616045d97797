"""Losses by name: own files in ``_losses``, entry points of the group ``bitlower.losses``, plugin files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitlower.ir import BitlowerError, shorten
from bitlower.ir.plugins import parameters
from bitlower.ir.plugins.catalog import Catalog, Problem
from bitlower.ir.plugins.faults import blamed, source_of
from bitlower.passes._machinery.loss import NEEDS, LogitsLoss, Loss, Objective


def _problem(cls: type[Loss]) -> Problem | None:
    if not isinstance(cls.needs, frozenset) or not cls.needs <= NEEDS:
        return f"needs {cls.needs!r}", f"`needs` is a frozenset of {', '.join(sorted(NEEDS))}"
    if issubclass(cls, LogitsLoss):
        if cls.rows is LogitsLoss.rows:
            return "defines no `rows`", "write `def rows(self, student, teacher, labels) -> torch.Tensor`"
    elif cls.value is Loss.value:
        return "defines no `value`", "write `def value(self, step, memory) -> torch.Tensor`"
    return None


LOSSES: Catalog[Loss] = Catalog(
    "loss",
    Loss,
    "bitlower.passes.training.Loss",
    "bitlower.losses",
    "bitlower.passes.training._losses",
    Path(__file__).parents[1] / "training" / "_losses",
    _problem,
)


def find_loss(name: str) -> type[Loss]:
    """The loss called ``name``; only the module that holds it is imported.

    Raises:
        BitlowerError: unknown (the nearest match is named), offered twice (both sides are named), or broken.
    """
    return LOSSES.find(name)


def known_losses() -> dict[str, type[Loss]]:
    """Own losses and those of loaded plugins, by name; installed third-party ones are loaded only when named."""
    return LOSSES.known()


def make_loss(name: str, params: Mapping[str, Any] | None = None) -> Loss:
    """The loss ``name`` with ``params`` (plain data, names in kebab-case or with underscores).

    Raises:
        BitlowerError: an unknown loss or parameter, or a value that does not fit.
    """
    cls = find_loss(name)
    with blamed(f"loss {name!r} cannot be made", source_of(cls)):
        return parameters.make(cls, f"loss {name!r}", params or {})


@dataclass(frozen=True)
class Losses(Objective):
    """The losses of a training as a pass's parameter: in recipes ``[logits, {hidden: {weight: 0.1}}]``.

    Raises:
        BitlowerError: no loss at all, or one given twice.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.losses:
            raise BitlowerError("no loss is given", hint="for example [logits]")

    @classmethod
    def from_list(cls, items: Sequence[Any]) -> Losses:
        """From plain data: names, and names with parameters.

        Raises:
            BitlowerError: an item is none of these, or is no loss.
        """
        return cls(tuple(map(_loss_of, items)))

    def to_list(self) -> list[Any]:
        """The inverse of :meth:`from_list`; defaults are left out."""
        forms = [(loss.name, parameters.plain_parameters(loss)) for loss in self.losses]
        return [{name: params} if params else name for name, params in forms]


def _loss_of(item: Any) -> Loss:
    if isinstance(item, Loss):
        return item
    if isinstance(item, str):
        return make_loss(item)
    if isinstance(item, Mapping) and len(item) == 1:
        ((name, params),) = item.items()
        if isinstance(name, str) and (params is None or isinstance(params, Mapping)):
            return make_loss(name, params)
    raise BitlowerError(
        f"{shorten(repr(item))} is no loss", hint="write a name, or one name with its parameters: {hidden: {weight: 1}}"
    )
