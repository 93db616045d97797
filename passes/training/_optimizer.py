"""Which tensors learn, at which rate, and how the rate changes from step to step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from bitlower.ir import BitlowerError
from bitlower.ir.dataflow import EMBEDDING, NORM
from bitlower.ir.trainable import TrainableModule
from bitlower.passes._machinery.patterns import Patterns

Schedule = Literal["linear", "cosine", "constant"]
ROLES = ("weights", "embeddings", "norms", "biases", "scales", "zero-points")
"""The kinds of parameters that a rate is given to."""
DECAYED = ("weights", "embeddings")
"""Those that weight decay is for."""


@dataclass(frozen=True)
class Rates:
    """Learning rates: by role, and by pattern over parameter names, which comes before the role. 0 keeps a tensor.

    Of several patterns that match the longest counts. In recipes ``{weights: 1e-5, "re:.*embeddings.*": 0}``.

    Raises:
        BitlowerError: a rate is negative or not finite.
    """

    rates: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        for name, rate in self.rates:
            if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < math.inf:
                raise BitlowerError(f"the learning rate of {name!r} is {rate!r}", hint="it is a number of at least 0")
        object.__setattr__(self, "rates", tuple(sorted((name, float(rate)) for name, rate in self.rates)))

    @classmethod
    def from_dict(cls, form: Mapping[str, Any]) -> Rates:
        """The rates of a mapping.

        Raises:
            BitlowerError: a rate is no number of at least 0.
        """
        return cls(tuple((str(name), rate) for name, rate in form.items()))

    def to_dict(self) -> dict[str, float]:
        """The inverse of :meth:`from_dict`."""
        return dict(self.rates)

    def over(self, defaults: Mapping[str, float]) -> Rates:
        """These, and ``defaults`` for the roles that have none here."""
        return Rates(tuple({**defaults, **dict(self.rates)}.items()))


@dataclass(frozen=True)
class Learned:
    """A parameter that learns: its name in the module, its role, and its rate."""

    name: str
    parameter: nn.Parameter
    role: str
    rate: float


def learned_parameters(module: TrainableModule, rates: Rates) -> list[Learned]:
    """The parameters whose rate is above 0; the others are told to need no gradient.

    Raises:
        BitlowerError: a pattern matches no parameter, or nothing learns.
    """
    by_role = {name: rate for name, rate in rates.rates if name in ROLES}
    by_pattern = {name: rate for name, rate in rates.rates if name not in ROLES}
    patterns = {name: Patterns([name]) for name in by_pattern}
    roles, learned = parameter_roles(module), []
    for name, parameter in module.named_parameters():
        matching = [key for key in by_pattern if patterns[key].match(name, name.removeprefix("model."))]
        rate = by_pattern[max(matching, key=len)] if matching else by_role.get(roles[name], 0.0)
        parameter.requires_grad_(rate > 0)
        if rate > 0:
            learned.append(Learned(name, parameter, roles[name], rate))
    names = [name.removeprefix("model.") for name in roles]
    for pattern in patterns.values():
        pattern.require_used("learning-rate", [*ROLES, *names])
    if not learned:
        raise BitlowerError("no parameter learns: all learning rates are 0", hint="give `weights` or `scales` a rate")
    return learned


def parameter_roles(module: TrainableModule) -> dict[str, str]:
    """The role of each parameter, by its name in the module."""
    roles: dict[str, str] = {}
    uses = {str(n.target): n for n in module.model.graph.nodes if n.op == "get_attr"}
    for name, parameter in module.named_parameters():
        node = uses.get(name.removeprefix("model."))
        targets = {user.target for user in node.users} if node else set()
        if node is None:
            roles[name] = "zero-points" if name.endswith(".zero") else "scales"
        elif targets & NORM:
            roles[name] = "norms"
        elif parameter.dim() < 2:
            roles[name] = "biases"
        else:
            table = targets & EMBEDDING or _is_table(module, name.removeprefix("model."))
            roles[name] = "embeddings" if table else "weights"
    return roles


def _is_table(module: TrainableModule, target: str) -> bool:
    """Whether a quantizer of this parameter takes rows of it, as an embedding does."""
    quantizers = {name for name, weight in module.weights.items() if weight == target}
    calls = module.model.graph.find_nodes(op="call_module")
    return any(len(node.args) > 1 for node in calls if node.target in quantizers)


def make_optimizer(learned: list[Learned], weight_decay: float) -> torch.optim.Optimizer:
    """AdamW with a group for each rate and decay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for item in learned:
        decay = weight_decay if item.role in DECAYED else 0.0
        groups.setdefault((item.rate, decay), []).append(item.parameter)
    form = [
        {"params": parameters, "lr": rate, "initial_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]
    return torch.optim.AdamW(form, fused=True)


def rate_factor(step: int, steps: int, schedule: Schedule, warmup: float) -> float:
    """What learning rates are multiplied by at ``step`` of ``steps``: a linear rise, then the schedule.

    ``linear`` falls to 0 at the end, ``cosine`` does so as half a cosine, ``constant`` stays.
    """
    rise = round(steps * warmup)
    if step < rise:
        return (step + 1) / rise
    share = (step - rise) / max(1, steps - rise)
    return {"linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2, "constant": 1.0}[schedule]
