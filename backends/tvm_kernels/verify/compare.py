"""Compare a written library with its Program: what every kernel returns, and the outputs.

- given inputs: a second library, which also returns the results of all kernels, is run, and each kernel of the Program
  reads what that library's kernels gave (:mod:`bitlower.backends.tvm_kernels.verify.trace`). Values differ by the float
  arithmetic of one kernel, codes are equal but for ties, at any depth; and so are the outputs.
- exposing: what was written returns the outputs of that second library.
- on its own: both run from the inputs. The errors of the outputs are what users see: ties turn codes over, which later
  layers carry on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from bitlower.backends.artifact.outputs import NOISE, Array, OutputComparison, OutputError
from bitlower.backends.artifact.selftest import SelfTest, make_selftest, with_drawn
from bitlower.backends.artifact.stages import WHOLE, compare_together, part_batches, parts_of
from bitlower.backends.artifact.unseen import Seen, Unseen, at, with_small_batch
from bitlower.backends.decoding import visible
from bitlower.backends.tvm_kernels.library.compile import compile_program
from bitlower.backends.tvm_kernels.library.files import load_library, processor
from bitlower.backends.tvm_kernels.library.library import Code, Library
from bitlower.backends.tvm_kernels.relax.precision import typed
from bitlower.backends.tvm_kernels.spec.base import HALF
from bitlower.backends.tvm_kernels.spec.target import Target
from bitlower.backends.tvm_kernels.verify.agreement import Agreement
from bitlower.backends.tvm_kernels.verify.calls import compared_calls
from bitlower.backends.tvm_kernels.verify.record import KernelError, Verification
from bitlower.backends.tvm_kernels.verify.trace import KernelComparison, trace
from bitlower.ir import Batch, BitlowerError, CheckError, Level, Program
from bitlower.ir.batch_sizes import small_batch
from bitlower.ir.float_noise import shaken
from bitlower.ir.observe import run
from bitlower.ir.stages import DECODER, ENCODER, is_encoder_decoder

Called = Callable[..., dict[str, torch.Tensor]]
"""A library, or a function of one: inputs by name, outputs by name."""
OUTPUT_GIVEN_INPUTS = 2e-4
"""The largest error of an output, over its standard deviation, that float arithmetic after the last kernel may make, or
that reading inner values may. A float program has no kernels: what :data:`NOISE` says may be there too."""
OUTPUT_OF_HALVES = 1e-2
"""The same where activations are float16: of what the last linear multiplies, each factor is rounded to 11 bits."""
TIES = 4
"""How many times what ties make between the Program and the library that shows its kernels they may make between that
library and the one that was written: reading inner values can move the last bit of others."""
OUTPUT_COSINE = 0.9
"""The least cosine between an output of the library and the Program's when both run on their own."""
BATCHES = 4
"""Only so many batches are compared, besides a part of the first."""
ROWS, LENGTH = 4, 64
"""A batch is cut to so many rows and tokens where the results of all kernels are held."""


def verify_export(
    program: Program,
    folder: Path,
    batches: Iterable[Batch],
    *,
    target: Target,
    activations: str = "float32",
    limit: int = BATCHES,
) -> Verification:
    """Check that the library in ``folder`` computes what ``program`` does.

    A decoder also decodes: part of the first batch is run again in steps, the last of one token, with the keys and
    values of those before. At the end there is a batch of sizes that neither the batches nor tracing had.

    Args:
        program: what was exported.
        folder: the artifact's.
        batches: inputs by name; real ones.
        target: whose code was written.
        activations: of the library, ``float16`` or ``float32``.
        limit: only so many batches are compared, besides a part of the first, which is kept for the self-test.

    Raises:
        BitlowerError: there is no batch.
        CheckError: the library does not load, or computes something else: the kernel and the figures are named.
    """
    samples = list(itertools.islice(batches, limit))
    if not samples:
        raise BitlowerError("an export cannot be verified without a batch of inputs", hint="give at least one")
    library, parts = load_library(folder), parts_of(program)
    calls = compared_calls(library.code)
    runs = {WHOLE: library} if isinstance(library, Library) else {ENCODER: library.encode, DECODER: library.decode}
    by_stage, comparisons = part_batches(parts, samples), list[Comparison]()
    for stage, part in parts.items():
        traced = compile_program(trace(part), target, activations=activations)
        comparisons.append(Comparison(part, runs[stage], traced, activations))
        comparisons[-1].run_all(list(with_small_batch(part, by_stage[stage])))
    if WHOLE in parts:
        tests = comparisons[0].selftests()
    else:
        tests = compare_together(program, lambda batch: _arrays(_called(library, batch)), samples[0], OUTPUT_COSINE)
    return _result(_runtime(target, activations), comparisons, calls, *tests)


