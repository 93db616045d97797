"""The losses of a batch, and their gradients: what sequences as a whole say at once, logits in chunks of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from bitlower.ir import Batch, BitlowerError, Program
from bitlower.ir.stages import is_encoder_decoder
from bitlower.ir.storage import release
from bitlower.ir.tasks import TEXT_GENERATION
from bitlower.ir.tokens import token_ids
from bitlower.ir.trainable import TrainableModule
from bitlower.passes._machinery.base import Context
from bitlower.passes._machinery.loss import LogitsLoss, Loss, Memories, Objective, Step, Values
from bitlower.passes.training._devices import Devices
from bitlower.passes.training._forward import Forward, LogitsHead, Taps, real_tokens
from bitlower.passes.training._teacher import Key, Teacher, tensors_of

TEACHER, LABELS = "teacher", "labels"
NO_LABEL = -100
"""What torch's cross entropy leaves out, and what labels of transformers say."""
Terms = dict[str, float]


@dataclass(frozen=True)
class _Rows:
    """What losses of logits look at: rows of student and teacher, and the labels of the rows."""

    student: torch.Tensor
    teacher: torch.Tensor | None
    labels: torch.Tensor | None


class Evaluator:
    """Computes an objective.

    Args:
        program: what is trained.
        module: as a module, with the :class:`~bitlower.passes.training._forward.Taps` that the losses need.
        objective: the losses.
        teacher: the float model; None if no loss needs one.
        context: for each step's randomness.
        devices: where the module and the teacher are.
    """

    def __init__(
        self,
        program: Program,
        module: TrainableModule,
        objective: Objective,
        teacher: Teacher | None,
        context: Context,
        devices: Devices,
    ) -> None:
        self.program, self.objective, self.teacher, self._context = program, objective, teacher, context
        self._devices = devices
        self.logits_losses = [loss for loss in objective.losses if isinstance(loss, LogitsLoss)]
        self.others = [loss for loss in objective.losses if not isinstance(loss, LogitsLoss)]
        taps = Taps.of(program, objective.needs)
        self.forward = Forward(program, module.model, taps, logits=bool(self.logits_losses))
        self.memories: Memories = {
            loss.name: {key: tensor.to(devices.device) for key, tensor in loss.memory(program).items()}
            for loss in objective.losses
        }

    def losses(self, key: Key, batch: Batch, step: int, *, gradient: float | None = None) -> Terms:
        """Each loss of a batch by name, before its weight.

        Args:
            key: the part of the data and the place in it.
            batch: inputs, and ``labels`` where there are any.
            step: of the optimizer, for randomness.
            gradient: gradients of the weighted sum times this are added to those of the parameters; None: of nothing.
        """
        batch = self._devices.batch(batch)
        with torch.set_grad_enabled(gradient is not None), self._devices.autocast():
            values, rows = self.forward(batch)
            told = self.teacher(key, batch) if self.teacher else (Values(), None)
            terms, total = self._whole(values, told[0], batch, step, training=gradient is not None)
            sources: list[tuple[torch.Tensor, torch.Tensor | None]] = []
            if total is not None and gradient is not None:
                sources.append((total * gradient, None))
            if rows is not None:
                paired_rows = _Rows(rows, told[1], self._labels(batch, len(rows)))
                terms |= self._in_chunks(paired_rows, gradient, sources)
            if gradient is not None:
                torch.autograd.backward([s for s, _ in sources], [g for _, g in sources])
        for tensor in tensors_of(told):
            release(tensor)
        return terms

    def total(self, terms: Terms) -> float:
        """The weighted sum."""
        return sum(loss.weight * terms[loss.name] for loss in self.objective.losses)

    def _whole(
        self, student: Values, teacher: Values, batch: Batch, step: int, *, training: bool
    ) -> tuple[Terms, torch.Tensor | None]:
        """The losses that look at whole sequences, and their weighted sum."""
        if not self.others:
            return {}, None
        inputs = {name: value for name, value in batch.items() if name != LABELS}
        generator = self._context.generator(f"losses/{step}")
        seen = Step(student, teacher, inputs, real_tokens(batch), batch.get(LABELS), training, generator)
        values = {loss.name: loss.value(seen, self.memories[loss.name]) for loss in self.others}
        total = torch.stack([loss.weight * values[loss.name] for loss in self.others]).sum()
        return {name: float(value.detach()) for name, value in values.items()}, total

    def _labels(self, batch: Batch, count: int) -> torch.Tensor | None:
        """The label of each row: that of its text, or for a language model the token that follows."""
        if not any(LABELS in loss.needs for loss in self.logits_losses):
            return None
        mask = real_tokens(batch)
        if count == len(mask) and not self.forward.by_token:
            return batch[LABELS]
        ids = token_ids(batch)
        if ids is None:
            raise BitlowerError("labels of a language model are its next tokens, and the batches have no token ids")
        following = ids.roll(-1, 1).masked_fill(~mask.roll(-1, 1), NO_LABEL)
        following[:, -1] = NO_LABEL
        return following[mask]

    def _in_chunks(
        self, rows: _Rows, gradient: float | None, sources: list[tuple[torch.Tensor, torch.Tensor | None]]
    ) -> Terms:
        """The losses of logits; what the backward pass starts from is added to ``sources``."""
        terms = {loss.name: 0.0 for loss in self.logits_losses}
        counts = {loss.name: _count(loss, rows) for loss in self.logits_losses}
        weights = self.forward.head.weights() if self.forward.head else ()
        leaves = [_leaf(tensor) for tensor in (rows.student, *weights)]
        for part, logits in _chunks(self.forward.head, leaves[0], leaves[1:]):
            teacher = self._teacher_logits(rows.teacher, part)
            total = logits.new_zeros(())
            for loss in self.logits_losses:
                labels = rows.labels[part] if rows.labels is not None and LABELS in loss.needs else None
                term = _summed(loss, logits, teacher, labels) / counts[loss.name]
                terms[loss.name] += float(term.detach())
                total = total + loss.weight * term
            if gradient is not None:
                (total * gradient).backward()  # type: ignore[no-untyped-call]
        for source, leaf in zip((rows.student, *weights), leaves, strict=True):
            if gradient is not None and source.requires_grad and leaf.grad is not None:
                sources.append((source, leaf.grad))
        return terms

    def _teacher_logits(self, rows: torch.Tensor | None, part: slice) -> torch.Tensor | None:
        if rows is None or self.teacher is None:
            return None
        head = self.teacher.forward.head
        if head is None:
            return rows[part].float()
        with torch.no_grad():
            [logits] = head.logits(rows[None, part], *self.teacher.weights)
        return cast(torch.Tensor, logits[0].float())


