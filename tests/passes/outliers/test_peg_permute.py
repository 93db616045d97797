"""peg-permute: the same function in another order of channels, without gathers where the order can be folded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from bitlower.backends.checkpoint import export
from bitlower.frontends import load
from bitlower.ir import BitlowerError, CheckError, Program, get_tensor
from bitlower.ir.feed_forward import feed_forwards
from bitlower.ir.observe import observe
from bitlower.ir.permutation.domains import domains
from bitlower.ir.permutation.reorder import gathers
from bitlower.ir.verifier import verify
from bitlower.passes import Context, PassManager, parse_pipeline
from bitlower.passes._machinery.results import decode_results, encode_results
from bitlower.passes.outliers._channel_statistics import channel_statistics
from bitlower.passes.outliers.peg_permute import PegPermute, PermutationReport

FAMILIES = ["bert", "llama", "gemma", "gpt2", "opt", "opt-post-norm", "gpt-neox", "phi"]
LAYERS = 2
Family = Callable[[str], Program]
Feed = Callable[..., dict[str, torch.Tensor]]


def permuted(program: Program, feed: Feed, **settings: object) -> tuple[Program, PermutationReport]:
    """In the program's own precision, without the pipeline's checks."""
    wide = any(tensor.dtype == torch.float64 for _, tensor in program.tensors())
    dtype = torch.float64 if wide else torch.float32
    context = Context(calibration=[feed(program, seed=seed, dtype=dtype) for seed in (1, 2)])
    result = program.clone()
    assert PegPermute(**settings).run(result, context)
    result.recompile()
    return result, context[PermutationReport]


@pytest.mark.parametrize("settings", [{}, {"scope": "layer", "groups": 4}], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_function_stays_with_and_without_a_past(
    name: str, settings: dict[str, object], family: Family, in_float64: Callable, feed: Feed
) -> None:
    before = in_float64(family(name))
    after, _ = permuted(before, feed, **settings)
    with torch.no_grad():
        for past in (0, 1, 4) if name != "bert" else (0,):
            inputs = feed(before, past=past, seed=9, dtype=torch.float64)
            found = after(**inputs)
            for output, value in before(**inputs).items():
                torch.testing.assert_close(found[output], value, atol=1e-10, rtol=1e-10)


def test_decoding_step_by_step_keeps_the_numbers(family: Family, in_float64: Callable, feed: Feed) -> None:
    """What a permuted decoder puts into the cache is what it later takes out of it."""
    before = in_float64(family("llama"))
    after, _ = permuted(before, feed)
    inputs = feed(before, seed=5, dtype=torch.float64)
    inputs["attention_mask"][:] = 1
    whole = before(**inputs)["logits"]
    cache = {name: value for name, value in inputs.items() if name.startswith("past")}
    for step in range(5):
        at = slice(step, step + 1)
        given = {
            "input_ids": inputs["input_ids"][:, at],
            "attention_mask": inputs["attention_mask"][:, : step + 1],
            "position_ids": inputs["position_ids"][:, at],
        }
        with torch.no_grad():
            found = after(**given, **cache)
        torch.testing.assert_close(found["logits"][:, 0], whole[:, step], atol=1e-10, rtol=1e-10)
        cache = {name.replace("present", "past_key_values"): value for name, value in found.items() if "." in name}


@pytest.mark.parametrize(
    ("name", "network", "layer"),
    [("bert", 1, LAYERS), ("llama", 0, LAYERS), ("gpt2", 0, LAYERS), ("opt", 0, LAYERS),
     ("opt-post-norm", 0, LAYERS - 1), ("gpt-neox", 0, LAYERS - 1)],
)  # fmt: skip
def test_gathers(name: str, network: int, layer: int, family: Family, feed: Feed) -> None:
    """One at the output of an encoder; a gather a layer, the last of them before a tied head or at the output."""
    program = family(name)
    after, report = permuted(program, feed)
    assert report.gathers == len(gathers(after.graph)) == network
    verify(after)
    after, report = permuted(program, feed, scope="layer")
    assert report.gathers == len(gathers(after.graph)) == layer
    verify(after)


@pytest.mark.parametrize("name", FAMILIES)
def test_ranges_ascend_along_the_stream(name: str, family: Family, feed: Feed) -> None:
    """Seen from outside: the mean of the relative ranges over all tensors of the stream, in the new order."""
    after, report = permuted(family(name), feed)
    [stream] = [domain for domain in report.domains if domain.residual]
    assert sorted(stream.order) == list(range(stream.size))
    last = [node for node in after.graph.nodes if (node.name, 2) in stream.values and node.op == "call_function"]
    context = Context(calibration=[feed(after, seed=seed) for seed in (1, 2)])
    seen = channel_statistics(after, [n for n in last if "view" not in n.name], context, "")
    ranges = [s.ranges / s.ranges.mean() for s in seen.values() if float(s.ranges.max()) > 0]
    mean = torch.stack(ranges).mean(0)
    assert float((mean.diff() < -1e-3).float().mean()) < 0.1
    assert mean[-4:].min() > mean[:4].max()


@pytest.mark.parametrize("name", ["bert", "opt-post-norm"])
def test_a_post_norm_layer_has_the_order_of_its_feed_forward_output(name: str, family: Family, feed: Feed) -> None:
    after, _ = permuted(family(name), feed, scope="layer")
    context = Context(calibration=[feed(after, seed=seed) for seed in (1, 2)])
    outputs = [part.output for part in feed_forwards(after.graph)]
    assert len(outputs) == LAYERS
    for value in channel_statistics(after, outputs, context, "").values():
        assert bool((value.ranges.diff() >= -1e-5).all())


@pytest.mark.parametrize("name", ["gpt-neox", "opt-post-norm"])
def test_layers_have_orders_of_their_own(name: str, family: Family, feed: Feed) -> None:
    _, report = permuted(family(name), feed, scope="layer")
    orders = [domain.order for domain in report.domains if domain.residual]
    assert len(set(orders)) == LAYERS


def test_inner_channels_are_sorted_or_not(family: Family, feed: Feed) -> None:
    program = family("llama")
    _, report = permuted(program, feed)
    assert [domain.size for domain in report.domains] == [32, 48, 48]
    _, report = permuted(program, feed, inner=False)
    assert [domain.residual for domain in report.domains] == [True]
    _, report = permuted(family("bert"), feed)
    assert [domain.size for domain in report.domains if domain.structure == "within"] == [8] * 2 * LAYERS


def test_what_is_ignored_stays(family: Family, feed: Feed) -> None:
    program = family("llama")
    after, report = permuted(program, feed, ignore=("model.layers.1.mlp.gate_proj",))
    assert [domain.size for domain in report.domains] == [48]
    assert report.domains[0].parameters[0][0] == "model.layers.0.mlp.gate_proj.weight"
    assert len(report.unchanged) == 1
    name = "model.layers.1.mlp.down_proj.weight"
    assert get_tensor(after.module, name) is get_tensor(program.module, name)
    with pytest.raises(BitlowerError, match="matches nothing"):
        permuted(program, feed, ignore=("model.layer.0",))


class Frozen(nn.Module):
    """A residual stream that a cumulative sum reads in its order."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        x = x + self.down(torch.relu(self.up(x)))
        return x.cumsum(-1)[..., -1:]


