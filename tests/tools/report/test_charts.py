"""Charts of the passes' own reports hold the numbers of their fields; axes and names of layers."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bitlower.ir.charts import BarChart, Chart, LineChart, MapChart, chart_form
from bitlower.passes import Report, known_passes
from bitlower.passes.precision._report import BudgetUse, FrontPoint, PrecisionReport
from bitlower.passes.precision._sensitivity_report import GroupSensitivity, SensitivityReport
from bitlower.passes.rounding.adaround import AdaroundReport, AdaroundRow
from bitlower.passes.rounding.gptq import GptqReport, GptqRow
from bitlower.passes.training._block_loop import BlockReport, TrainedBlockRow
from bitlower.passes.training._report import CurvePoint, QuantizerRow, TrainReport
from bitlower.tools.report.charts import draw
from bitlower.tools.report.naming import place_of
from bitlower.tools.report.svg import Axis, axis_of

FRONT = PrecisionReport(
    (), "kl", (BudgetUse("weight-bits", 5.0, 4.9),), measured=0.25,
    front=(FrontPoint(4.0, 4.0, 0.5, 0.6), FrontPoint(8.0, 8.0, 0.01, None)),
)  # fmt: skip
SENSITIVE = SensitivityReport(
    "kl", ("logits",), 1, 3, 4, 1.0,
    (GroupSensitivity("both", "linear-input", "layers.0", 2, 0.4, 0.3, 0.6),
     GroupSensitivity("role", "linear-input", "", 4, 0.2, 0.7, 0.8)),
    (), (), 0, 1.0, "",
)  # fmt: skip
TRAINED = TrainReport(
    10, 5, 100,
    (CurvePoint(0, None, 2.0, {}, 1.0), CurvePoint(5, 1.5, 1.0, {}, 0.5), CurvePoint(10, 1.25, 1.1, {}, 0.0)),
    (QuantizerRow("q", "a.weight", 0.125, 0, 0.25, 0.0625, 0.0), QuantizerRow("r", "value", 0.5, 0)),
)  # fmt: skip


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (FRONT, [("Loss under a budget", {"predicted": ((4.0, 0.5), (8.0, 0.01)), "measured": ((4.0, 0.6),)})]),
        (
            SENSITIVE,
            [
                ("Gain of leaving these out, by role or layer", {"Gain of leaving these out": (0.8,)}),
                ("Gain of leaving these out (kl)", ((0.6,),)),
                ("Loss with these alone, by role or layer", {"Loss with these alone": (0.7,)}),
                ("Loss with these alone (kl)", ((0.3,),)),
            ],
        ),
        (
            TRAINED,
            [
                ("Losses over the steps", {"training": ((5.0, 1.5), (10.0, 1.25)),
                                           "held out": ((0.0, 2.0), (5.0, 1.0), (10.0, 1.1))}),
                ("Drift of ranges", {"largest change of a scale": (0.125, 0.5)}),
                ("Codes that changed", {"changed": (0.25,), "flipped in the last tenth of the steps": (0.0625,)}),
            ],
        ),
        (
            GptqReport((GptqRow("a.weight", "s4", 8, 0.5, 0.75, 0, 0.01, ()),)),
            [("Error of weights under the Hessian", {"GPTQ": (0.5,), "round to nearest": (0.75,)})],
        ),
        (
            AdaroundReport((AdaroundRow("a.weight", "s4", 8, 0.5, 0.75, 0.1, 0, ()),)),
            [("Error of layers' outputs", {"AdaRound": (0.5,), "round to nearest": (0.75,)})],
        ),
        (
            BlockReport((TrainedBlockRow("layers.0", 8, 0.5, 0.25, 3, ()),)),
            [("Error of blocks' outputs, held out", {"before": (0.5,), "after": (0.25,)})],
        ),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_charts_hold_the_fields(report: Report, expected: list[tuple[str, object]]) -> None:
    charts = list(report.charts())
    assert [(chart.title, numbers(chart)) for chart in charts] == expected
    assert all(chart.topic for chart in charts)


def numbers(chart: Chart) -> object:
    return chart.lines if isinstance(chart, LineChart) else chart.bars if isinstance(chart, BarChart) else chart.cells


def test_the_chosen_points_are_marked() -> None:
    [front], [losses, *_] = FRONT.charts(), TRAINED.charts()
    assert isinstance(front, LineChart)
    assert isinstance(losses, LineChart)
    assert (front.chosen, losses.chosen) == ((5.0, 0.25), (5.0, 1.0))


def test_passes_that_fill_a_part_say_so() -> None:
    drawn = {name: set(cls.draws) for name, cls in known_passes().items() if cls.draws}
    assert drawn == {
        "adaround": {"training"}, "analyze-outliers": {"outliers"}, "analyze-sensitivity": {"sensitivity"},
        "assign-precision": {"front"}, "autoround": {"training"}, "gptq": {"training"}, "lkd": {"training"},
        "qat": {"training"},
    }  # fmt: skip


NUMBERS = st.floats(-1e6, 1e6, allow_subnormal=False) | st.none()


@example([(5e-324, None)], False)
@given(st.lists(st.tuples(st.floats(-1e6, 1e6), NUMBERS), max_size=6), st.booleans())
def test_whatever_numbers_a_chart_has_it_is_drawn(points: list[tuple[float, float | None]], logarithmic: bool) -> None:
    heights = tuple(y for _, y in points)
    charts: list[Chart] = [
        LineChart("lines", "x", "y", {"one": tuple(points)}, logarithmic=logarithmic, chosen=(0.0, -1.0)),
        BarChart("bars", "y", tuple(map(str, heights)), {"one": heights}, logarithmic=logarithmic),
        MapChart("map", ("row",), tuple(map(str, heights)), (heights,)),
    ]
    for chart in charts:
        assert chart_form(chart)["kind"] in ("lines", "bars", "map")
        block = draw("key", chart)
        if block.kind == "picture":
            assert "nan" not in block.svg
            assert "inf" not in block.svg


@given(st.floats(-1e9, 1e9), st.floats(1e-9, 1e9), st.integers(2, 10))
def test_ticks_are_few_round_and_inside(low: float, span: float, count: int) -> None:
    axis = Axis(low, low + span, "")
    ticks = axis.ticks(count)
    room = 1e-6 * span + 1e-12 * abs(low)
    assert len(ticks) <= 2 * count + 2
    assert all(axis.low - room <= tick <= axis.high + room for tick in ticks)
    if axis.high - axis.low > 1e-6 * abs(low):
        assert len(ticks) >= 1


def test_logarithmic_axes_have_powers_of_ten_or_round_numbers() -> None:
    assert Axis(0.5, 2000.0, "", True).ticks() == [1.0, 10.0, 100.0, 1000.0]
    narrow = axis_of([0.06, 0.07], "", logarithmic=True)
    assert all(narrow.low <= tick <= narrow.high for tick in narrow.ticks())
    assert len(narrow.ticks()) > 2
    assert narrow.share(math.sqrt(narrow.low * narrow.high)) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("path", "stack", "layer", "role"),
    [
        ("encoder.layer.0.attention.self", "encoder.layer", 0, "attention.self"),
        ("model.layers.12.mlp.experts.3.up", "model.layers", 12, "mlp.experts.3.up"),
        ("h.7", "h", 7, "output"),
        ("embeddings.word2vec", "", None, "embeddings.word2vec"),
        ("3.weight", "", 3, "weight"),
    ],
)
def test_paths_are_layers_and_roles(path: str, stack: str, layer: int | None, role: str) -> None:
    place = place_of(path)
    assert (place.stack, place.layer, place.role) == (stack, layer, role)
