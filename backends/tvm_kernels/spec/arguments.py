"""The arguments of a kernel in order: name, dtype and shape; ``None`` is the number of rows, known at run time."""

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
        shape: None is the number of rows.
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
    dtype = code_dtype(spec.activation) if spec.activation else spec.dtype_of("x")
    found = [Argument("x", dtype, (None, spec.inputs))]
    if spec.activation is not None:
        token = spec.activation.granularity.dynamic
        shape: tuple[int | None, ...] = (None,) if token else (len(spec.activation_sizes),)
        found += [Argument("x_scale", "float32", shape), Argument("x_zero", "float32", shape)]
    found += weight_arguments(spec)
    if spec.bias:
        found.append(Argument("bias", spec.dtype_of("bias"), (padded_outputs(spec),)))
    if spec.rounded is not None:
        count = static_scales(spec.rounded, spec.outputs)
        found += [Argument(f"rounded_{part}", "float32", (count,)) for part in ("scale", "zero")]
    if spec.residual:
        found += _operand("residual", spec.residual_codes, spec.dtype_of("residual"), spec.outputs)
    return (*found, *_results(spec.output, spec.dtype_of("values"), spec.outputs, spec.keep))


def padded_outputs(spec: LinearSpec) -> int:
    """The length of a vector with a value an output: whole panels where the layout has them."""
    return spec.outputs if spec.layout is Layout.ROWS else panels(spec) * PANEL


def weight_arguments(spec: LinearSpec) -> list[Argument]:
    """The weight and what belongs to it, in the order of :func:`~bitlower.backends.tvm_kernels.pack_linear`."""
    groups = spec.inputs // spec.group
    if spec.weight is None:
        rows = spec.layout is Layout.ROWS
        full = (spec.outputs, spec.inputs) if rows else (panels(spec), spec.inputs, 1, PANEL)
        return [Argument("weight", spec.dtype, full)]
    if spec.layout is Layout.ROWS:
        words = -(-spec.inputs * spec.width // 32)
        kind, shape = ("int8", (spec.outputs, spec.inputs)) if spec.width == 8 else ("int32", (spec.outputs, words))
        found = [Argument("weight", kind, shape), Argument("weight_scale", "float32", (spec.outputs, groups))]
    else:
        steps, words = spec.inputs // spec.step, spec.step * spec.width // 32
        found = [Argument("weight", "int32", (panels(spec), steps, words, PANEL))]
        found.append(Argument("weight_scale", "float32", (panels(spec), groups, PANEL)))
    if spec.has_zeros:
        found.append(Argument("weight_zero", "uint8", found[-1].shape))
    if spec.activation is not None:
        kind = "float32" if spec.grouped else "int32"
        found.append(Argument("weight_sum", kind, (len(spec.activation_sizes), padded_outputs(spec))))
    return found


def _norm(spec: NormSpec) -> tuple[Argument, ...]:
    found = _operand("x", spec.x_codes, spec.dtype_of("x"), spec.columns)
    if spec.residual:
        found += _operand("residual", spec.residual_codes, spec.dtype_of("residual"), spec.columns)
    found.append(Argument("weight", spec.dtype_of("weight"), (spec.columns,)))
    if spec.bias:
        found.append(Argument("bias", spec.dtype_of("bias"), (spec.columns,)))
    results = _results(spec.output, spec.dtype_of("values"), spec.columns, spec.keep)
    if spec.keep_sum:
        results.append(Argument("sum", spec.dtype_of("sum"), (None, spec.columns), written=True))
    return (*found, *results)


def _activation(spec: ActivationSpec) -> tuple[Argument, ...]:
    width = spec.columns * (2 if spec.gate == "halves" else 1)
    found = _operand("x", spec.x_codes, spec.dtype_of("x"), width)
    if spec.bias:
        found.append(Argument("bias", spec.dtype_of("bias"), (width,)))
    if spec.gate == "separate":
        found += _operand("gate", spec.gate_codes, spec.dtype_of("gate"), spec.columns)
    if spec.residual:
        found += _operand("residual", spec.residual_codes, spec.dtype_of("residual"), spec.columns)
    return (*found, *_results(spec.output, spec.dtype_of("values"), spec.columns, spec.keep))


def _operand(name: str, quantizer: QuantSpec | None, dtype: str, columns: int) -> list[Argument]:
    """A float operand, or codes with their scales and zero points."""
    if quantizer is None:
        return [Argument(name, dtype, (None, columns))]
    count = None if quantizer.granularity.dynamic else static_scales(quantizer, columns)
    scales = [Argument(f"{name}_{part}", "float32", (count,)) for part in ("scale", "zero")]
    return [Argument(name, code_dtype(quantizer), (None, columns)), *scales]


def _results(output: QuantSpec | None, dtype: str, columns: int, keep: str) -> list[Argument]:
    """Scales of a static quantizer, then codes, scales of a dynamic one, and float values."""
    found = []
    if output is not None:
        dynamic = output.granularity.dynamic
        shape: tuple[int | None, ...] = (None,) if dynamic else (static_scales(output, columns),)
        scales = [Argument(f"out_{part}", "float32", shape, written=dynamic) for part in ("scale", "zero")]
        codes = Argument("codes", code_dtype(output), (None, columns), written=True)
        found = [codes, *scales] if dynamic else [*scales, codes]
    values = [Argument("values", dtype, (None, columns), written=True)] if keep or output is None else []
    return [*found, *values]
