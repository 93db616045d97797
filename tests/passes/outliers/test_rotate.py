"""rotate: the same function with the residual stream in another basis, in which no channel stands out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from bitlower.backends.checkpoint import export
from bitlower.frontends import load
from bitlower.ir import BitlowerError, Program, get_tensor, set_tensor
from bitlower.ir.dataflow import residual_sums
from bitlower.ir.observe import observe
from bitlower.ir.storage import is_mapped, spill
from bitlower.ir.verifier import verify
from bitlower.passes import Context, PassManager, parse_pipeline
from bitlower.passes._machinery.results import decode_results, encode_results
from bitlower.passes.outliers.rotate import Rotate, RotationReport, StreamRotation

aten = torch.ops.aten
PRE_NORM = ["llama", "gemma", "gpt2", "opt", "gpt-neox", "phi"]
TIED = {"llama": "lm_head.weight", "gemma": "lm_head.weight", "gpt2": "lm_head.weight", "opt": "lm_head.weight"}
Family = Callable[[str], Program]
Feed = Callable[..., dict[str, torch.Tensor]]


def rotated(program: Program, seed: int = 0, **settings: object) -> tuple[Program, StreamRotation]:
    context = Context(seed=seed)
    result = program.clone()
    assert Rotate(**settings).run(result, context)
    result.recompile()
    [stream] = context[RotationReport].streams
    return result, stream


def assert_equal(before: Program, after: Program, feed: Feed, pasts: tuple[int, ...] = (0, 3)) -> None:
    with torch.no_grad():
        for past in pasts:
            inputs = feed(before, past=past, seed=past, dtype=torch.float64)
            found = after(**inputs)
            for name, value in before(**inputs).items():
                torch.testing.assert_close(found[name], value, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", PRE_NORM)
def test_the_function_stays_with_and_without_a_past(
    name: str, family: Family, in_float64: Callable, feed: Feed
) -> None:
    before = in_float64(family(name))
    after, report = rotated(before)
    assert_equal(before, after, feed)
    assert report.matrix == "hadamard"  # 36 has one too, Paley's
    assert report.centred == (name not in ("llama", "gemma"))
    assert report.untied == ((TIED[name],) if name in TIED else ())
    assert report.products == 0
    assert len(report.norms) == (3 if name == "phi" else 5)


@pytest.mark.parametrize("name", PRE_NORM)
def test_no_operation_is_added(name: str, family: Family) -> None:
    before = family(name)
    after, _ = rotated(before)
    verify(after)
    kinds = [[node.target for node in p.graph.nodes if node.op == "call_function"] for p in (before, after)]
    rms = [aten.rms_norm.default if kind is aten.layer_norm.default else kind for kind in kinds[0]]
    assert sorted(map(str, rms)) == sorted(map(str, kinds[1]))


def test_the_stream_holds_the_rotated_values(family: Family, in_float64: Callable, feed: Feed) -> None:
    """All of them by one orthogonal matrix, which least squares finds again."""
    before = in_float64(family("llama"))
    after, _ = rotated(before)
    inputs = feed(before, seed=1, dtype=torch.float64)
    names = [node.name for node in residual_sums(before.graph)]
    values: list[list[torch.Tensor]] = []
    for program in (before, after):
        seen: list[torch.Tensor] = []
        observe(program, names, [inputs], lambda node, value, batch, seen=seen: seen.append(value.reshape(-1, 32)))
        values.append(seen)
    old, new = (torch.cat(seen) for seen in values)
    assert old.shape[0] >= 32
    basis = torch.linalg.lstsq(old, new).solution
    torch.testing.assert_close(old @ basis, new, atol=1e-8, rtol=0)
    torch.testing.assert_close(basis @ basis.T, torch.eye(32, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(basis.abs(), torch.full((32, 32), 32**-0.5, dtype=torch.float64), atol=1e-6, rtol=0)


def test_a_planted_outlier_channel_is_spread(family: Family, in_float64: Callable, feed: Feed) -> None:
    before = in_float64(family("llama"))
    name = "model.layers.0.mlp.down_proj.weight"
    weight = get_tensor(before.module, name).detach().clone()
    weight[5] *= 500
    set_tensor(before.module, name, nn.Parameter(weight))
    after, _ = rotated(before)
    assert_equal(before, after, feed)
    total = residual_sums(before.graph)[1].name
    peaks = []
    for program in (before, after):

        def keep(_: object, value: torch.Tensor, batch: object) -> None:
            peaks.append(float(value.abs().max() / value.std()))

        observe(program, [total], [feed(before, dtype=torch.float64)], keep)
    assert peaks[1] < 0.6 * peaks[0]


def test_norms_lose_their_weights_and_stay_where_the_model_has_them(family: Family) -> None:
    after, _ = rotated(family("llama"))
    for norm in after.graph.find_nodes(op="call_function", target=aten.rms_norm.default):
        assert bool((get_tensor(after.module, norm.args[2].target) == 1).all())
    after, _ = rotated(family("gemma"))  # multiplies with 1 + w
    assert not bool(get_tensor(after.module, "model.norm.weight").any())
    after, _ = rotated(family("gpt2"))
    for norm in after.graph.find_nodes(op="call_function", target=aten.rms_norm.default):
        assert norm.args[2] is None


def test_a_tie_is_kept_where_the_last_norm_has_nothing_to_move(
    family: Family, in_float64: Callable, feed: Feed
) -> None:
    """One factor for all channels commutes with a rotation."""
    before = in_float64(family("llama"))
    set_tensor(before.module, "model.norm.weight", nn.Parameter(torch.full((32,), 1.7, dtype=torch.float64)))
    after, report = rotated(before)
    assert report.untied == ()
    assert "model.norm" not in report.norms
    assert_equal(before, after, feed)


class Encoder(nn.Module):
    """Pre-norm, with the stream itself (or its last norm) given out, and a vector that is added to it."""

    def __init__(self, norm: type[nn.Module], *, raw: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 12)
        self.shift = nn.Parameter(torch.randn(12))
        self.first, self.last = norm(12), norm(12)
        self.up, self.down, self.pooled = nn.Linear(12, 24), nn.Linear(24, 12), nn.Linear(12, 3)
        self.raw = raw
        with torch.no_grad():
            for parameter in (*self.first.parameters(), *self.last.parameters()):
                parameter += 0.3 * torch.randn(12)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = (self.table(ids) + self.shift) * 3.5
        x = x + self.down(torch.relu(self.up(self.first(x))))
        hidden = self.last(x)
        return (x if self.raw else hidden), self.pooled(hidden[:, 0])


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_what_is_given_out_is_turned_back_by_a_product(norm: type[nn.Module]) -> None:
    batch = {"ids": torch.arange(20).reshape(4, 5)}
    program = load(Encoder(norm, raw=False).eval(), example_inputs=batch)
    context = Context(evaluation=[batch])
    result = PassManager(parse_pipeline("clean,rotate")).run(program, context)
    [stream] = context[RotationReport].streams
    assert stream.products == 1
    assert stream.size == 12
    for name, value in program(**batch).items():
        torch.testing.assert_close(result(**batch)[name], value, atol=1e-5, rtol=1e-5)


def test_the_raw_stream_of_layer_norms_cannot_be_given_out() -> None:
    """It has a mean, which the rotated stream of a LayerNorm model has not."""
    batch = {"ids": torch.arange(20).reshape(4, 5)}
    program = load(Encoder(nn.RMSNorm, raw=True).eval(), example_inputs=batch)
    result = PassManager(parse_pipeline("clean,rotate")).run(program, Context(evaluation=[batch]))
    torch.testing.assert_close(result(**batch), program(**batch), atol=1e-5, rtol=1e-5)
    program = load(Encoder(nn.LayerNorm, raw=True).eval(), example_inputs=batch)
    with pytest.raises(BitlowerError, match="reads the stream with its mean"):
        PassManager(parse_pipeline("clean,rotate")).run(program, Context(evaluation=[batch]))


@pytest.mark.parametrize(
    ("name", "place"),
    [("bert", "adds what the norm embeddings.LayerNorm gives"), ("opt-post-norm", "self_attn_layer_norm gives")],
)
def test_post_norm_is_refused_and_the_place_named(name: str, place: str, family: Family) -> None:
    with pytest.raises(BitlowerError, match=place) as caught:
        rotated(family(name))
    assert "post-norm" in str(caught.value)
    assert "peg-permute" in caught.value.hint


class Odd(nn.Module):
    """A stream with ``function`` between its parts."""

    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function
        self.norm, self.up, self.down = nn.RMSNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.enter, self.leave = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.leave(self.function(self, x))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x: x.relu(), "it is not linear in the channels"),
        (lambda m, x: x * m.norm.weight, "it is not linear in the channels"),
        (lambda m, x: x.cumsum(-1), "cumsum"),
        (lambda m, x: m.norm(m.norm(x)), "it normalizes what another norm gives"),
        (lambda m, x: torch.relu(m.norm(x)), "it is not linear in the channels"),
        (lambda m, x: x @ x.transpose(1, 2) @ x, "the channels are not its whole last axis"),
        (lambda m, x: x + x.mean(-1, keepdim=True), "it reads the channels and is no linear layer"),
    ],
)
def test_what_is_not_linear_in_the_stream_is_named(function: Callable, reason: str) -> None:
    batch = {"x": torch.randn(2, 3, 4)}
    program = load(Odd(function).eval(), example_inputs=batch)
    with pytest.raises(BitlowerError, match=reason):
        PassManager(parse_pipeline("clean,rotate")).run(program, Context(evaluation=[batch]))


def test_linears_may_read_the_stream_itself() -> None:
    batch = {"x": torch.randn(2, 3, 4)}
    program = load(Odd(lambda m, x: x / 2).eval(), example_inputs=batch)
    result = PassManager(parse_pipeline("clean,rotate")).run(program, Context(evaluation=[batch]))
    torch.testing.assert_close(result(**batch), program(**batch), atol=1e-5, rtol=1e-5)


def test_without_a_residual_stream_there_is_nothing_to_rotate() -> None:
    program = load(nn.Linear(4, 4), example_inputs={"input": torch.randn(2, 4)})
    with pytest.raises(BitlowerError, match="no residual stream"):
        Rotate().run(program, Context())


def test_random_matrices_on_request_and_seeds(family: Family, in_float64: Callable, feed: Feed) -> None:
    before = in_float64(family("llama"))
    after, report = rotated(before, matrix="orthogonal")
    assert report.matrix == "orthogonal"
    assert_equal(before, after, feed)
    first, again, other = (rotated(family("llama"), seed=seed)[0].digest() for seed in (1, 1, 2))
    assert first == again != other


def test_the_weights_of_other_programs_are_not_written_to(family: Family) -> None:
    program = family("gpt2")
    kept = {name: tensor.clone() for name, tensor in program.tensors()}
    rotated(program)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in program.tensors())


def test_mapped_weights_stay_in_files(family: Family) -> None:
    program = family("llama")
    name = "model.layers.0.mlp.down_proj.weight"
    set_tensor(program.module, name, nn.Parameter(spill(get_tensor(program.module, name))))
    after, _ = rotated(program)
    assert is_mapped(get_tensor(after.module, name))


def test_the_report_is_plain_data(family: Family) -> None:
    context = Context()
    Rotate().run(family("llama"), context)
    results = {RotationReport: context[RotationReport]}
    assert decode_results(encode_results(results), "bitlower") == results


def test_a_rotated_llama_is_a_llama_of_transformers(family: Family, feed: Feed, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    program = family("llama")
    after, _ = rotated(program)
    batch = {k: v for k, v in feed(program, seed=3).items() if "." not in k}
    export(after, tmp_path, batches=[batch], dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert model.config.tie_word_embeddings is False
    with torch.no_grad():
        found = model(**batch).logits
    torch.testing.assert_close(found[1], program(**batch)["logits"][1], atol=1e-4, rtol=1e-4)


def test_layer_norms_that_became_rms_norms_fit_no_checkpoint(family: Family, feed: Feed, tmp_path: Path) -> None:
    after, _ = rotated(family("gpt2"))
    with pytest.raises(BitlowerError, match="is no weight of GPT2LMHeadModel"):
        export(after, tmp_path, batches=[feed(after)], dtype="float32")
