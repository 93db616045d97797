"""Move activation outliers into the weights: divide a linear's input by a vector, multiply its weight by it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Interval, Le
from torch import fx

from bitlower.ir import Batch, BitlowerError, Level, Program, TensorType, get_tensor, ops, set_tensor
from bitlower.ir.dataflow import NORM, QUANTIZER, parameter_of
from bitlower.ir.observe import observe
from bitlower.ir.operators import LinearNode, NormNode
from bitlower.ir.quantization import numerics
from bitlower.ir.quantizer_node import QuantizerNode, is_uncalibrated
from bitlower.ir.tokens import token_rows
from bitlower.passes._machinery.base import Context, Contract, Pass

aten = torch.ops.aten
_FLOOR = 1e-5
"""As in SmoothQuant's published code: channels that are zero keep a scale."""
_BUDGET = 1 << 28
"""Bytes of sampled tokens that are held at a time."""


@dataclass(frozen=True)
class Smooth(Pass):
    """Scale migration (SmoothQuant, Xiao et al. 2023, eq. 3–4): ``X W = (X / s)(s W)``, so X/s has milder outliers.

    It works on uncalibrated static quantizers of linear inputs. The division goes into the norm before the linear if
    nothing else reads the norm, and is one multiplication otherwise. Sites that gain too little are left alone.
    """

    name: ClassVar[str] = "smooth"
    requires: ClassVar[frozenset[Level]] = frozenset({Level.SIMULATED})
    contract: ClassVar[Contract] = Contract.EXACT
    rewrites_weights: ClassVar[bool] = True
    alpha: Annotated[float, Interval(ge=0, le=1)] = 0.8
    """Migration strength in ``s = max|X|^α / max|W|^(1−α)``: 0 leaves all to the activations, 1 to the weights."""
    rows: Annotated[int, Ge(1)] = 512
    """Calibration tokens kept a site for measuring the quantization error."""
    gain: Annotated[float, Le(1)] = 0.1
    """The least share of a site's quantization error that has to go for the site to be changed."""

    def data_runs(self, program: Program) -> int:
        """One, if there is a site."""
        return int(any(smoothing_sites(program.module)))

    def needs_calibration(self) -> bool:
        """Always."""
        return True

    def run(self, program: Program, context: Context) -> bool:
        """Smooth every site that gains.

        Raises:
            BitlowerError: there is no calibration data.
        """
        sites = list(smoothing_sites(program.module))
        if sites and not context.calibration:
            raise BitlowerError("smooth needs calibration data", hint="give calibration batches")
        changed = False
        for group in _within_budget(sites, self.rows):
            for sample in collect(program, group, context, self.rows):
                scale = smoothing_scale(program.module, sample, self.alpha, self.gain)
                if scale is not None:
                    apply(program.module, sample.site, scale)
                    changed = True
        return changed


@dataclass(frozen=True)
class SmoothingSite:
    """An uncalibrated quantizer and the linears that read it; nothing else does."""

    quantizer: fx.Node
    linears: tuple[fx.Node, ...]

    @property
    def value(self) -> fx.Node:
        """The activation."""
        return self.quantizer.all_input_nodes[0]

    @property
    def width(self) -> int:
        """Input channels."""
        size = self.value.meta["type"].shape[-1]
        assert isinstance(size, int)
        return size


@dataclass
class SmoothingSample:
    """What was seen at a site: each channel's extremes over all tokens ``[channels]``, tokens ``[rows, channels]``."""

    site: SmoothingSite
    low: torch.Tensor
    high: torch.Tensor
    rows: torch.Tensor


def smoothing_sites(module: fx.GraphModule) -> Iterator[SmoothingSite]:
    """Open per-tensor activation quantizers that linears alone read, whose weights nobody else reads."""
    for node in module.graph.find_nodes(op="call_function", target=ops.fake_quantize):
        view = QuantizerNode(node)
        if view.rounds_parameter or view.spec.granularity.kind != "tensor" or not view.is_static:
            continue
        users = tuple(node.users)
        owned = all(user.target is aten.linear.default and _owns_weight(user) for user in users)
        if users and owned and is_uncalibrated(node):
            yield SmoothingSite(node, users)


def _owns_weight(linear: fx.Node) -> bool:
    """Whether the weight is a parameter as it is, behind a quantizer at most, and ``linear`` alone reads it."""
    value = LinearNode(linear).weight
    owned = len(value.users) == 1
    if value.target in QUANTIZER:
        value = QuantizerNode(value).value
    return owned and value.op == "get_attr" and len(value.users) == 1


