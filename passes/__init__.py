"""Passes turn a Program into a Program: one file a pass; the machinery lies in the modules with an underscore."""

from bitlower.passes._base import Context, Contract, Pass
from bitlower.passes._cache import Cache
from bitlower.passes._catalog import Provider
from bitlower.passes._contracts import check_levels
from bitlower.passes._ledger import Ledger
from bitlower.passes._manager import PassManager
from bitlower.passes._observers import Observer, PassTime, PrintAfterChange, Progress, Recorder, Timing, Verify
from bitlower.passes._parameters import describe_type, parameter_types, plain_parameters
from bitlower.passes._pipeline import format_pipeline, parse_pipeline
from bitlower.passes._registry import find_pass, known_passes, load_plugin, make_pass, providers
from bitlower.passes._reproducer import Reproducer, replay

__all__ = [
    "Cache",
    "Context",
    "Contract",
    "Ledger",
    "Observer",
    "Pass",
    "PassManager",
    "PassTime",
    "PrintAfterChange",
    "Progress",
    "Provider",
    "Recorder",
    "Reproducer",
    "Timing",
    "Verify",
    "check_levels",
    "describe_type",
    "find_pass",
    "format_pipeline",
    "known_passes",
    "load_plugin",
    "make_pass",
    "parameter_types",
    "parse_pipeline",
    "plain_parameters",
    "providers",
    "replay",
]
