"""Steps as an engine hands them to losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from bitlower.passes.training import Step, Values


@pytest.fixture
def make_step() -> Callable[..., Step]:
    """``make_step(mask, ids=…, hidden=(student, teacher), attention=…)``: values as lists, one a block."""

    def make(
        mask: torch.Tensor,
        ids: torch.Tensor | None = None,
        hidden: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]] = ((), ()),
        attention: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]] = ((), ()),
        training: bool = True,
        seed: int = 0,
    ) -> Step:
        student, teacher = (Values(tuple(h), tuple(a)) for h, a in zip(hidden, attention, strict=True))
        batch = {} if ids is None else {"input_ids": ids}
        return Step(student, teacher, batch, mask, None, training, torch.Generator().manual_seed(seed))

    return make
