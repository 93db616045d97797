"""The loop that trains a simulated Program: steps, schedule, evaluation, the best state, checkpoints and the report.

Killed at any step and started again it ends in the same bytes: what a step does depends on the state at its start,
the seed and its number alone, and a checkpoint at every evaluation holds that state.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import fx, nn

from bitlower.ir import Batch, BitlowerError, describe
from bitlower.ir.quantization.numerics import bfloat16_products
from bitlower.ir.trainable import TrainableModule
from bitlower.passes._machinery.base import Context
from bitlower.passes._machinery.checkpoints import Stored, load_checkpoint, save_checkpoint
from bitlower.passes.training._codes import CodeChanges
from bitlower.passes.training._devices import Devices
from bitlower.passes.training._objective import Evaluator, Terms
from bitlower.passes.training._optimizer import Rates, Schedule, learned_parameters, make_optimizer, rate_factor
from bitlower.passes.training._report import CurvePoint, TrainReport

_LATE = 0.9
"""Codes that change after this share of the steps count as oscillating."""
_CHECKPOINT = "training"


@dataclass(frozen=True)
class LoopOptions:
    """How long, how fast and how watched; the parameters of the pass ``qat`` with these names say what they are."""

    steps: int
    accumulate: int = 1
    schedule: Schedule = "linear"
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    freeze_ranges: float = 0.8
    evaluate_every: int = 100
    keep: Literal["best", "last"] = "best"
    products: Literal["float32", "bfloat16"] = "float32"


class Status:
    """The label of a progress display: it reads differently as the training goes on."""

    def __init__(self, name: str) -> None:
        self._name, self._figures = name, ""

    def __str__(self) -> str:
        return f"{self._name}{self._figures}"

    def show(self, loss: float, held_out: float | None, rate: float) -> None:
        """Have the latest figures read."""
        figures = {"loss": loss, "held out": held_out, "rate": rate}
        self._figures = "".join(f"  {key} {value:.4g}" for key, value in figures.items() if value is not None)


class Training:
    """One training of one module.

    Args:
        module: what is trained.
        evaluator: computes its losses.
        rates: what learns, and how fast.
        options: of the loop.
        context: training and held-out batches, seed, work folder, progress display.
        devices: where it runs; each process takes batches of its own, and all take the same steps.
    """

    def __init__(
        self,
        module: TrainableModule,
        evaluator: Evaluator,
        rates: Rates,
        options: LoopOptions,
        context: Context,
        devices: Devices,
    ) -> None:
        self.module, self.evaluator, self.options, self.context = module, evaluator, options, context
        self.devices = devices
        self.learned = learned_parameters(module, rates)
        self.optimizer = make_optimizer(self.learned, options.weight_decay)
        self.changes = CodeChanges(module)
        self.curve: list[CurvePoint] = []
        self._best: dict[str, torch.Tensor] = {}
        self._best_step = 0
        self._losses: list[float] = []
        self._order: tuple[int, list[int]] = (-1, [])

    def run(self, label: str) -> TrainReport:
        """Train; the module then has the best state, or the last one if that was asked for.

        Raises:
            BitlowerError: a loss or a gradient is not finite.
        """
        status, start = Status(label), self._resumed()
        self.module.train()
        with bfloat16_products() if self.options.products == "bfloat16" else nullcontext():
            for step in self.context.track(range(start, self.options.steps), status):
                if step % self.options.evaluate_every == 0:
                    self._look(step)
                self._turn(step)
                self._losses.append(self._step(step))
                status.show(self._losses[-1], self.curve[-1].held_out, self._factor(step))
            self._look(self.options.steps)
        return self._finish()

    def _factor(self, step: int) -> float:
        return rate_factor(step, self.options.steps, self.options.schedule, self.options.warmup)

    def _turn(self, step: int) -> None:
        """What happens once, before this step."""
        if step == round(self.options.freeze_ranges * self.options.steps):
            self.module.freeze_ranges()
        if step == round(_LATE * self.options.steps):
            self.changes.note()

    def _step(self, step: int) -> float:
        """One step of the optimizer; its loss."""
        factor, loss = self._factor(step), 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.optimizer.zero_grad()
        for part in range(self.options.accumulate):
            number = step * self.options.accumulate + part
            index = self._index(number * self.devices.processes + self.devices.rank)
            batch = self.context.training[index]
            terms = self.evaluator.losses(("training", index), batch, step, gradient=1 / self.options.accumulate)
            loss += self._finite(terms, step, index, batch) / self.options.accumulate
        parameters = [item.parameter for item in self.learned]
        self.devices.average(parameters)
        norm = nn.utils.clip_grad_norm_(parameters, self.options.clip or math.inf)
        if not bool(norm.isfinite()):
            bad = [
                i.name for i in self.learned if i.parameter.grad is not None and not i.parameter.grad.isfinite().all()
            ]
            raise BitlowerError(
                f"step {step + 1}: the gradient of {bad[0] if bad else 'all parameters together'} is not finite",
                hint="lower the learning rate",
            )
        self.optimizer.step()
        return loss

    def _finite(self, terms: Terms, step: int, index: int, batch: Batch) -> float:
        total = self.evaluator.total(terms)
        if math.isfinite(total):
            return total
        loss = next(name for name, value in terms.items() if not math.isfinite(value))
        raise BitlowerError(
            f"step {step + 1}: the loss {loss!r} of training batch {index + 1} is {terms[loss]}; "
            f"{self._first_bad(batch)}",
            hint="lower the learning rate, or look at that batch",
        )

    def _first_bad(self, batch: Batch) -> str:
        """The first value of the model that is not finite, in words."""
        finder = _Finder(self.evaluator.forward.body)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad():
            finder.run(*self.evaluator.program.arguments(inputs))
        return (
            f"first not finite is {describe(finder.bad_node)}" if finder.bad_node else "all values before it are finite"
        )

    def _index(self, number: int) -> int:
        """Which training batch comes as the ``number``-th: each once an epoch, in an order of the epoch's own."""
        count = len(self.context.training)
        epoch, place = divmod(number, count)
        if self._order[0] != epoch:
            generator = self.context.generator(f"training/epoch {epoch}")
            self._order = epoch, torch.randperm(count, generator=generator).tolist()
        return self._order[1][place]

    def _look(self, step: int) -> None:
        """Evaluate, keep the state if it is the best, and write a checkpoint."""
        if self.curve and self.curve[-1].step == step:
            return
        terms = self._held_out(step) if len(self.context.held_out) else {}
        held_out = self.evaluator.total(terms) if terms else None
        loss = sum(self._losses) / len(self._losses) if self._losses else None
        best = min((p.held_out for p in self.curve if p.held_out is not None), default=math.inf)
        self.curve.append(CurvePoint(step, loss, held_out, terms, self._factor(step)))
        self._losses = []
        if self.options.keep == "last" or held_out is None or held_out < best:
            self._best = {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()}
            self._best_step = step
        self._save(step)

    def _held_out(self, step: int) -> Terms:
        """Each loss on the held-out data, mean over its rows of texts or windows."""
        total: Terms = {}
        rows = 0
        self.module.eval()
        for index, batch in enumerate(self.context.held_out):
            count = len(next(iter(batch.values())))
            for name, value in self.evaluator.losses(("held-out", index), batch, step).items():
                total[name] = total.get(name, 0.0) + value * count
            rows += count
        self.module.train()
        return {name: value / rows for name, value in total.items()}

    def _finish(self) -> TrainReport:
        learned = sum(item.parameter.numel() for item in self.learned)
        rows = self.changes.rows()
        self.module.load_state_dict(self._best)
        self.module.eval()
        return TrainReport(self.options.steps, self._best_step, learned, tuple(self.curve), rows)

    def _save(self, step: int) -> None:
        """The whole state, under the names of what it is of; one process writes it."""
        if self.devices.rank or self.context.work is None:
            return
        state: dict[str, torch.Tensor] = {}
        kinds: dict[str, dict[str, torch.Tensor]] = {
            "now": dict(self.module.named_parameters()) | dict(self.module.named_buffers()),
            "best": self._best,
            "late": self.changes.late,
            **{f"memory.{name}": memory for name, memory in self.evaluator.memories.items()},
            **{
                f"optimizer.{item.name}": self.optimizer.state[item.parameter]
                for item in self.learned
                if item.parameter in self.optimizer.state
            },
        }
        for kind, tensors in kinds.items():
            state |= {f"{kind}/{name}": tensor.detach().clone() for name, tensor in tensors.items()}
        form = {"step": step, "best_step": self._best_step, "curve": [asdict(point) for point in self.curve]}
        save_checkpoint(self.context.work, _CHECKPOINT, Stored(state, [form]))

    def _resumed(self) -> int:
        """The step of the last checkpoint, whose state is then the present one; 0 without any."""
        stored = load_checkpoint(self.context.work, _CHECKPOINT)
        if stored is None:
            return 0
        kinds: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in stored.tensors.items():
            kind, _, key = name.partition("/")
            kinds.setdefault(kind, {})[key] = tensor
        [form] = stored.rows
        self._restore(kinds)
        self._best_step, self.curve = form["best_step"], [CurvePoint(**point) for point in form["curve"]]
        return int(form["step"])

    def _restore(self, kinds: dict[str, dict[str, torch.Tensor]]) -> None:
        with torch.no_grad():
            for name, tensor in (*self.module.named_parameters(), *self.module.named_buffers()):
                tensor.copy_(kinds["now"][name])
        self._best, self.changes.late = kinds["best"], kinds.get("late", {})
        for name, memory in self.evaluator.memories.items():
            for key, tensor in memory.items():
                tensor.copy_(kinds[f"memory.{name}"][key])
        for item in self.learned:
            if state := kinds.get(f"optimizer.{item.name}"):
                self.optimizer.state[item.parameter] = dict(state)


class _Finder(fx.Interpreter):
    """Runs a graph until a value is not finite."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.bad_node: fx.Node | None = None

    def run_node(self, node: fx.Node) -> Any:
        """Compute ``node`` and look at what comes out."""
        value = super().run_node(node)
        floats = isinstance(value, torch.Tensor) and value.is_floating_point()
        if self.bad_node is None and node.op.startswith("call") and floats and bool(value.isnan().any()):
            self.bad_node = node
        return value
