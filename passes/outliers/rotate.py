"""Rotate the residual stream, so that no channel stands out: outliers are spread over all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx

from bitlower.ir import BitlowerError, Level, Program
from bitlower.ir.permutation.domains import domains
from bitlower.passes._machinery.base import Context, Contract, Pass
from bitlower.passes._machinery.report import Record, counted, few
from bitlower.passes.outliers._hadamard import random_hadamard, random_orthogonal
from bitlower.passes.outliers._new_basis import add_products, centre, fold_norms, rotate
from bitlower.passes.outliers._residual_stream import Stream, trace_stream


@dataclass(frozen=True)
class StreamRotation:
    """A rotated residual stream.

    Args:
        size: its channels.
        matrix: ``hadamard`` or ``orthogonal``.
        centred: whether what writes it leaves out its mean, so that each LayerNorm is an RMSNorm now.
        norms: those that lost their weights to linears, by module path.
        untied: weights that got a copy of their own, because a norm's weight moved into them.
        products: how many matrix products were added, to give out what is rotated inside.
    """

    size: int
    matrix: str
    centred: bool
    norms: tuple[str, ...]
    untied: tuple[str, ...]
    products: int


@dataclass(frozen=True)
class RotationReport(Record):
    """What ``rotate`` did to each residual stream."""

    streams: tuple[StreamRotation, ...]

    def summary(self) -> str:
        """What was rotated."""
        streams = ", ".join(f"{stream.size:,} channels ({stream.matrix})" for stream in self.streams)
        norms = sum(len(stream.norms) for stream in self.streams)
        return f"residual stream of {streams} rotated; {counted(norms, 'norm')} folded into linears"

    def details(self) -> Iterable[str]:
        """Which weights are no longer tied, and what runs in addition."""
        for stream in self.streams:
            yield from few(f"{name} has a copy of its own now" for name in stream.untied)
            if stream.products:
                yield f"{counted(stream.products, 'matrix product')} added"


@dataclass(frozen=True)
class Rotate(Pass):
    """Fold an orthogonal matrix into the residual stream (QuaRot, Ashkboos et al. 2024, §3), for pre-norm models.

    With Q orthogonal, RMSNorm(xQ) = RMSNorm(x)Q, so the stream may hold xQ, if what writes it is multiplied by Q, and
    what reads it by Qᵀ. Norms' weights move into linears first; a LayerNorm becomes an RMSNorm, as what writes the
    stream leaves its mean out. No operation is added, but for a product where the stream is an output of the model.
    """

    name: ClassVar[str] = "rotate"
    requires: ClassVar[frozenset[Level]] = frozenset({Level.FLOAT})
    contract: ClassVar[Contract] = Contract.EXACT
    rewrites_weights: ClassVar[bool] = True
    matrix: Literal["hadamard", "orthogonal"] = "hadamard"
    """Hadamard with random signs, where a Hadamard matrix of that size is known; else, or if asked for, random."""

    def run(self, program: Program, context: Context) -> bool:
        """Rotate every residual stream, and leave a :class:`RotationReport`.

        Raises:
            BitlowerError: there is no residual stream, or something stands in the way of another basis.
        """
        residual_domains = [domain for domain in domains(program.module) if domain.residual]
        if not residual_domains:
            raise BitlowerError("rotate: the model has no residual stream", hint="run `clean` before it")
        streams = [trace_stream(program.graph, domain) for domain in residual_domains]
        generator = context.generator("rotate")
        context.put(RotationReport(tuple(self._rotate(program.module, stream, generator) for stream in streams)))
        return True

    def _rotate(self, module: fx.GraphModule, stream: Stream, generator: torch.Generator) -> StreamRotation:
        size = stream.domain.size
        basis = random_hadamard(size, generator) if self.matrix == "hadamard" else None
        kind = "orthogonal" if basis is None else "hadamard"
        products = add_products(module, stream)
        norms, untied = fold_norms(module, stream)
        centred = centre(module, stream)
        rotate(module, stream, random_orthogonal(size, generator) if basis is None else basis)
        return StreamRotation(size, kind, centred, tuple(norms), tuple(untied), products)
