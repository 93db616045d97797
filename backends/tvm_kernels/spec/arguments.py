"""The arguments of a kernel in order: name, dtype and shape; ``None`` is M, the number of rows, known at run time."""

from __future__ import annotations

from dataclasses import dataclass

from bitlower.backends.tvm_kernels.spec.base import KernelSpec, static_scales
from bitlower.backends.tvm_kernels.spec.linear import Layout, LinearSpec
from bitlower.backends.tvm_kernels.spec.packing import PANEL, panels
from bitlower.backends.tvm_kernels.spec.rowwise import ActivationSpec, NormSpec
from bitlower.ir import QuantSpec


@dataclass(frozen=True)
class Argument:
    """A buffer that a kernel takes.

    Args:
        name: what it is.
        dtype: as numpy calls it.
        shape: None is M, the number of rows.
        written: whether the kernel writes it.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    written: bool = False


def arguments(spec: KernelSpec) -> tuple[Argument, ...]:
    """All buffers of the kernel of ``spec``, inputs first."""
    match spec:
        case LinearSpec():
            return _linear(spec)
        case NormSpec():
            return _norm(spec)
        case ActivationSpec():
            return _activation(spec)
        case _:
            raise TypeError(f"no kernels of {type(spec).__name__}")


def code_dtype(spec: QuantSpec) -> str:
    """The dtype of activation codes: ``int8`` or ``uint8``."""
    return str(spec.grid.dtype).removeprefix("torch.")


def _linear(spec: LinearSpec) -> tuple[Argument, ...]:
    dtype = code_dtype(spec.x_quant) if spec.x_quant else spec.dtype_of("x")
    inputs = [Argument("x", dtype, (None, spec.k))]
    if spec.x_quant is not None:
        token = spec.x_quant.granularity.dynamic
        shape: tuple[int | None, ...] = (None,) if token else (len(spec.x_group_sizes),)
        inputs += [Argument("x_scale", "float32", shape), Argument("x_zero", "float32", shape)]
    inputs += weight_arguments(spec)
    if spec.bias:
        inputs.append(Argument("bias", spec.dtype_of("bias"), (padded_outputs(spec),)))
    if spec.rounded is not None:
        count = static_scales(spec.rounded, spec.n)
        inputs += [Argument(f"rounded_{part}", "float32", (count,)) for part in ("scale", "zero")]
    if spec.residual:
        inputs += _operand("residual", spec.residual_codes, spec.dtype_of("residual"), spec.n)
    return (*inputs, *_results(spec.output, spec.dtype_of("values"), spec.n, spec.keep))


def padded_outputs(spec: LinearSpec) -> int:
    """The length of a vector with a value an output: whole panels where the layout has them."""
    return spec.n if spec.layout is Layout.ROWS else panels(spec) * PANEL


def weight_arguments(spec: LinearSpec) -> list[Argument]:
    """The weight and what belongs to it, in the order of :func:`~bitlower.backends.tvm_kernels.pack_linear`."""
    groups = spec.k // spec.group_size
    if spec.weight is None:
        in_rows = spec.layout is Layout.ROWS
        full = (spec.n, spec.k) if in_rows else (panels(spec), spec.k, 1, PANEL)
        return [Argument("weight", spec.dtype, full)]
    if spec.layout is Layout.ROWS:
        words = -(-spec.k * spec.bits // 32)
        kind, shape = ("int8", (spec.n, spec.k)) if spec.bits == 8 else ("int32", (spec.n, words))
        parts = [Argument("weight", kind, shape), Argument("weight_scale", "float32", (spec.n, groups))]
    else:
        steps, words = spec.k // spec.step, spec.step * spec.bits // 32
        parts = [Argument("weight", "int32", (panels(spec), steps, words, PANEL))]
        parts.append(Argument("weight_scale", "float32", (panels(spec), groups, PANEL)))
    if spec.has_zeros:
        parts.append(Argument("weight_zero", "uint8", parts[-1].shape))
    if spec.x_quant is not None:
        kind = "float32" if spec.grouped else "int32"
        parts.append(Argument("weight_sum", kind, (len(spec.x_group_sizes), padded_outputs(spec))))
    return parts


def _norm(spec: NormSpec) -> tuple[Argument, ...]:
    inputs = _operand("x", spec.x_codes, spec.dtype_of("x"), spec.columns)
    if spec.residual:
        inputs += _operand("residual", spec.residual_codes, spec.dtype_of("residual"), spec.columns)
    inputs.append(Argument("weight", spec.dtype_of("weight"), (spec.columns,)))
    if spec.bias:
        inputs.append(Argument("bias", spec.dtype_of("bias"), (spec.columns,)))
    results = _results(spec.output, spec.dtype_of("values"), spec.columns, spec.keep)
    if spec.keep_sum:
        results.append(Argument("sum", spec.dtype_of("sum"), (None, spec.columns), written=True))
    return (*inputs, *results)


def _activation(spec: ActivationSpec) -> tuple[Argument, ...]:
    width = spec.columns * (2 if spec.gate == "halves" else 1)
    inputs = _operand("x", spec.x_codes, spec.dtype_of("x"), width)
    if spec.bias:
        inputs.append(Argument("bias", spec.dtype_of("bias"), (width,)))
    if spec.gate == "separate":
        inputs += _operand("gate", spec.gate_codes, spec.dtype_of("gate"), spec.columns)
    if spec.residual:
        inputs += _operand("residual", spec.residual_codes, spec.dtype_of("residual"), spec.columns)
    return (*inputs, *_results(spec.output, spec.dtype_of("values"), spec.columns, spec.keep))


def _operand(name: str, quantizer: QuantSpec | None, dtype: str, columns: int) -> list[Argument]:
    """A float operand, or codes with their scales and zero points."""
    if quantizer is None:
        return [Argument(name, dtype, (None, columns))]
    count = None if quantizer.granularity.dynamic else static_scales(quantizer, columns)
    scales = [Argument(f"{name}_{part}", "float32", (count,)) for part in ("scale", "zero")]
    return [Argument(name, code_dtype(quantizer), (None, columns)), *scales]


def _results(output: QuantSpec | None, dtype: str, columns: int, keep: str) -> list[Argument]:
    """Scales of a static quantizer, then codes, scales of a dynamic one, and float values."""
    results = []
    if output is not None:
        dynamic = output.granularity.dynamic
        shape: tuple[int | None, ...] = (None,) if dynamic else (static_scales(output, columns),)
        scales = [Argument(f"out_{part}", "float32", shape, written=dynamic) for part in ("scale", "zero")]
        codes = Argument("codes", code_dtype(output), (None, columns), written=True)
        results = [codes, *scales] if dynamic else [*scales, codes]
    values = [Argument("values", dtype, (None, columns), written=True)] if keep or output is None else []
    return [*results, *values]
