"""The pipeline and the recipe behind the one-line command: what a scheme and an algorithm stand for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from bitlower.backends.base import Backend
from bitlower.backends.registry import BACKENDS, find_backend, known_backends, make_backend
from bitlower.frontends.locate import check_place
from bitlower.ir import BitlowerError, Level, Scheme, nearest
from bitlower.ir.quantization.scheme import ACTIVATION_ROLES
from bitlower.passes import Pass, make_pass
from bitlower.tools.data.texts import split_column
from bitlower.tools.recipes.recipe import Recipe, steps_of

ALGORITHMS = ("adaround", "calibrate", "gptq", "rtn")
_LEARNED = ("adaround", "gptq")
_ELSEWHERE = {
    "awq": "awq's scales protect channels with large inputs: here gptq weighs weights by their inputs, take gptq",
    "smoothquant": "its scales are the pass `smooth`, which every algorithm has before it with quantized activations",
    "spinquant": "its rotations are the pass `rotate`, for recipes",
    "quarot": "its rotations are the pass `rotate`, for recipes",
    "autoround": "it trains: the pass `autoround`, for recipes",
    "auto_round": "it trains: the pass `autoround`, for recipes",
    "minmax": "take calibrate",
    "round_to_nearest": "take rtn",
    "qat": "it trains: give training data",
    "hqq": "without data take rtn",
    "gguf": "it is a file format, not an algorithm",
    "onnx": "did you mean onnx-qdq?",
    "qdq": "did you mean onnx-qdq?",
    "onnxruntime": "did you mean onnx-qdq?",
    "safetensors": "did you mean compressed-tensors?",
    "hf": "did you mean compressed-tensors?",
    "vllm": "did you mean compressed-tensors?",
    "gptq": "did you mean gptq-v2?",
    "tvm": "did you mean tvm-kernels?",
}
"""What other tools call algorithms and formats, and what comes nearest here."""
DEFAULT = "onnx-qdq"
"""The format if nobody says."""
_GIVE = "give texts to calibrate on: --calibration FILE (`calibration` in Python)"
_FULL_WIDTH = 8
"""Bits of weights from which rounding to nearest is the default."""


def as_scheme(scheme: str | Scheme) -> Scheme:
    """``scheme``, read if it is a name.

    Raises:
        BitlowerError: not a scheme.
    """
    return Scheme.parse(scheme) if isinstance(scheme, str) else scheme


def default_algorithm(scheme: str | Scheme, *, calibrated: bool = True) -> str:
    """What chooses the weights' codes if nobody says.

    ``gptq`` for weights of fewer than 8 bits beside float activations, or ``rtn`` where there are no data to calibrate
    on; ``calibrate`` for all else.

    Raises:
        BitlowerError: not a scheme.
    """
    made = as_scheme(scheme)
    if made.weights is None or made.weights.grid.bits >= _FULL_WIDTH or made.activations is not None:
        return "calibrate"
    return "gptq" if calibrated else "rtn"


def standard_passes(
    scheme: str | Scheme,
    ignore: Sequence[str] = (),
    *,
    algorithm: str | None = None,
    calibrated: bool = True,
    trained: bool = False,
    formats: Sequence[str] = (),
) -> tuple[Pass, ...]:
    """The pipeline behind ``quantize``: every step from a float program to integers, or to kernels.

    ``smooth`` and ``calibrate`` are for activations; with float activations ``algorithm`` stands alone. Without
    calibration data there is no ``smooth``. With training data (``trained``) what comes of these goes through ``qat``.
    Formats that are made of kernels have ``fuse`` at the end, and no
    ``smooth``, whose multiplications would stand between kernels. Where all formats are checkpoints, which hold no
    codes of tables, large output heads stay in float unless the scheme names their bits.

    Raises:
        BitlowerError: not a scheme, an algorithm or a format; one of them needs calibration data and there are none; or
            no program fits all formats.
    """
    made = as_scheme(scheme)
    algorithm = algorithm or default_algorithm(made, calibrated=calibrated)
    if algorithm not in ALGORITHMS:
        raise BitlowerError(f"unknown algorithm {algorithm!r}", hint=_hint(algorithm, ALGORITHMS))
    fused = _of_kernels(formats)
    if not calibrated:
        _check_needs_no_data(made, algorithm)
    if made.heads and formats and not any(_format(name)[0].holds_heads for name in formats):
        scheme = replace(made, heads=None)
    parameters: dict[str, Any] = {"scheme": scheme, "ignore": list(ignore)}
    smooth = ("smooth",) if calibrated and not fused else ()
    names = (*smooth, algorithm, "calibrate") if made.activations else (algorithm,)
    names += ("qat",) if trained else ()
    return (
        make_pass("clean"),
        make_pass("quantize", parameters),
        *(make_pass(name) for name in dict.fromkeys(names)),
        make_pass("lower-integer"),
        *((make_pass("fuse"),) if fused else ()),
    )


def _of_kernels(formats: Sequence[str]) -> bool:
    """Whether the formats are made of fused programs.

    Raises:
        BitlowerError: an unknown format, or some are and others are not.
    """
    fused, others = list[str](), list[str]()
    for name in formats or (DEFAULT,):
        (others if Level.INTEGER in _format(name)[0].levels else fused).append(name)
    if fused and others:
        raise BitlowerError(
            f"{fused[0]} is made of kernels, which the pass `fuse` makes and {others[0]} does not know: no program fits"
            " both",
            hint="run once for each",
        )
    return bool(fused)


def known_formats() -> dict[str, tuple[str, dict[str, Any]]]:
    """Names of artifacts: a backend's own, and others that backends have for it with some options.

    Of third parties' backends the names alone are known here, so that a broken one stands in nobody's way.
    """
    formats: dict[str, tuple[str, dict[str, Any]]] = {}
    for backend, offers in BACKENDS.providers().items():
        formats[backend] = (backend, {})
        own = all(offer.entry_point is None for offer in offers)
        more = find_backend(backend).formats if own else {}
        formats |= {name: (backend, dict(options)) for name, options in more.items()}
    return formats


def _format(name: str) -> tuple[type[Backend], dict[str, Any]]:
    formats = known_formats()
    if name not in formats:
        others = [cls for backend in known_backends() if name in (cls := find_backend(backend)).formats]
        if not others:
            raise BitlowerError(f"unknown format {name!r}", hint=_hint(name, formats))
        return others[0], dict(others[0].formats[name])
    backend, options = formats[name]
    return find_backend(backend), options


def _hint(name: str, known: Iterable[str]) -> str:
    """What comes nearest to ``name``, also if it is another tool's word."""
    elsewhere = _ELSEWHERE.get(name.lower().replace("-", "_"))
    return f"{elsewhere}; known: {', '.join(sorted(known))}" if elsewhere else nearest(name, known)


