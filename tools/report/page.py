"""The page: all parts in order, written by the templates into one HTML file that loads nothing."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from bitlower.ir import BitlowerError, CheckError
from bitlower.ir.version import __version__
from bitlower.tools.report.blocks import Chapter, Heading, Prose
from bitlower.tools.report.charts import chart_blocks, chart_chapter
from bitlower.tools.report.checks import checks_chapter
from bitlower.tools.report.comparison import comparison_chapter
from bitlower.tools.report.contents import Material, Stage, read_material
from bitlower.tools.report.depth import depth_chapter
from bitlower.tools.report.environment import environment_chapter
from bitlower.tools.report.kernel_strip import with_kernel_times
from bitlower.tools.report.ledger import ledger_chapter
from bitlower.tools.report.outliers import outliers_chapter
from bitlower.tools.report.samples import samples_chapter
from bitlower.tools.report.tensor_pages import tensor_chapter, tensor_pages
from bitlower.tools.report.verdict import verdict_chapter
from bitlower.tools.report.widths import widths_chapter
from bitlower.tools.runs.samples import SampleText

MOST_BYTES = 3_000_000
"""Of a page."""
PAGES_BYTES = 1_700_000
"""Of it, for pages of tensors."""
DATA_BYTES = 700_000
"""Of it, for the data at its end; longer lists are cut, and it says so."""
MARK = '<meta name="generator" content="bitlower'
"""What our pages begin with, so that a page of ours may be replaced and nothing else."""
_JOINT = re.compile(r"(?<=[A-Za-z\d])[._/](?=[A-Za-z])")
_HEAD = 2_000
"""Characters in which the mark is looked for."""
FILE = "report.html"
"""Its name in an artifact."""


def report(
    folder: str | os.PathLike[str],
    other: str | os.PathLike[str] | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
    profile: bool = False,
) -> Path:
    """Write one HTML file that shows an artifact, or two side by side; its path.

    >>> report("minilm-w8a8", output="report.html")  # doctest: +SKIP

    Args:
        folder: the artifact's.
        other: that of another one, to compare it with.
        output: the file; the folder's name with ``.html``, beside it, if left out. A report that is there is replaced.
        profile: run the artifacts in their runtime and show what their kernels take on this machine.

    Raises:
        BitlowerError: a folder is missing or holds several artifacts, or ``output`` is something else than a report or
            cannot be written.
        CheckError: a file of an artifact is missing or damaged.
    """
    whole = Path(folder).resolve()
    target = Path(output) if output is not None else whole.with_name(f"{whole.name}.html")
    _check_target(target)
    folders = [Path(one) for one in (folder, other) if one is not None]
    materials = [read_material(one) for one in folders]
    if profile:
        materials = [with_kernel_times(material, one) for material, one in zip(materials, folders, strict=True)]
    _write(target, render(*materials))
    return target


def write_run_report(folder: Path, name: str, stages: Sequence[Stage], texts: Sequence[SampleText]) -> None:
    """Write the report of a run that is just done into its artifact's ``folder``, which will be called ``name``."""
    _write(folder / FILE, render(read_material(folder, stages, texts, name)))


