"""What tracing a model of transformers found, kept without its weights: a further one of that architecture needs none.

A file holds the graph, and of its tensors those that are none of the model's own. Its name is a hash of all that a
trace follows from: the configuration, the classes of the model's parts and the files that define them, the names and
shapes of their tensors, versions, and the sources of what traces. What no hash can see, such as a function that was
replaced in this process, the comparison with the model finds: it is made of every trace, and one that fails it is made
anew.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors

from bitlower.frontends._instantiate import trace_by_layers
from bitlower.frontends._layers import is_changed
from bitlower.frontends.weights import model_tensors
from bitlower.ir import BitlowerError, CheckError, Program
from bitlower.ir.document import encode
from bitlower.ir.files import read_checked, write_checked
from bitlower.ir.serialize import decode
from bitlower.ir.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VARIABLE = "BITLOWER_TRACES"
"""The variable of the environment that names the folder of traces where no caller does."""
_MOST = 500
"""So many traces are kept, those that were used last."""
_LARGEST = 1 << 20
"""Bytes of tensors that are none of the model's own; a trace with more is not kept."""
_GRAPH = "model/"


def traced(
    model: PreTrainedModel,
    kind: str,
    trace: Callable[[], Program],
    check: Callable[[Program], None],
    folder: Path | None,
) -> Program:
    """The trace of ``model``, from ``folder`` if it is there, else from ``trace``, which is then kept; checked.

    Args:
        model: as it is traced.
        kind: what else the trace follows from.
        trace: traces the model as it is at that moment; of layers that repeat it may be shown a few.
        check: raises a CheckError where a trace does not compute what the model does.
        folder: made when something is first put there; None: the one that :data:`VARIABLE` names, or none.

    Raises:
        BitlowerError: what ``trace`` and ``check`` raise.
    """
    place = folder or (Path(named) if (named := os.environ.get(VARIABLE)) else None)
    path = place / f"{_key(model, kind)}.json" if place and not any(map(is_changed, model.modules())) else None
    cached_program = _read(path, model) if path else None
    if cached_program is not None and _holds(cached_program, check):
        return cached_program
    program = trace_by_layers(model, trace, check)
    if path:
        _write(path, program, model)
    return program


def is_kept(folder: Path, since: float) -> bool:
    """Whether a trace in ``folder`` was written or read at ``since`` (seconds since the epoch) or later."""
    return any(file.stat().st_mtime >= since for file in folder.glob("*.json"))


def _holds(program: Program, check: Callable[[Program], None]) -> bool:
    """Whether a trace computes what the model does; one that is kept may not, if a function was replaced since."""
    try:
        check(program)
    except CheckError:
        return False
    return True


def _read(path: Path, model: PreTrainedModel) -> Program | None:
    """The trace in ``path`` with the weights of ``model``; None if there is none, or it is damaged."""
    try:
        form = json.loads(read_checked(path))
        weights = model_tensors(model)
        values = {name: weights[name.removeprefix(_GRAPH)] for name in form["tensors"]}
        values |= safetensors.load(base64.b64decode(form["constants"]))
        program = decode(form["document"], {name: tensor.detach() for name, tensor in values.items()})
        program.notes = tuple(form["notes"])
        os.utime(path)
        return program
    except (OSError, ValueError, TypeError, KeyError, SafetensorError, BitlowerError):
        return None


def _write(path: Path, program: Program, model: PreTrainedModel) -> None:
    """Keep a trace, unless it holds what belongs to the model under a name that the model does not know."""
    try:
        document, tensors = encode(program)
    except BitlowerError:
        return  # a plugin's operator, whose name says nothing here
    weights = model_tensors(model)
    storages = {tensor.untyped_storage().data_ptr() for tensor in weights.values()}
    own = {name for name, tensor in tensors.items() if _is(tensor, weights.get(name.removeprefix(_GRAPH)))}
    others = {name: tensor.contiguous() for name, tensor in tensors.items() if name not in own}
    if any(tensor.untyped_storage().data_ptr() in storages for tensor in others.values()):
        return
    if sum(tensor.nbytes for tensor in others.values()) > _LARGEST:
        return
    form = {
        "document": document,
        "notes": list(program.notes),
        "tensors": sorted(own),
        "constants": base64.b64encode(safetensors.save(others)).decode(),
    }
    try:
        write_checked(path, json.dumps(form).encode())
        files = sorted(path.parent.glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
        for oldest in files[:-_MOST]:
            oldest.unlink(missing_ok=True)
    except OSError:
        return  # a full disk, or a folder that is not ours: the trace is good all the same


def _is(tensor: torch.Tensor, other: torch.Tensor | None) -> bool:
    """Whether both are one piece of memory, read in one way."""
    if other is None:
        return False
    return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) == (
        other.data_ptr(), other.dtype, other.shape, other.stride(),
    )  # fmt: skip


def _key(model: PreTrainedModel, kind: str) -> str:
    state = hashlib.sha256(kind.encode())
    for part in _depends_on(model):
        state.update(json.dumps(part, sort_keys=True, default=str).encode())
    return state.hexdigest()


def _depends_on(model: PreTrainedModel) -> Iterator[Any]:
    """What a trace of ``model`` follows from, piece by piece."""
    import transformers

    yield torch.__version__, transformers.__version__, sys.version, __version__, _own_sources()
    yield model.config.to_dict(), getattr(model.config, "_attn_implementation", None)
    first: dict[tuple[Any, ...], int] = {}
    for name, tensor in model_tensors(model).items():
        same = first.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), len(first))
        yield name, str(tensor.dtype), list(tensor.shape), list(tensor.stride()), same
    for name, module in model.named_modules():
        kinds = [kind for kind in type(module).__mro__ if not kind.__module__.startswith(("torch.", "builtins"))]
        yield name, [(kind.__module__, kind.__qualname__, _source_digest(kind.__module__)) for kind in kinds]
        plain = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str, tuple, type(None)))}
        yield {key: str(value) for key, value in plain.items()}


@functools.cache
def _own_sources() -> str:
    """A hash of what traces: the frontends and the IR."""
    state = hashlib.sha256()
    for package in ("frontends", "ir"):
        module = sys.modules[f"bitlower.{package}"]
        for path in sorted(Path(str(module.__file__)).parent.rglob("*.py")):
            state.update(path.read_bytes())
    return state.hexdigest()


@functools.cache
def _source_digest(module: str) -> str:
    """A hash of the file of a module; empty if it has none."""
    path = getattr(sys.modules.get(module), "__file__", None)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path and Path(path).is_file() else ""
