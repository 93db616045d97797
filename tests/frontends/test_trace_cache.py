"""Traces that are kept: the program of a fresh trace, with the weights of the model at hand; or a new trace."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama import modeling_llama

from bitlower.frontends import _encoder, huggingface, load
from bitlower.frontends import trace_cache as _trace_cache
from bitlower.ir import Program

SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32,
}  # fmt: skip
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertForSequenceClassification", SIZES),
    "llama": ("LlamaConfig", "LlamaForCausalLM", SIZES | {"tie_word_embeddings": True}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", SIZES | {"num_local_experts": 2, "num_key_value_heads": 2}),
}


def make(kind: str, seed: int = 0, **changes: Any) -> transformers.PreTrainedModel:
    configuration, model, sizes = KINDS[kind]
    torch.manual_seed(seed)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return getattr(transformers, model)(getattr(transformers, configuration)(**sizes | special | changes)).eval()


@pytest.fixture(autouse=True)
def no_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(_trace_cache.VARIABLE)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Program, Path]]:
    """Of each kind the Program of a fresh trace, and the folder that keeps the trace; neither is to be changed."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("bert", "llama", "gpt2")}
    return {kind: (load(make(kind), traces=folder), folder) for kind, folder in folders.items()}


@pytest.fixture
def keep(traced: dict[str, tuple[Program, Path]], tmp_path: Path) -> Callable[[str], None]:
    """``keep("bert")``: its trace is kept in ``tmp_path``."""

    def copy(kind: str) -> None:
        shutil.copytree(traced[kind][1], tmp_path, dirs_exist_ok=True)

    return copy


