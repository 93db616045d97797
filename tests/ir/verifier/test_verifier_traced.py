import pytest
import torch
from transformers import BertConfig, BertModel

from bitlower.frontends import load
from bitlower.ir import CheckError, Level, set_tensor
from bitlower.ir.verifier import verify
from bitlower.passes import Context, PassManager, parse_pipeline

SCHEMES = ["W8A8", "W8A8-full", "W4A8-token", "W4A16-g16", "W8A8-peg4", "W4A8-asym"]


@pytest.fixture(scope="module")
def traced():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=32, architectures=["BertModel"],
    )  # fmt: skip
    return load(BertModel(config))


def test_a_traced_model_passes(traced):
    verify(traced)
    traced.clone().recompile()
    verify(traced)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_sound_at_every_level(traced, scheme):
    ids = torch.arange(12).reshape(2, 6)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    context, program = Context([batch]), traced
    steps = parse_pipeline(f"clean,quantize{{scheme={scheme}}},smooth,calibrate,lower-integer")
    for step, level in zip(steps, (Level.FLOAT, *[Level.SIMULATED] * 3, Level.INTEGER), strict=True):
        program = PassManager([step], verify=False).run(program, context)
        assert program.level is level
        verify(program)


def test_a_mask_may_hold_infinities_but_no_nan(traced):
    program = traced.clone()
    set_tensor(program.module, "mask", torch.tensor([0.0, -torch.inf]))
    with program.graph.inserting_before(program.graph.output_node()):
        program.graph.get_attr("mask")
    verify(program)
    set_tensor(program.module, "mask", torch.tensor([0.0, torch.nan]))
    with pytest.raises(CheckError, match="the tensor 'mask' holds NaN"):
        verify(program)


def test_every_graph_is_checked(traced):
    program, other = traced.clone(), traced.clone()
    program.graphs["decoder"] = other.module
    verify(program)
    next(node for node in other.graph.nodes if node.name == "layer_norm").meta.pop("type")
    with pytest.raises(CheckError, match="has no type"):
        verify(program)
