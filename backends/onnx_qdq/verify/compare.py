"""Compare an exported model in onnxruntime with its Program: outputs, every quantized tensor's codes, constants.

Quantization turns a rounding error of float arithmetic at a tie into a whole step, and later layers carry it on, so two
right implementations do not give equal codes everywhere. Three comparisons together tell that from a fault:

- on its own: both run from the inputs. The shares of equal codes and the errors of the outputs are what users see.
- given codes: the Program goes on from the *runtime's* codes at every quantizer. What reaches the next one then differs
  by the float arithmetic of one layer, so each code must be the Program's own but for ties: the value must lie within
  ``tie`` (a small part of the range) from the rounding interval of the code, at any depth.
- exact: ``round_half_even(x / scale) + zero_point`` on the runtime's own ``x`` must give its code, bit for bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from bitlower.backends.artifact.outputs import NOISE, OutputComparison, OutputError
from bitlower.backends.artifact.rounding import TIE
from bitlower.backends.artifact.selftest import SelfTest, make_selftest
from bitlower.backends.artifact.unseen import Seen, Unseen, at, with_small_batch
from bitlower.backends.decoding import visible
from bitlower.backends.onnx_qdq.encoding.nbits import FLOAT_ACTIVATIONS
from bitlower.backends.onnx_qdq.runtime.session import read_model, runtime_versions
from bitlower.backends.onnx_qdq.verify.codes import CodeComparison
from bitlower.backends.onnx_qdq.verify.constants import check_constants, weights
from bitlower.backends.onnx_qdq.verify.record import CodeError, Figures, Verification
from bitlower.backends.onnx_qdq.verify.runtime_kernels import Optimized, inspect_kernels, optimized_model
from bitlower.backends.onnx_qdq.write.files import MODEL
from bitlower.ir import Batch, BitlowerError, CheckError, Program
from bitlower.ir.float_noise import shaken
from bitlower.ir.folding import with_float_weights
from bitlower.ir.observe import run
from bitlower.ir.storage import trim

OUTPUT_GIVEN_CODES = 2e-4
"""The largest error of an output, over its standard deviation, that float arithmetic alone may make. A 6-layer encoder
of 384 channels shows 5e-6."""
OUTPUT_COSINE = 0.9
"""The least cosine between an output of the runtime and the Program's when both run on their own. That encoder shows
0.999 with quantized linears, and 0.97 where every value is quantized with one scale a tensor."""
HELD_BYTES = 256 << 20
"""Weights of more bytes in float lie in files for the comparison, not in memory."""
UNPACKED_BYTES = 2 << 30
"""Weights of more bytes in float are dequantized anew in each run, so that no disk has to hold them either."""
REMEMBERED_BYTES = 64 << 20
"""Outputs of the Program that take no more are remembered until the next batch, which may be the tokens that follow."""
CODES_EQUAL = 0.5
"""The least share of equal codes of at most 8 bits when both run on their own; that encoder shows 0.97 and 0.93."""


class Compared(NamedTuple):
    """A model that holds what its Program promises: the figures, a self-test if one was made, and the new sizes."""

    figures: Figures
    selftest: SelfTest | None
    unseen: Unseen


def verify_export(
    program: Program,
    folder: Path,
    batches: Iterable[Batch],
    *,
    limit: int = 4,
    session_config: Mapping[str, str] | None = None,
    accuracy_level: int = FLOAT_ACTIVATIONS,
    split: Collection[str] = (),
) -> Verification:
    """Check that ``folder/model.onnx`` computes what ``program`` does; see :func:`compare_export`.

    Raises:
        BitlowerError: there is no batch.
        CheckError: the model does not load or run, or computes something else: the tensor and the figures are named.
    """
    figures, selftest, unseen = compare_export(
        program, folder, batches, limit=limit, session_config=session_config, accuracy_level=accuracy_level,
        split=split, tested=True,
    )  # fmt: skip
    assert selftest is not None
    return Verification(**vars(figures), selftest=selftest, unseen=unseen)


def compare_export(
    program: Program,
    folder: Path,
    batches: Iterable[Batch],
    *,
    limit: int = 4,
    session_config: Mapping[str, str] | None = None,
    accuracy_level: int = FLOAT_ACTIVATIONS,
    split: Collection[str] = (),
    file: str = MODEL,
    tested: bool = False,
) -> Compared:
    """Check that a model in ``folder`` computes what ``program`` does.

    Only one batch's values are held at a time, and the weights in float if they are not large. A decoder also decodes:
    part of the first batch is run again in steps, the last of one token, with the keys and values of those before. At
    the end there is a batch of sizes that neither the batches nor tracing had.

    Args:
        program: what was exported.
        folder: the artifact's.
        batches: inputs by name; real ones.
        limit: only so many batches are compared, besides a part of the first, which is kept for the self-test.
        session_config: session configuration entries that the model is meant to run with.
        accuracy_level: of MatMulNBits that the export was asked for.
        split: the names of codes that the export multiplies with float activations as integers of several digits.
        file: the name of the model in the folder.
        tested: whether self-tests are made.

    Raises:
        BitlowerError: there is no batch.
        CheckError: the model does not load or run, or computes something else: the tensor and the figures are named.
    """
    path, config = folder / file, dict(session_config or {})
    constants = check_constants(program, read_model(path))
    _require(constants.problems)
    program.release()
    floats = unpacked(program)
    with optimized_model(path, config) as optimized:
        graph = read_model(optimized.path).graph
        kernels = inspect_kernels(
            program, path, graph, session_config=config, accuracy_level=accuracy_level, split=split
        )
        comparison = _Comparison(floats, path, optimized, config, tested=tested)
        trim()
        selftest, unseen = comparison.run_all(itertools.islice(batches, limit), rounds=kernels.rounds_activations)
    figures = Figures(
        runtime=runtime_versions(),
        session_config=config,
        batches=comparison.batches,
        tokens=comparison.tokens,
        outputs=comparison.outputs.rows(),
        quantized=comparison.codes.rows(),
        constants={"tensors": constants.tensors, "codes": constants.codes},
        exposing=max((row.worst for row in comparison.exposing.rows()), default=0.0),
        kernels=kernels,
    )
    return Compared(figures, selftest, unseen)


class _Comparison:
    """All comparisons, summed over batches."""

    def __init__(
        self, program: Program, path: Path, optimized: Optimized, config: Mapping[str, str], *, tested: bool
    ) -> None:
        self._program, self._session, self._tested = program, optimized.session, tested
        for spec in program.outputs:
            if spec.name not in self._session.outputs:
                raise CheckError(f"{path.name} has no output {spec.name!r}")
        self.codes = CodeComparison(program, path, optimized.path, config)
        self.outputs, self.exposing, self._noise = (OutputComparison(program) for _ in range(3))
        self._last: tuple[Batch, Mapping[str, torch.Tensor]] = {}, {}
        self.batches = self.tokens = 0

    def run_all(self, batches: Iterable[Batch], *, rounds: bool) -> tuple[SelfTest | None, Unseen]:
        """Compare a part of the first batch, all of them, and one of other sizes; self-tests where they are wanted.

        Args:
            batches: real ones.
            rounds: whether the runtime rounds float activations.

        Raises:
            BitlowerError: there is no batch.
            CheckError: the model fails, or computes something else.
        """
        seen, selftest = Seen(self._program), None
        for batch in with_small_batch(self._program, batches, self._outputs):
            made = self.run(batch, tested=self._tested and selftest is None)
            selftest = selftest or made
            seen.add(batch)
        if not self.batches:
            raise BitlowerError("an export cannot be verified without a batch of inputs", hint="give at least one")
        self._check(rounds=rounds)
        other = seen.other()
        sizes = seen.describe(other)
        if other is None:
            return selftest, Unseen(sizes)
        with at(sizes):
            unseen = self.run(self._program.complete(other), tested=self._tested)
            self._check(rounds=rounds)
        return selftest, Unseen(sizes, unseen)

    def _check(self, *, rounds: bool) -> None:
        outputs = _output_problems(self.outputs.rows(), self.limits(), rounds=rounds)
        _require([*_code_problems(self.codes.rows()), *outputs])

    def run(self, batch: Batch, *, tested: bool) -> SelfTest | None:
        """Compare one batch; a self-test of it if it is to be ``tested``.

        What a comparison alone needs goes after it: logits are as large as all else together.
        """
        self._last = {}, {}
        raw, batch = batch, self._program.complete(batch)
        shown = visible(self._program, batch)
        if self.codes.names:
            deployed = self._session.run(batch)
            codes, meanwhile = self.codes.read(batch)
            self.exposing.add({name: torch.from_numpy(value) for name, value in deployed.items()}, meanwhile)
            del meanwhile
            alone = self.codes.compare_alone(batch, codes)
        else:
            codes, alone = {}, run(self._program, batch)  # before the model's own outputs are there too
            deployed = self._session.run(batch)
        self.outputs.add(alone, deployed, shown)
        if sum(value.nbytes for value in alone.values()) <= REMEMBERED_BYTES:
            self._last = raw, alone
        if codes:
            del alone
            self.outputs.add_given_codes(self.codes.compare_given_codes(batch, codes), deployed, shown)
            self.codes.explain(batch, codes)
        else:
            self.outputs.add_given_codes(alone, deployed, shown)
            if any(row.given_codes > OUTPUT_GIVEN_CODES for row in self.outputs.rows()):
                self._noise.add(alone, {k: v.numpy() for k, v in shaken(self._program, batch).items()}, shown)
            del alone
        selftest = make_selftest(batch, deployed) if tested else None
        del codes, deployed
        self.codes.compare_exactly(batch)
        self.batches, self.tokens = self.batches + 1, self.tokens + next(iter(batch.values())).numel()
        trim()  # what was compared leaves holes as large as itself
        return selftest

    def _outputs(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        """The Program's outputs; those of the batch that was compared last are known."""
        last, outputs = self._last
        return outputs if last is batch else run(self._program, batch)

    def limits(self) -> dict[str, float]:
        """The largest error of each output, given codes, over its standard deviation."""
        noise = {row.name: NOISE * row.relative for row in self._noise.rows()}
        return {row.name: max(OUTPUT_GIVEN_CODES, noise.get(row.name, 0.0)) for row in self.outputs.rows()}


