"""A Program as a trainable module: the same bits, one parameter a tensor, and the way back."""

import pytest
import torch

from bitlower.ir import BitlowerError, get_tensor
from bitlower.ir.learnable import RangeSettings
from bitlower.passes import Context, PassManager, parse_pipeline

SCHEMES = ["W8A8-full", "W4A8-g16-asym-e2", "W8A8-token", "W4A8-peg4-full", "W4A8-upeg3-full", "W3A16-g24-e8"]
FAMILIES = ["bert", "llama", "gpt2"]


@pytest.fixture(scope="module")
def calibrated(family, feed):
    made = {}

    def make(name, scheme="W8A8-full"):
        if (name, scheme) not in made:
            program = family(name)
            context = Context([feed(program, seed=seed) for seed in (1, 2)])
            passes = parse_pipeline(f"quantize{{scheme={scheme}}},calibrate")
            made[name, scheme] = PassManager(passes).run(program, context)
        return made[name, scheme]

    return make


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", FAMILIES)
def test_an_untrained_module_gives_the_same_bits(calibrated, feed, name, scheme):
    program = calibrated(name, scheme)
    batch = feed(program, seed=3)
    expected, found = program(**batch), program.trainable_module()(**batch)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("scheme", SCHEMES[:2])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_trained_module_is_the_program_that_takes_its_state(calibrated, feed, name, scheme):
    program = calibrated(name, scheme)
    before = program.digest()
    module, batch = program.trainable_module(RangeSettings(parametrization="log")), feed(program, seed=3)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        sum(value.float().square().mean() for value in module(**batch).values()).backward()
        optimizer.step()
    trained = program.load_trained(module.state_dict())
    found = trained(**batch)
    for key, value in module(**batch).items():
        assert torch.equal(found[key], value), key
    assert program.digest() == before
    assert trained.digest() != before


def test_every_parameter_of_the_model_learns_and_no_shared_tensor_is_written(calibrated, feed):
    program = calibrated("bert")
    module = program.trainable_module()
    sum(value.square().mean() for value in module(**feed(program)).values()).backward()
    without = {name for name, parameter in module.named_parameters() if parameter.grad is None}
    assert without == set()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    originals = {name: tensor.clone() for name, tensor in calibrated("bert").tensors()}
    assert all(torch.equal(tensor, originals[name]) for name, tensor in program.tensors())


def test_a_tied_table_is_one_parameter_with_one_quantizer(calibrated, feed):
    program = calibrated("llama", "W4A8-g16-asym-e2")
    module = program.trainable_module()
    tables = [name for name, parameter in module.named_parameters() if parameter.shape == (60, 32)]
    assert len(tables) == 1
    assert [weight for weight in module.weights.values() if weight == tables[0].removeprefix("model.")] == [
        tables[0].removeprefix("model.")
    ]
    with torch.no_grad():
        dict(module.named_parameters())[tables[0]].mul_(1.5)
    trained = program.load_trained(module.state_dict())
    quantized = [node for node, found in trained.quantizers() if found.tensor == tables[0].removeprefix("model.")]
    assert len(quantized) == 1
    batch = feed(program)
    assert torch.equal(trained(**batch)["logits"], module(**batch)["logits"])


def test_taps_give_the_values_of_nodes(calibrated, feed):
    program = calibrated("bert")
    [last] = [node for node in program.graph.nodes if node.target is torch.ops.aten.layer_norm.default][-1:]
    quantizer = next(user for user in last.users if "quantizer" in user.meta)
    module = program.trainable_module(taps=[quantizer.name])
    batch = feed(program)
    assert torch.equal(module(**batch)[quantizer.name], program(**batch)["last_hidden_state"])
    with pytest.raises(BitlowerError, match="no node %nothing"):
        program.trainable_module(taps=["nothing"])


def test_what_cannot_be_trained_is_refused(calibrated, family, feed):
    program = family("bert")
    open_ = PassManager(parse_pipeline("quantize{scheme=W8A8}")).run(program, Context())
    with pytest.raises(BitlowerError, match=r"%.*: a quantizer without a range cannot be trained; run `calibrate`"):
        open_.trainable_module()
    lowered = PassManager(parse_pipeline("lower-integer")).run(calibrated("bert"), Context([feed(program)]))
    with pytest.raises(BitlowerError, match="train before `lower-integer`"):
        lowered.trainable_module()


def test_a_state_of_something_else_is_refused(calibrated):
    program, other = calibrated("bert"), calibrated("gpt2")
    with pytest.raises(BitlowerError, match="this is no state of a trainable module"):
        program.load_trained({"x": torch.zeros(1)})
    with pytest.raises(BitlowerError, match="the trained state does not fit the program"):
        program.load_trained(other.trainable_module().state_dict())


def test_scales_are_stored_as_they_were_learned(calibrated):
    """Trained scales go on verbatim: no pass estimates them again."""
    program = calibrated("bert", "W4A8-peg4-full")
    module = program.trainable_module()
    with torch.no_grad():
        for quantizer in module.quantizers().values():
            quantizer.range.mul_(1.1)
    trained = program.load_trained(module.state_dict())
    for name, quantizer in module.quantizers().items():
        assert torch.equal(get_tensor(trained.module, f"{name}.scale"), quantizer.qparams()[0])
