"""What a backend is: a frozen dataclass whose fields are its options, which writes, checks and loads artifacts."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from bitlower.backends.artifact.card import Usage
from bitlower.backends.sizes import Sizes
from bitlower.ir import Batch, BitlowerError, Level, Program, QuantSpec, Scheme
from bitlower.ir.plugins.kinds import check_bounds
from bitlower.ir.plugins.parameters import plain_parameters


class Summary(Protocol):
    """What an export or a check found."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON.

        Of an export, ``notes`` (lines) and ``float_tables`` (reasons by name) are shown; of an export and of a check,
        ``headline``: ``runtime`` in words, empty where nothing ran, and the figures that a person asks for first, by
        name: numbers, or pairs ``[found, expected]``.
        """
        ...


WARM, RUNS = 3, 20
"""Runs of a model in which kernels are not timed yet, and those in which they are."""


@dataclass(frozen=True)
class KernelTime:
    """What one kind of kernel takes in a run of a model.

    Args:
        kernel: its name in the runtime.
        calls: how often a run calls it.
        microseconds: of all its calls in one run.
    """

    kernel: str
    calls: int
    microseconds: float


class Model(Protocol):
    """A model that runs."""

    @property
    def program(self) -> Program:
        """Its configuration, inputs, outputs and tokenizer; it may have no graphs."""
        ...

    def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run it: inputs by name, outputs by name."""
        ...


@dataclass(frozen=True)
class Backend(abc.ABC):
    """One form of artifact: a frozen dataclass whose fields are its options.

    Subclass it in ``backends/<name>/backend.py``, or in a package of your own with an entry point in the group
    ``bitlower.backends``. Decorate the class with ``@dataclass(frozen=True)`` and set ``name``. The types and bounds of
    options are those that parameters of passes may have. A ``__post_init__`` of your own begins with
    ``super().__post_init__()``.
    """

    name: ClassVar[str] = ""
    levels: ClassVar[frozenset[Level]] = frozenset({Level.FLOAT, Level.INTEGER})
    """The levels of programs that it takes."""
    formats: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Names beside its own that ``--format`` takes, with the options that each stands for."""
    holds_heads: ClassVar[bool] = True
    """Whether an output head can be stored in few bits."""
    node_seconds: ClassVar[float] = 0.0019
    """Seconds that an export takes for each node of the graph, for predictions."""
    copies_model: ClassVar[bool] = True
    """Whether an export holds the model in memory a second time, for predictions."""

    def __post_init__(self) -> None:
        """Hold the options to their types and bounds.

        Raises:
            BitlowerError: a value does not fit.
        """
        check_bounds(self, f"backend {self.name!r}")

    @classmethod
    def suited_to(cls, scheme: Scheme) -> Mapping[str, Any]:
        """The options that ``bitlower quantize`` takes for ``scheme`` if nobody says."""
        return {}

    @abc.abstractmethod
    def export(
        self, program: Program, folder: Path, batches: Sequence[Batch], provenance: Mapping[str, Any] | None = None
    ) -> Summary:
        """Write the artifact of ``program`` into the existing ``folder``, and compare it with the program.

        Args:
            program: at one of :attr:`levels`.
            folder: exists, and holds files that all artifacts have.
            batches: real inputs for the comparison.
            provenance: for the manifest: seeds, hashes of data, and what else the caller knows; plain data.

        Raises:
            BitlowerError: the program cannot be expressed.
            CheckError: what was written does not compute what the program does.
        """

    @classmethod
    @abc.abstractmethod
    def verify(cls, folder: Path) -> Summary:
        """Check an artifact that :meth:`export` wrote, without the program.

        Raises:
            BitlowerError: something that checking needs is not installed.
            CheckError: a file is missing or changed, or the model does not compute what it did.
        """

    @abc.abstractmethod
    def sizes(self, placed: Program) -> Sizes:
        """How many bytes tensors take in the artifact of ``placed``, whose quantizers may be uncalibrated."""

    @classmethod
    def load(cls, folder: Path) -> Model | None:
        """The model in an artifact, ready to run; None: transformers reads the folder.

        Raises:
            BitlowerError: what runs it is not installed, or it does not run on this machine.
        """
        return None

    @classmethod
    def kernel_times(cls, folder: Path) -> tuple[KernelTime, ...]:
        """What the kernels of an artifact take here, the longest first; empty where the runtime does not say.

        Raises:
            BitlowerError: what runs it is not installed, or it does not run on this machine.
            CheckError: a file is missing or damaged.
        """
        return ()

    def usage(self, program: Program) -> Usage:
        """How the artifact of ``program`` is loaded, for its model card; with bitlower, as a rule."""
        return Usage("bitlower", "import bitlower\n\nmodel = bitlower.load(folder)", "bitlower")

    def check_level(self, level: Level) -> None:
        """See that programs at ``level`` are taken.

        Raises:
            BitlowerError: they are not; the hint says which pass is missing or too much.
        """
        if level in self.levels:
            return
        if level is Level.FUSED:
            message, hint = "a fused program has kernels that this backend does not know", "leave out the pass `fuse`"
        elif Level.INTEGER in self.levels:
            message, hint = f"a {level} program has no integers to export", "run the pass `lower-integer` first"
        else:
            missing = "`fuse`" if level is Level.INTEGER else "`lower-integer` and `fuse`"
            message, hint = f"it takes fused programs; this is {level}", f"end the passes with {missing}"
        raise BitlowerError(f"backend {self.name!r}: {message}", hint=hint)

    def check_host(self) -> None:  # noqa: B027  # nothing is needed as a rule
        """See that this machine has what an export needs.

        Raises:
            BitlowerError: a package, a tool or the right processor is missing; the hint says what to do about it.
        """

    def check_program(self, program: Program) -> None:  # noqa: B027  # everything can be expressed as a rule
        """See that every operator of ``program`` can be expressed, as far as operators stay to the end.

        Raises:
            BitlowerError: one cannot; it is named.
        """

    def supports(self, spec: QuantSpec, shape: Sequence[int], role: str) -> str:
        """Why a tensor cannot be held with ``spec``; empty if it can.

        Args:
            spec: grid and granularity.
            shape: of a weight ``[outputs, inputs]``.
            role: see :mod:`bitlower.ir.quantization.scheme`.
        """
        return ""

    def unforeseen(self, placed: Program) -> Iterable[str]:
        """Why an export takes more memory and time than is predicted, a line for each reason."""
        return ()

    def check_fits(self, program: Program) -> None:
        """See that every operator can be expressed, and that every tensor with a quantizer can be held.

        Raises:
            BitlowerError: one cannot; the operator or the tensor is named.
        """
        self.check_program(program)
        for node, quantizer in program.quantizers():
            shape = node.all_input_nodes[0].meta["type"].shape
            if reason := self.supports(quantizer.spec, shape, quantizer.role):
                raise BitlowerError(
                    f"{self.name} cannot hold {quantizer.tensor} ({quantizer.role}) as {quantizer.spec}: {reason}",
                    hint="choose another scheme or format, or leave it in float with `ignore`",
                )

    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults, as plain data."""
        return plain_parameters(self)

    def __str__(self) -> str:
        options = " ".join(f"{key}={value}" for key, value in self.options().items())
        return f"{self.name}{{{options}}}" if options else self.name
