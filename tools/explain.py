"""Why each tensor of an artifact has its bits: placement, scheme, search, and what it would cost to change them."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitlower.backends.artifact import check_artifact
from bitlower.ir import BitlowerError, CheckError, QuantSpec, nearest
from bitlower.ir.files import check_name
from bitlower.ir.json_files import read_json
from bitlower.passes.precision.analyze_sensitivity import SensitivityReport
from bitlower.passes.precision.assign_precision import PrecisionReport
from bitlower.passes.quantizers.quantize import PlacementReport
from bitlower.tools.runs.reports import FOLDER

FLOAT_BITS = 32
"""Bits of what stays in float, as the Program computes; a file may hold it in 16."""


@dataclass(frozen=True)
class Explanation:
    """One tensor.

    Args:
        tensor: a parameter's name, or that of the node that computes a value.
        role: what the scheme calls it.
        path: the module's.
        bits: of a code, or :data:`FLOAT_BITS`.
        spec: the grid and its granularity; empty in float.
        reasons: why, a sentence each, the first the decisive one.
        change: how to decide otherwise, and what is known of the cost.
    """

    tensor: str
    role: str
    path: str
    bits: int
    spec: str
    reasons: tuple[str, ...]
    change: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def text(self) -> str:
        """All that is known, in lines."""
        head = f"{self.tensor} ({self.role} of {self.path or 'the model'}): {self.spec or 'float'}"
        return "\n".join([head, *(f"  {reason}" for reason in (*self.reasons, *self.change))])


def explain(folder: str | os.PathLike[str], pattern: str = "") -> tuple[Explanation, ...]:
    """Why tensors of an artifact have their bits.

    Args:
        folder: the artifact's.
        pattern: a tensor or a module, or a glob of them; all if empty.

    Raises:
        BitlowerError: no artifact, none that a run with a placement wrote, or no tensor is called so.
        CheckError: a file of the artifact is missing or changed.
    """
    place = check_name(folder)
    check_artifact(place)
    rows = explanations(place)
    if not pattern:
        return rows
    chosen = tuple(row for row in rows if _matches(row, pattern))
    if not chosen:
        names = {name for row in rows for name in (row.tensor, row.path) if name}
        raise BitlowerError(f"no tensor or module of {folder} is called {pattern!r}", hint=nearest(pattern, names))
    return chosen


def explanations(folder: Path) -> tuple[Explanation, ...]:
    """All that :func:`explain` says of an artifact, whose files are not held against its manifest.

    Raises:
        BitlowerError: none that a run with a placement wrote.
        CheckError: a report is damaged.
    """
    try:
        return tuple(_Artifact.read(folder).explanations())
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckError(f"a report in {folder} is damaged: {error!r}") from error


def _matches(row: Explanation, pattern: str) -> bool:
    below = bool(row.path) and row.path.startswith(f"{pattern}.")
    return below or any(fnmatch.fnmatchcase(name, pattern) for name in (row.tensor, row.path) if name)


@dataclass(frozen=True)
class _Artifact:
    """What a run recorded of its decisions, as plain data.

    Args:
        placement: rows of all tensors that could be quantized.
        quantized: rows of the manifest by tensor.
        precision: the report of a search for bits, if there was one.
        sensitivity: the report of what quantizers cost, if there was one.
        codes: rows of the verification by tensor.
    """

    placement: list[dict[str, Any]]
    quantized: Mapping[str, dict[str, Any]]
    precision: Mapping[str, Any]
    sensitivity: Mapping[str, Any]
    codes: Mapping[str, dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> _Artifact:
        """The record in ``folder``.

        Raises:
            BitlowerError: there is no report of a placement.
        """
        reports: dict[str, list[dict[str, Any]]] = {}
        for path in sorted((folder / FOLDER).glob("*.json")):
            form = read_json(path)
            reports.setdefault(str(form.get("report", "")), []).append(form)
        placed = reports.get(PlacementReport.__name__)
        if not placed:
            raise BitlowerError(
                f"{folder} has no report of where quantizers were placed", hint="give the folder that a run wrote"
            )
        last = {name: forms[-1] for name, forms in reports.items()}
        verified = read_json(folder / "verification.json").get("quantized", [])
        return cls(
            list(_merged(placed)),
            {row["tensor"]: row for row in read_json(folder / "manifest.json")["tensors"]},
            last.get(PrecisionReport.__name__, {}),
            last.get(SensitivityReport.__name__, {}),
            {row["tensor"]: row for row in verified},
        )

    def explanations(self) -> Iterator[Explanation]:
        """One for each tensor that could be quantized, in execution order."""
        for row in self.placement:
            final = self.quantized.get(row["tensor"])
            spec = QuantSpec.from_dict(final["spec"]) if final else None
            quantized = bool(row["spec"]) or final is not None
            written = str(spec) if spec else row["spec"]
            bits = spec.grid.bits if spec else _bits(row["spec"])
            yield Explanation(
                row["tensor"],
                row["role"],
                row["path"],
                bits if quantized else FLOAT_BITS,
                written if quantized else "",
                tuple(self._reasons(row, written) if quantized else [f"it stays float: {row['reason']}"]),
                tuple(self._change(row) if quantized else _quantize_it(row)),
            )

    def _reasons(self, row: Mapping[str, Any], written: str) -> Iterator[str]:
        searched = self._searched(row["tensor"])
        if searched:
            yield self._search(searched)
            yield f"the scheme gave {row['role']} {searched['before']} bits before"
        else:
            yield f"the scheme gives {row['role']} {row['spec'] or written}"
        if row["spec"] and row["spec"] != written and not searched:
            yield f"a later pass made it {written}"
        final = self.quantized.get(row["tensor"], {})
        if "scale" in final:
            zero = f", zero point {final['zero_point']}" if "zero_point" in final else ""
            yield f"scale {final['scale']:.6g}{zero}"
        elif "scale_shape" in final:
            yield f"scales of shape {final['scale_shape']}"
        codes = self.codes.get(row["tensor"])
        if codes:
            equal = f"{codes['given_codes']:.2%}" if codes["given_codes"] < 1 else "all"
            yield f"in the runtime {equal} of {codes['codes']:,} codes are the Program's, given the same inputs"

    def _searched(self, tensor: str) -> Mapping[str, Any]:
        """The row of a search for bits that chose those of ``tensor``."""
        return next((row for row in self.precision.get("rows", ()) if tensor in row["tensors"]), {})

    def _search(self, row: Mapping[str, Any]) -> str:
        budgets = [f"{use['name']} {use['used']:.6g} of at most {use['most']:.6g}" for use in self.precision["budgets"]]
        within = f" within {', '.join(budgets)}" if budgets else ", as the fixed set says"
        loss = "" if row["loss"] is None else f"; alone in these it costs {row['loss']:.3g} {self.precision['measure']}"
        return f"a search over all quantizers chose {row['bits']} bits{within}{loss}"

    def _change(self, row: Mapping[str, Any]) -> Iterator[str]:
        """How to leave a tensor in float or give it other bits, and what that is worth as far as it was measured."""
        where = row["path"] or row["tensor"]
        yield f"to leave it in float: `ignore: [{where}]` in the pass that places quantizers (--ignore {where})"
        if self.sensitivity:
            yield from self._gains(row)
        else:
            yield "what it costs alone was not measured: `analyze-sensitivity` measures it"

    def _gains(self, row: Mapping[str, Any]) -> Iterator[str]:
        ranked = self.sensitivity.get("groups", ())
        for rank, group in enumerate(ranked, start=1):
            layer, path = group["layer"], row["path"]
            inside = not layer or path == layer or path.startswith(f"{layer}.")
            if inside and group["role"] in ("", row["role"]):
                name = " of ".join(part for part in (group["role"], layer) if part)
                gain = "an unknown amount" if group["gain"] is None else f"{group['gain']:.3g}"
                measure = self.sensitivity["measure"]
                yield f"without quantizers of {name} the {measure} falls by {gain} (place {rank} of {len(ranked)})"


def _merged(reports: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows of several placements: of each tensor the one that quantized it, else the last reason."""
    rows: dict[str, dict[str, Any]] = {}
    for report in reports:
        for row in report["rows"]:
            if row["spec"] or not rows.get(row["tensor"], {}).get("spec"):
                rows[row["tensor"]] = row
    yield from rows.values()


def _bits(spec: str) -> int:
    """The bits in a spec as text (``s8 per-channel(0)``)."""
    digits = "".join(letter for letter in spec.partition(" ")[0] if letter.isdigit())
    return int(digits or FLOAT_BITS)


def _quantize_it(row: Mapping[str, Any]) -> Iterator[str]:
    """How to quantize what stays in float because of the scheme."""
    if row["reason"].startswith("the scheme leaves"):
        yield f"to quantize it: a scheme with the role {row['role']}, such as one that ends in -full, or its long form"