def _result(
    runtime: Mapping[str, str],
    comparisons: Sequence[Comparison],
    calls: Mapping[str, Mapping[str, int]],
    selftest: SelfTest,
    unseen: Unseen,
) -> Verification:
    """The figures of all that was compared."""
    agreements = [row for part in comparisons for row in part.agreements if row.compared]
    kinds = dict.fromkeys(row.kind for row in agreements)
    return Verification(
        runtime=runtime,
        batches=comparisons[-1].batches,
        tokens=comparisons[-1].tokens,
        outputs=tuple(row for part in comparisons for row in part.outputs),
        kernels=tuple(KernelError.of(kind, (row for row in agreements if row.kind == kind)) for kind in kinds),
        exposing=max(part.exposing for part in comparisons),
        calls=calls,
        selftest=selftest,
        unseen=unseen,
    )


def expect(program: Program, batches: Sequence[Batch], code: Code, *, activations: str = "float32") -> Verification:
    """What a library that does not run here is checked by where it does: the Program's outputs for a small input.

    The kernels that its code calls are counted all the same.

    Raises:
        BitlowerError: there is no batch.
        CheckError: the code calls other kernels than the program needs.
    """
    if not batches:
        raise BitlowerError("an export has no self-test without a batch of inputs", hint="give at least one")
    if is_encoder_decoder(program):
        tests = compare_together(program, lambda batch: _arrays(run(program, batch)), batches[0], OUTPUT_COSINE)
    else:
        tests = _expected_tests(program, batches)
    return Verification(
        runtime=_runtime(code.target, activations),
        batches=0,
        tokens=0,
        outputs=(),
        kernels=(),
        exposing=0.0,
        calls=compared_calls(code),
        selftest=tests[0],
        unseen=tests[1],
    )


def _expected_tests(program: Program, batches: Sequence[Batch]) -> tuple[SelfTest, Unseen]:
    small, seen = with_drawn(program.complete(small_batch(program, batches[0]))), Seen(program)
    for batch in (small, *batches[:BATCHES]):
        seen.add(batch)
    other = seen.other()
    sizes = seen.describe(other)
    with at(sizes):
        unseen = None if other is None else _expected(program, program.complete(other))
    return _expected(program, small), Unseen(sizes, unseen)


def _expected(program: Program, batch: Batch) -> SelfTest:
    return make_selftest(batch, _arrays(run(program, batch)))


def _runtime(target: Target, activations: str) -> dict[str, str]:
    names = {"target": str(target), "activations": activations, "processor": processor()}
    return names | {"tvm": version("apache-tvm")}


