"""Passes that train a simulated Program: end to end or block by block, against a teacher, with losses found by name."""

from bitlower.passes._machinery.loss import LogitsLoss, Loss, Step, Values

__all__ = ["LogitsLoss", "Loss", "Step", "Values"]
