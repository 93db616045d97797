"""The verifier: what must hold for every Program, checked after each pass."""

from bitlower.ir.verifier.verify import verify

__all__ = ["verify"]