@pytest.fixture
def exports(traced: dict[str, tuple[Program, Path]], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The classes of the models that a test traces, one entry a trace."""
    seen: list[str] = []

    def counting(model: Any, *args: Any) -> Any:
        seen.append(type(model).__name__)
        return real(model, *args)

    real = _encoder.export
    for module in (_encoder, huggingface):
        monkeypatch.setattr(module, "export", counting)
    return seen


def same(a: Program, b: Program) -> None:
    """Node by node with types, paths and source lines, and byte by byte."""
    assert str(a) == str(b)
    for ours, theirs in zip(a.graph.nodes, b.graph.nodes, strict=True):
        assert (ours.name, ours.target, ours.meta) == (theirs.name, theirs.target, theirs.meta)
    assert a.digest() == b.digest()
    for field in ("task", "inputs", "outputs", "notes", "lengths", "context_length", "config", "source"):
        assert getattr(a, field) == getattr(b, field), field


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_a_kept_trace_is_the_fresh_one(kind: str, traced: dict[str, tuple[Program, Path]], exports: list[str]) -> None:
    fresh, folder = traced[kind]
    kept = load(make(kind), traces=folder)
    assert not exports
    same(kept, fresh)


def test_it_has_the_weights_of_the_model_at_hand(
    tmp_path: Path, keep: Callable[[str], None], exports: list[str]
) -> None:
    """Tied ones are one tensor, and all of them are read where the model has them."""
    keep("llama")
    model = make("llama", seed=1)
    program = load(model, traces=tmp_path)
    assert not exports
    same(program, load(model))
    table = dict(program.tensors())["model/model.embed_tokens.weight"]
    assert table.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert table.data_ptr() == model.lm_head.weight.data_ptr()


def _changed_attribute(model: Any) -> None:
    model.model.layers[0].self_attn.scaling *= 2


def _untied(model: Any) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())


def _subclassed(model: Any) -> None:
    class Doubled(type(model.model.layers[0].mlp)):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model.model.layers[0].mlp.__class__ = Doubled


@pytest.mark.parametrize(
    ("changes", "edit"),
    [
        ({"num_hidden_layers": 2}, None),
        ({"rms_norm_eps": 1e-3}, None),
        ({"attn_implementation": "eager"}, None),
        ({}, _changed_attribute),
        ({}, _untied),
        ({}, _subclassed),
    ],
)
def test_another_model_is_traced(
    changes: dict[str, Any], edit: Callable[[Any], None] | None, tmp_path: Path, keep: Callable[[str], None],
    exports: list[str],
) -> None:  # fmt: skip
    keep("llama")
    other = make("llama", **changes)
    if edit:
        edit(other)
    load(other, traces=tmp_path)
    assert len(exports) == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_other_versions_and_other_sources_are_other_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("bert")
    keys = {_trace_cache._key(model, "encoder"), _trace_cache._key(model, "decoder")}
    for module, name, value in (
        (torch, "__version__", "3.0"),
        (sys.modules["transformers"], "__version__", "6.0"),  # it replaces itself when its models are imported
        (_trace_cache, "__version__", "9"),
        (_trace_cache, "_own_sources", lambda: "other"),
        (_trace_cache, "_source_digest", lambda module: "other"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            keys.add(_trace_cache._key(model, "encoder"))
    assert len(keys) == 7


def test_a_function_that_was_replaced_in_this_process_is_found(
    tmp_path: Path, keep: Callable[[str], None], exports: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep("llama")
    monkeypatch.setattr(modeling_llama, "rotate_half", lambda x: -x)
    model = make("llama")
    program = load(model, traces=tmp_path)
    assert len(exports) == 1
    ids = torch.tensor([[3, 4, 5]])
    empty = {spec.name: torch.zeros(1, 2, 0, 8) for spec in program.inputs if "." in spec.name}
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(3)[None], **empty}
    torch.testing.assert_close(program(**given)["logits"], model(ids).logits)


@pytest.mark.parametrize(
    "edit",
    [
        lambda module: setattr(module, "forward", lambda x: 3 * x),
        lambda module: module.register_forward_hook(lambda module, given, result: 2 * result),
        lambda module: module.register_forward_pre_hook(lambda module, given: (-given[0],)),
    ],
)
def test_a_module_with_a_forward_or_hooks_of_its_own_keeps_nothing(
    edit: Callable[[torch.nn.Module], object], tmp_path: Path, keep: Callable[[str], None], exports: list[str]
) -> None:
    keep("llama")
    model = make("llama")
    edit(model.model.layers[0].mlp)
    load(model, traces=tmp_path)
    assert len(exports) == 1
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("damage", [b"", b"{}", b"no trace at all\n{}"])
def test_a_damaged_file_counts_as_missing_and_is_mended(
    damage: bytes, tmp_path: Path, traced: dict[str, tuple[Program, Path]], keep: Callable[[str], None]
) -> None:
    keep("bert")
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage or whole[:-9])
    same(load(make("bert"), traces=tmp_path), traced["bert"][0])
    assert path.read_bytes() == whole


def test_experts_that_are_cut_out_of_one_tensor_are_traced_each_time(tmp_path: Path) -> None:
    """They are the model's weights under names that the model does not know."""
    load(make("mixtral"), traces=tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_weight_is_kept(tmp_path: Path) -> None:
    model = make("gpt2", n_positions=512)
    load(model, traces=tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.stat().st_size < sum(parameter.nbytes for parameter in model.parameters())


def test_the_environment_names_a_folder(tmp_path: Path, exports: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITLOWER_TRACES", str(tmp_path / "here"))
    for _ in range(2):
        load(make("bert"))
    assert exports == ["BertForSequenceClassification"]
    assert len(list((tmp_path / "here").iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_no_reason_to_fail(tmp_path: Path, exports: list[str]) -> None:
    (tmp_path / "file").write_text("no folder")
    for _ in range(2):
        load(make("bert"), traces=tmp_path / "file")
    assert len(exports) == 2


def test_those_used_last_stay(tmp_path: Path, exports: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_trace_cache, "_MOST", 2)
    for entries in (51, 52, 51, 53):
        load(make("bert", vocab_size=entries), traces=tmp_path)
    assert len(exports) == 3
    load(make("bert", vocab_size=51), traces=tmp_path)
    assert len(exports) == 3
    load(make("bert", vocab_size=52), traces=tmp_path)
    assert len(exports) == 4
    assert len(list(tmp_path.iterdir())) == 2
