"""Schemes: which numbers are quantized to what, by the names people know (``W8A8``, ``W4A16-g128``) and in long form.

The long form uses the argument names of compressed-tensors (``num_bits``, ``type``, ``symmetric``, ``strategy``,
``group_size``, ``dynamic``), with four of ours: ``num_groups``, ``axis``, ``restricted`` and ``scale_convention``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from bitlower.ir.diagnostics import BitlowerError, nearest, shorten
from bitlower.ir.quantization.foreign_names import nearest_scheme
from bitlower.ir.quantization.granularity import COUNTED, Granularity
from bitlower.ir.quantization.grid import Grid, ScaleConvention

_ARGUMENTS = (
    *("num_bits", "type", "symmetric", "strategy", "dynamic", "group_size"),
    *("num_groups", "axis", "restricted", "scale_convention"),
)
T = TypeVar("T")

WEIGHT_ROLES = ("linear-weight", "convolution-weight", "embedding-table", "position-table", "norm-weight")
ACTIVATION_ROLES = (
    "linear-input", "convolution-input", "embedding-sum", "norm", "linear-output", "scores", "probs", "context",
    "residual", "activation", "logits",
)  # fmt: skip
_GOES_WITH = {
    "position-table": "embedding-table",
    "convolution-weight": "linear-weight",
    "convolution-input": "linear-input",
}
"""Roles that are treated as another where a scheme does not name them."""
FULL_PLACEMENT = tuple(role for role in (*WEIGHT_ROLES, *ACTIVATION_ROLES) if role not in (*_GOES_WITH, "linear-input"))
LINEAR_PLACEMENT = ("linear-weight", "embedding-table", "linear-input")
_STRATEGIES = {
    "tensor": "tensor",
    "channel": "channel",
    "group": "group",
    "row_group": "row-group",
    "token": "token",
    "embedding": "embedding",
    "embedding_group": "embedding-group",
    "embedding_parts": "embedding-parts",
}
_ALONG_EMBEDDING = ("embedding", "embedding-group", "embedding-parts")
_NO_EMBEDDING_AXIS = ("scores", "probs", "context", "logits", "convolution-input")
"""Roles whose last axis is no embedding: positions, the inside of a head, classes."""


@dataclass(frozen=True)
class QuantSpec:
    """A grid and a granularity: all one needs to know about a quantizer but its range."""

    grid: Grid
    granularity: Granularity

    def to_dict(self) -> dict[str, Any]:
        """The long form; the inverse of :meth:`from_dict`."""
        strategy = next(k for k, v in _STRATEGIES.items() if v == self.granularity.kind)
        form: dict[str, Any] = {
            "num_bits": self.grid.bits,
            "type": "int" if self.grid.signed else "uint",
            "symmetric": self.grid.symmetric,
            "strategy": strategy,
            "dynamic": self.granularity.dynamic,
        }
        for name in ("group_size", "num_groups"):
            if number := getattr(self.granularity, name):
                form[name] = number
        if self.granularity.kind in ("channel", "group"):
            form["axis"] = self.granularity.axis
        if self.grid.restricted:
            form["restricted"] = True
        if self.grid.convention is not ScaleConvention.QMAX:
            form["scale_convention"] = str(self.grid.convention)
        return form

    @classmethod
    def from_dict(cls, form: Mapping[str, Any]) -> QuantSpec:
        """The spec of a long form.

        Raises:
            BitlowerError: an unknown key or strategy, or values that do not go together.
        """
        _check_keys(form, _ARGUMENTS, "quantization argument")
        grid = Grid(
            bits=_argument(form, "num_bits", 8),
            signed=_choice(form, "type", ("int", "uint")) == "int",
            symmetric=_argument(form, "symmetric", True),
            restricted=_argument(form, "restricted", False),
            convention=ScaleConvention(_choice(form, "scale_convention", tuple(map(str, ScaleConvention)))),
        )
        return cls(grid, _granularity(form))

    def __str__(self) -> str:
        return f"{self.grid} {self.granularity}"


def _check_keys(form: object, known: Collection[str], what: str) -> None:
    if not isinstance(form, Mapping):
        raise BitlowerError(f"{shorten(repr(form))} is not a mapping of {what}s to values")
    for key in form:
        if key not in known:
            raise BitlowerError(f"unknown {what} {shorten(repr(key))}", hint=nearest(str(key), known))


def _argument(form: Mapping[str, Any], key: str, default: T) -> T:
    """``form[key]``, which has the type of ``default``; ``default`` where it is left out or null."""
    value = form.get(key)
    if value is None:
        return default
    if not isinstance(value, type(default)) or isinstance(value, bool) != isinstance(default, bool):
        raise BitlowerError(
            f"the quantization argument {key!r} is of type {type(default).__name__}, not {shorten(repr(value))}"
        )
    return value


def _choice(form: Mapping[str, Any], key: str, known: tuple[str, ...]) -> str:
    """``form[key]``, one of ``known``; the first of them where it is left out or null."""
    value = _argument(form, key, known[0])
    if value not in known:
        raise BitlowerError(f"unknown {key} {shorten(repr(value))}", hint=nearest(value, known))
    return value


def _granularity(form: Mapping[str, Any]) -> Granularity:
    strategy = _choice(form, "strategy", tuple(_STRATEGIES))
    kind = _STRATEGIES[strategy]
    axis = _argument(form, "axis", 0 if kind in ("channel", "row-group", "tensor") else -1)
    size, number = _argument(form, "group_size", 0), _argument(form, "num_groups", 0)
    if size and kind in COUNTED:
        raise BitlowerError(
            f"strategy {strategy!r} takes num_groups, the number of groups, and no group_size",
            hint=f"write num_groups: {size}",
        )
    granularity = Granularity(kind, axis, size, number)
    if form.get("axis") is not None and kind not in ("channel", "group"):
        raise BitlowerError(f"strategy {strategy!r} takes no axis")
    for name, value, takes in (("group_size", size, kind == "group"), ("num_groups", number, kind in COUNTED)):
        if value and not takes:
            raise BitlowerError(f"strategy {strategy!r} takes no {name}")
    if _argument(form, "dynamic", granularity.dynamic) != granularity.dynamic:
        raise BitlowerError(
            f"strategy {strategy!r} with dynamic: {form['dynamic']} is not supported",
            hint="per-token scales are dynamic, all others static",
        )
    return granularity


def _weight_spec(bits: int) -> QuantSpec:
    return QuantSpec(Grid(bits), Granularity.per_channel(0))


def _activation_spec(bits: int) -> QuantSpec:
    return QuantSpec(Grid(bits, signed=False, symmetric=False), Granularity.per_tensor())


def _ternary_spec(bits: int, granularity: Granularity) -> QuantSpec | None:
    """Codes as far down as up; with 2 bits −1, 0 and 1. None: float."""
    return QuantSpec(Grid(bits, restricted=True), granularity) if bits < 16 else None


_NAME = re.compile(r"W(\d+)A(\d+)((?:-[a-z]+\d*)*)", re.IGNORECASE)
_MODULE_WISE = re.compile(r"(\d+)-(\d+)-(\d+)(-static)?", re.IGNORECASE)
_LONGEST = 100
"""Characters of a name."""


@dataclass(frozen=True)
class Scheme:
    """What each role gets. ``roles`` says which are quantized at all; ``overrides`` sets single roles apart.

    A role's spec is its override if it has one, else ``embeddings`` for ``embedding-table``, ``weights`` for the other
    weight roles (per tensor for ``norm-weight``), and ``activations`` for the rest (scores, probabilities, context and
    logits have no embedding axis and are per tensor where that says one along it). None leaves a role in float.
    ``position-table``, tables that no token ids index, goes with ``embedding-table`` unless it is named itself, and
    what convolutions multiply goes with what linears do.

    ``heads`` is for what ``embeddings`` leaves in float: output heads of language models that are a large share of the
    model, and the tables of token embeddings that have their shape or are one with them.

    Raises:
        BitlowerError: an unknown role, or ``embedding-parts`` for weights, whose parts no calibration chooses.
    """

    weights: QuantSpec | None = field(default_factory=lambda: _weight_spec(8))
    activations: QuantSpec | None = field(default_factory=lambda: _activation_spec(8))
    embeddings: QuantSpec | None = field(default_factory=lambda: _weight_spec(8))
    roles: tuple[str, ...] = LINEAR_PLACEMENT
    overrides: tuple[tuple[str, QuantSpec | None], ...] = ()
    heads: QuantSpec | None = None

    def __post_init__(self) -> None:
        known = (*WEIGHT_ROLES, *ACTIVATION_ROLES)
        for role in (*self.roles, *(role for role, _ in self.overrides)):
            if role not in known:
                raise BitlowerError(f"unknown role {shorten(repr(role))}", hint=nearest(role, known))
        overridden = [spec for role, spec in self.overrides if role in WEIGHT_ROLES]
        for spec in (self.weights, self.embeddings, self.heads, *overridden):
            if spec and spec.granularity.chosen:
                raise BitlowerError(f"{spec.granularity} is for activations, not for weights", hint="use `channel`")

    def spec(self, role: str) -> QuantSpec | None:
        """What ``role`` is quantized to, or None if it stays in float."""
        for name, spec in self.overrides:
            if name == role:
                return spec
        implied = role in _GOES_WITH and role not in self.roles
        if role not in self.roles and not implied:
            return None
        if role in ("embedding-table", "position-table") and not implied:
            return self.embeddings
        if role == "norm-weight":
            return replace(self.weights, granularity=Granularity.per_tensor()) if self.weights else None
        plain = self.weights if role in WEIGHT_ROLES else self.activations
        spec = self.spec(_GOES_WITH[role]) if implied else plain
        if role in _NO_EMBEDDING_AXIS and spec and spec.granularity.kind in _ALONG_EMBEDDING:
            return replace(spec, granularity=Granularity.per_tensor())
        return spec

    @property
    def head(self) -> QuantSpec | None:
        """What large output heads and their tables are quantized to."""
        set_apart = any(role == "embedding-table" for role, _ in self.overrides)
        tables = self.spec("embedding-table")
        return tables if tables or set_apart or "embedding-table" not in self.roles else self.heads

    @classmethod
    def parse(cls, name: str) -> Scheme:
        """The scheme called ``name``: ``W<bits>A<bits>`` and suffixes, each after a dash.

        16 bits and more mean float. Suffixes: ``g128`` weight groups along the input; ``asym`` asymmetric weights;
        ``tensor`` per-tensor weights; ``token`` per-token dynamic activations; ``peg6`` activations in 6 embedding
        groups of equal size; ``upeg6`` in 6 that calibration chooses; ``e4`` embedding tables and heads in 4 bits
        (``e16``: float); ``full`` every tensor Bondarenko et al. §3 quantize. Beside float activations large output
        heads have 8 bits if nothing is said.

        ``<weights>-<tables>-<activations>`` are the schemes of QuantGPT (Tao et al. 2022), such as ``2-2-8``:
        symmetric grids with as many codes below zero as above, one scale a linear and one a row of a table, position
        tables in float, dynamic activations per token (``-static``: one stored scale a tensor).

        Raises:
            BitlowerError: not a scheme, or two suffixes for one thing.
        """
        text = name.strip() if len(name) <= _LONGEST else ""
        if module_wise := _MODULE_WISE.fullmatch(text):
            return _module_wise([int(bits) for bits in module_wise.groups()[:3]], static=bool(module_wise[4]))
        match = _NAME.fullmatch(text)
        if not match:
            meant = f"did you mean {text.upper()}?" if _NAME.fullmatch(text.upper()) else nearest_scheme(text)
            raise BitlowerError(
                f"{shorten(repr(name))} is not a scheme",
                hint=f"{meant} examples: W8A8, W4A16-g128, W4A8-token, 2-2-8".strip(),
            )
        weight_bits, activation_bits = int(match[1]), int(match[2])
        weights = _weight_spec(weight_bits) if weight_bits < 16 else None
        activations = _activation_spec(activation_bits) if activation_bits < 16 else None
        tables, heads = (_weight_spec(8) if wanted else None for wanted in (weights and activations, not activations))
        scheme = cls(weights, activations, tables, heads=heads if weights else None)
        for suffix in _suffixes(match[3].lower(), name):
            scheme = _apply_suffix(scheme, suffix, name)
        return scheme

    @property
    def name(self) -> str:
        """The short name, or ``custom`` where only the long form says it all."""
        for candidate in _candidate_names(self):
            if Scheme.parse(candidate) == self:
                return candidate
        return "custom"

    def to_dict(self) -> dict[str, Any]:
        """The long form; the inverse of :meth:`from_dict`."""

        def form(spec: QuantSpec | None) -> dict[str, Any] | None:
            return spec.to_dict() if spec else None

        return {
            "weights": form(self.weights),
            "activations": form(self.activations),
            "embeddings": form(self.embeddings),
            "roles": list(self.roles),
            "overrides": {role: form(spec) for role, spec in self.overrides},
            "heads": form(self.heads),
        }

    @classmethod
    def from_dict(cls, form: Mapping[str, Any]) -> Scheme:
        """The scheme of a long form; keys that are left out take the defaults of ``W8A8``.

        Raises:
            BitlowerError: an unknown key, role or argument.
        """
        default = cls()
        known = ("weights", "activations", "embeddings", "roles", "overrides", "heads")
        _check_keys(form, known, "scheme key")

        def spec(key: str) -> QuantSpec | None:
            if key not in form:
                return getattr(default, key)  # type: ignore[no-any-return]
            return QuantSpec.from_dict(form[key]) if form[key] is not None else None

        overrides = form.get("overrides") or {}
        _check_keys(overrides, (*WEIGHT_ROLES, *ACTIVATION_ROLES), "role")
        roles = form.get("roles", default.roles)
        if not isinstance(roles, list | tuple):
            raise BitlowerError(f"the roles of a scheme are a list of names, not {shorten(repr(roles))}")
        return cls(
            spec("weights"),
            spec("activations"),
            spec("embeddings"),
            tuple(map(str, roles)),
            tuple((role, QuantSpec.from_dict(arg) if arg is not None else None) for role, arg in overrides.items()),
            spec("heads"),
        )

    def __str__(self) -> str:
        return self.name


def _module_wise(bits: Sequence[int], static: bool) -> Scheme:
    weight_bits, table_bits, activation_bits = bits
    weights = _ternary_spec(weight_bits, Granularity.per_tensor())
    tables = _ternary_spec(table_bits, Granularity.per_channel(0))
    activations = _activation_spec(activation_bits) if activation_bits < 16 else None
    if activations and not static:
        activations = replace(activations, granularity=Granularity.per_token())
    return Scheme(weights, activations, tables, overrides=(("position-table", None),))


def _suffixes(text: str, name: str) -> list[str]:
    """In the order in which they apply: the bits of the tables come before a suffix that sets their granularity."""
    suffixes = sorted(filter(None, text.split("-")), key=lambda suffix: not suffix.startswith("e"))
    kinds = [suffix.rstrip("0123456789") for suffix in suffixes]
    same = {"tensor": "g", "peg": "token", "upeg": "token"}
    things = [same.get(kind, kind) for kind in kinds]
    if len(set(things)) < len(things):
        raise BitlowerError(f"{name!r} has two suffixes for one thing", hint="keep one of them")
    return suffixes


def _apply_suffix(scheme: Scheme, suffix: str, name: str) -> Scheme:
    match = re.fullmatch(r"([a-z]+)(\d*)", suffix)
    key, number = (match[1], int(match[2] or 0)) if match else (suffix, 0)
    weights, activations = scheme.weights, scheme.activations
    match key, bool(number):
        case "full", False:
            return replace(scheme, roles=FULL_PLACEMENT)
        case "g", True if weights:
            return replace(scheme, weights=replace(weights, granularity=Granularity.per_group(number)))
        case "tensor", False if weights:
            tensor = Granularity.per_tensor()
            tables = replace(scheme.embeddings, granularity=tensor) if scheme.embeddings else None
            return replace(scheme, weights=replace(weights, granularity=tensor), embeddings=tables)
        case "asym", False if weights:
            grid = replace(weights.grid, signed=False, symmetric=False)
            return replace(scheme, weights=replace(weights, grid=grid))
        case "token", False if activations:
            return replace(scheme, activations=replace(activations, granularity=Granularity.per_token()))
        case (("peg" | "upeg"), True) if activations:
            kind = Granularity.per_embedding_group if key == "peg" else Granularity.per_embedding_parts
            return replace(scheme, activations=replace(activations, granularity=kind(number)))
        case "e", True:
            return replace(scheme, embeddings=_weight_spec(number) if number < 16 else None, heads=None)
    raise BitlowerError(
        f"{name!r}: {suffix!r} does not fit", hint="known suffixes: g128, asym, tensor, token, peg6, upeg6, e4, full"
    )


def _candidate_names(scheme: Scheme) -> list[str]:
    weights, activations, tables = scheme.weights, scheme.activations, scheme.embeddings
    bits = [spec.grid.bits if spec else 16 for spec in (weights, tables, activations)]
    if scheme.overrides:
        name = "-".join(map(str, bits))
        return [name, f"{name}-static"]
    if any(spec and spec.grid.bits > 15 for spec in (weights, activations)):
        return []
    base = f"W{bits[0]}A{bits[2]}"
    if weights and weights.granularity.kind == "group":
        base += f"-g{weights.granularity.group_size}"
    if weights and weights.granularity.kind == "tensor":
        base += "-tensor"
    if weights and not weights.grid.symmetric:
        base += "-asym"
    if activations and activations.granularity.kind == "token":
        base += "-token"
    if activations and activations.granularity.kind == "embedding-group":
        base += f"-peg{activations.granularity.num_groups}"
    if activations and activations.granularity.chosen:
        base += f"-upeg{activations.granularity.num_groups}"
    names = [base, f"{base}-e{bits[1]}"]
    return [*names, *(f"{name}-full" for name in names)]
