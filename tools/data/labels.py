"""Labels of rows: the class that a text belongs to, or its value, as the head of a model has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitlower.ir import BitlowerError, Program, nearest, shorten
from bitlower.tools.data.tables import Row, number


@dataclass(frozen=True)
class ClassifierHead:
    """What a model says of a text.

    Args:
        names: the classes by name, as the model's configuration has them; may be empty.
        classes: how many there are; None where the program leaves that open.
        regression: one value and no classes.
    """

    names: Mapping[str, int]
    classes: int | None
    regression: bool = False

    @classmethod
    def of(cls, program: Program) -> ClassifierHead:
        """The head of ``program``, which returns ``logits`` ``[batch, classes]``.

        One class is a value, unless the configuration's ``problem_type`` says otherwise; as transformers have it.

        Raises:
            BitlowerError: the program returns other outputs, or a text may have several labels or values.
        """
        width = next((spec.type.shape[1] for spec in program.outputs if _is_row(spec.name, spec.type.shape)), None)
        source, problem = program.source or "the model", program.config.get("problem_type")
        if width is None:
            outputs = ", ".join(f"{spec.name}: {spec.type}" for spec in program.outputs if "present." not in spec.name)
            raise BitlowerError(
                f"labels are for models with one row of logits for each text, and {source} gives {shorten(outputs)}",
                hint="leave `label` out, or check the task",
            )
        if problem == "multi_label_classification":
            raise BitlowerError(
                f"a text may have several labels of {source}, and those are neither trained nor measured"
            )
        classes = width if isinstance(width, int) else None
        regression = problem == "regression" or (classes == 1 and problem is None)
        if regression and classes not in (None, 1):
            raise BitlowerError(f"{source} gives {classes} values for a text, and labels have one")
        return cls(class_names(program.config), classes, regression)

    def tensor(self, path: Path, rows: Sequence[Row]) -> torch.Tensor:
        """The labels of ``rows``, their last values: ``[rows]``, int64 for classes and float32 for values.

        Raises:
            BitlowerError: a label is none; the message names file and line.
        """
        if self.regression:
            return torch.tensor([number(path, row, row.values[-1]) for row in rows], dtype=torch.float32)
        return torch.tensor([class_of(path, row, self.names, self.classes) for row in rows], dtype=torch.int64)


def class_names(config: Mapping[str, Any]) -> dict[str, int]:
    """The classes of a model by name, as its configuration has them."""
    return {str(name): int(place) for place, name in (config.get("id2label") or {}).items()}


def class_of(path: Path, row: Row, names: Mapping[str, int], classes: int | None) -> int:
    """The class that the last value of ``row`` names, or whose index it is.

    Raises:
        BitlowerError: there is no such class; the message names file and line.
    """
    label = row.values[-1].strip()
    if label in names:
        return names[label]
    known = label.isdecimal() and len(label) < 10 and (not names or int(label) in names.values())
    if not known or (classes is not None and int(label) >= classes):
        numbers = "labels are numbers from 0" if classes is None else f"labels are numbers from 0 to {classes - 1}"
        hint = f"{numbers}, or names; {nearest(label, names)}" if names else numbers
        raise BitlowerError(f"{path}, line {row.line}: {shorten(repr(label))} is no label", hint=hint)
    return int(label)


def _is_row(name: str, shape: Sequence[int | str]) -> bool:
    return name == "logits" and len(shape) == 2
