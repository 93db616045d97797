"""An artifact's files as plain typed data: what the report is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from bitlower.backends.artifact import MANIFEST, VERIFICATION, Manifest, parsed, read_json, read_manifest
from bitlower.backends.base import KernelTime
from bitlower.ir import BitlowerError
from bitlower.ir.files import reason
from bitlower.ir.model_card import CARD
from bitlower.passes.quantizers.quantize import PlacementReport
from bitlower.tools.explain import Explanation, explanations
from bitlower.tools.runs.reports import FOLDER, TENSORS
from bitlower.tools.runs.samples import SampleText
from bitlower.tools.verdict.verdict import Verdict, read_verdict

LEDGER, RECIPE = "ledger.json", "recipe.yaml"
Number = float | int | None
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class LayerLoss:
    """Signal over noise of one linear or residual sum in dB; None: no noise at all."""

    node: str
    path: str
    sqnr_db: Number


@dataclass(frozen=True)
class LedgerRow:
    """What the ledger says of one lossy pass."""

    step: Annotated[str, Field(alias="pass")]
    bytes: int
    outputs: dict[str, dict[str, Number]] = field(default_factory=dict)
    layers: tuple[LayerLoss, ...] = ()


@dataclass(frozen=True)
class LedgerFile:
    """The whole ledger; ``reference`` holds the float program's bytes."""

    reference: dict[str, int]
    rows: tuple[LedgerRow, ...] = ()


@dataclass(frozen=True)
class Bins:
    """A histogram."""

    start: float
    step: float
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Channels:
    """Ranges of channels, sorted by width: how many there are, and for some their index, ends, and group of scales."""

    count: int
    index: tuple[int, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    group: tuple[int, ...] = ()


@dataclass(frozen=True)
class Spread:
    """Some of ``count`` numbers, sorted, at even distances (:mod:`bitlower.tools.runs.spread`)."""

    count: int
    sorted: tuple[Number, ...]


@dataclass(frozen=True)
class TokenSizes(Spread):
    """Norms of tokens; ``first``: the mean norm at the first places of texts."""

    first: tuple[Number, ...] = ()


@dataclass(frozen=True)
class Rewritten:
    """A weight's distance from the float model's, over its norm, and the share of codes that are not the nearest."""

    distance: Number
    codes: Share


@dataclass(frozen=True)
class TensorRow:
    """What a quantizer rounds (:mod:`bitlower.tools.runs.tensor_statistics`)."""

    tensor: str
    role: str
    path: str
    spec: str
    bits: int
    values: int
    share: Share
    minimum: Number
    maximum: Number
    low: Number
    high: Number
    clipped: Share
    sqnr_db: Number
    codes_used: int | None
    codes: int
    histogram: Bins
    channels: Channels | None = None
    tokens: TokenSizes | None = None
    scales: Spread | None = None
    rewritten: Rewritten | None = None

    @property
    def name(self) -> str:
        """What people call it: a parameter's name, or the module whose value it is, with its role."""
        return self.tensor if "." in self.tensor else f"{self.path or self.tensor} ({self.role})"


@dataclass(frozen=True)
class ChannelMap:
    """How large channels of one residual sum get, before and after (:mod:`bitlower.tools.runs.channel_maps`)."""

    node: str
    path: str
    width: int
    before: tuple[float, ...]
    after: tuple[float, ...]
    largest: tuple[tuple[int, float, float], ...]


@dataclass(frozen=True)
class SampleRow:
    """A held-out sample whose output lies far from the float model's (:mod:`bitlower.tools.runs.samples`)."""

    sample: int
    tokens: int
    relative_error: float
    kl_divergence: float | None = None
    differs_at: int | None = None


@dataclass(frozen=True)
class TensorFile:
    """All statistics; ``output`` is what samples are judged by."""

    tensors: tuple[TensorRow, ...] = ()
    channels: tuple[ChannelMap, ...] = ()
    output: str = ""
    samples: tuple[SampleRow, ...] = ()


@dataclass(frozen=True)
class Stage:
    """What a stage of the run took."""

    name: str
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Material:
    """One artifact, read.

    Args:
        name: of its folder.
        manifest: its manifest.
        ledger: what each lossy pass cost.
        verification: the record of the verification, plain data.
        recipe: the recipe's text; empty where there was none.
        reports: what passes left, by the name of the file.
        tensors: statistics; None where there are none.
        verdict: what it is and what it cost; None where no run wrote it.
        explanations: why tensors have their bits; none where no placement was reported.
        stages: of the run that is just done; a folder read later has none.
        texts: of samples, likewise.
        kernels: what they take on this machine, the longest first, as far as the runtime says.
        timed: whether they were run for it.
        card: the model card; empty if there is none.
    """

    name: str
    manifest: Manifest
    ledger: LedgerFile
    verification: Mapping[str, Any]
    recipe: str
    reports: Mapping[str, Mapping[str, Any]]
    tensors: TensorFile | None
    verdict: Verdict | None = None
    explanations: Sequence[Explanation] = ()
    stages: Sequence[Stage] = ()
    texts: Sequence[SampleText] = ()
    card: str = ""
    kernels: Sequence[KernelTime] = ()
    timed: bool = False

    @property
    def model(self) -> str:
        """The model's name."""
        return self.manifest.program.source.removeprefix("package:") or "a module in memory"


def read_material(
    folder: Path, stages: Sequence[Stage] = (), texts: Sequence[SampleText] = (), name: str = ""
) -> Material:
    """Read the files of an artifact; nothing of the model is loaded.

    Args:
        folder: the artifact's.
        stages: what the run took, where it is known.
        texts: of samples, where they are known.
        name: of the artifact, if not that of the folder.

    Raises:
        BitlowerError: there is no such folder, or it holds several artifacts.
        CheckError: a file is missing or damaged; the entry is named.
    """
    if folder.is_dir() and not (folder / MANIFEST).is_file():
        inner = sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
        if inner:
            raise BitlowerError(f"{folder} holds {len(inner)} artifacts", hint=f"give one of them: {inner[0]}")
    manifest = read_manifest(folder)
    ledger = read_json(folder / LEDGER) if (folder / LEDGER).is_file() else {"reference": {"bytes": 0}}
    tensors = None
    if (folder / TENSORS).is_file():
        tensors = parsed(TensorFile, read_json(folder / TENSORS), f"{TENSORS} in {folder}")
    files = sorted((folder / FOLDER).glob("*.json"))
    reports = {path.stem: read_json(path) for path in files if path != folder / TENSORS}
    return Material(
        name or folder.resolve().name,
        manifest,
        parsed(LedgerFile, ledger, f"{LEDGER} in {folder}"),
        read_json(folder / VERIFICATION) if (folder / VERIFICATION).is_file() else {},
        _text(folder / RECIPE),
        reports,
        tensors,
        read_verdict(folder),
        explanations(folder) if any(_places(report) for report in reports.values()) else (),
        tuple(stages),
        tuple(texts),
        _text(folder / CARD),
    )


def _places(report: Mapping[str, Any]) -> bool:
    """Whether a report is of a placement of quantizers."""
    return report.get("report") == PlacementReport.__name__


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise BitlowerError(f"{path} cannot be read: {reason(error)}") from None
