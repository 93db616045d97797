"""The Program: a model between passes. It can be run, differentiated, printed, checked, hashed and saved any time."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from bitlower.ir.document import encode
from bitlower.ir.learnable import RangeSettings
from bitlower.ir.program_data import ProgramData
from bitlower.ir.tensors import tensor_digest
from bitlower.ir.text import format_program, html_table
from bitlower.ir.trainable import TrainableModule, restored, write_trained


@dataclass
class Program(ProgramData):
    """A model as named graphs at one level; its fields and most of its methods are those of :class:`ProgramData`."""

    def digest(self) -> str:
        """A hash of all that the program is: graphs, tensors, types, configuration, files."""
        document, tensors = encode(self)
        state = hashlib.sha256(document.encode())
        for name, tensor in sorted(tensors.items()):
            state.update(name.encode())
            state.update(tensor_digest(tensor).encode())
        return state.hexdigest()

    def trainable_module(self, settings: RangeSettings | None = None, taps: Collection[str] = ()) -> TrainableModule:
        """A module to train in a loop or a Trainer of your own; :meth:`load_trained` takes its state.

        Args:
            settings: how the ranges of quantizers behave; learned by default.
            taps: names of nodes whose values are given out too.

        Raises:
            BitlowerError: the program is lowered already, or a quantizer is not calibrated.
        """
        return TrainableModule(self, settings, taps)

    def load_trained(self, state: Mapping[str, torch.Tensor]) -> Program:
        """A copy with the weights and ranges of ``state``, the ``state_dict`` of a :meth:`trainable_module`.

        Raises:
            BitlowerError: the state is that of another program.
        """
        trained = self.clone()
        write_trained(trained, restored(self, state))
        trained.recompile()
        return trained

    def __str__(self) -> str:
        return format_program(self)

    def _repr_html_(self) -> str:
        """A short table, for notebooks: the text of a whole program is long."""
        bits = Counter(f"{q.role}: {q.spec}" for _, q in self.quantizers())
        rows = {
            "source": self.source,
            "task": self.task,
            "level": str(self.level),
            "passes": ", ".join(self.passes),
            "inputs": ", ".join(map(str, self.inputs)),
            "outputs": ", ".join(map(str, self.outputs)),
            "tensors": f"{self.size_bytes():,} bytes",
            "quantized": "; ".join(f"{count} × {name}" for name, count in bits.items()),
        }
        return html_table("Program", [(name, value) for name, value in rows.items() if value])
