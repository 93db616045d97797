"""Frontends turn a model into a Program: a Hugging Face folder, a model inside an installed package, a live module."""

from bitlower.frontends.load import load
from bitlower.frontends.tokenize import batches

__all__ = ["batches", "load"]
