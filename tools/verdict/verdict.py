"""The verdict on a quantized model: one line that a person understands, and the few figures that matter."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from bitlower.ir import CheckError, Program
from bitlower.ir.json_files import read_json
from bitlower.ir.text import html_table
from bitlower.passes import Pass
from bitlower.tools.render import format_bytes, make_table
from bitlower.tools.verdict.figures import COLUMNS, Figure, headline_figures, ledger_figures, ordered

FILE = "verdict.json"
NOT_MEASURED = "what it cost was not measured: there were no held-out data"
LINEAR_WEIGHT = "linear-weight"
FULL_WIDTH = 8
"""Bits of weights below which figures lie in other ranges."""
_PRODUCTS = {
    "integer_products": "{} products in integers",
    "dequantized_products": "{} products of quantized operands in float",
    "packed_products": "{} products with packed weights",
    "kernel_calls": "{} calls of low-bit kernels",
}
"""How the figures that count what runs in few bits are said in a line."""


@dataclass(frozen=True)
class Verdict:
    """What a quantized model is, what it cost, and whether it was verified.

    Args:
        model: as the user wrote it.
        scheme: its names; of mixed precision also the widths that weights of linears have.
        float_bytes: of the float32 model.
        bytes: of the artifact's files, without the verdict and the manifest; 0 if nothing was written.
        output: the output that the costs are of; empty if nothing was measured.
        runtime: in which it was verified, in words; empty if it was not run.
        figures: in the order of tables.
    """

    model: str
    scheme: str
    float_bytes: int
    bytes: int
    output: str
    runtime: str
    figures: tuple[Figure, ...] = field(default_factory=tuple)

    def values(self) -> dict[str, float]:
        """All figures by name."""
        return {figure.name: figure.value for figure in self.figures}

    @property
    def cost(self) -> str:
        """What quantization cost on held-out data, in the model's own terms."""
        values = self.values()
        if "perplexity" in values:
            before, after = values["perplexity_float"], values["perplexity"]
            return f"perplexity {before:.4g} → {after:.4g} ({values['perplexity_increase']:+.1f} %)"
        if "top1" in values:
            return f"{values['top1']:.4g} % of the answers are the float model's"
        if "cosine" in values:
            return f"the cosine of {self.output} with the float model's is {values['cosine']:.4f}"
        return f"{self.output} is not finite, and cannot be compared" if self.output else ""

    @property
    def line(self) -> str:
        """The verdict in one line."""
        size = format_bytes(self.float_bytes)
        if self.bytes:
            size += f" → {format_bytes(self.bytes)} ({self.float_bytes / self.bytes:.1f} × smaller)"
        parts = [size, f"on held-out data {self.cost}" if self.cost else NOT_MEASURED]
        if self.bytes:
            parts.append(f"verified in {self.runtime}" if self.runtime else "not run here, and not verified")
        parts += [_PRODUCTS[figure.name].format(figure.text) for figure in self.figures if figure.name in _PRODUCTS]
        return f"{self.model or 'model'}, {self.scheme or 'float'}: {'; '.join(parts)}"

    def table(self) -> Table:
        """The figures with what they mean and where they normally lie."""
        return make_table("figures", COLUMNS, [figure.row() for figure in self.figures])

    def html(self) -> str:
        """The line above a table of the figures, for notebooks."""
        rows = [tuple("" if cell is None else str(cell) for cell in figure.row()) for figure in self.figures]
        return html_table(self.line, rows, COLUMNS)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the inverse of :meth:`from_dict`."""
        return {
            "verdict": self.line,
            "model": self.model,
            "scheme": self.scheme,
            "float_bytes": self.float_bytes,
            "bytes": self.bytes,
            "output": self.output,
            "runtime": self.runtime,
            "figures": [figure.to_dict() for figure in self.figures],
        }

    @classmethod
    def from_dict(cls, form: Mapping[str, Any]) -> Verdict:
        """The verdict of plain data.

        Raises:
            KeyError, TypeError: the data are none.
        """
        figures = (
            Figure(row["name"], row["value"], row.get("of"), row.get("few_bits", False)) for row in form["figures"]
        )
        names = ("model", "scheme", "float_bytes", "bytes", "output", "runtime")
        return cls(**{name: form[name] for name in names}, figures=tuple(figures))

    def text(self) -> str:
        """The file ``verdict.json``."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Facts:
    """What a run knows of a quantized model before it is written.

    Args:
        program: quantized.
        passes: that made it.
        float_bytes: of the float model.
        ledger: what lossy passes cost.
        float_share: of all parameters, those that stay in float; between 0 and 1.
    """

    program: Program
    passes: tuple[Pass, ...]
    float_bytes: int
    ledger: Mapping[str, Any]
    float_share: float

    def verdict(self, headline: Mapping[str, Any], written: int) -> Verdict:
        """The verdict on one artifact.

        Args:
            headline: what its backend says (:class:`~bitlower.backends.base.Summary`).
            written: its bytes; 0 if there is none.
        """
        output, costs = ledger_figures(self.ledger)
        bits = weight_bits(self.program)
        few_bits = bool(bits) and bits[0] < FULL_WIDTH
        figures = [replace(figure, few_bits=few_bits) for figure in costs]
        figures += [*headline_figures(headline), Figure("float_share", 100 * self.float_share)]
        if written:
            figures.append(Figure("size_ratio", self.float_bytes / written))
        scheme, runtime = scheme_words(self.passes, self.program), str(headline.get("runtime", ""))
        return Verdict(self.program.source, scheme, self.float_bytes, written, output, runtime, ordered(figures))


def scheme_words(passes: Iterable[Pass], program: Program) -> str:
    """The schemes that passes have as a parameter; where the weights of linears have several widths, these too."""
    schemes = " + ".join(dict.fromkeys(str(pass_.scheme) for pass_ in passes if hasattr(pass_, "scheme")))
    bits = weight_bits(program)
    if len(bits) < 2:
        return schemes
    return f"{schemes} with weights of {', '.join(map(str, bits[:-1]))} and {bits[-1]} bits"


def weight_bits(program: Program) -> list[int]:
    """The widths of the weights of linears, the least first; empty where all are in float."""
    return sorted({q.spec.grid.bits for _, q in program.quantizers() if q.role == LINEAR_WEIGHT})


def checked_verdict(folder: Path, headline: Mapping[str, Any]) -> Verdict | None:
    """The verdict on an artifact that was checked again: what it cost as recorded, what it is in the runtime as seen.

    None where none was recorded: no run wrote the artifact, but an export alone.

    Args:
        folder: the artifact's.
        headline: what its backend says of the check.

    Raises:
        CheckError: a file is damaged.
    """
    recorded = read_verdict(folder)
    if recorded is None:
        return None
    figures = {figure.name: figure for figure in (*recorded.figures, *headline_figures(headline))}
    runtime = str(headline.get("runtime", ""))
    return replace(recorded, runtime=runtime, figures=ordered(figures.values()))


def read_verdict(folder: Path) -> Verdict | None:
    """The verdict that was written into an artifact; None where there is none.

    Raises:
        CheckError: the file is damaged.
    """
    if not (folder / FILE).is_file():
        return None
    try:
        return Verdict.from_dict(read_json(folder / FILE))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckError(f"{FILE} in {folder} is damaged: {error}") from None
