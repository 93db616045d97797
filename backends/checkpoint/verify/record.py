"""What a verified checkpoint is: every packed weight and every output compared with the Program's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from bitlower.backends.artifact.json_files import rounded_figures
from bitlower.backends.artifact.record import Verified
from bitlower.backends.artifact.unseen import Unseen
from bitlower.backends.checkpoint.verify.client import CLIENT


@dataclass(frozen=True)
class LayerCheck:
    """A packed layer that was read back.

    Args:
        path: of the module.
        bits: of a code.
        codes: how many; all are the Program's, and so are the zero points.
        scale_error: the largest relative difference of a stored scale to the Program's, which is float32.
        underflow: how many scales that are not 0 became 0 or lost bits below the smallest normal number.
        digests: hashes of the unpacked codes, scales and zero points.
    """

    path: str
    bits: int
    codes: int
    scale_error: float
    underflow: int
    digests: Mapping[str, str]


@dataclass(frozen=True)
class OutputCheck:
    """How far an output of what is stored is from the Program's.

    Args:
        name: of the output.
        worst: the largest absolute error.
        mean: the mean absolute error.
        relative: ``worst`` over the standard deviation of the output.
        cosine: of both outputs, flattened.
        given_weights: the largest difference, over the standard deviation, between Hugging Face's model and the Program
            when both compute in float32 with the stored weights: what is left is the order of float arithmetic.
    """

    name: str
    worst: float
    mean: float
    relative: float
    cosine: float
    given_weights: float


@dataclass(frozen=True)
class Verification(Verified):
    """A comparison that held.

    Args:
        format: of the packed layers.
        dtype: of the scales and of what stays in float.
        batches: how many were run.
        tokens: the entries of their first input.
        layers: one row for each packed layer.
        float_error: the largest difference of a weight that stays in float to the Program's, over the largest entry.
        outputs: one row each.
        client: what loaded the folder and gave the Program's outputs, or ``not run`` and why.
        versions: of what ran the model.
        unseen: the sizes that neither tracing nor the batches had, and a self-test of them that expects what the
            Program returns with the weights of the file.
    """

    format: str
    dtype: str
    batches: int
    tokens: int
    layers: tuple[LayerCheck, ...]
    float_error: float
    outputs: tuple[OutputCheck, ...]
    client: str
    versions: Mapping[str, str]
    unseen: Unseen

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, floats with six significant digits; the inverse of :meth:`from_dict`."""
        form = {field.name: getattr(self, field.name) for field in fields(self)}
        form["layers"] = [rounded_figures(asdict(row)) for row in self.layers]
        form["outputs"] = [rounded_figures(asdict(row)) for row in self.outputs]
        form |= {"versions": dict(self.versions), "unseen": self.unseen.to_dict(), "summary": self.summary()}
        return rounded_figures(form)

    def headline(self) -> dict[str, Any]:
        """What ran the model, how many layers are packed, and how it agrees with the Program."""
        version = self.versions.get("transformers", "")
        whole = "" if self.client == CLIENT else ", module by module"
        figures: dict[str, Any] = {"runtime": f"transformers {version}{whole}", "packed_layers": len(self.layers)}
        return figures | {"runtime_cosine": self.summary()["output_cosine"]}

    def summary(self) -> dict[str, Any]:
        """The figures that people look at first."""
        return rounded_figures(
            {
                "output_relative_error": max((row.relative for row in self.outputs), default=0.0),
                "output_cosine": min((row.cosine for row in self.outputs), default=1.0),
                "codes": sum(row.codes for row in self.layers),
                "scale_error": max((row.scale_error for row in self.layers), default=0.0),
                "client": self.client,
                "unseen_sizes": self.unseen.sizes,
            }
        )
