from __future__ import annotations

import torch

from bitlower.ir import Scheme, get_tensor, ops, set_tensor
from bitlower.ir.dataflow import linears
from bitlower.ir.folding import without_quantizers
from bitlower.passes import Context
from bitlower.passes.canonical.clean import Clean
from bitlower.passes.quantizers.calibrate import Calibrate
from bitlower.passes.quantizers.quantize import Quantize


def test_it_computes_what_the_float_program_does(bert, batches, run) -> None:
    clean = run(bert()[1], Clean())
    data = batches()
    for scheme in ("W4A8-full", "W4A8-token"):
        simulated = run(clean, Quantize(Scheme.parse(scheme)), Calibrate(), context=Context(data))
        twin, twins = without_quantizers(simulated)
        reference = run(clean, Quantize(Scheme.parse(scheme)))  # "full" opens attention up
        for node in reference.graph.find_nodes(op="call_function", target=ops.fake_quantize):
            node.replace_all_uses_with(node.all_input_nodes[0])
        reference.recompile()
        with torch.no_grad():
            assert torch.equal(twin(**data[0])["logits"], reference(**data[0])["logits"])
        assert not twin.graph.find_nodes(op="call_function", target=ops.choose_qparams)
        assert [twins[node].name for node in linears(simulated.graph)] == [n.name for n in linears(twin.graph)]


def test_what_is_written_to_the_program_does_not_reach_it(bert, batches, run) -> None:
    simulated = run(bert()[1], Clean(), Quantize(Scheme.parse("W4A8")), Calibrate(), context=Context(batches()))
    twin, _ = without_quantizers(simulated)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    before = get_tensor(simulated.module, name)
    assert get_tensor(twin.module, name) is before
    set_tensor(simulated.module, name, torch.nn.Parameter(torch.zeros_like(before)))
    assert get_tensor(twin.module, name) is before
