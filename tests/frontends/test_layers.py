"""Layers that repeat are traced once: the Program of all layers is that of the whole trace, node by node.

``BITLOWER_FAMILIES=FOLDER pytest tests/frontends/test_layers.py`` compares the two for every model in ``FOLDER``, each
with ten layers and random weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import fx
from torch.fx.node import map_arg
from transformers.models.llama import modeling_llama

from bitlower.frontends import _encoder, _instantiate, huggingface, load
from bitlower.frontends import trace_cache as _trace_cache
from bitlower.frontends._layers import representatives, shortened
from bitlower.ir import BitlowerError, Program, get_tensor

SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 1}
SLIDING = [*["sliding_attention", "sliding_attention", "full_attention"] * 3, "sliding_attention"]
GEMMA = GROUPED | {"num_hidden_layers": 10, "head_dim": 8, "layer_types": SLIDING, "sliding_window": 4}
T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 6}
NEO = {
    "vocab_size": 50, "hidden_size": 16, "num_layers": 6, "num_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32, "attention_types": [[["local"], 6]], "window_size": 4,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
KINDS: dict[str, tuple[str, str, dict[str, Any], tuple[int, ...]]] = {
    "bert": ("BertConfig", "BertForSequenceClassification", SIZES, (0, 1, 2)),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 16, "n_layer": 7, "n_head": 2, "vocab_size": 50}, (0, 1, 2)),
    "tied": ("LlamaConfig", "LlamaForCausalLM", GROUPED | {"tie_word_embeddings": True}, (0, 1, 2)),
    "experts": ("MixtralConfig", "MixtralForCausalLM", GROUPED | {"num_local_experts": 2}, (0, 1, 2)),
    "sliding and full attention": ("Gemma3TextConfig", "Gemma3ForCausalLM", GEMMA, (0, 1, 2, 3, 5)),
    "positions of the first layer": ("T5Config", "T5EncoderModel", T5, (0, 1, 2)),
    "constants in layers": ("GPTNeoConfig", "GPTNeoForCausalLM", NEO, (0, 1, 2)),
}
FAMILIES = sorted(Path(os.environ["BITLOWER_FAMILIES"]).iterdir()) if "BITLOWER_FAMILIES" in os.environ else []


def make(kind: str, **changes: Any) -> transformers.PreTrainedModel:
    configuration, model, sizes, _ = KINDS[kind]
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, configuration)(**sizes | changes)).eval()


@pytest.fixture(autouse=True)
def no_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(_trace_cache.VARIABLE)


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each traced model had."""
    seen: list[int] = []

    def counting(model: Any, *args: Any) -> Any:
        seen.append(model.config.get_text_config().num_hidden_layers)
        return real(model, *args)

    real = _encoder.export
    for module in (_encoder, huggingface):
        monkeypatch.setattr(module, "export", counting)
    return seen


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> Callable[[transformers.PreTrainedModel], Program]:
    """Traces a model with all its layers."""

    def trace(model: transformers.PreTrainedModel) -> Program:
        with monkeypatch.context() as patch:
            patch.setattr(_instantiate, "representatives", lambda model: None)
            return load(model)

    return trace


def same(ours: Program, theirs: Program) -> None:
    """Node by node with types, paths and source lines, tensor by tensor.

    Names of values are left out, as is which of several equal sizes of inputs is read, and how often a constant is
    held that the trace made itself: torch numbers and chooses as it goes.
    """
    for field in ("task", "inputs", "outputs", "notes", "lengths", "context_length", "config", "level"):
        assert getattr(ours, field) == getattr(theirs, field), field
    for one, other in zip(form(ours), form(theirs), strict=True):
        assert one == other
    tensors, others = (
        {name: tensor for name, tensor in program.tensors() if not is_made(name)} for program in (ours, theirs)
    )
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert (tensor.data_ptr(), tensor.shape) == (others[name].data_ptr(), others[name].shape) or torch.equal(
            tensor, others[name]
        ), name


def is_made(name: str) -> bool:
    return "lifted_tensor" in name


def form(program: Program) -> Iterator[Any]:
    nodes = [node for node in program.graph.nodes if not (node.op == "get_attr" and is_made(str(node.target)))]
    order = {node: place for place, node in enumerate(nodes)}

    def operand(x: fx.Node) -> Any:
        return order[x] if x in order else ("constant", repr(get_tensor(program.module, str(x.target)).tolist()))

    for node in nodes:
        if node.target is torch.ops.aten.sym_size.int and node.args[0].op == "placeholder":  # type: ignore[union-attr]
            yield "size", node.args[0].meta["type"].shape[node.args[1]]  # type: ignore[union-attr,index]
        else:
            yield node.op, node.target, map_arg(node.args, operand), map_arg(node.kwargs, operand), node.meta


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.nightly] if kind in ("gpt2", "tied", "experts") else []) for kind in KINDS],
)
def test_it_is_the_whole_trace(
    kind: str, exports: list[int], whole: Callable[[transformers.PreTrainedModel], Program]
) -> None:
    model = make(kind)
    program = load(model)
    assert exports == [len(KINDS[kind][3])]
    same(program, whole(model))
    assert exports[1:] == [model.config.get_text_config().num_hidden_layers]


