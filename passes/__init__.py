"""Passes turn a Program into a Program: one file a pass, in folders by what they are for; ``_machinery`` runs them."""

from bitlower.ir.plugins.catalog import Provider
from bitlower.ir.plugins.kinds import describe_type, parameter_types
from bitlower.ir.plugins.parameters import plain_parameters
from bitlower.passes._machinery.base import Context, Contract, Pass
from bitlower.passes._machinery.cache import Cache
from bitlower.passes._machinery.contracts import check_levels
from bitlower.passes._machinery.ledger import Ledger
from bitlower.passes._machinery.manager import PassManager
from bitlower.passes._machinery.observers import (
    Observer,
    PassTime,
    PrintAfterChange,
    Progress,
    Recorder,
    Timing,
    Verify,
)
from bitlower.passes._machinery.pipeline import format_pipeline, parse_pipeline
from bitlower.passes._machinery.registry import find_pass, known_passes, load_plugin, make_pass, providers
from bitlower.passes._machinery.report import Record, Report
from bitlower.passes._machinery.reproducer import Reproducer, replay

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
    "Record",
    "Recorder",
    "Report",
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
