"""What becomes of the output head of a language model, said where the scheme's own rule decides it."""

from __future__ import annotations

from collections.abc import Iterator

from bitlower.ir import Level, Program
from bitlower.ir.dataflow import EMBEDDING, LINEAR
from bitlower.ir.quantization.scheme import ACTIVATION_ROLES
from bitlower.passes import Context, Observer, Pass


def head_notes(program: Program) -> Iterator[str]:
    """A line for each output head that is quantized in a program whose activations are float."""
    if any(quantizer.role in ACTIVATION_ROLES for _, quantizer in program.quantizers()):
        return
    for node, quantizer in program.quantizers():
        paths = [str(user.meta.get("path", "")) for user in node.users if user.target in LINEAR]
        if quantizer.role == "embedding-table" and paths:
            tied = any(user.target in EMBEDDING for user in node.users)
            shared = f", as the table {quantizer.tensor} that it shares" if tied else ""
            yield f"the output head {paths[0]} has {quantizer.spec.grid.bits} bits{shared}; suffix e16 keeps it float"


class HeadNotes(Observer):
    """Keeps :func:`head_notes` of the last pass that placed quantizers."""

    def __init__(self) -> None:
        self.notes: tuple[str, ...] = ()

    def after(self, pass_: Pass, program: Program, context: Context, changed: bool) -> None:
        """Look at what ``pass_`` gave."""
        if pass_.ensures is Level.SIMULATED:
            self.notes = tuple(head_notes(program))
