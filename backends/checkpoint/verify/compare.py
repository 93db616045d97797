"""Compare a written checkpoint with its Program: every packed weight bit for bit, and the outputs.

Three comparisons tell a fault from the rounding that a checkpoint in half precision does on purpose:

- weights: codes and zero points are unpacked from the file and must be the Program's; scales and what stays in float
  must be the Program's, rounded to the file's dtype.
- given weights: Hugging Face's own model and the Program, both in float32 with the weights of the file, must agree but
  for the order of float arithmetic. So the names, the orientation and the ties are right, and the Program's graph still
  computes what the model does.
- outputs: the Program as it is, and with the weights of the file. This is what the rounding costs.

At last transformers loads the folder, where what it needs is installed and the model is small enough, and must give the
outputs of the Program with the weights of the file. All of this is done at sizes too that nothing had before.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import fx

from bitlower.backends.artifact.selftest import SelfTest, make_selftest
from bitlower.backends.artifact.unseen import Seen, Unseen, at
from bitlower.backends.checkpoint.contents import Contents, Float, Layer
from bitlower.backends.checkpoint.format import Format, Packed, Weight
from bitlower.backends.checkpoint.skeleton import CONV1D, Skeleton
from bitlower.backends.checkpoint.verify.client import CLIENT, Client, obstacle
from bitlower.backends.checkpoint.verify.outputs import OutputComparison
from bitlower.backends.checkpoint.verify.record import LayerCheck, Verification
from bitlower.ir import Batch, BitlowerError, CheckError, Program
from bitlower.ir.observe import observe
from bitlower.ir.operators import graph_results
from bitlower.ir.quantization import numerics
from bitlower.ir.storage import parts, spill, trim
from bitlower.ir.tensors import tensor_digest

PACKAGES = ("torch", "transformers")
TOKENS = 256
"""A batch is cut to so many entries of its first input, by whole rows: logits are large."""


class Stored:
    """The weights of a written checkpoint, read one at a time, as float32.

    Args:
        folder: of the checkpoint.
        form: of its packed layers.
        config: its ``config.json``.

    Raises:
        CheckError: a file is damaged, or does not say how a layer is packed.
    """

    def __init__(self, folder: Path, form: Format, config: Mapping[str, Any]) -> None:
        self.path, self._folder, self._form = folder, form.container.open(folder), form
        self.dequantizes = bool((config.get("quantization_config") or {}).get("dequantize"))
        """Whether the client is asked to unfold the weights as it loads them."""
        try:
            self.packed = form.layers(config["quantization_config"], self._folder) if _is_packed(config) else {}
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckError(f"the quantization_config in {folder} is damaged: {error!r}") from None

    @property
    def readers(self) -> tuple[str, ...]:
        """The modules that transformers needs to read all of it."""
        return (*self._form.container.readers, *(self._form.readers if self.packed else ()))

    def layer(self, path: str) -> Weight:
        """A packed layer, unpacked."""
        try:
            return self._form.read(self._folder, path, self.packed[path])
        except CheckError:
            raise
        except BitlowerError as error:
            raise CheckError(f"{path} cannot be unpacked: {error}") from None

    def tensor(self, name: str) -> torch.Tensor:
        """One of the file's, as it is there."""
        return self._folder.tensor(name)

    def whole(self, name: str, skeleton: Skeleton) -> torch.Tensor:
        """As :meth:`weight`, by the name that it has in the model."""
        path = name.removesuffix(".weight")
        if path in skeleton.pieces:
            return torch.cat([self.weight(f"{piece}.weight") for piece in skeleton.pieces[path]])
        return self.weight(name, skeleton.kinds.get(name.rpartition(".")[0], ""))

    def weight(self, name: str, kind: str = "") -> torch.Tensor:
        """A weight in the model's orientation: a packed one of a ``Conv1D`` is [in, out], all others [out, in]."""
        path = name.removesuffix(".weight")
        if path not in self.packed or not name.endswith(".weight"):
            return spill(self.tensor(name), torch.float32)
        layer = self.layer(path)
        value = numerics.values(layer.codes, layer.scales, layer.zeros)
        return value.T if kind == CONV1D else value


