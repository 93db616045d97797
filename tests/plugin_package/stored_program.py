"""A backend by a third party: the Program itself, as files that bitlower reads again."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import fx

from bitlower import Backend, CheckError, Program
from bitlower.backends.artifact import check_artifact, write_assets, write_config, write_json, write_manifest
from bitlower.ir import Batch, Quantizer, serialize

FOLDER = "program"


@dataclass(frozen=True)
class Copies:
    """What is reported: the largest difference from the program on the batches that were compared."""

    batches: int
    difference: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class StoredModel:
    """The program that was read again."""

    program: Program

    def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return self.program(**inputs)


@dataclass(frozen=True)
class StoredSizes:
    """Codes lie in whole bytes, floats as they are."""

    def quantized(self, quantizer: Quantizer, shape: tuple[int, ...], readers: Collection[fx.Node] = ()) -> int:
        spec, count = quantizer.spec, torch.Size(shape).numel()
        scales = torch.Size(spec.granularity.scale_shape(shape)).numel()
        return count * spec.grid.dtype.itemsize + scales * (4 + spec.grid.dtype.itemsize)

    def floats(self, tensor: torch.Tensor, readers: Collection[fx.Node] = ()) -> int:
        return tensor.nbytes

    def overhead(self, program: Program) -> int:
        return 500 * len(program.graph.nodes)


@dataclass(frozen=True)
class StoredProgram(Backend):
    """Write the Program as it is."""

    name: ClassVar[str] = "stored-program"
    formats: ClassVar[Mapping[str, Mapping[str, Any]]] = {"stored-once": {"batches": 1}}
    batches: Annotated[int, Ge(1)] = 2
    """How many batches are compared."""

    def export(
        self, program: Program, folder: Path, batches: Sequence[Batch], provenance: Mapping[str, Any] | None = None
    ) -> Copies:
        serialize.save(program, folder / FOLDER)
        write_assets(program, folder, ())
        write_config(program, folder, self.name)
        model, worst = StoredModel(serialize.load(folder / FOLDER)), 0.0
        for batch in batches[: self.batches]:
            found, expected = model(**batch), program(**batch)
            worst = max([worst, *(float((found[name] - expected[name]).abs().max()) for name in expected)])
        if worst:
            raise CheckError(f"what was read again is {worst} off")
        report = Copies(len(batches[: self.batches]), worst)
        write_json(folder / "verification.json", report.to_dict())
        write_manifest(
            program, folder, backend=self.name, packages=["torch"], backend_options=asdict(self), provenance=provenance
        )
        return report

    @classmethod
    def verify(cls, folder: Path) -> Copies:
        check_artifact(folder)
        serialize.load(folder / FOLDER)
        return Copies(0, 0.0)

    @classmethod
    def load(cls, folder: Path) -> StoredModel:
        return StoredModel(serialize.load(folder / FOLDER))

    def sizes(self, placed: Program) -> StoredSizes:
        return StoredSizes()
