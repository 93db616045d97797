"""What passes promise, held against what they do: levels before any work, equal numbers, untouched programs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from bitlower.ir import Batch, BitlowerError, CheckError, Level, Program, describe, ops
from bitlower.ir.document import encode
from bitlower.ir.float_noise import shaken
from bitlower.ir.observe import observe, run, stream
from bitlower.ir.quantizer_node import is_uncalibrated
from bitlower.passes._machinery.base import Contract, Pass
from bitlower.passes._machinery.digest import Fingerprint, fingerprint
from bitlower.passes._machinery.registry import known_passes

RTOL = 1e-4  # of a value's standard deviation over the batch
NOISE = 2.0
"""So many times what :func:`~bitlower.ir.float_noise.shaken` shows may an output of a float program differ, where that
is more: errors add up from layer to layer, and the largest of millions of values tells."""
_PART = 1 << 20
"""Elements that are compared at a time: 4 MB in float32 beside the two tensors."""
_CONSTANT = 1e-12
"""A standard deviation of so much of the largest value, in float64, is what rounding leaves of a constant."""


def check_levels(passes: Sequence[Pass], level: Level, first: int = 1) -> Level:
    """Follow the levels through a pipeline that starts at ``level``, without running it; the level at its end.

    ``first`` is the position of the first pass in the whole pipeline, for the message.

    Raises:
        BitlowerError: a pass would get a level that it does not take.
    """
    for position, pass_ in enumerate(passes, first):
        if level not in pass_.requires:
            raise BitlowerError(
                f"pass {position}, {pass_.name!r}, takes a program at level {' or '.join(sorted(pass_.requires))}; "
                f"here it is {level}",
                hint=_who_gives(pass_.requires),
            )
        level = pass_.ensures or level
    return level


def _who_gives(levels: Iterable[Level]) -> str:
    """A hint: the passes that lead to one of ``levels``."""
    wanted = set(levels)
    names = [name for name, cls in known_passes().items() if cls.ensures in wanted]
    return f"put {' or '.join(map(repr, names))} before it" if names else "change the order of the passes"


class Guard:
    """Remembers a program before a pass, to see afterwards whether the pass kept its hands off it."""

    def __init__(self, pass_: Pass, program: Program) -> None:
        self.pass_ = pass_
        self.program = program
        self.prints: dict[str, Fingerprint] = {name: fingerprint(tensor) for name, tensor in program.tensors()}

    def check(self, result: Program, changed: bool, batches: Sequence[Batch]) -> None:
        """Hold the pass to its contract; ``batches`` are real inputs for comparing numbers.

        Raises:
            CheckError: it wrote into a shared tensor, changed the program as an analysis, or changed the numbers
                although it is exact.
        """
        name = self.pass_.name
        for target, tensor in self.program.tensors():
            if self.prints[target] != fingerprint(tensor):
                raise CheckError(
                    f"the pass {name!r} wrote into the tensor {target!r}, which other programs share",
                    hint="make a new tensor and put it in place with set_tensor",
                )
        if self.pass_.contract is Contract.ANALYSIS and (changed or not _same(self.program, result)):
            raise CheckError(f"the pass {name!r} says it is an analysis, but it changed the program")
        if self.pass_.contract is Contract.EXACT and changed:
            check_exact(name, self.program, result, batches)


def _same(first: Program, second: Program) -> bool:
    """Whether two programs are equal; tensors are compared by identity."""
    documents = [json.loads(encode(program)[0]) for program in (first, second)]
    tensors = [[(name, id(tensor)) for name, tensor in program.tensors()] for program in (first, second)]
    return bool(documents[0] == documents[1] and tensors[0] == tensors[1])


def check_exact(name: str, before: Program, after: Program, batches: Iterable[Batch]) -> None:
    """Compare the outputs of two programs, within ``RTOL`` of each output's standard deviation.

    Where nothing is rounded to a grid, an output may differ by ``NOISE`` times what another order of sums does to it,
    if that is more.

    Where a rounding error of float arithmetic turns a code over, outputs differ by more although the programs do not:
    then the values that quantizers round are compared instead, each given those before
    (:func:`equal_between_roundings`).

    Raises:
        CheckError: they differ; names the first node of both graphs whose values differ.
    """
    for batch in batches:
        _check_batch(name, before, after, batch)


def _check_batch(name: str, before: Program, after: Program, batch: Batch) -> None:
    """What :func:`check_exact` does with one batch, whose outputs are let go of with it."""
    expected, actual = run(before, batch), run(after, batch)
    noise: dict[str, float] | None = None
    for output, value in expected.items():
        if output not in actual:
            raise CheckError(f"the pass {name!r} says it is exact, but the output {output!r} is gone")
        difference = excess(value, actual[output])
        if difference and equal_between_roundings(before, after, batch):
            return
        if difference and not is_rounding(before):
            noise = noise or _noise(before, batch, expected)
            difference = excess(value, actual[output], NOISE * noise[output])
        if difference:
            culprit = first_difference(before, after, _worst_sample(batch, value, actual[output]))
            place = f"; the first value that differs is {describe(culprit)}" if culprit else ""
            raise CheckError(
                f"the pass {name!r} says it is exact, but the output {output!r} differs: {difference}{place}"
            )


def is_rounding(program: Program) -> bool:
    """Whether any value of ``program`` is rounded: then the least difference may become a whole step."""
    simulated = program.graph.find_nodes(op="call_function", target=ops.fake_quantize)
    integer = program.graph.find_nodes(op="call_function", target=ops.quantize)
    return bool(integer) or not all(map(is_uncalibrated, simulated))


def _noise(program: Program, batch: Batch, outputs: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """By how much each of the ``outputs`` of ``program`` moves where its linears round otherwise."""
    worst = {}
    for name, value in shaken(program, batch).items():
        off = (value - outputs[name]).abs()
        worst[name] = float(off[off.isfinite()].max()) if bool(off.isfinite().any()) else 0.0
    return worst


def excess(expected: torch.Tensor, actual: torch.Tensor, noise: float = 0.0) -> str:
    """How ``actual`` differs from ``expected`` beyond the tolerance, in words; empty if it does not.

    ``noise`` is what float arithmetic is known to explain of it.
    """
    if expected.shape != actual.shape:
        return f"shape {list(actual.shape)} instead of {list(expected.shape)}"
    if not expected.is_floating_point():
        wrong = int((expected != actual).sum())
        return f"{wrong} of {expected.numel()} values" if wrong else ""
    moments = _Moments()
    for a, b in zip(*(torch.split(t.detach().reshape(-1), _PART) for t in (expected, actual)), strict=True):
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()):
            return "NaN or Inf"
        if not bool(finite.all()):  # picking takes longer than all else here
            a, b = a[finite], b[finite]
        moments.add(a.double(), b.double())
    tolerance = RTOL * (moments.spread if moments.spread > _CONSTANT * moments.largest else moments.largest)
    tolerance = max(tolerance, noise)
    return f"by up to {moments.worst:.3g}, tolerance {tolerance:.3g}" if moments.worst > tolerance else ""


@dataclass
class _Moments:
    """What a tolerance is made of, gathered part by part so that outputs are never held in float64."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    largest: float = 0.0
    worst: float = 0.0

    def add(self, expected: torch.Tensor, actual: torch.Tensor) -> None:
        """A part, float64; sums of squares about the means are put together as Chan et al. (1983) do."""
        if not expected.numel():
            return
        mean, count = float(expected.mean()), self.count + expected.numel()
        shift = mean - self.mean
        self.squares += float((expected - mean).square().sum()) + shift**2 * self.count * expected.numel() / count
        self.mean += shift * expected.numel() / count
        self.count = count
        self.largest = max(self.largest, float(expected.abs().max()))
        self.worst = max(self.worst, float((expected - actual).abs().max()))

    @property
    def spread(self) -> float:
        """The standard deviation."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0


def equal_between_roundings(before: Program, after: Program, batch: Batch) -> bool:
    """Whether all outputs, and all values that ``before`` rounds and ``after`` computes too, are equal in tolerance.

    ``after`` goes on from the values of ``before``, so that none differs because of a code before it. Both run side by
    side: what has been compared is let go of.
    """
    rounding = (ops.fake_quantize, ops.quantize)
    quantizers = [n for n in before.graph.nodes if n.target in rounding and not is_uncalibrated(n)]
    rounded = {n.all_input_nodes[0] for n in quantizers}
    known = {node.name for node in after.graph.nodes}
    names = {node.name for node in rounded if node.op == "call_function" and node.name in known}
    results, after_results = (list(program.graph.output_node().all_input_nodes) for program in (before, after))
    run_before = stream(before, {*names, *(node.name for node in results)}, batch)
    values: dict[str, torch.Tensor] = {}
    outputs: dict[fx.Node, torch.Tensor] = {}
    after_outputs: dict[fx.Node, torch.Tensor] = {}

    def keep(node: fx.Node, value: torch.Tensor) -> None:
        if node.name in names:
            values[node.name] = value
        if node in results:
            outputs[node] = value

    def compare(node: fx.Node, value: torch.Tensor, batch: Batch) -> torch.Tensor | None:
        if node.name in names:
            while node.name not in values:
                keep(*next(run_before))
            expected = values.pop(node.name)
            if excess(expected, value):
                raise _FoundError(node)
            value = expected
        if node in after_results:
            after_outputs[node] = value
        return value

    try:
        observe(after, {*names, *(node.name for node in after_results)}, [batch], compare)
    except _FoundError:
        return False
    for node, value in run_before:
        keep(node, value)
    pairs = zip(results, after_results, strict=True)
    return bool(names) and not any(excess(outputs[old], after_outputs[new]) for old, new in pairs)


def _worst_sample(batch: Batch, expected: torch.Tensor, actual: torch.Tensor) -> Batch:
    """The one sample of ``batch`` that differs most, if its inputs and outputs share their first dimension."""
    sizes = {tensor.shape[0] if tensor.dim() else -1 for tensor in (*batch.values(), expected)}
    if len(sizes) != 1 or sizes == {-1} or expected.shape != actual.shape:
        return batch
    errors = (expected.double() - actual.double()).abs().nan_to_num(nan=torch.inf).reshape(expected.shape[0], -1)
    worst = int(errors.amax(1).argmax())
    return {name: tensor[worst : worst + 1] for name, tensor in batch.items()}


class _FoundError(Exception):
    """Ends the run at the first node that differs."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__()
        self.node = node


def first_difference(before: Program, after: Program, batch: Batch) -> fx.Node | None:
    """The first node of ``after`` whose value differs from that of the node of the same name in ``before``."""
    targets = {node.name: node.target for node in before.graph.nodes if node.op == "call_function"}
    common = [node.name for node in after.graph.nodes if targets.get(node.name) == node.target]
    values: dict[str, torch.Tensor] = {}

    def keep(node: fx.Node, value: object, batch: Batch) -> None:
        if isinstance(value, torch.Tensor):
            values[node.name] = value

    def compare(node: fx.Node, value: object, batch: Batch) -> None:
        expected = values.pop(node.name, None)
        if isinstance(value, torch.Tensor) and expected is not None and excess(expected, value):
            raise _FoundError(node)

    try:
        observe(before, common, [batch], keep)
        observe(after, common, [batch], compare)
    except _FoundError as difference:
        return difference.node
    return None
