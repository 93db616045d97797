"""How much each token of a layer's output matters to the loss: the squared norm of the loss's gradient there."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from bitlower.ir import Batch, BitlowerError, Program
from bitlower.passes._machinery.base import Context


def token_gradients(
    program: Program, nodes: Collection[fx.Node], context: Context
) -> dict[fx.Node, list[torch.Tensor]]:
    """``‖∂ℓ/∂y_t‖²`` of each of ``nodes``, y being its value, on each calibration batch: ``[batch, sequence]`` each.

    ℓ is the cross-entropy of the next token, summed over the sequence; padding has no part in it. Sequences are run
    one by one, forwards and backwards through the whole model.

    Raises:
        BitlowerError: the program returns no logits over tokens.
    """
    if program.task != "text-generation":
        raise BitlowerError(
            f"tokens are weighted by gradients for text generation only, not for {program.task}",
            hint="leave `gradient` at 0",
        )
    runner = _Recorder(program.module, nodes)
    gradient_norms: dict[fx.Node, list[torch.Tensor]] = {node: [] for node in nodes}
    for batch in context.track(context.calibration, "token gradients"):
        rows = [runner.gradients(program, batch, row) for row in range(len(batch["input_ids"]))]
        for node in nodes:
            gradient_norms[node].append(torch.stack([row[node] for row in rows]))
    return gradient_norms


class _Recorder(fx.Interpreter):
    """Runs forwards with gradients and notes those that reach the watched nodes."""

    def __init__(self, module: fx.GraphModule, nodes: Collection[fx.Node]) -> None:
        super().__init__(module, garbage_collect_values=True)
        self._nodes = nodes
        self._norms: dict[fx.Node, torch.Tensor] = {}

    def gradients(self, program: Program, batch: Batch, row: int) -> dict[fx.Node, torch.Tensor]:
        """Those of one sequence, ``[sequence]`` each; zero where the loss does not depend on the node."""
        one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        length = one["input_ids"].shape[1]
        self._norms = {node: torch.zeros(length) for node in self._nodes}
        with torch.enable_grad():
            results: Sequence[Any] = self.run(*program.arguments(one))
            names = [spec.name for spec in program.outputs]
            next_token_loss(results[names.index("logits")], one).backward()  # type: ignore[no-untyped-call]
        return self._norms

    def run_node(self, n: fx.Node) -> Any:
        """Compute ``n``; what is watched needs a gradient."""
        value = super().run_node(n)
        if n in self._nodes:
            value = value if value.requires_grad else value.detach().requires_grad_()
            value.register_hook(partial(self._note, n))
        return value.detach() if n.op == "get_attr" else value

    def _note(self, node: fx.Node, gradient: torch.Tensor) -> None:
        self._norms[node] = gradient.square().sum(-1).reshape(-1)


def next_token_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The cross-entropy of each token but the first given those before it, summed; padding left out.

    ``logits`` are ``[batch, sequence, vocabulary]``.
    """
    ids = batch["input_ids"]
    mask = batch["attention_mask"][:, -ids.shape[1] :].bool()
    targets = ids.masked_fill(~mask, -100)[:, 1:]
    return functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=-100, reduction="sum"
    )
