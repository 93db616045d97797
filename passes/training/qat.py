"""Quantization-aware training: weights, ranges, norms and biases of a simulated Program learn end to end."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from annotated_types import Ge, Interval

from bitlower.ir import BitlowerError, Level, Program
from bitlower.ir.charts import Topic
from bitlower.ir.learnable import ClippedGradient, Edge, GradientScale, Parametrization, Ranges, RangeSettings
from bitlower.ir.trainable import TrainableModule, write_trained
from bitlower.passes._machinery.base import Context, Contract, Pass
from bitlower.passes._machinery.loss import Objective
from bitlower.passes._machinery.losses import Losses
from bitlower.passes.training._devices import Where, make_devices, move
from bitlower.passes.training._engine import LoopOptions, Training
from bitlower.passes.training._forward import Taps
from bitlower.passes.training._objective import TEACHER, Evaluator, check_objective, make_teacher
from bitlower.passes.training._optimizer import Rates, Schedule
from bitlower.passes.training._teacher import float_reference

PRESETS: dict[str, dict[str, Any]] = {
    "own": {
        "losses": ["logits"],
        "learning_rate": {"weights": 1e-5, "embeddings": 1e-5, "norms": 1e-5, "biases": 1e-5, "scales": 1e-4,
                          "zero-points": 1e-2},
        "parametrization": "amax", "gradient_scale": "lsq", "edge": "before-rounding", "freeze_ranges": 0.8,
    },
    "ranges": {
        "losses": ["logits"],
        "learning_rate": {"weights": 0, "embeddings": 0, "norms": 0, "biases": 0, "scales": 1e-3, "zero-points": 1e-2},
        "parametrization": "log", "gradient_scale": "plain", "edge": "before-rounding", "freeze_ranges": 1.0,
    },
    "bondarenko": {
        "losses": ["task"],
        "learning_rate": dict.fromkeys(("weights", "embeddings", "norms", "biases", "scales", "zero-points"), 5e-5),
        "parametrization": "scale", "gradient_scale": "plain", "edge": "after-rounding", "freeze_ranges": 1.0,
    },
    "quantgpt": {
        "losses": ["logits", {"token-contrast": {"weight": 0.1}}],
        "learning_rate": {"weights": 5e-4, "embeddings": 5e-4, "norms": 5e-4, "biases": 5e-4, "scales": 5e-4},
        "parametrization": "gamma", "gradient_scale": "plain", "edge": "before-rounding", "freeze_ranges": 1.0,
    },
}  # fmt: skip
"""What parameters that are left out are, by preset."""


@dataclass(frozen=True)
class Qat(Pass):
    """Train a calibrated program end to end against the float model, and keep the best state by held-out loss.

    What is rounded in the forward pass is rounded as in the artifact; gradients pass rounding straight through. All
    static ranges must be calibrated first, and are constants afterwards. The program was traced without dropout, so
    there is none. Training data are those of the section `training`; without one, the calibration and evaluation
    data, which have no labels. Step 0 is evaluated and can win: nothing leaves worse than it came in.
    """

    name: ClassVar[str] = "qat"
    requires: ClassVar[frozenset[Level]] = frozenset({Level.SIMULATED})
    contract: ClassVar[Contract] = Contract.LOSSY
    draws: ClassVar[frozenset[Topic]] = frozenset({"training"})
    keeps_sizes: ClassVar[bool] = True
    preset: Literal["own", "ranges", "bondarenko", "quantgpt"] = "own"
    """What the parameters are that are left out. ``ranges``: scales and zero points alone learn, scales as logarithms,
    so that a rate is a relative change. ``bondarenko``: one rate of 5e-5, the scale itself and zero points learned, no
    LSQ factor, the task's loss (Bondarenko et al. 2021, §5). ``quantgpt``: module-wise dynamic scaling of weights,
    logits and token-level contrastive distillation with a weight of 0.1, a rate of 5e-4 (Tao et al. 2022)."""
    losses: Losses | None = None
    """What is minimized: a list of losses, each a name or a name with parameters; `[logits]` in the preset ``own``."""
    learning_rate: Rates | None = None
    """By role (`weights`, `embeddings`, `norms`, `biases`, `scales`, `zero-points`) or by pattern over parameter
    names, which comes first; 0 keeps a tensor as it is."""
    ranges: Ranges = "learned"
    """``learned`` by gradient, ``observed`` (average of the extremes of batches, 0.9 on the old), or ``fixed``."""
    parametrization: Parametrization | None = None
    """What of a range is learned: ``amax`` (the preset's), ``scale``, ``log``; for weights ``gamma`` (QuantGPT), and
    the baselines ``pact`` and ``laq``."""
    gradient_scale: GradientScale | None = None
    """``lsq``: gradients of scales times 1/√(n·quant_max), n being the elements that share one; ``plain``: as they
    are."""
    clipped_gradient: ClippedGradient = "zero"
    """What passes through a value outside its range: ``zero`` or ``pass``."""
    edge: Edge | None = None
    """Whether a value counts as outside ``before-rounding`` or ``after-rounding``."""
    steps: Annotated[int, Ge(1)] = 1000
    """Of the optimizer."""
    epochs: Annotated[float, Interval(ge=0, le=1e6)] = 0.0
    """Steps as passes over the training data instead; 0: `steps` counts."""
    accumulate: Annotated[int, Ge(1)] = 1
    """Batches for each step."""
    schedule: Schedule = "linear"
    """How learning rates fall after the warm-up: ``linear`` or ``cosine`` to 0, or ``constant``."""
    warmup: Annotated[float, Interval(ge=0, le=1)] = 0.1
    """The share of the steps in which they rise."""
    weight_decay: Annotated[float, Interval(ge=0, le=1e3)] = 0.0
    """Of AdamW, on weights and embeddings alone."""
    clip: Annotated[float, Ge(0)] = 1.0
    """The largest norm of all gradients together; 0: any."""
    freeze_ranges: Annotated[float, Interval(ge=0, le=1)] | None = None
    """The share of the steps after which ranges are constants."""
    evaluate_every: Annotated[int, Ge(1)] = 100
    """Steps between two looks at the held-out loss, each of which also writes a checkpoint."""
    keep: Literal["best", "last"] = "best"
    """Which state the program gets: that of the least held-out loss (step 0 among them), or the last."""
    products: Literal["float32", "bfloat16"] = "float32"
    """To what the operands of matrix products are rounded; sums are float32."""
    device: Where = "cpu"
    """``accelerate``: on the device, in the processes and with the mixed precision that `accelerate launch` set up;
    each process takes batches of its own. It needs `bitlower[train]`."""
    memory: Annotated[int, Ge(0)] = 4 << 30
    """Bytes of the teacher's values that are kept on disk from one epoch to the next."""

    def run(self, program: Program, context: Context) -> bool:
        """Train, and leave a :class:`~bitlower.passes.training._report.TrainReport`.

        Raises:
            BitlowerError: no training data, a quantizer that is not calibrated, a loss that the model or the data
                cannot serve, a pattern that matches nothing, or a loss or gradient that is not finite.
        """
        data = training_data(self.name, context)
        objective = self.objective
        check_objective(program, objective, [*data.training, *data.held_out])
        devices = make_devices(self.device)
        module = TrainableModule(program, self.settings, Taps.of(program, objective.needs).names)
        move(module.model, devices.device)
        teacher = None
        if TEACHER in objective.needs:
            reference = float_reference(program, context)
            teacher = make_teacher(reference, objective, devices, context.work, self.memory)
        evaluator = Evaluator(program, module, objective, teacher, data, devices)
        if devices.processes > 1:
            self._refuse_own_state(evaluator)
        training = Training(module, evaluator, self.rates, self.loop(len(data.training)), data, devices)
        report = training.run(self.name)
        context.put(report)
        move(module.model, torch.device("cpu"))
        if report.best_step:
            write_trained(program, module)
        return report.best_step > 0

    def _refuse_own_state(self, evaluator: Evaluator) -> None:
        """Only gradients are shared among processes: what else changes with the batches would differ in each."""
        keeping = [name for name, memory in evaluator.memories.items() if memory]
        if keeping or self.ranges == "observed":
            what = f"the loss {keeping[0]!r} keeps values of" if keeping else "observed ranges follow"
            raise BitlowerError(
                f"qat: {what} the batches of one process, and there are several", hint="train in one process"
            )

    def trains(self) -> bool:
        """It does."""
        return True

    def rehearsed(self) -> Self:
        """Two steps."""
        return replace(self, steps=min(self.steps, 2), epochs=0.0)

    def training_steps(self, batches: int) -> int:
        """Batches of all steps together."""
        loop = self.loop(batches)
        return loop.steps * loop.accumulate

    def training_evaluations(self, batches: int) -> int:
        """At the start, after every ``evaluate_every`` steps, and at the end."""
        return 1 + math.ceil(self.loop(batches).steps / self.evaluate_every)

    @property
    def objective(self) -> Objective:
        """The losses."""
        return self.losses or Losses.from_list(self._or_preset("losses"))

    @property
    def rates(self) -> Rates:
        """The learning rates: those that are given over the preset's."""
        return (self.learning_rate or Rates()).over(PRESETS[self.preset]["learning_rate"])

    @property
    def settings(self) -> RangeSettings:
        """How ranges behave."""
        return RangeSettings(**{field.name: self._or_preset(field.name) for field in fields(RangeSettings)})

    def loop(self, batches: int) -> LoopOptions:
        """How long and how fast, for so many training batches."""
        options = {field.name: self._or_preset(field.name) for field in fields(LoopOptions)}
        if self.epochs:
            options["steps"] = math.ceil(self.epochs * batches / self.accumulate)
        return LoopOptions(**options)

    def _or_preset(self, name: str) -> Any:
        value = getattr(self, name)
        return PRESETS[self.preset][name] if value is None else value


def training_data(name: str, context: Context) -> Context:
    """A context with training data: those of ``training``, or else those to calibrate and evaluate on.

    Raises:
        BitlowerError: there are none.
    """
    if len(context.training):
        training, held_out = context.training, context.held_out
    else:
        training, held_out = context.calibration, context.evaluation
    if not len(training):
        raise BitlowerError(f"{name} needs training data", hint="add a section `training` or `calibration`")
    if context.work is not None:
        context.work.mkdir(parents=True, exist_ok=True)
    return Context(training=training, held_out=held_out, seed=context.seed, work=context.work, track=context.track)
