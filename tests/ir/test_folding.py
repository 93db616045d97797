import pytest
import torch

from bitlower.ir import Level, Program, Scheme, get_tensor, set_tensor
from bitlower.ir.folding import with_float_weights
from bitlower.ir.storage import is_mapped, spill


@pytest.fixture(scope="module", params=[Level.SIMULATED, Level.INTEGER], ids=str)
def lowered(request) -> tuple[Program, dict[str, torch.Tensor]]:
    from transformers import BertConfig, BertModel

    from bitlower.frontends import load
    from bitlower.passes import Context, PassManager
    from bitlower.passes.lowering.lower_integer import LowerInteger
    from bitlower.passes.quantizers.calibrate import Calibrate
    from bitlower.passes.quantizers.quantize import Quantize

    torch.manual_seed(0)
    config = BertConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    program = load(BertModel(config))
    ids = torch.randint(0, 50, (2, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    passes = [Quantize(Scheme.parse("W4A8-g8")), Calibrate(activations="minmax")]
    passes += [LowerInteger()] if request.param is Level.INTEGER else []
    return PassManager(passes).run(program, Context([batch])), batch


@pytest.mark.parametrize("mapped", [False, True])
def test_the_copy_computes_the_same_and_leaves_the_program_alone(lowered, mapped: bool) -> None:
    program, batch = lowered
    text = str(program)
    copy = with_float_weights(program, mapped=mapped)
    targets = {str(node.target) for node in copy.graph.find_nodes(op="get_attr")}
    folded = [get_tensor(copy.module, target) for target in targets if target.startswith("folded.")]
    assert {is_mapped(tensor) for tensor in folded} == {mapped}
    with torch.no_grad():
        expected, found = program(**batch), copy(**batch)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    roles = {quantizer.role for _, quantizer in copy.quantizers()}
    assert "linear-input" in roles
    assert not roles & {"linear-weight", "embedding-table"}
    assert str(program) == text


def test_weights_in_files_are_folded_into_files(lowered) -> None:
    program, _ = lowered
    copy = program.clone()
    node = next(n for n, q in copy.quantizers() if q.role == "linear-weight")
    target = str(node.args[0].target)
    set_tensor(copy.module, target, spill(get_tensor(copy.module, target)))
    folded = with_float_weights(copy)
    assert is_mapped(get_tensor(folded.module, f"folded.{node.name}"))
