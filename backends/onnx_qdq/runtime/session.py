"""onnxruntime sessions as an artifact is checked with, and models whose inner values can be read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

from bitlower.ir import Batch, CheckError

PROVIDER = "CPUExecutionProvider"
_EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
_SMALL = 4096
"""Bytes; a tensor of fewer stays in the file of the graph."""
_NARROW = {ir.DataType.INT2: ir.DataType.INT8, ir.DataType.UINT2: ir.DataType.UINT8} | {
    ir.DataType.INT4: ir.DataType.INT8,
    ir.DataType.UINT4: ir.DataType.UINT8,
}
"""Types that onnxruntime computes with but does not hand out, and those that hold their values."""

Array = np.ndarray[Any, Any]


class Session:
    """A model in onnxruntime on the CPU.

    Args:
        model: a file, or a serialized model whose external data lie in ``folder``.
        folder: see ``model``; not needed for a file.
        config: session configuration entries by key.
        optimized: where to write the graph that the runtime runs; its tensors go to a file beside it.
        optimize: with the runtime's default optimizations; without, as the graph stands.
        profile: what the file that :meth:`end_profile` writes begins with; nothing is profiled without.

    Raises:
        CheckError: the runtime does not take the model.
    """

    def __init__(
        self,
        model: Path | bytes,
        *,
        folder: Path | None = None,
        config: Mapping[str, str] | None = None,
        optimized: Path | None = None,
        optimize: bool = True,
        profile: Path | None = None,
    ) -> None:
        try:
            options = _options(folder, config or {}, optimized, optimize)
            if profile is not None:
                options.enable_profiling, options.profile_file_prefix = True, str(profile)
                options.enable_cpu_mem_arena = True  # as users run it
            source = model if isinstance(model, bytes) else str(model)
            self._session = onnxruntime.InferenceSession(source, options, providers=[PROVIDER])
        except Exception as error:
            raise CheckError(f"onnxruntime does not load {_name(model)}: {_first_line(error)}") from error
        self._model = model
        self.shapes = {value.name: tuple(value.shape) for value in self._session.get_inputs()}
        self.inputs = tuple(self.shapes)
        self.outputs = tuple(value.name for value in self._session.get_outputs())

    def run(self, batch: Batch, outputs: Iterable[str] | None = None) -> dict[str, Array]:
        """The outputs (all of them, or those named) on ``batch``.

        Raises:
            CheckError: an input or an output is missing, or a kernel fails.
        """
        names = list(self.outputs if outputs is None else outputs)
        for kind, wanted, known in (("output", names, self.outputs), ("input", self.inputs, tuple(batch))):
            for name in wanted:
                if name not in known:
                    raise CheckError(f"{_name(self._model)} and its program do not agree on the {kind} {name!r}")
        feed = {name: batch[name].detach().cpu().numpy() for name in self.inputs}
        try:
            values = self._session.run(names, feed)
        except Exception as error:
            raise CheckError(f"onnxruntime cannot run {_name(self._model)}: {_first_line(error)}") from None
        return dict(zip(names, values, strict=True))

    def end_profile(self) -> Path:
        """The file of what was profiled, which is complete now."""
        return Path(self._session.end_profiling())


def _options(
    folder: Path | None, config: Mapping[str, str], optimized: Path | None, optimize: bool
) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = False  # it keeps the most that a run took, for runs that do not come
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        entry = "session.optimized_model_external_initializers_"
        options.add_session_config_entry(f"{entry}file_name", f"{optimized.name}.data")
        options.add_session_config_entry(f"{entry}min_size_in_bytes", str(_SMALL))
    if folder is not None:
        options.add_session_config_entry(_EXTERNAL_FOLDER, str(folder))
    return options


def runtime_versions() -> dict[str, str]:
    """The runtime and where it runs, for reports."""
    return {"onnxruntime": str(onnxruntime.__version__), "provider": PROVIDER}


def read_model(path: Path) -> ir.Model:
    """The model in ``path``; large tensors stay on the disk until they are asked for.

    Raises:
        CheckError: there is no such file, or it is no ONNX model.
    """
    if not path.is_file():
        raise CheckError(f"{path.name} is missing in {path.parent}")
    try:
        return ir.load(path)
    except Exception as error:
        raise CheckError(f"{path.name} is not an ONNX model: {_first_line(error)}") from None


def exposed(path: Path, names: Collection[str]) -> bytes:
    """The model in ``path`` with the values called ``names`` as further outputs; types below 8 bits are widened.

    Raises:
        CheckError: not an ONNX model, or it has no such value.
    """
    model = read_model(path)
    values = named_values(model.graph)
    present = {value.name for value in model.graph.outputs}
    for name in names:
        if name not in values:
            raise CheckError(f"{path.name} has no value {name!r}")
        if name not in present:
            model.graph.outputs.append(_readable(model.graph, values[name]))
    data: bytes = ir.to_proto(model).SerializeToString()
    return data


def with_data_beside(path: Path, folder: Path) -> Path:
    """``path``, or a copy in ``folder`` with its tensors in a file of their own, which sessions and graphs only map.

    Raises:
        CheckError: see :func:`read_model`.
    """
    model = read_model(path)
    if any(isinstance(value.const_value, ir.ExternalTensor) for value in model.graph.initializers.values()):
        return path
    copy = folder / path.name
    ir.save(model, copy, external_data=f"{path.name}.data", size_threshold_bytes=_SMALL)
    return copy


def named_values(graph: ir.Graph) -> dict[str, ir.Value]:
    """Every input, initializer and node output of ``graph`` by name."""
    values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    return {value.name: value for value in values if value.name}


def to_tensor(array: Array) -> torch.Tensor:
    """The array as a tensor, uncopied if it can be written; types that torch computes little with become int32."""
    wide = array.astype(np.int32) if array.dtype in (np.uint16, np.uint32) else array
    return torch.from_numpy(np.require(wide, requirements="W"))


def _readable(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """``value``, or a wide copy under its name: the narrow value is renamed."""
    wide = _NARROW.get(code_type(value))
    if wide is None:
        return value
    name, value.name = value.name, f"{value.name}_narrow"
    cast = ir.node("Cast", [value], {"to": wide}, name=f"{name}_widen")
    cast.outputs[0].name = name
    graph.append(cast)
    return cast.outputs[0]


def code_type(value: ir.Value) -> ir.DataType:
    """The element type of a value as far as the graph says it; UNDEFINED if it does not."""
    producer = value.producer()
    if value.dtype is None and producer is not None and producer.op_type == "QuantizeLinear":
        attribute = producer.attributes.get("output_dtype")
        if attribute is not None and attribute.as_int():
            return ir.DataType(attribute.as_int())
        zero = producer.inputs[2] if len(producer.inputs) > 2 else None
        return zero.dtype or ir.DataType.UNDEFINED if zero is not None else ir.DataType.UINT8
    return value.dtype or ir.DataType.UNDEFINED


def _name(model: Path | bytes) -> str:
    return model.name if isinstance(model, Path) else "the model with further outputs"


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
