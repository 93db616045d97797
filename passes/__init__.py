"""Passes turn a Program into a Program: one file a pass; the machinery lies in the modules with an underscore."""

from bitlower.passes._base import Context, Contract, Pass

__all__ = ["Context", "Contract", "Pass"]
