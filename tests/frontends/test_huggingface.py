"""Models of transformers: the same numbers at any shape, and every way in which a folder can be bad."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    ASTConfig,
    ASTModel,
    AutoModel,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaModel,
)

from bitlower.frontends import load
from bitlower.ir import BitlowerError, Program, TensorType
from bitlower.ir.verifier import verify

CLOSE = {"atol": 1e-6, "rtol": 1e-5}  # where a file's weights lie in memory changes the last bit of a product
SHAPES = [(1, 1), (1, 5), (2, 10), (3, 17), (5, 24)]


@pytest.fixture(scope="module")
def programs(saved) -> dict[str, Program]:
    return {name: load(folder) for name, folder in saved.items()}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["encoder", "sharded"])
def test_outputs_are_those_of_transformers(saved, programs, inputs, name: str, shape: tuple[int, int]) -> None:
    """Also with padding, and at shapes other than the one of the trace."""
    model = AutoModel.from_pretrained(saved["encoder"]).eval()
    batch = inputs(*shape)
    with torch.no_grad():
        expected, found = model(**batch), programs[name](**batch)
    assert list(found) == ["last_hidden_state", "pooler_output"]
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], **CLOSE)


@pytest.mark.parametrize("shape", SHAPES[1:4])
def test_a_classifier_gives_the_logits_of_transformers(saved, programs, inputs, shape: tuple[int, int]) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(saved["classifier"]).eval()
    batch = inputs(*shape)
    program = programs["classifier"]
    with torch.no_grad():
        torch.testing.assert_close(program(**batch)["logits"], model(**batch)["logits"], **CLOSE)
    assert program.task == "text-classification"
    assert [str(spec) for spec in program.outputs] == ["logits: float32[batch, 3]"]


def test_inputs_and_outputs_have_names_and_symbolic_dimensions(programs) -> None:
    program = programs["encoder"]
    kind = TensorType(torch.int64, ("batch", "sequence"))
    assert [(spec.name, spec.type) for spec in program.inputs] == [
        (name, kind) for name in ("input_ids", "attention_mask", "token_type_ids")
    ]
    assert [str(spec) for spec in program.outputs] == [
        "last_hidden_state: float32[batch, sequence, 32]",
        "pooler_output: float32[batch, 32]",
    ]
    verify(program)


def test_configuration_and_tokenizer_come_along(saved, programs) -> None:
    folder, program = saved["encoder"], programs["encoder"]
    config = json.loads((folder / "config.json").read_text())
    for key in ("hidden_size", "model_type", "vocab_size", "architectures"):
        assert program.config[key] == config[key]
    assert str(folder) not in json.dumps(program.config)
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(program.assets)
    assert all(data == (folder / name).read_bytes() for name, data in program.assets.items())
    assert not {"model.safetensors", "config.json"} & set(program.assets)


def test_parameters_keep_their_names(saved, programs) -> None:
    stored = load_file(saved["encoder"] / "model.safetensors")
    held = {name.removeprefix("model/"): tensor for name, tensor in programs["encoder"].tensors()}
    assert set(stored) <= set(held)
    assert all(torch.equal(held[name], tensor) for name, tensor in stored.items())


def test_loading_twice_gives_equal_programs(saved, programs) -> None:
    again = load(saved["classifier"])
    assert again.digest() == programs["classifier"].digest()


def test_a_model_in_memory_is_left_as_it_is(saved, inputs) -> None:
    model = AutoModel.from_pretrained(saved["encoder"]).half().train()
    program = load(model)
    assert model.training
    assert all(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert {t.dtype for _, t in program.tensors() if t.is_floating_point()} == {torch.float32}
    batch = inputs(2, 7)
    with torch.no_grad():
        expected = model.eval().float()(**batch).last_hidden_state
    torch.testing.assert_close(program(**batch)["last_hidden_state"], expected, **CLOSE)


def test_models_without_token_types() -> None:
    config = DistilBertConfig(vocab_size=60, dim=32, n_layers=1, n_heads=4, hidden_dim=64, max_position_embeddings=24)
    program = load(DistilBertModel(config))
    assert [spec.name for spec in program.inputs] == ["input_ids", "attention_mask"]


def test_positions_that_depend_on_padding() -> None:
    """RoBERTa counts positions from the padding token."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=24, pad_token_id=1,
    )  # fmt: skip
    model = RobertaModel(config).eval()
    program = load(model)
    ids = torch.tensor([[5, 9, 3, 1, 1], [7, 1, 1, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": (ids != 1).long(), "token_type_ids": torch.zeros_like(ids)}
    with torch.no_grad():
        torch.testing.assert_close(program(**batch)["last_hidden_state"], model(**batch).last_hidden_state, **CLOSE)


def test_a_model_without_a_head_that_hears_is_an_error() -> None:
    config = ASTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, max_length=64)
    with pytest.raises(BitlowerError, match="ASTModel hears sound alone, and feature-extraction is not for that; pass"):
        load(ASTModel(config))


def test_own_example_inputs(saved, inputs) -> None:
    model = AutoModel.from_pretrained(saved["encoder"]).eval()
    example = {name: value for name, value in inputs(2, 6).items() if name != "token_type_ids"}
    program = load(model, example_inputs=example)
    assert [spec.name for spec in program.inputs] == ["input_ids", "attention_mask"]
    batch = {name: inputs(3, 9)[name] for name in example}
    with torch.no_grad():
        torch.testing.assert_close(program(**batch)["last_hidden_state"], model(**batch).last_hidden_state, **CLOSE)


def test_nothing_is_said_on_the_way(copy, capfd) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(copy())
    out, err = capfd.readouterr()
    assert out == ""
    assert "\n".join(line for line in err.splitlines() if line.strip()) == ""


# --- what can be wrong with a folder


def change(folder, edit, file: str = "model.safetensors") -> None:
    """Rewrite the weights: ``edit`` maps the dictionary of tensors."""
    tensors = load_file(folder / file)
    edit(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def test_no_configuration(copy) -> None:
    folder = copy()
    (folder / "config.json").unlink()
    with pytest.raises(BitlowerError, match=r"holds no config\.json"):
        load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not JSON: it holds a list, not a JSON object"),
        ("\x00", "is not JSON"),
        ("", "is not JSON"),
    ],
)
def test_a_configuration_that_is_none(copy, text: str, message: str) -> None:
    folder = copy()
    (folder / "config.json").write_text(text)
    with pytest.raises(BitlowerError, match=rf"config\.json {message}"):
        load(folder)


def test_remote_code_is_refused(copy) -> None:
    folder = copy(auto_map={"AutoModel": "modeling.Model"})
    (folder / "modeling.py").write_text("raise RuntimeError('ran')")
    with pytest.raises(BitlowerError, match=r"asks for remote code .* never run; use an architecture that ships"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 30}, "not a multiple"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"model_type": "unheard-of"}, "unheard-of"),
        ({"hidden_act": "unheard-of"}, "unheard-of"),
        ({"architectures": None}, r"\(none given\) fits no task; name one of feature-extraction"),
        ({"architectures": ["BertForMultipleChoice"]}, "BertForMultipleChoice is for multiple choice, which is not"),
        ({"architectures": ["Unheard"]}, "Unheard fits no task"),
        ({"intermediate_size": 48}, r"the weight 'encoder\.layer\.0.*' has the shape \[.*64.*\], config.json asks for"),
        ({"num_hidden_layers": 3}, r"the weight 'encoder\.layer\.2\..*' is missing"),
        ({"num_hidden_layers": 1}, r"fewer layers than the weights hold: 'encoder\.layer\.1\."),
    ],
)
def test_configurations_that_fit_no_model_or_not_these_weights(copy, changes: dict[str, object], message: str) -> None:
    folder = copy(**changes)
    with pytest.raises(BitlowerError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_no_weights(copy) -> None:
    folder = copy()
    (folder / "model.safetensors").unlink()
    with pytest.raises(BitlowerError, match=r"the weights .*model\.safetensors are missing; fetch the model again"):
        load(folder)


def test_pickled_weights_only(copy) -> None:
    folder = copy()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BitlowerError, match="are missing; convert the pickled weights to safetensors"):
        load(folder)


