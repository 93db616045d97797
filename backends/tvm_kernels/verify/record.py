"""What a verified library is: the figures of the comparison between a Program and its library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from bitlower.backends.artifact.json_files import rounded_figures
from bitlower.backends.artifact.outputs import OutputError
from bitlower.backends.artifact.record import Verified
from bitlower.backends.artifact.selftest import SelfTest
from bitlower.backends.artifact.unseen import Unseen
from bitlower.backends.tvm_kernels.verify.agreement import Agreement


@dataclass(frozen=True)
class KernelError:
    """How far kernels of one kind are from the Program's, which read the same.

    Args:
        kind: the operator.
        kernels: how many of them were compared.
        values: how many floats that they gave.
        worst: the largest error of one, over the root mean square of its row.
        codes: how many codes that they gave.
        equal: the share of them that is equal; 1 where there are none.
        excess: how far any value lies from the rounding interval of its code, in steps.
        turned: the largest share of what one of them gave that roundings inside of it turned over.
        scale: the largest relative error of a scale that was chosen for a token.
    """

    kind: str
    kernels: int
    values: int
    worst: float
    codes: int
    equal: float
    excess: float
    turned: float
    scale: float

    @classmethod
    def of(cls, kind: str, agreements: Iterable[Agreement]) -> KernelError:
        """The figures of kernels of one kind, each at its worst."""
        rows = list(agreements)
        codes = sum(row.codes for row in rows)
        return cls(
            kind=kind,
            kernels=len(rows),
            values=sum(row.values for row in rows),
            worst=max(row.worst for row in rows),
            codes=codes,
            equal=sum(row.equal for row in rows) / codes if codes else 1.0,
            excess=max(row.excess for row in rows),
            turned=max(row.turned_share for row in rows),
            scale=max(row.qparams.get("scale", 0.0) for row in rows),
        )


def calls_headline(calls: Mapping[str, Mapping[str, int]]) -> dict[str, list[int]]:
    """How many kernels one run calls, of all families: ``[found, expected]``; nothing where none is expected."""
    counted, expected = (sum(calls[side].values()) for side in ("found", "expected"))
    return {"kernel_calls": [counted, expected]} if expected else {}


def runtime_words(runtime: Mapping[str, str]) -> str:
    """TVM's version and the target."""
    return f"TVM {runtime['tvm']} on {runtime['target']}"


@dataclass(frozen=True)
class Verification(Verified):
    """A comparison that held, or was left to where the library runs.

    Args:
        runtime: the target, the processor and TVM's version.
        batches: how many were compared, the small one of the self-test among them.
        tokens: the entries of their first input.
        outputs: one row each; none where the library was not run.
        kernels: one row for each kind; none where the library was not run.
        exposing: the largest change of an output from reading what kernels give, over the output's standard deviation.
        calls: how often one run calls kernels of each family: ``expected``, of what the Program's operators became,
            and ``found``, in the library's code.
        selftest: lets the artifact be checked without the Program; expects the Program's outputs where the library was
            not run, else its own.
        unseen: the sizes that neither tracing nor the batches had, and a self-test of them, as ``selftest``.
    """

    runtime: Mapping[str, str]
    batches: int
    tokens: int
    outputs: tuple[OutputError, ...]
    kernels: tuple[KernelError, ...]
    exposing: float
    calls: Mapping[str, Mapping[str, int]]
    selftest: SelfTest
    unseen: Unseen

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, floats with six significant digits; the inverse of :meth:`from_dict`."""
        form = {field.name: getattr(self, field.name) for field in fields(self)}
        form |= {"runtime": dict(self.runtime), "summary": self.summary()}
        form["calls"] = {side: dict(counts) for side, counts in self.calls.items()}
        form |= {"selftest": self.selftest.to_dict(), "unseen": self.unseen.to_dict()}
        for name in ("outputs", "kernels"):
            form[name] = [rounded_figures(asdict(row)) for row in form[name]]
        return rounded_figures(form)

    def headline(self) -> dict[str, Any]:
        """The runtime, the calls of kernels of those expected, and how it agrees with the Program."""
        summary, calls = self.summary(), calls_headline(self.calls)
        if not self.batches:
            return {"runtime": "", **calls}
        figures = {"runtime": runtime_words(self.runtime), **calls, "runtime_cosine": summary["output_cosine"]}
        if "codes_equal_given_inputs" in summary:
            figures["codes_given_codes"] = summary["codes_equal_given_inputs"]
        return figures

    def summary(self) -> dict[str, Any]:
        """The figures that people look at first: the worst of all."""
        if not self.batches:
            return {"not_run": True}
        codes = sum(row.codes for row in self.kernels)
        equal = sum(row.equal * row.codes for row in self.kernels)
        figures: dict[str, Any] = {
            "output_relative_error": max((row.relative for row in self.outputs), default=0.0),
            "output_cosine": min((row.cosine for row in self.outputs), default=1.0),
            "kernels": sum(row.kernels for row in self.kernels),
            "kernel_error": max((row.worst for row in self.kernels), default=0.0),
            "unseen_sizes": self.unseen.sizes,
        }
        return rounded_figures(figures | ({"codes_equal_given_inputs": equal / codes} if codes else {}))