@torch.no_grad()
def verify_export(
    program: Program,
    contents: Contents,
    skeleton: Skeleton,
    stored: Stored,
    batches: Iterable[Batch],
    *,
    form: Format,
    dtype: torch.dtype,
    limit: int = 2,
) -> Verification:
    """Check that what was written is ``program``.

    One weight and one batch's values are held at a time.

    Args:
        program: what was exported.
        contents: its weights.
        skeleton: its model.
        stored: what was written.
        batches: inputs by name; real ones.
        form: of the packed layers.
        dtype: of scales and floats.
        limit: only so many batches are run.

    Raises:
        BitlowerError: there is no batch.
        CheckError: what was written is something else: the tensor and the figures are named.
    """
    layers = tuple(_check_layer(layer, stored, form.scale_dtype(dtype)) for layer in contents.layers)
    float_error = max((_check_float(entry, stored, dtype) for entry in contents.floats), default=0.0)
    comparison = _Comparison(program, contents, skeleton, stored)
    first, other = comparison.run_all(itertools.islice(batches, limit))
    exact = dtype == torch.float32 or not stored.dequantizes
    return Verification(
        format=form.name,
        dtype=str(dtype).removeprefix("torch."),
        batches=comparison.batches,
        tokens=comparison.tokens,
        layers=layers,
        float_error=float_error,
        outputs=comparison.outputs.rows(),
        client=_run_client(skeleton, stored, form, (first, other), exact),
        versions={name: version(name) for name in PACKAGES},
        unseen=Unseen(other.sizes, other.selftest()),
    )


@dataclass(frozen=True)
class _Run:
    """A batch with the outputs of the Program with the stored weights, and its sizes in words; none of it if empty."""

    sizes: str
    batch: Batch
    outputs: Mapping[str, torch.Tensor]

    def selftest(self) -> SelfTest | None:
        arrays = {name: value.numpy() for name, value in self.outputs.items()}
        return make_selftest(self.batch, arrays) if arrays else None