def collect(program: Program, sites: Sequence[SmoothingSite], context: Context, rows: int) -> list[SmoothingSample]:
    """Run the calibration batches once and gather what :class:`SmoothingSample` holds; padded tokens are left out."""
    samples = {site.value: SmoothingSample(site, *_nothing(site.width)) for site in sites}
    share = max(1, rows // max(1, len(context.calibration)))
    generator = context.generator("smooth")

    def update(node: fx.Node, value: torch.Tensor, batch: Batch) -> None:
        sample, tokens = samples[node], token_rows(value, node.meta["type"].shape, batch)
        if not tokens.numel():
            return
        sample.low = torch.minimum(sample.low, tokens.amin(0))
        sample.high = torch.maximum(sample.high, tokens.amax(0))
        chosen = torch.randperm(tokens.shape[0], generator=generator)[:share]
        sample.rows = torch.cat([sample.rows, tokens[chosen]])[:rows]

    observe(program, list(samples), context.calibration, update, track=context.track, label="smoothing statistics")
    return list(samples.values())


def smoothing_scale(module: fx.GraphModule, sample: SmoothingSample, alpha: float, gain: float) -> torch.Tensor | None:
    """The vector s ``[channels]``, or None if it does not save the share ``gain`` of the site's error."""
    weights = [get_tensor(module, _parameter(linear)).detach() for linear in sample.site.linears]
    reach = torch.maximum(-sample.low, sample.high).clamp(min=_FLOOR)
    columns = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).clamp(min=_FLOOR)
    scale = reach**alpha / columns ** (1 - alpha)
    scale = scale / scale.log().mean().exp()
    before = site_error(sample, weights, torch.ones_like(scale))
    return scale if site_error(sample, weights, scale) <= (1 - gain) * before else None


def site_error(sample: SmoothingSample, weights: Sequence[torch.Tensor], scale: torch.Tensor) -> float:
    """The mean over tokens of the squared error of the linears' outputs, relative to the token's own energy.

    Both inputs and weights are rounded. Plain mean squared error would be owned by the few tokens of huge norm.
    """
    grid = sample.site.quantizer.meta["quantizer"].spec.grid
    step, zero = grid.qparams((sample.low / scale).amin(), (sample.high / scale).amax())
    rounded = numerics.fake(sample.rows / scale, step, zero, grid.quant_min, grid.quant_max)
    error = 0.0
    for linear, weight in zip(sample.site.linears, weights, strict=True):
        expected = sample.rows @ weight.T
        actual = rounded @ _rounded_weight(linear, weight * scale).T
        token_error, token_energy = (y.square().sum(1) for y in (actual - expected, expected))
        error += float((token_error / token_energy.clamp(min=_FLOOR)).mean())
    return error


def _rounded_weight(linear: fx.Node, weight: torch.Tensor) -> torch.Tensor:
    value = LinearNode(linear).weight
    if "quantizer" not in value.meta:
        return weight
    spec = value.meta["quantizer"].spec
    scale, zero = spec.grid.qparams(*spec.granularity.range_of(weight))
    return numerics.fake(weight, scale, zero, spec.grid.quant_min, spec.grid.quant_max)


def apply(module: fx.GraphModule, site: SmoothingSite, scale: torch.Tensor) -> None:
    """Divide the value by ``scale`` and multiply the weights by it."""
    for linear in site.linears:
        name = _parameter(linear)
        set_tensor(module, name, torch.nn.Parameter(get_tensor(module, name).detach() * scale))
    norm = site.value
    if _is_foldable(site):
        _fold_into_norm(module, norm, scale)
        return
    target = f"smoothing.{norm.name}"
    set_tensor(module, target, 1 / scale)
    with norm.graph.inserting_before(site.quantizer):
        vector = norm.graph.get_attr(target)
        vector.meta = {"type": TensorType(torch.float32, (site.width,))}
        product = norm.graph.call_function(aten.mul.Tensor, (norm, vector))
    product.meta = {key: value for key, value in norm.meta.items() if key != "quantizer"}
    site.quantizer.replace_input_with(norm, product)


def _is_foldable(site: SmoothingSite) -> bool:
    """Whether the site alone reads a norm that has a weight, and that norm alone reads its parameters."""
    norm = site.value
    if norm.target not in NORM or list(norm.users) != [site.quantizer]:
        return False
    own = _norm_parameters(norm)
    has_weight = NormNode(norm).weight is not None
    return has_weight and all(node.op == "get_attr" and len(node.users) == 1 for node in own)


def _norm_parameters(norm: fx.Node) -> list[fx.Node]:
    view = NormNode(norm)
    return [node for node in (view.weight, view.bias) if node is not None]


def _fold_into_norm(module: fx.GraphModule, norm: fx.Node, scale: torch.Tensor) -> None:
    for parameter in _norm_parameters(norm):
        name = str(parameter.target)
        set_tensor(module, name, torch.nn.Parameter(get_tensor(module, name).detach() / scale))


def _parameter(linear: fx.Node) -> str:
    parameter = parameter_of(LinearNode(linear).weight)
    assert parameter is not None
    return str(parameter.target)


def _nothing(width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.zeros(width), torch.zeros(width), torch.zeros(0, width)


def _within_budget(sites: Sequence[SmoothingSite], rows: int) -> Iterator[list[SmoothingSite]]:
    """The sites in groups whose kept tokens fill at most 256 MiB."""
    group: list[SmoothingSite] = []
    for site in sites:
        if group and sum(s.width for s in [*group, site]) * rows * 4 > _BUDGET:
            yield group
            group = []
        group.append(site)
    if group:
        yield group