def unpacked(program: Program) -> Program:
    """``program`` with its weights dequantized once and not at each run, as far as memory and disk hold them."""
    size = sum(codes.size for _, _, codes in weights(program)) * 4
    return program if size > UNPACKED_BYTES else with_float_weights(program, mapped=size > HELD_BYTES)


def _require(problems: Sequence[str]) -> None:
    if problems:
        rest = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckError(f"the exported model is not its program: {problems[0]}{rest}")


def _code_problems(rows: Sequence[CodeError]) -> list[str]:
    problems = []
    for row in rows:
        where = f"%{row.name} ({row.role} of %{row.tensor}{f' in {row.path}' if row.path else ''})"
        if row.exact is not None and row.exact < 1:
            problems.append(f"{where}: only {row.exact:.4%} of the codes are round(x / scale) + zero point")
        elif not row.excess <= row.tie:
            problems.append(
                f"{where}: a code is {row.excess:.3g} steps from its value, where float arithmetic explains"
                f" {row.tie:.3g}; {row.given_codes:.4%} of the codes are equal, given those before"
            )
    coarse = [row for row in rows if row.tie <= TIE * 255]
    total = sum(row.codes for row in coarse)
    equal = sum(row.equal * row.codes for row in coarse) / total if total else 1.0
    if not problems and equal < CODES_EQUAL:
        problems.append(f"only {equal:.2%} of all codes are the program's; at least {CODES_EQUAL:.0%} are expected")
    return problems


def _output_problems(rows: Sequence[OutputError], limits: Mapping[str, float], *, rounds: bool) -> list[str]:
    """What is too far off; where the runtime ``rounds`` float activations, only the cosine can tell."""
    problems = []
    for row in rows:
        if not rounds and not row.given_codes <= limits[row.name]:
            problems.append(
                f"the output {row.name} is {row.given_codes:.3g} standard deviations off, where float arithmetic"
                f" explains {limits[row.name]:.3g}"
            )
        elif not row.cosine >= OUTPUT_COSINE:
            problems.append(f"the output {row.name} has the cosine {row.cosine:.6g} to the program's")
    return problems