class _Comparison:
    """All outputs, summed over batches."""

    def __init__(self, program: Program, contents: Contents, skeleton: Skeleton, stored: Stored) -> None:
        self._program, self._contents, self._skeleton, self._stored = program, contents, skeleton, stored
        self.outputs = OutputComparison([spec.name for spec in program.outputs])
        self.batches = self.tokens = 0

    def run_all(self, batches: Iterable[Batch]) -> tuple[_Run, _Run]:
        """Compare the first rows of all batches, and one of other sizes; the first and the last run.

        Raises:
            BitlowerError: there is no batch.
            CheckError: the model does not run, or an output is too far off.
        """
        seen, first = Seen(self._program), None
        for whole in batches:
            batch = _cut(whole)
            outputs = self.run(batch)
            first = first or _Run("", batch, outputs)
            seen.add(whole)
            seen.add(batch)
        if first is None:
            raise BitlowerError("an export cannot be verified without a batch of inputs", hint="give at least one")
        self.outputs.rows()
        other = seen.other()
        sizes = seen.describe(other)
        if other is None:
            return first, _Run(sizes, {}, {})
        with at(sizes):
            outputs = self.run(other)
            self.outputs.rows()
        return first, _Run(sizes, other, outputs)

    def run(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Compare one batch; what the Program returns with the stored weights."""
        model = _run_model(self._skeleton, self._contents, self._stored, batch)
        trim()
        ours = _run_program(self._program, {}, batch, model)
        trim()
        weights = _weights(self._program, self._contents, self._stored, self._skeleton)
        rounded = _run_program(self._program, weights, batch, model)
        self.outputs.add(ours, rounded, model)
        self.batches, self.tokens = self.batches + 1, self.tokens + next(iter(batch.values())).numel()
        return rounded


def _run_client(skeleton: Skeleton, stored: Stored, form: Format, runs: tuple[_Run, _Run], exact: bool) -> str:
    """The client that gave the outputs of both runs, or why none was asked."""
    reason = obstacle(skeleton, stored.readers)
    if reason:
        return reason
    client, (first, other) = Client(stored.path, skeleton), runs
    client.check(first.batch, first.outputs, exact=exact)
    if other.outputs:
        with at(other.sizes):
            client.check(other.batch, other.outputs, exact=exact)
    return CLIENT


def _is_packed(config: Mapping[str, Any]) -> bool:
    return config.get("quantization_config") is not None


def _cut(batch: Batch) -> Batch:
    """The first rows of a batch."""
    first = next(iter(batch.values()))
    rows = max(TOKENS * len(first) // max(first.numel(), 1), 1)
    return {name: tensor[:rows] for name, tensor in batch.items()}


def check_weight(path: str, packed: Packed, weight: Weight) -> dict[str, str]:
    """The hashes of an unpacked layer, whose parts fit each other.

    Raises:
        CheckError: they do not fit, or a scale is not finite.
    """
    rows, columns = weight.codes.shape
    groups = weight.scales.shape[1] if weight.scales.dim() == 2 else 0
    size = columns if packed.group_size == -1 else packed.group_size
    if weight.scales.shape != (rows, groups) or weight.zeros.shape != (rows, groups) or groups * size != columns:
        raise CheckError(
            f"{path} has codes {[rows, columns]}, scales {list(weight.scales.shape)} and zero points"
            f" {list(weight.zeros.shape)}, which do not make groups of {size}"
        )
    if not bool(weight.scales.isfinite().all()):
        raise CheckError(f"a scale of {path} is not finite")
    pieces = {"codes": weight.codes, "scales": weight.scales, "zero_points": weight.zeros}
    return {name: tensor_digest(part) for name, part in pieces.items()}


def _check_layer(layer: Layer, stored: Stored, dtype: torch.dtype) -> LayerCheck:
    weight = stored.layer(layer.path)
    digests = check_weight(layer.path, stored.packed[layer.path], weight)
    for what, ours, theirs in (("codes", layer.codes(), weight.codes), ("zero points", layer.zeros(), weight.zeros)):
        wrong = int((ours != theirs).sum()) if ours.shape == theirs.shape else ours.numel()
        if wrong:
            raise CheckError(f"{wrong} of {ours.numel()} {what} of {layer.path} in the file are not the program's")
    scales = layer.scales()
    if not torch.equal(scales.to(dtype).float(), weight.scales):
        raise CheckError(f"the scales of {layer.path} in the file are not the program's, rounded to {dtype}")
    layer.release()
    small = (scales != 0) & (weight.scales.abs() < torch.finfo(dtype).tiny)
    return LayerCheck(
        layer.path,
        layer.bits,
        weight.codes.numel(),
        float(((weight.scales - scales).abs() / scales.abs().clamp(min=torch.finfo(torch.float32).tiny)).max()),
        int(small.sum()),
        digests,
    )


def _check_float(entry: Float, stored: Stored, dtype: torch.dtype) -> float:
    """The largest error of a weight that stays in float, over its largest entry."""
    ours, theirs = entry.value().reshape(-1), stored.tensor(entry.name).reshape(-1)
    number = dtype if ours.is_floating_point() else ours.dtype
    largest = error = 0.0
    same = theirs.dtype == number and ours.shape == theirs.shape
    for a, b in zip(parts(ours), parts(theirs), strict=True) if same else ():
        same = same and torch.equal(a.to(number), b)
        largest = max(largest, float(a.abs().max()))
        error = max(error, float((a - b).abs().max()))
    if not same:
        raise CheckError(f"the weight {entry.name} in the file is not the program's")
    return error / largest if largest else 0.0


Weights = Mapping[fx.Node, Callable[[], torch.Tensor]]


def _weights(program: Program, contents: Contents, stored: Stored, skeleton: Skeleton) -> Weights:
    """The stored weights, for the nodes of the Program that give its own."""

    def turned(entry: Float) -> torch.Tensor:
        weight = stored.weight(entry.name)
        return weight.flatten(1) if entry.kernel else weight.T if entry.transposed else weight

    def joined(names: list[str]) -> torch.Tensor:
        return torch.cat([stored.weight(name) for name in names]) if len(names) > 1 else stored.weight(names[0])

    floats = {entry.target: partial(turned, entry) for entry in contents.floats}
    nodes = program.graph.find_nodes(op="get_attr")
    pieces: dict[fx.Node, list[str]] = {}
    for layer in contents.layers:
        pieces.setdefault(layer.node, []).append(f"{layer.path}.weight")
    layers = {node: partial(joined, names) for node, names in pieces.items()}
    return {node: floats[str(node.target)] for node in nodes if node.target in floats} | layers


def _run_program(program: Program, weights: Weights, batch: Batch, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Those of the Program's outputs that are among ``names``, with ``weights`` in place of its own."""
    pairs = zip(program.outputs, graph_results(program.graph), strict=True)
    results = {node: spec.name for spec, node in pairs if spec.name in names}
    outputs: dict[str, torch.Tensor] = {}

    def visit(node: fx.Node, value: torch.Tensor, batch: Batch) -> torch.Tensor | None:
        if node in weights:
            return weights[node]()
        outputs[results[node]] = value.clone()
        return None

    observe(program, {*weights, *results}, [batch], visit)
    return outputs


def _run_model(skeleton: Skeleton, contents: Contents, stored: Stored, batch: Batch) -> dict[str, torch.Tensor]:
    """What Hugging Face's model returns with the stored weights.

    Raises:
        CheckError: it does not run.
    """
    try:
        return skeleton.run(batch, lambda name: stored.whole(name, skeleton), contents.ties)
    except (RuntimeError, IndexError, ValueError) as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckError(f"Hugging Face's model does not run: {line}") from error
