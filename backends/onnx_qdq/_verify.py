"""Compare an exported model in onnxruntime with its Program: outputs, every quantized tensor's codes, constants.

Quantization turns a rounding error of float arithmetic at a tie into a whole step, and later layers carry it on, so two
right implementations do not give equal codes everywhere. Three comparisons together tell that from a fault:

- on its own: both run from the inputs. The shares of equal codes and the errors of the outputs are what users see.
- given codes: the Program goes on from the *runtime's* codes at every quantizer. What reaches the next one then differs
  by the float arithmetic of one layer, so each code must be the Program's own but for ties: the value must lie within
  ``TIE`` of the range from the rounding interval of the code. Nothing is left to interpretation by depth.
- exact: ``round_half_even(x / scale) + zero_point`` on the runtime's own ``x`` must give its code, bit for bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path

from bitlower.backends.onnx_qdq._codes import CodeComparison
from bitlower.backends.onnx_qdq._constants import check_constants
from bitlower.backends.onnx_qdq._kernels import inspect_kernels
from bitlower.backends.onnx_qdq._outputs import OutputComparison
from bitlower.backends.onnx_qdq._selftest import make_selftest
from bitlower.backends.onnx_qdq._session import Session, read_model, runtime_versions
from bitlower.backends.onnx_qdq._verification import CodeError, OutputError, Verification
from bitlower.ir import Batch, BitlowerError, CheckError, Program

MODEL = "model.onnx"
OUTPUT_GIVEN_CODES = 1e-3
"""The largest error of an output, over its standard deviation, that float arithmetic alone may make."""
OUTPUT_COSINE = 0.99
"""The least cosine between an output of the runtime and the Program's when both run on their own."""
TIE = 2e-5
"""How far from a rounding interval a value may lie, as a part of the quantizer's range (0.005 steps of 8 bits)."""
CODES_EQUAL = 0.9
"""The least share of equal codes, over all quantized tensors, when both run on their own."""


def verify_export(
    program: Program,
    folder: Path,
    batches: Iterable[Batch],
    *,
    limit: int = 4,
    session_config: Mapping[str, str] | None = None,
) -> Verification:
    """Check that ``folder/model.onnx`` computes what ``program`` does.

    Only one batch's values are held at a time.

    Args:
        program: what was exported.
        folder: the artefact's.
        batches: inputs by name; real ones.
        limit: only so many batches are compared.
        session_config: session configuration entries that the model is meant to run with.

    Raises:
        BitlowerError: there is no batch.
        CheckError: the model does not load or run, or computes something else: the tensor and the figures are named.
    """
    path, config = folder / MODEL, dict(session_config or {})
    kernels = inspect_kernels(program, path, session_config=config)
    constants = check_constants(program, read_model(path))
    _require(constants.problems)
    session = Session(path, config=config)
    outputs, codes = OutputComparison(program), CodeComparison(program, path, config)
    selftest, count, tokens = None, 0, 0
    for batch in itertools.islice(batches, limit):
        selftest = selftest or make_selftest(program, batch)
        ours, theirs = program(**batch), session.run(batch)
        outputs.add(ours, theirs)
        outputs.add_given_codes(codes.add(batch) or ours, theirs)
        count, tokens = count + 1, tokens + next(iter(batch.values())).numel()
    if selftest is None:
        raise BitlowerError("an export cannot be verified without a batch of inputs", hint="give at least one")
    verification = Verification(
        runtime_versions(),
        config,
        count,
        tokens,
        outputs.rows(),
        codes.rows(),
        {"tensors": constants.tensors, "codes": constants.codes},
        0.0,
        kernels,
        selftest,
    )
    _require([*_code_problems(verification), *_output_problems(verification.outputs)])
    return verification
