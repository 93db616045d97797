"""The figures that matter: each with what it means and the range in which it normally lies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from bitlower.ir.digits import rounded
from bitlower.tools.render import Cell


@dataclass(frozen=True)
class Meaning:
    """What a figure says.

    Args:
        text: in one sentence.
        unit: of the number; empty for a plain one.
        least: the lower end of the range in which it normally lies; None: no end.
        most: the upper end.
        few: the end that counts in their place where weights have fewer than 8 bits; None: the same.
    """

    text: str
    unit: str = ""
    least: float | None = None
    most: float | None = None
    few: float | None = None

    def ends(self, few_bits: bool) -> tuple[float | None, float | None]:
        """Both ends of the range."""
        if not few_bits or self.few is None:
            return self.least, self.most
        return (self.few, None) if self.least is not None else (None, self.few)

    def normal(self, few_bits: bool = False) -> str:
        """The range in words."""
        low, high = self.ends(few_bits)
        words = [f"≥ {low:g}" if low is not None else "", f"≤ {high:g}" if high is not None else ""]
        return " and ".join(f"{end} {self.unit}".rstrip() for end in words if end)


MEANINGS: Mapping[str, Meaning] = {
    "perplexity": Meaning("on held-out text, of the quantized model"),
    "perplexity_float": Meaning("on the same text, of the float model"),
    "perplexity_increase": Meaning("what quantization added to the perplexity", "%", most=10),
    "top1": Meaning(
        "held-out rows or tokens whose most likely class or token is the float model's", "%", least=85, few=75
    ),
    "kl": Meaning(
        "mean KL divergence of the outputs' softmax from the float model's, on held-out data", "nats", most=0.1, few=0.2
    ),
    "cosine": Meaning(
        "mean cosine of the outputs' vectors with the float model's, on held-out data", least=0.985, few=0.95
    ),
    "relative_error": Meaning("norm of the outputs' error over their norm, on held-out data", most=0.15, few=0.3),
    "size_ratio": Meaning("how many times smaller the artifact is than the float32 model"),
    "float_share": Meaning("of all parameters, those that stay in float", "%"),
    "integer_products": Meaning("multiplications that the runtime does in integers, of those that have codes"),
    "dequantized_products": Meaning(
        "multiplications of quantized operands in float: no integer kernel takes their granularity or bits"
    ),
    "packed_products": Meaning("multiplications whose weights the runtime reads packed, of those that have codes"),
    "kernel_calls": Meaning("low-bit kernels that one run of the library calls, of those expected"),
    "packed_layers": Meaning("layers that are stored packed"),
    "runtime_cosine": Meaning(
        "least cosine of an output in the runtime with the Program's: the same model", least=0.99
    ),
    "codes_given_codes": Meaning(
        "codes that the runtime computes as the Program does, given the same inputs", least=0.999
    ),
    "selftest_cosine": Meaning("least cosine of an output with the one that was recorded at export", least=0.99),
}
"""All figures by name, in the order of tables.

The ranges are a little wider than what ``examples/minilm-w8a8.yaml`` and ``smollm2-static.yaml`` give, and
``smollm2-w4.yaml`` where weights have fewer than 8 bits.
"""


@dataclass(frozen=True)
class Figure:
    """One figure of a model.

    Args:
        name: one of :data:`MEANINGS`, or a backend's own.
        value: in its unit.
        of: how many there should be, where something is counted; None elsewhere.
        few_bits: whether the model's weights have fewer than 8 bits.
    """

    name: str
    value: float
    of: float | None = None
    few_bits: bool = False

    @property
    def meaning(self) -> Meaning:
        """What it says; of a figure that only its backend knows, nothing."""
        return MEANINGS.get(self.name, Meaning(""))

    @property
    def is_normal(self) -> bool | None:
        """Whether it lies in its normal range; None where there is none."""
        low, high = (self.of, None) if self.of is not None else self.meaning.ends(self.few_bits)
        if low is None and high is None:
            return None
        return (low is None or self.value >= low) and (high is None or self.value <= high)

    @property
    def normal(self) -> str:
        """The normal range in words."""
        return f"{self.of:g}" if self.of is not None else self.meaning.normal(self.few_bits)

    @property
    def text(self) -> str:
        """The value with its unit."""
        if self.of is not None:
            return f"{self.value:g} of {self.of:g}"
        digits = "g" if float(self.value).is_integer() else ".4g"
        return f"{self.value:{digits}} {self.meaning.unit}".rstrip()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        head: dict[str, Any] = {"name": self.name, "value": self.value}
        head |= {} if self.of is None else {"of": self.of}
        head |= {"few_bits": True} if self.few_bits else {}
        head |= {"unit": self.meaning.unit, "meaning": self.meaning.text, "normal": self.normal}
        return head | {"is_normal": self.is_normal}

    def row(self) -> tuple[Cell, ...]:
        """Cells of a table: name, value, normal range, and whether it lies outside, meaning."""
        outside = "outside: " if self.is_normal is False else ""
        return self.name, self.text, f"{outside}{self.normal}", self.meaning.text


COLUMNS = ("figure", "value", "normal", "meaning")
"""Of tables of figures."""


def ordered(figures: Iterable[Figure]) -> tuple[Figure, ...]:
    """In the order of :data:`MEANINGS`, others last; with the six significant digits that files have."""
    places = {name: place for place, name in enumerate(MEANINGS)}
    short = (replace(figure, value=rounded(figure.value)) for figure in figures)
    return tuple(sorted(short, key=lambda figure: places.get(figure.name, len(places))))


def headline_figures(headline: Mapping[str, Any]) -> Iterator[Figure]:
    """The figures in what a backend says of an export or a check: numbers, and pairs ``[found, expected]``."""
    for name, value in headline.items():
        if isinstance(value, list | tuple) and len(value) == 2:
            yield Figure(name, value[0], value[1])
        elif isinstance(value, int | float):
            yield Figure(name, value)


def ledger_figures(ledger: Mapping[str, Any]) -> tuple[str, tuple[Figure, ...]]:
    """The output that is judged, and what quantization cost it; an empty name where nothing was measured.

    It is the first output with logits, else the first: after the last pass that cost anything.
    """
    measured = [row["outputs"] for row in ledger.get("rows", ()) if row.get("outputs")]
    if not measured:
        return "", ()
    outputs = measured[-1]
    name = next((name for name, row in outputs.items() if "kl_divergence" in row), next(iter(outputs)))
    return name, tuple(_cost(outputs[name]))


def _cost(row: Mapping[str, float | None]) -> Iterator[Figure]:
    """The figures of one output in a row of the ledger."""
    after, before = row.get("perplexity"), row.get("reference_perplexity")
    if after and before:
        yield Figure("perplexity", after)
        yield Figure("perplexity_float", before)
        yield Figure("perplexity_increase", 100 * (after / before - 1))
    named = {"top1_agreement": ("top1", 100), "kl_divergence": ("kl", 1), "cosine": ("cosine", 1)}
    for key, (name, factor) in (named | {"relative_error": ("relative_error", 1)}).items():
        value = row.get(key)
        if value is not None:
            yield Figure(name, factor * value)
