import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from bitlower.frontends import load
from bitlower.ir import BitlowerError
from bitlower.ir.dataflow import linears
from bitlower.passes import Context
from bitlower.passes.rounding._token_gradients import token_gradients


def test_gradients_are_those_of_transformers_own_loss() -> None:
    """With left padding and two sequences a batch; the loss there is the mean over the tokens that count."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=50
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    program = load(model)
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    nodes = [node for node in linears(program.graph) if "mlp" in node.meta["path"]]
    found = token_gradients(program, nodes, Context([batch, batch]))

    noted: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if "mlp" in name and isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda _, args, value, name=name: value.register_hook(lambda g: noted.update({name: g})) and None
            )
    loss = model(**batch, labels=ids.masked_fill(mask == 0, -100)).loss
    (loss * mask[:, 1:].sum()).backward()
    assert len(nodes) == 6
    for node in nodes:
        expected = noted[node.meta["path"]].square().sum(-1)
        assert len(found[node]) == 2
        for actual in found[node]:
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-9)


def test_other_tasks_are_refused(bert, batches) -> None:
    _, program = bert()
    with pytest.raises(BitlowerError, match="for text generation only, not for text-classification"):
        token_gradients(program, linears(program.graph), Context(batches()))