def make_teacher(
    reference: Program, objective: Objective, devices: Devices, folder: Path | None, budget: int
) -> Teacher:
    """The teacher of an objective; ``budget`` bytes of its values are kept in files in ``folder``."""
    logits = any(isinstance(loss, LogitsLoss) and TEACHER in loss.needs for loss in objective.losses)
    needs, device = objective.needs, devices.device
    return Teacher(reference, needs, logits=logits, device=device, budget=budget, folder=folder)


def check_objective(program: Program, objective: Objective, batches: Sequence[Batch]) -> None:
    """See that the losses can be computed of this program on these data.

    Raises:
        BitlowerError: there is no loss, the model returns no logits, or a loss needs labels that the data do not have
            or that do not fit the head.
    """
    if not objective.losses:
        raise BitlowerError("training needs a loss", hint="give `losses`, for example [logits]")
    outputs = {spec.name: spec.type for spec in program.outputs}
    for loss in objective.losses:
        if isinstance(loss, LogitsLoss) and "logits" not in outputs:
            raise BitlowerError(
                f"the loss {loss.name!r} needs logits, and the model gives {', '.join(outputs)}", hint="use `hidden`"
            )
        generates = program.task == TEXT_GENERATION or is_encoder_decoder(program)
        language_model = isinstance(loss, LogitsLoss) and generates
        if LABELS in loss.needs and not language_model:
            _check_labels(loss, outputs["logits"].shape[-1] if "logits" in outputs else 0, batches)


def _check_labels(loss: Loss, classes: int | str, batches: Sequence[Batch]) -> None:
    for place, batch in enumerate(batches):
        labels = batch.get(LABELS)
        if labels is None:
            raise BitlowerError(
                f"the loss {loss.name!r} needs labels, and batch {place + 1} of the training data has none",
                hint="name the label column in the section `training`",
            )
        if not labels.is_floating_point() and isinstance(classes, int) and classes > 1:
            wrong = labels[(labels < 0) | (labels >= classes)]
            if len(wrong):
                raise BitlowerError(
                    f"batch {place + 1} of the training data has the label {int(wrong[0])}, and the head {classes} "
                    "classes",
                    hint="labels count from 0",
                )


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad and torch.is_grad_enabled())


def _chunks(
    head: LogitsHead | None, rows: torch.Tensor, weights: Sequence[torch.Tensor]
) -> Iterator[tuple[slice, torch.Tensor]]:
    if head is None:
        yield slice(0, len(rows)), rows.float()
    else:
        yield from head.chunks(rows, weights)


def _count(loss: LogitsLoss, rows: _Rows) -> int:
    """Over how many rows the mean is taken."""
    if LABELS in loss.needs and rows.labels is not None and not rows.labels.is_floating_point():
        return max(1, int((rows.labels != NO_LABEL).sum()))
    return max(1, len(rows.student))


def _summed(
    loss: LogitsLoss, logits: torch.Tensor, teacher: torch.Tensor | None, labels: torch.Tensor | None
) -> torch.Tensor:
    teacher = teacher if TEACHER in loss.needs else None
    if labels is not None and not labels.is_floating_point():
        keep = labels != NO_LABEL
        logits, labels = logits[keep], labels[keep]
        teacher = teacher[keep] if teacher is not None else None
    return loss.rows(logits, teacher, labels).sum()
