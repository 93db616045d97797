"""Passes turn a Program into a Program: one file a pass, in folders by what they are for; ``_machinery`` runs them."""

from bitlower.ir.plugins.catalog import Provider
from bitlower.ir.plugins.kinds import describe_type, parameter_types
from bitlower.ir.plugins.parameters import plain_parameters
from bitlower.passes._machinery.base import Context, Contract, Pass
from bitlower.passes._machinery.cache import Cache
from bitlower.passes._machinery.contracts import check_levels
from bitlower.passes._machinery.declared import (
    data_runs,
    needs_calibration,
    training_evaluations,
    training_steps,
    trains,
)
from bitlower.passes._machinery.digest import digest_batches
from bitlower.passes._machinery.ledger import Ledger
from bitlower.passes._machinery.losses import Losses, known_losses
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
from bitlower.passes._machinery.pipeline import PASSES, format_pipeline, parse_pipeline
from bitlower.passes._machinery.registry import find_pass, known_passes, load_plugin, make_pass, providers
from bitlower.passes._machinery.report import Record, Report
from bitlower.passes._machinery.reproducer import Reproducer, replay
from bitlower.passes._machinery.workload import BlockSchedule, Workload

__all__ = [
    "PASSES",
    "BlockSchedule",
    "Cache",
    "Context",
    "Contract",
    "Ledger",
    "Losses",
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
    "Workload",
    "check_levels",
    "data_runs",
    "describe_type",
    "digest_batches",
    "find_pass",
    "format_pipeline",
    "known_losses",
    "known_passes",
    "load_plugin",
    "make_pass",
    "needs_calibration",
    "parameter_types",
    "parse_pipeline",
    "plain_parameters",
    "providers",
    "replay",
    "training_evaluations",
    "training_steps",
    "trains",
]