def test_a_frozen_stream_is_left_alone_and_said_why() -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randn(2, 3, 6)}
    program = load(Frozen().eval(), example_inputs=batch)
    context = Context(calibration=[batch])
    result = PassManager(parse_pipeline("clean,peg-permute")).run(program, context)
    report = context[PermutationReport]
    assert [domain.size for domain in report.domains] == [12]
    assert len(report.unchanged) == 1
    assert "frozen (%cumsum" in report.unchanged[0]
    for name in ("enter.weight", "down.bias"):
        assert get_tensor(result.module, name) is get_tensor(program.module, name)


class Fixed(nn.Module):
    """A feed-forward part whose inner channels are scaled by a buffer, which a model may make anew as it is loaded."""

    def __init__(self, fixed: bool) -> None:
        super().__init__()
        self.enter, self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.leave = nn.Linear(8, 2)
        if fixed:
            self.register_buffer("gain", torch.linspace(2, 1, 12))
        else:
            self.gain = nn.Parameter(torch.linspace(2, 1, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        return self.leave(x + self.down(torch.relu(self.up(x)) * self.gain))


@pytest.mark.parametrize(("fixed", "sizes"), [(True, [8]), (False, [8, 12])])
def test_channels_along_a_buffer_keep_their_order_and_a_second_run_changes_nothing(
    fixed: bool, sizes: list[int]
) -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randn(40, 3, 6)}
    program = load(Fixed(fixed).eval(), example_inputs=batch)
    context, gain = Context(calibration=[batch]), get_tensor(program.module, "gain")
    assert PegPermute().run(program, context)
    assert sorted(domain.size for domain in context[PermutationReport].domains) == sizes
    assert (get_tensor(program.module, "gain") is gain) is fixed
    program.recompile()
    assert not PegPermute().run(program, context)


def test_the_pipeline_checks_it_and_quantizers_follow(bert: Callable, batches: Callable) -> None:
    """Exact by contract on held-out batches; afterwards groups of channels have scales that ascend."""
    _, program = bert()
    context = Context(calibration=batches(3), evaluation=batches(1, seed=7))
    pipeline = "clean,peg-permute{groups=4},quantize{scheme=W8A8-peg4-full},calibrate{activations=minmax}"
    result = PassManager(parse_pipeline(pipeline)).run(program, context)
    assert "peg-permute{groups=4}" in result.passes
    assert domains(result.module)


def test_padding_does_not_count(bert: Callable, batches: Callable) -> None:
    _, program = bert()
    [batch] = batches(1, rows=2, length=7, padding=3)
    padded = {name: value.clone() for name, value in batch.items()}
    padded["input_ids"][1, -1:] = 55
    orders = []
    for given in (batch, padded):
        context = Context(calibration=[given])
        PassManager(parse_pipeline("clean,peg-permute")).run(program, context)
        orders.append([domain.order for domain in context[PermutationReport].domains])
    assert orders[0] == orders[1]


def test_the_report_is_plain_data(family: Family, feed: Feed) -> None:
    _, report = permuted(family("bert"), feed)
    results = {PermutationReport: report}
    assert decode_results(encode_results(results), "bitlower") == results


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_checkpoint_of_it_is_a_model_of_transformers(name: str, family: Family, feed: Feed, tmp_path: Path) -> None:
    """Weights that were turned round (GPT-2) go out as the model has them; transformers computes the same logits."""
    from transformers import AutoModelForCausalLM

    program = family(name)
    after, _ = permuted(program, feed)
    assert after.transposed == program.transposed
    batch = {k: v for k, v in feed(program, seed=3).items() if "." not in k}
    export(after, tmp_path, batches=[batch], dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        found = model(**batch).logits
    torch.testing.assert_close(found[1], program(**batch)["logits"][1], atol=1e-4, rtol=1e-4)


def test_no_checkpoint_can_hold_a_gather(family: Family, feed: Feed, tmp_path: Path) -> None:
    after, _ = permuted(family("bert"), feed)
    with pytest.raises(CheckError, match="a pass changed the graph in a way that no checkpoint can hold"):
        export(after, tmp_path, batches=[feed(after)], dtype="float32")


@pytest.mark.parametrize("settings", [{"groups": -1}, {"bits": 1}, {"bits": 17}])
def test_parameters_out_of_range(settings: dict[str, int]) -> None:
    with pytest.raises(BitlowerError, match=r"it takes int (of 0 or more|from 2 to 16)"):
        PegPermute(**settings)


def test_it_needs_calibration_data(family: Family) -> None:
    with pytest.raises(BitlowerError, match="peg-permute needs calibration data"):
        PegPermute().run(family("llama"), Context())


def test_statistics_are_those_of_the_values(family: Family, feed: Feed) -> None:
    program = family("llama")
    node = feed_forwards(program.graph)[0].output
    batches = [feed(program, seed=seed) for seed in (1, 2)]
    rows: list[torch.Tensor] = []

    def keep(_: object, value: torch.Tensor, batch: dict[str, torch.Tensor]) -> None:
        rows.append(value[batch["attention_mask"].bool()])

    observe(program, [node], batches, keep)
    found = channel_statistics(program, [node], Context(calibration=batches), "")[node]
    expected = torch.cat(rows)
    assert torch.equal(found.ranges, expected.amax(0) - expected.amin(0))
    torch.testing.assert_close(found.energy, expected.double().square().mean(0))
