"""Scale migration: the numbers stay, s is SmoothQuant's, rounding errs less where channels are outliers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bitlower.frontends import load
from bitlower.ir import Batch, BitlowerError, Level, Program, Scheme, get_tensor
from bitlower.ir.dataflow import NORM
from bitlower.ir.verifier import verify
from bitlower.passes import Context, Contract, PassManager, check_levels
from bitlower.passes.outliers.smooth import Smooth, collect, smoothing_sites
from bitlower.passes.quantizers.calibrate import Calibrate
from bitlower.passes.quantizers.quantize import Quantize

WIDTH = 16
OUTLIERS = (3, 11)
ALWAYS = -1e9  # the gain of a site that is changed whatever it gains


class PreNorm(nn.Module):
    """A norm whose output linears alone read, and a feed-forward whose inner value they alone read."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm(WIDTH)
        self.left, self.right = nn.Linear(WIDTH, 12), nn.Linear(WIDTH, 12)
        self.down = nn.Linear(12, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.norm(x)
        return x + self.down(torch.relu(self.left(n)) * torch.tanh(self.right(n)))


class PostNorm(PreNorm):
    """The norm's output is also the residual stream, so nothing can be folded into it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.norm(x)
        return n + self.down(torch.relu(self.left(n)) * torch.tanh(self.right(n)))


def planted(kind: type[PreNorm], seed: int = 0, **options: type[nn.Module]) -> Program:
    """Two channels of the norm are 30 times as large as the others."""
    torch.manual_seed(seed)
    model = kind(**options)
    with torch.no_grad():
        if getattr(model.norm, "weight", None) is not None:
            model.norm.weight[list(OUTLIERS)] *= 30
    return load(model, example_inputs={"x": torch.randn(3, 5, WIDTH)})


def data(count: int = 2, seed: int = 1) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(4, 6, WIDTH, generator=generator)} for _ in range(count)]


@pytest.fixture
def quantized(run) -> Program:
    return run(planted(PreNorm), Quantize(Scheme.parse("W8A8")))


def norm_output(program: Program, batch: Batch) -> torch.Tensor:
    norm = {name.removeprefix("model/norm."): t for name, t in program.tensors() if name.startswith("model/norm.")}
    return nn.functional.layer_norm(batch["x"], (WIDTH,), norm["weight"], norm["bias"])


@pytest.mark.parametrize("kind", [PreNorm, PostNorm])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_the_numbers_stay(run, kind: type[PreNorm], alpha: float) -> None:
    program = run(planted(kind), Quantize(Scheme.parse("W8A8")))
    smoothed = run(program, Smooth(alpha=alpha, gain=ALWAYS), context=Context(calibration=data()))
    verify(smoothed)
    (batch,) = data(1, seed=7)
    expected, found = (p(**batch)["output"].detach() for p in (program, smoothed))
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    changed = {
        name for name, t in program.tensors() if name in dict(smoothed.tensors()) and not equal(t, smoothed, name)
    }
    assert {"model/left.weight", "model/right.weight"} <= changed


def equal(tensor: torch.Tensor, program: Program, name: str) -> bool:
    return torch.equal(tensor, dict(program.tensors())[name])


def test_bert_stays_what_it_is(bert, batches, run) -> None:
    model, program = bert()
    quantized = run(program, Quantize(Scheme.parse("W8A8")))
    smoothed = run(quantized, Smooth(gain=ALWAYS), context=Context(calibration=batches(2)))
    assert len(smoothed.graph.nodes) > len(quantized.graph.nodes)
    (batch,) = batches(1, seed=3)
    with torch.no_grad():
        expected = model(**batch)["logits"]
    assert float((smoothed(**batch)["logits"].detach() - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_it_goes_into_a_norm_that_linears_alone_read(quantized: Program, run) -> None:
    smoothed = run(quantized, Smooth(gain=ALWAYS), context=Context(calibration=data()))
    ratio = get_tensor(quantized.module, "norm.weight") / get_tensor(smoothed.module, "norm.weight")
    torch.testing.assert_close(
        get_tensor(smoothed.module, "norm.bias") * ratio, get_tensor(quantized.module, "norm.bias")
    )
    for name in ("left.weight", "right.weight"):
        torch.testing.assert_close(get_tensor(smoothed.module, name) / ratio, get_tensor(quantized.module, name))
    added = [n for n in smoothed.graph.nodes if str(n.target).startswith("smoothing.")]
    assert [n.target for n in added] == ["smoothing.mul"], "the feed-forward's product has no norm to go into"


def test_it_is_one_product_where_the_norm_is_read_elsewhere(run) -> None:
    program = run(planted(PostNorm), Quantize(Scheme.parse("W8A8")))
    smoothed = run(program, Smooth(gain=ALWAYS), context=Context(calibration=data()))
    assert equal(get_tensor(program.module, "norm.weight"), smoothed, "model/norm.weight")
    added = [n for n in smoothed.graph.nodes if str(n.target).startswith("smoothing.")]
    assert [n.target for n in added] == ["smoothing.layer_norm", "smoothing.mul"]
    for node in added:
        (product,) = node.users
        (quantizer,) = product.users
        assert quantizer.meta["quantizer"].role == "linear-input"
        assert product.meta == product.args[0].meta


class Recurrent(PreNorm):
    """One norm, applied twice; linears alone read what it gives, both times."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__(norm)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(super().forward(x)))


def test_a_norm_that_is_applied_twice_keeps_its_weights(run) -> None:
    program = run(planted(Recurrent), Quantize(Scheme.parse("W8A8")))
    smoothed = run(program, Smooth(gain=ALWAYS), context=Context(calibration=data()))
    assert equal(get_tensor(program.module, "norm.weight"), smoothed, "model/norm.weight")
    (batch,) = data(1, seed=7)
    torch.testing.assert_close(smoothed(**batch)["output"], program(**batch)["output"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("rows", "each"), [(8, 4), (1, 1)])
def test_tokens_are_drawn_from_every_batch(quantized: Program, rows: int, each: int) -> None:
    batches = data()
    site = next(site for site in smoothing_sites(quantized.module) if site.value.target in NORM)
    [sample] = collect(quantized, [site], Context(calibration=batches), rows)
    drawn = [
        int((sample.rows[:, None] - norm_output(quantized, batch).reshape(-1, WIDTH)).abs().amax(-1).lt(1e-5).sum())
        for batch in batches
    ]
    assert drawn == ([each, each] if rows > 1 else [1, 0])


class Plain(nn.LayerNorm):
    def __init__(self, width: int) -> None:
        super().__init__(width, elementwise_affine=False)


def test_a_norm_without_weights_gets_a_product(run) -> None:
    program = run(planted(PreNorm, norm=Plain), Quantize(Scheme.parse("W8A8")))
    smoothed = run(program, Smooth(gain=ALWAYS), context=Context(calibration=data()))
    (batch,) = data(1, seed=7)
    torch.testing.assert_close(smoothed(**batch)["output"], program(**batch)["output"], atol=1e-5, rtol=1e-5)


def test_a_norm_with_quantized_weights_gets_a_product(run) -> None:
    """The norm's weight is behind a quantizer: dividing it would be undone."""
    spec = Scheme.parse("W8A8-tensor").weights
    program = run(planted(PreNorm), Quantize(Scheme(overrides=(("norm-weight", spec),))))
    smoothed = run(program, Smooth(gain=ALWAYS), context=Context(calibration=data()))
    (batch,) = data(1, seed=7)
    torch.testing.assert_close(smoothed(**batch)["output"], program(**batch)["output"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_the_scale_is_that_of_the_paper(quantized: Program, run, alpha: float) -> None:
    """Eq. 4 over all tokens and all linears of the site, up to the common factor that per-tensor scales ignore."""
    batches = data(3)
    smoothed = run(quantized, Smooth(alpha=alpha, gain=ALWAYS), context=Context(calibration=batches))
    values = np.concatenate([norm_output(quantized, b).detach().double().numpy().reshape(-1, WIDTH) for b in batches])
    weights = [get_tensor(quantized.module, f"{name}.weight").detach().double().numpy() for name in ("left", "right")]
    reach, columns = np.abs(values).max(0), np.abs(np.concatenate(weights)).max(0)
    expected = reach**alpha / columns ** (1 - alpha)
    found = get_tensor(smoothed.module, "left.weight") / get_tensor(quantized.module, "left.weight")
    found = found.detach().mean(0).double().numpy()
    np.testing.assert_allclose(found / found[0], expected / expected[0], rtol=1e-4)
    assert np.exp(np.log(found).mean()) == pytest.approx(1.0, rel=1e-4)


def test_padded_tokens_have_no_say(bert, batches, run) -> None:
    _, program = bert()
    quantized = run(program, Quantize(Scheme.parse("W8A8")))
    clean = batches(2, padding=3)
    other = [
        {**b, "input_ids": torch.where(b["attention_mask"] == 0, 99 - b["input_ids"], b["input_ids"])} for b in clean
    ]
    first, second = (
        run(quantized, Smooth(gain=ALWAYS), context=Context(calibration=batches_)) for batches_ in (clean, other)
    )
    for (name, a), (_, b) in zip(first.tensors(), second.tensors(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=name)


class Heads(PreNorm):
    """The linears that read the norm, and nothing after them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.norm(x)
        return torch.cat([self.left(n), self.right(n)], -1)


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8-tensor", "W16A8", "W8A6"])
def test_rounding_errs_less_where_channels_are_outliers(run, scheme: str) -> None:
    """Each token's squared error over its own energy, on tokens that nobody has seen."""
    float_program = planted(Heads)
    simulated = run(float_program, Quantize(Scheme.parse(scheme)))
    context, close = Context(calibration=data(4)), Calibrate(activations="minmax")
    errors = []
    for passes in ((close,), (Smooth(), close)):
        program, total = run(simulated, *passes, context=context), 0.0
        for batch in data(4, seed=9):
            expected, found = (p(**batch)["output"].detach() for p in (float_program, program))
            total += float(((found - expected).square().sum(-1) / expected.square().sum(-1)).mean())
        errors.append(total)
    assert errors[1] < 0.5 * errors[0]


def test_sites_that_gain_too_little_are_left_alone(quantized: Program, run) -> None:
    """The planted site gains, a site without outliers does not; nobody gains everything."""
    context = Context(calibration=data())
    some = run(quantized, Smooth(), context=context)
    assert not equal(get_tensor(quantized.module, "left.weight"), some, "model/left.weight")
    assert Smooth(gain=1.0).run(quantized.clone(), context) is False
    torch.manual_seed(0)
    even = load(nn.Sequential(nn.Linear(WIDTH, WIDTH)), example_inputs={"input": torch.randn(3, WIDTH)})
    even = run(even, Quantize(Scheme.parse("W8A8")))
    signs = [{"input": torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0)).sign()}]
    assert Smooth(gain=0.3).run(even, Context(calibration=signs)) is False


def test_which_sites_can_be_smoothed(bert, run) -> None:
    _, program = bert()
    count = {}
    for scheme in ("W8A8", "W8A8-token", "W8A8-peg4", "W8A16", "W8A8-full"):
        count[scheme] = len(list(smoothing_sites(run(program, Quantize(Scheme.parse(scheme))).module)))
    assert count == {"W8A8": 10, "W8A8-token": 0, "W8A8-peg4": 0, "W8A16": 0, "W8A8-full": count["W8A8-full"]}
    assert 0 < count["W8A8-full"] < 31


def test_calibrated_quantizers_are_left_alone(bert, batches, run) -> None:
    _, program = bert()
    closed = run(program, Quantize(), Calibrate(), context=Context(calibration=batches(1)))
    assert list(smoothing_sites(closed.module)) == []
    assert Smooth().run(closed.clone(), Context()) is False


def test_shared_and_turned_weights_are_left_alone(run) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.turned = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.one(torch.relu(self.one(x))), self.turned.t())

    program = run(load(Shared(), example_inputs={"x": torch.randn(3, 8)}), Quantize(Scheme.parse("W8A8")))
    assert sum(q.role == "linear-input" for _, q in program.quantizers()) == 3
    assert list(smoothing_sites(program.module)) == []


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_an_alpha_outside_its_range_is_an_error(quantized: Program, run, alpha: float) -> None:
    with pytest.raises(BitlowerError, match=r"smooth: alpha is .*; it takes float from 0 to 1"):
        run(quantized, Smooth(alpha=alpha), context=Context(calibration=data()))


def test_without_data_it_is_an_error(quantized: Program, run) -> None:
    with pytest.raises(BitlowerError, match="smooth needs calibration data; give calibration batches"):
        run(quantized, Smooth())


def test_a_batch_of_padding_only_is_no_error(bert, batches, run) -> None:
    _, program = bert(layers=1)
    (batch,) = batches(1)
    context = Context(calibration=[{**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}, batch])
    smoothed = run(program, Quantize(), Smooth(gain=ALWAYS), context=context)
    assert bool(torch.isfinite(smoothed(**batch)["logits"]).all())


def test_two_runs_give_equal_programs(quantized: Program, run) -> None:
    first, second = (run(quantized, Smooth(rows=8), context=Context(calibration=data(3))) for _ in range(2))
    assert first.digest() == second.digest()


def test_it_keeps_its_promises_in_a_pipeline(bert, batches) -> None:
    """The manager holds the pass to its contract on held-out batches: exact, nothing shared is written."""
    _, program = bert()
    context = Context(calibration=batches(2), evaluation=batches(1, seed=4))
    before = program.digest()
    PassManager([Quantize(), Smooth(gain=ALWAYS), Calibrate()]).run(program, context)
    assert program.digest() == before
    assert Smooth.contract is Contract.EXACT
    with pytest.raises(BitlowerError, match="takes a program at level simulated"):
        check_levels([Smooth()], Level.FLOAT)