def render(material: Material, other: Material | None = None) -> str:
    """The page as text.

    Raises:
        CheckError: a chart of a report is damaged.
        BitlowerError: the page would be larger than :data:`MOST_BYTES`.
    """
    for room in (PAGES_BYTES, PAGES_BYTES // 3, 0):
        try:
            chapters, data = parts(material, other, room), embedded(material, other)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:  # reports are plain data
            raise CheckError(f"a file of {material.name} is damaged: {error!r}") from error
        text = _template().render(
            chapters=chapters, title=f"{material.name} · bitlower", name=material.name, version=__version__, data=data,
            mark=Markup(MARK),
        )  # fmt: skip
        if len(text.encode()) <= MOST_BYTES:
            return text
    raise BitlowerError(f"the report of {material.name} takes more than {MOST_BYTES:,} bytes")


def parts(material: Material, other: Material | None = None, room: int = PAGES_BYTES) -> list[Chapter]:
    """The parts in order; ``room`` is what pages of tensors may take."""
    pages = tensor_pages(material)
    ledger = ledger_chapter(material)
    said = [
        Prose(f"{report['summary']}.", strong=step) for step, report in material.reports.items() if "summary" in report
    ]
    ledger = Chapter(
        ledger.anchor, ledger.title, ledger.about, (*ledger.blocks, *chart_blocks(material, ""), *said), ledger.missing
    )
    tensors = tensor_chapter(material, room)
    shown = {block.anchor for block in tensors.blocks if isinstance(block, Heading)}
    linked = {path: anchor for path, anchor in pages.items() if anchor in shown}
    front = chart_chapter(
        material, "front", "front", "Pareto fronts",
        "The least loss under each budget, predicted and measured, and the point that was chosen.",
        "No front was computed",
    )  # fmt: skip
    training = chart_chapter(
        material, "training", "training", "Training and rounding",
        "Losses over the steps of passes that train, and errors beside those of round-to-nearest of passes that choose "
        "codes: bars of the chosen codes that are lower are gains.",
        "Nothing was trained, and no codes were chosen by their error",
    )  # fmt: skip
    return [
        verdict_chapter(material, linked), ledger, depth_chapter(material, linked), widths_chapter(material), tensors,
        outliers_chapter(material), front, training, checks_chapter(material), samples_chapter(material),
        comparison_chapter(material, other), environment_chapter(material),
    ]  # fmt: skip


def embedded(material: Material, other: Material | None) -> Markup:
    """The data behind the page as JSON that can stand in a script element."""
    forms = [_data(one) for one in (material, other) if one is not None]
    text = json.dumps(forms if other is not None else forms[0], ensure_ascii=False, separators=(",", ":"))
    if len(text.encode()) > DATA_BYTES:
        for form in forms:
            form["tensors"] = [{k: v for k, v in row.items() if not isinstance(v, dict)} for row in form["tensors"]]
            form["cut"] = "histograms and channels of tensors; they are in reports/tensors.json of the artifact"
        text = json.dumps(forms if other is not None else forms[0], ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _data(material: Material) -> dict[str, Any]:
    tensors = asdict(material.tensors) if material.tensors else {"tensors": [], "channels": []}
    return {
        "name": material.name,
        "manifest": asdict(material.manifest),
        "ledger": asdict(material.ledger),
        "verification": {
            key: value for key, value in material.verification.items() if key not in ("selftest", "unseen")
        },
        "reports": {name: _short(report) for name, report in material.reports.items()},
        "tensors": tensors["tensors"],
        "channels": tensors["channels"],
        "samples": tensors.get("samples", []),
        "stages": [asdict(stage) for stage in material.stages],
    }


def _short(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report without its long lists: what they hold is in the tables, or in the artifact."""
    return {
        key: value for key, value in report.items() if not isinstance(value, list) or len(json.dumps(value)) < _LONG
    }


_LONG = 20_000
"""Characters of a list of a report that is left out of the data."""


@cache
def _template() -> Template:
    loader = PackageLoader("bitlower.tools.report", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"as_svg": Markup, "words": _words, "breakable": _breakable}
    return environment.get_template("page.html.j2")


def _words(text: str) -> Markup:
    """Text as HTML: what stands between backticks is code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _breakable(text: str) -> Markup:
    """A name that may be broken behind its dots and underscores, with code as in :func:`_words`."""
    return Markup(_JOINT.sub(r"\g<0><wbr>", str(_words(text))))


def _check_target(target: Path) -> None:
    if target.is_dir():
        raise BitlowerError(f"{target} is a folder", hint="give a file: -o report.html")
    if target.exists() and MARK not in _head(target):
        raise BitlowerError(f"{target} exists already and is no report", hint="choose another name")


def _head(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(_HEAD)


def _write(target: Path, text: str) -> None:
    data, temporary = text.encode(), target.with_name(f".{target.name}.partial")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, target)
    except OSError as error:
        raise BitlowerError(f"the report {target} cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
