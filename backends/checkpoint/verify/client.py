"""A written folder in the hands of its client: transformers loads it, and must return what the Program returns.

Loading makes the model as its users make it, by the files' own configuration: it shows a class that cannot run packed,
a name that the client reads otherwise, a weight that it leaves uninitialized. None of that can be seen in the files.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bitlower.backends.artifact.outputs import Array, Sums, flat_parts
from bitlower.backends.artifact.unseen import Unseen
from bitlower.backends.checkpoint.skeleton import Skeleton
from bitlower.ir import Batch, CheckError
from bitlower.ir.quiet import silent

CLIENT = "transformers"
LIMIT = 2 << 30
"""Bytes of a model's weights in float32; larger ones are not loaded as a whole only to see that they can be."""
EXACT = 1e-3
"""The largest error of an output, over its standard deviation, that the order of float arithmetic may make,"""
ROUNDED = 0.999
"""and the least cosine where the client rounds each weight to the file's dtype once more."""


def obstacle(skeleton: Skeleton, readers: Collection[str]) -> str:
    """Why the client is not run; empty if it can be.

    Args:
        skeleton: its model.
        readers: the modules, by the names that they are imported by, that read the weights.
    """
    missing = [name for name in readers if find_spec(name) is None]
    if missing:
        return f"not run: {missing[0]} is not installed"
    size = 4 * sum(math.prod(shape) for name, shape in skeleton.shapes.items() if name not in skeleton.ties)
    return f"not run: {size / 1e9:.1f} GB of weights in float32" if size > LIMIT else ""


class Client:
    """A checkpoint as transformers loads it, in float32.

    Args:
        folder: the checkpoint.
        skeleton: its model.

    Raises:
        CheckError: it does not load.
    """

    def __init__(self, folder: Path, skeleton: Skeleton) -> None:
        self._model = _load(folder, skeleton)

    @torch.no_grad()
    def run(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        """The outputs by name, without a KV cache.

        Raises:
            CheckError: it does not run.
        """
        cache = {"use_cache": False} if hasattr(self._model.config, "use_cache") else {}
        try:
            with silent():  # packed weights may be unfolded at the first run
                outputs: Mapping[str, torch.Tensor] = self._model(**batch, **cache)
        except Exception as error:  # whatever a model raises that is not what it should be
            raise _unusable("run", error) from None
        return outputs

    def check(self, batch: Batch, expected: Mapping[str, torch.Tensor], *, exact: bool) -> None:
        """Run ``batch`` and compare.

        Args:
            batch: inputs by name.
            expected: the Program's outputs with the weights of the file, by name.
            exact: whether the client computes with the very weights of the file.

        Raises:
            CheckError: it does not run, or returns something else.
        """
        outputs = self.run(batch)
        for name, value in expected.items():
            _compare(name, outputs[name], value, exact)

    def test(self, unseen: Unseen) -> dict[str, float]:
        """The cosine of each output to what was recorded at export, at the sizes of ``unseen``.

        Raises:
            CheckError: it does not run, or returns something else.
        """
        names = unseen.selftest.outputs if unseen.selftest else ()

        def run(batch: Batch) -> dict[str, Array]:
            outputs = self.run(batch)
            return {name: outputs[name].numpy() for name in names if name in outputs}

        return unseen.check(run)


def _load(folder: Path, skeleton: Skeleton) -> Any:
    try:
        with silent():
            model, info = skeleton.loader.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, output_loading_info=True
            )
    except Exception as error:  # whatever transformers and the format's library raise on what they cannot read
        raise _unusable("load", error) from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            names = sorted(map(str, info[kind]))
            raise CheckError(f"{CLIENT} loads the checkpoint with {kind.replace('_', ' ')}: {', '.join(names[:3])}")
    return model.eval()


def _compare(name: str, actual: torch.Tensor, expected: torch.Tensor, exact: bool) -> None:
    if actual.shape != expected.shape:
        raise CheckError(f"the output {name} of {CLIENT} is {list(actual.shape)}, the program's {list(expected.shape)}")
    sums = Sums()
    for a, b in flat_parts(expected, actual):
        sums.add(a.double(), b.double())
    error = sums.worst / sums.deviation
    if not (error <= EXACT if exact else sums.cosine >= ROUNDED):
        raise CheckError(
            f"{CLIENT} loads the checkpoint and gives a {name} that is {error:.3g} standard deviations off the"
            f" program's with the same weights (cosine {sums.cosine:.6g})",
            hint="its own loading changes a weight; export with the backend `onnx-qdq`",
        )


def _unusable(step: str, error: Exception) -> CheckError:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return CheckError(
        f"{CLIENT} cannot {step} this checkpoint: {type(error).__name__}: {line}"[:400],
        hint="leave the layer in float with `ignore`, or choose another format",
    )