class Comparison:
    """All comparisons, summed over batches.

    Args:
        program: what was exported.
        library: what was written, or the function of it that the program is.
        traced: that of :func:`~bitlower.backends.tvm_kernels.verify.trace.trace`.
        activations: of both.
    """

    def __init__(self, program: Program, library: Called, traced: Called, activations: str = "float32") -> None:
        self._program, self._library, self._traced = program, library, traced
        self._inputs = typed(program, activations).inputs
        self._output = OUTPUT_OF_HALVES if activations == HALF else OUTPUT_GIVEN_INPUTS
        self._kernels = KernelComparison(program, activations)
        self._outputs, self._noise = OutputComparison(program), OutputComparison(program)
        self._exposing, self._ties = OutputComparison(program), OutputComparison(program)
        self._first: tuple[Batch, dict[str, Array]] | None = None
        self._other: tuple[Batch, dict[str, Array]] | None = None
        self._sizes = ""
        self.batches = self.tokens = 0

    def run_all(self, batches: Sequence[Batch]) -> None:
        """Compare all batches, and one of sizes that none of them has.

        Raises:
            CheckError: see :meth:`run` and :meth:`check`.
        """
        seen = Seen(self._program)
        for batch in batches:
            self.run(batch)
            seen.add(batch)
        self.check()
        other = seen.other()
        self._sizes = seen.describe(other)
        if other is None:
            return
        with at(self._sizes):
            batch = self._taken(other)
            self._other = batch, self.run(batch, whole=True)
            self.check()

    def run(self, batch: Batch, *, whole: bool = False) -> dict[str, Array]:
        """Compare one batch; what the library returns. The first becomes the self-test.

        Args:
            batch: inputs by name.
            whole: compare kernels on all of it, and not on a part.

        Raises:
            CheckError: the library does not run, or an output or an inner value has another shape, or is not finite
                where the Program's is.
        """
        batch = self._taken(batch)
        ours, deployed = run(self._program, batch), _called(self._library, batch)
        self._outputs.add(ours, _arrays(deployed), visible(self._program, batch))
        if self._program.level is Level.FLOAT and _worst(self._outputs) > self._output:
            self._noise.add(ours, _arrays(shaken(self._program, batch)), visible(self._program, batch))
        self._compare_kernels(batch if whole else small_batch(self._program, batch, ROWS, LENGTH))
        self._first = self._first or (batch, _arrays(deployed))
        self.batches, self.tokens = self.batches + 1, self.tokens + next(iter(batch.values())).numel()
        return _arrays(deployed)

    def _taken(self, batch: Batch) -> Batch:
        """Floats as the library takes them, so that the Program takes the same: a cache may be float16."""
        dtypes = {spec.name: spec.type.dtype for spec in self._inputs if spec.type.is_float}
        complete = self._program.complete(batch)
        return {name: value.to(dtypes.get(name, value.dtype)).to(value.dtype) for name, value in complete.items()}

    def _compare_kernels(self, batch: Batch) -> None:
        results, shown = _called(self._traced, batch), visible(self._program, batch)
        outputs = {spec.name: results[spec.name] for spec in self._program.outputs}
        own = self._kernels.run(self._program.arguments(batch), results)
        self._outputs.add_given_codes(own, _arrays(outputs), shown)
        self._exposing.add(outputs, _arrays(_called(self._library, batch)), shown)
        self._ties.add(run(self._program, batch), _arrays(outputs), shown)

    def check(self) -> None:
        """See that the figures are those of a library of the Program.

        Raises:
            CheckError: they are not: the kernel or output is named.
        """
        exposing, allowed = self.exposing, max(self._output, NOISE * _worst(self._noise))
        _require([*_kernel_problems(self.agreements), *_output_problems(self.outputs, allowed)])
        limit = max(allowed, TIES * _worst(self._ties))
        if not exposing <= limit:
            _require(
                [
                    f"an output is {exposing:.3g} standard deviations off what it is when the kernels' results are"
                    f" read, where ties explain {limit:.3g}"
                ]
            )

    @property
    def agreements(self) -> list[Agreement]:
        """A row for each kernel."""
        return list(self._kernels.agreements.values())

    @property
    def outputs(self) -> tuple[OutputError, ...]:
        """A row for each output."""
        return self._outputs.rows()

    @property
    def exposing(self) -> float:
        """The largest change of an output from reading inner values, over its standard deviation."""
        return _worst(self._exposing)

    def selftests(self) -> tuple[SelfTest, Unseen]:
        """Those of the first batch and of the last one, whose sizes none before it had, after :meth:`run_all`."""
        assert self._first is not None
        return make_selftest(*self._first), Unseen(self._sizes, self._other and make_selftest(*self._other))


def _called(library: Called, batch: Batch) -> dict[str, torch.Tensor]:
    """What a library returns.

    Raises:
        CheckError: it does not run.
    """
    try:
        return library(**batch)
    except BitlowerError:
        raise
    except Exception as error:  # TVM raises many kinds
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckError(f"the library does not run: {line}") from error


def _arrays(values: Mapping[str, torch.Tensor]) -> dict[str, Array]:
    return {name: value.detach().numpy() for name, value in values.items()}


def _kernel_problems(agreements: Iterable[Agreement]) -> Iterator[str]:
    yield from filter(None, (row.problem() for row in agreements if row.compared))


def _worst(comparison: OutputComparison) -> float:
    return max((row.relative for row in comparison.rows()), default=0.0)


def _output_problems(rows: Sequence[OutputError], limit: float) -> Iterator[str]:
    for row in rows:
        if not row.given_codes <= limit:
            yield (
                f"the output {row.name} is {row.given_codes:.3g} standard deviations off, given what the kernels before"
                f" it gave, where float arithmetic explains {limit:.3g}"
            )
        elif not row.cosine >= OUTPUT_COSINE:
            yield f"the output {row.name} has the cosine {row.cosine:.6g} to the program's"


def _require(problems: Sequence[str]) -> None:
    if problems:
        rest = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckError(f"the library is not its program: {problems[0]}{rest}")