def rounding_advice(passes: Sequence[Pass], *, calibrated: bool) -> tuple[str, ...]:
    """What would do better than rounding few bits to nearest only because there are no data to calibrate on."""
    if calibrated or not any(pass_.name == "rtn" for pass_ in passes):
        return ()
    return (
        "there are no calibration data, so weights are rounded to nearest; gptq costs less accuracy: give calibration "
        "data (--calibration FILE, in a recipe the section `calibration`) and the algorithm gptq",
    )


def _check_needs_no_data(scheme: Scheme, algorithm: str) -> None:
    if algorithm in _LEARNED:
        raise BitlowerError(
            f"{algorithm} needs calibration data", hint=f"{_GIVE}, or round to nearest: --algorithm rtn"
        )
    specs = [spec for role in ACTIVATION_ROLES if (spec := scheme.spec(role))]
    if not all(spec.granularity.dynamic for spec in specs):
        raise BitlowerError(
            f"{scheme} has static activations, whose ranges need calibration data",
            hint=f"{_GIVE}, or take scales of each token, such as --scheme W8A8-token",
        )


def standard_exports(scheme: str | Scheme, formats: Sequence[str] = ()) -> tuple[Backend, ...]:
    """Backends with the options that suit ``scheme``; ``onnx-qdq`` if nobody says.

    Raises:
        BitlowerError: not a scheme, or not a format.
    """
    made = as_scheme(scheme)
    chosen = [_format(name) for name in formats or (DEFAULT,)]
    return tuple(make_backend(cls.name, {**options, **cls.suited_to(made)}) for cls, options in chosen)


def standard_recipe(
    model: str,
    scheme: str | Scheme,
    calibration: str | os.PathLike[str] | None,
    *,
    algorithm: str | None = None,
    formats: Sequence[str] = (),
    task: str | None = None,
    samples: int | None = None,
    max_length: int | None = None,
    seed: int = 0,
    ignore: Sequence[str] = (),
    bos: str = "auto",
    training: str | os.PathLike[str] | None = None,
) -> Recipe:
    """The recipe behind ``bitlower quantize``; paths are from the working directory.

    Without calibration data weights are rounded to nearest, activations with scales of each token. With ``training``
    data the program is trained on them.

    Raises:
        BitlowerError: not a scheme, not an algorithm, or no model is there.
    """
    check_place(model)
    calibrated = calibration is not None
    trained = training is not None
    passes = standard_passes(
        scheme, ignore, algorithm=algorithm, calibrated=calibrated, trained=trained, formats=formats
    )
    form: dict[str, Any] = {
        "model": {"path": model, "task": task, "bos": bos},
        "passes": steps_of(passes),
        "export": [{b.name: b.options()} if b.options() else b.name for b in standard_exports(scheme, formats)],
    }
    for name, texts, count in (("calibration", calibration, samples), ("training", training, None)):
        if texts is not None:
            path, column = split_column(texts)
            data = {"data": str(path), "column": column, "samples": count, "max_length": max_length, "seed": seed}
            form[name] = {key: value for key, value in data.items() if value is not None}
    try:
        return Recipe.model_validate(form)
    except ValidationError as error:
        first = error.errors()[0]
        raise BitlowerError(f"{first['loc'][-1]}: {first['msg']}, not {first['input']!r}") from None