@pytest.mark.parametrize("folder", FAMILIES, ids=lambda path: str(path.name))
def test_it_is_the_whole_trace_of_each_family(
    folder: Path, whole: Callable[[transformers.PreTrainedModel], Program]
) -> None:
    model = deepened(folder, 10)
    try:
        expected = whole(model)
    except BitlowerError as error:
        pytest.skip(f"refused: {error}")
    same(load(model), expected)


def deepened(folder: Path, layers: int) -> transformers.PreTrainedModel:
    """The model in ``folder`` with so many layers, its lists for each layer repeated, and random weights."""
    config = transformers.AutoConfig.from_pretrained(folder)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        count = getattr(part, "num_hidden_layers", None)
        for key, value in list(vars(part).items()):
            if isinstance(value, list) and len(value) == count and key != "architectures":
                setattr(part, key, (value * layers)[:layers])
        try:
            part.num_hidden_layers = layers
        except NotImplementedError:
            pytest.skip("its layers are counted in blocks")
    torch.manual_seed(0)
    named = json.loads((folder / "config.json").read_text())["architectures"][0]
    model: transformers.PreTrainedModel = getattr(transformers, named)(config)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_the_layers_that_are_traced(kind: str) -> None:
    """The first, and two of each kind behind it; every other one stands for the second of its kind."""
    layers = representatives(make(kind))
    assert layers is not None
    assert layers.traced == KINDS[kind][3]
    for place, order in enumerate(layers.stands_for):
        stands = layers.traced[order]
        assert stands == place or (0 < stands < place and layers.kinds[stands] == layers.kinds[place])
        assert place not in layers.traced or stands == place


def test_full_attention_never_stands_for_sliding() -> None:
    layers = representatives(make("sliding and full attention"))
    assert layers is not None
    assert [SLIDING[layers.traced[order]] for order in layers.stands_for] == SLIDING


def test_layers_that_differ_are_traced_each() -> None:
    """GPT-2 that divides its scores by the number of the layer has no two equal ones; four layers save too little."""
    assert representatives(make("gpt2", scale_attn_by_inverse_layer_idx=True)) is None
    assert representatives(make("gpt2", n_layer=4)) is None
    assert representatives(make("gpt2", n_layer=6)) is not None


def test_a_layer_with_a_hook_is_traced_itself() -> None:
    model = make("bert")
    assert representatives(model) is not None
    model.bert.encoder.layer[4].output.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert representatives(model) is None


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_before(fails: bool) -> None:
    model = make("sliding and full attention")
    before = describe(model)
    layers = representatives(model)
    assert layers is not None
    with pytest.raises(RuntimeError) if fails else nullcontext(), shortened(model, layers):
        assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3, 4]
        assert model.config.layer_types == [SLIDING[place] for place in layers.traced]
        assert model.config.num_hidden_layers == 5
        if fails:
            raise RuntimeError
    assert describe(model) == before


def describe(model: transformers.PreTrainedModel) -> Any:
    numbers = [layer.self_attn.layer_idx for layer in model.model.layers]
    return model.config.to_dict(), [id(module) for module in model.modules()], numbers, list(model.state_dict())


@pytest.mark.parametrize(
    "scale", [lambda layer: 1 + layer, lambda layer: 2 if layer == 4 else 1], ids=["all", "fourth"]
)
def test_a_layer_that_counts_is_found(
    scale: Callable[[int], int], exports: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no module shows, the traces of two layers do, or the comparison with the model: the whole is traced then."""
    forward = modeling_llama.LlamaDecoderLayer.forward

    def counting(self: Any, *args: Any, **options: Any) -> Any:
        return scale(self.self_attn.layer_idx) * forward(self, *args, **options)

    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", counting)
    model = make("tied")
    program = load(model)
    assert exports == [3, 6]
    ids = torch.arange(1, 9)[None]
    expected = model(input_ids=ids).logits
    given = program(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(8)[None])
    torch.testing.assert_close(given["logits"], expected, rtol=1e-4, atol=1e-4)


def test_weights_that_layers_share_stay_shared(
    whole: Callable[[transformers.PreTrainedModel], Program],
) -> None:
    """Layers 3 and 5 have one matrix, which neither of the traced layers shows."""
    model = make("bert")
    model.bert.encoder.layer[5].output.dense.weight = model.bert.encoder.layer[3].output.dense.weight
    program = load(model)
    same(program, whole(model))
    held = [name for name, _ in program.tensors() if name.endswith("output.dense.weight") and "attention" not in name]
    assert len(held) == 5