@pytest.mark.parametrize("size", [0, 7, 100, -10])
def test_truncated_weights(copy, size: int) -> None:
    folder = copy()
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:size])
    with pytest.raises(BitlowerError, match=r"model\.safetensors is damaged: .*; fetch the file again"):
        load(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(copy, bad: float) -> None:
    folder, name = copy(), "encoder.layer.1.attention.self.key.weight"
    change(folder, lambda tensors: tensors[name].__setitem__((3, 4), bad))
    with pytest.raises(BitlowerError, match=rf"the weight '{name}' holds NaN or Inf"):
        load(folder)


def test_a_weight_of_another_shape(copy) -> None:
    folder, name = copy(), "encoder.layer.0.output.dense.weight"
    change(folder, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))
    with pytest.raises(BitlowerError, match=rf"'{name}' has the shape \[64, 32\], config.json asks for \[32, 64\]"):
        load(folder)


def test_a_weight_that_is_missing(copy) -> None:
    folder, name = copy(), "encoder.layer.0.output.dense.weight"
    change(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(BitlowerError, match=rf"the weight '{name}' is missing"):
        load(folder)


def test_a_head_without_weights(copy) -> None:
    """transformers would make them up at random."""
    with pytest.raises(BitlowerError, match=r"'classifier\.\w+' is missing; is the task 'text-classification' right\?"):
        load(copy(), task="text-classification")


def test_the_encoder_of_a_classifier(saved, programs, inputs) -> None:
    """A head that the task does not need is no error."""
    program = load(saved["classifier"], task="feature-extraction")
    model = AutoModel.from_pretrained(saved["classifier"]).eval()
    batch = inputs(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(program(**batch)["last_hidden_state"], model(**batch).last_hidden_state, **CLOSE)


def test_sharded_weights_are_several_files(saved) -> None:
    assert len(list(saved["sharded"].glob("*.safetensors"))) > 2


def test_a_shard_that_is_missing(copy) -> None:
    folder = copy("sharded")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(BitlowerError, match=f"the weights .*{shard.name} are missing"):
        load(folder)


def test_a_shard_with_nan(copy) -> None:
    folder = copy("sharded")
    name = "embeddings.LayerNorm.bias"
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    change(folder, lambda tensors: tensors[name].fill_(float("nan")), index[name])
    with pytest.raises(BitlowerError, match=rf"{index[name]}: the weight '{name}' holds NaN"):
        load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "does not say which file holds which weight"),
        ('{"weight_map": {"a": 1}}', "does not say which file"),
        ('{"weight_map": {"a": "../../model.safetensors"}}', "does not say which file"),
    ],
)
def test_a_damaged_index(copy, text: str, message: str) -> None:
    folder = copy("sharded")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(BitlowerError, match=message):
        load(folder)
