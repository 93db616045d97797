"""Which task an architecture is for, as transformers' own tables say; and models that no task here is for."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitlower.frontends._scans import CHUNKED, SELECTIVE
from bitlower.frontends._sounds import reads_samples, reads_spectrogram
from bitlower.ir import BitlowerError, nearest
from bitlower.ir.quiet import quiet
from bitlower.ir.tasks import CAPTIONS, CTC, PICTURE_FEATURES, SOUND_CLASSES, SPEECH_RECOGNITION, TASKS, TEXT_TO_TEXT
from bitlower.ir.tokens import SOUND

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TABLES = (
    ("text-classification", "SEQUENCE_CLASSIFICATION"),
    ("token-classification", "TOKEN_CLASSIFICATION"),
    ("question-answering", "QUESTION_ANSWERING"),
    (TEXT_TO_TEXT, "SEQ_TO_SEQ_CAUSAL_LM"),
    (SPEECH_RECOGNITION, "SPEECH_SEQ_2_SEQ"),
    ("image-classification", "IMAGE_CLASSIFICATION"),
    (SOUND_CLASSES, "AUDIO_CLASSIFICATION"),
    (CTC, "CTC"),
    (CAPTIONS, "ZERO_SHOT_IMAGE_CLASSIFICATION"),
    ("fill-mask", "MASKED_LM"),
    ("text-generation", "CAUSAL_LM"),
    ("feature-extraction", "TEXT_ENCODING"),
    ("pre-training", "PRETRAINING"),
)
"""Tables of transformers, the more specific first: those of pre-training and encoding hold classes of others too."""
_BODY = (
    "an encoder loads without its head: name feature-extraction as the task for one of text, image-feature-extraction"
    " for one of pictures"
)
_TEXT, _TEXT_PART = "input_ids", "text_config"
PIXELS = "pixel_values"
_CAPTIONED = frozenset(
    (
        "self", _TEXT, PIXELS, "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "return_loss",
        "interpolate_pos_encoding", "kwargs",
    )
)  # fmt: skip
"""What models of texts and pictures are called with; who asks for more reads something else too."""
_OTHER_INPUTS = "pass `example_inputs`"
SPEECH = "WhisperForConditionalGeneration"
"""The one class whose features of sound an encoder reads here."""


def check_task(task: str | None) -> None:
    """See that a task is known.

    Raises:
        BitlowerError: it is not.
    """
    if task is not None and task not in TASKS:
        raise BitlowerError(f"unknown task {task!r}", hint=nearest(task, TASKS))


def task_of(architectures: Sequence[str], where: str) -> str:
    """The task of the first architecture that has one.

    Raises:
        BitlowerError: none has; the message says what for the architecture is, if that is known.
    """
    for architecture in architectures:
        for task, table in _TABLES:
            if architecture in _names(f"MODEL_FOR_{table}_MAPPING_NAMES"):
                return task
        if architecture in _names("MODEL_MAPPING_NAMES"):
            return PICTURE_FEATURES if _reads_pictures(architecture) else "feature-extraction"
    other = next((purpose for name in architectures if (purpose := _other(name))), "")
    raise BitlowerError(
        f"{where}the architecture {', '.join(architectures) or '(none given)'} "
        + (f"is for {other}, which is not supported" if other else "fits no task"),
        hint=_other_hint(architectures) if other else f"name one of {', '.join(TASKS)} as the task",
    )


def refuse_texts_of_sound(architectures: Sequence[str], task: str) -> None:
    """See that a model that hears sound alone is loaded for a task of sounds.

    Raises:
        BitlowerError: it is not.
    """
    for name in architectures:
        if getattr(_class(name), "main_input_name", None) == SOUND and not TASKS[task].sounds:
            own = next((known for known, table in _TABLES if name in _names(f"MODEL_FOR_{table}_MAPPING_NAMES")), None)
            known = TASKS[own].sounds if own else False
            raise BitlowerError(
                f"{name} hears sound alone, and {task} is not for that",
                hint=f"name {own} as the task" if known else _OTHER_INPUTS,
            )


def _reads_pictures(architecture: str) -> bool:
    kind = _class(architecture)
    return getattr(kind, "main_input_name", None) == PIXELS and _TEXT_PART not in _parts(kind.config_class)


def _other_hint(architectures: Sequence[str]) -> str:
    """What can be done with a head that no task is for: its body loads if it reads text or pictures."""
    inputs = {getattr(_class(name), "main_input_name", _TEXT) for name in architectures}
    return _BODY if inputs <= {_TEXT, PIXELS} else f"load the model with transformers, and {_OTHER_INPUTS}"


def _class(architecture: str) -> Any:
    import transformers

    return getattr(transformers, architecture, None)


def _parts(config: Any) -> list[str]:
    return list(getattr(config, "sub_configs", None) or {})


def _names(table: str) -> set[str]:
    from transformers.models.auto import modeling_auto

    return set(_flat(getattr(modeling_auto, table, {}).values()))


def _flat(values: Any) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        else:
            yield from _flat(value)


def _other(architecture: str) -> str:
    """What transformers' further tables say that an architecture is for, in words; empty if none has it."""
    from transformers.models.auto import modeling_auto

    for table in vars(modeling_auto):
        name = table.removeprefix("MODEL_FOR_").removesuffix("_MAPPING_NAMES")
        if table == f"MODEL_FOR_{name}_MAPPING_NAMES" and architecture in _names(table):
            return str(name).lower().replace("_", " ")
    return ""


def refuse_class(kind: type[PreTrainedModel], config: Any, task: str) -> None:
    """See that a model of this class and configuration can be loaded for ``task``, before its weights are.

    Raises:
        BitlowerError: it reads something else than the task says, is several models, or keeps a state in a way that
            cannot be traced.
    """
    refuse_texts_of_sound([kind.__name__], task)
    parts = _parts(config)
    others = [name.removesuffix("_config") for name in parts if name != _TEXT_PART] if _TEXT_PART in parts else []
    if kind.__name__ == SPEECH and task == SPEECH_RECOGNITION:
        return
    if TASKS[task].sounds:
        _refuse_sounds(kind, config, task)
        return
    if TASKS[task].captions:
        _refuse_captions(kind)
        return
    if TASKS[task].pictures or (kind.main_input_name == PIXELS and _TEXT_PART not in parts):
        _refuse_pictures(kind, config, task)
        return
    if kind.__name__ in _names("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES") and others:
        raise BitlowerError(
            f"{kind.__name__} writes from pictures among its tokens, and decoders here read token ids alone",
            hint="its vision tower works as a module, its language model with `inputs_embeds` among `example_inputs`,"
            " without a cache",
        )
    if kind.main_input_name != _TEXT or others:
        reads = kind.main_input_name if kind.main_input_name != _TEXT else f"text and {' and '.join(others)}"
        known = f"name {CAPTIONS} as the task" if _reads_captions(kind) else _OTHER_INPUTS
        raise BitlowerError(f"{kind.__name__} reads {reads}, not token ids", hint=known)
    if getattr(config, "is_encoder_decoder", False) and not (TASKS[task].whole or TASKS[task].sequence_to_sequence):
        raise BitlowerError(
            f"{kind.__name__} is an encoder and a decoder, which together are not supported for {task}",
            hint=f"they are for {TEXT_TO_TEXT}, and with heads for classification and question answering",
        )
    if getattr(kind, "_is_stateful", False) and config.model_type not in (*SELECTIVE, *CHUNKED):
        raise state_refused(kind.__name__)
    refuse_rope(kind.__name__, config.to_dict())


def _reads_captions(kind: type[PreTrainedModel]) -> bool:
    """Whether a model reads texts and pictures, and nothing else."""
    names = set(inspect.signature(kind.forward).parameters)
    return {_TEXT, PIXELS} <= names <= _CAPTIONED


def _refuse_captions(kind: type[PreTrainedModel]) -> None:
    """See that a model reads texts and pictures, and nothing else.

    Raises:
        BitlowerError: it is not so.
    """
    if _reads_captions(kind):
        return
    names = set(inspect.signature(kind.forward).parameters)
    others = sorted(names - _CAPTIONED)
    raise BitlowerError(
        f"{kind.__name__} reads {', '.join(others or [str(kind.main_input_name)])}, and {CAPTIONS} is for models of"
        " texts and of pictures of one size",
        hint=_OTHER_INPUTS,
    )


def _refuse_sounds(kind: type[PreTrainedModel], config: Any, task: str) -> None:
    """See that a model reads sound in a form that is known here.

    Raises:
        BitlowerError: it does not.
    """
    if kind.main_input_name != SOUND or not (reads_samples(config) or reads_spectrogram(config)):
        raise BitlowerError(
            f"{kind.__name__} reads {kind.main_input_name}, and {task} is for models of samples (wav2vec 2.0, HuBERT)"
            " and of spectrograms of one size (AST)",
            hint=_OTHER_INPUTS,
        )


def _refuse_pictures(kind: type[PreTrainedModel], config: Any, task: str) -> None:
    """See that a model reads one picture a row and nothing else, and that the task is one of pictures.

    Raises:
        BitlowerError: it is not so.
    """
    name, parameters = kind.__name__, inspect.signature(kind.forward).parameters.values()
    if not TASKS[task].pictures:
        known = ", ".join(name for name, entry in TASKS.items() if entry.pictures)
        raise BitlowerError(f"{name} reads pictures, and {task} is for texts", hint=f"name one of {known} as the task")
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    others = [needs for needs in needed if needs not in ("self", PIXELS)]
    whole = _TEXT_PART in _parts(config)
    if kind.main_input_name != PIXELS or whole or others:
        reads = "text too" if whole else ", ".join(dict.fromkeys((kind.main_input_name, *others)))
        raise BitlowerError(
            f"{name} reads {reads}, and {task} is for models of pictures alone",
            hint="take its part for pictures, as CLIPVisionModel is of CLIP" if whole else _OTHER_INPUTS,
        )
    if hasattr(config, "num_frames"):
        raise BitlowerError(
            f"{name} reads the frames of a film, and {task} is for one picture a row", hint=_OTHER_INPUTS
        )


def state_refused(name: str) -> BitlowerError:
    """The refusal of the model ``name``, which goes from token to token by a state of another kind."""
    return BitlowerError(
        f"{name} keeps a state between tokens that is no keys and values, which is not supported for it (recurrent"
        " models and linear attention go through the tokens in a loop)",
        hint="take a model of attention, short convolutions (LFM2) or state-space layers (Mamba, Mamba-2, Jamba)",
    )


def refuse_folder(folder: Path, loader: str, task: str) -> None:
    """:func:`refuse_class` for the model in ``folder``; what transformers cannot read is left to its loading.

    Raises:
        BitlowerError: as there.
    """
    import transformers
    from transformers.models.auto.auto_factory import _get_model_class

    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            kind = _get_model_class(config, getattr(transformers, loader)._model_mapping)
    except Exception:  # whatever its libraries raise on a configuration that makes no model
        return
    refuse_class(kind, config, task)


def refuse_rope(name: str, config: Mapping[str, Any]) -> None:
    """Refuse rotary frequencies that depend on how long the longest text seen so far was.

    Raises:
        BitlowerError: the configuration asks for them.
    """
    for key in ("rope_parameters", "rope_scaling"):
        parameters = config.get(key)
        groups = [parameters, *parameters.values()] if isinstance(parameters, Mapping) else []
        for group in groups:
            kind = (group.get("rope_type") or group.get("type")) if isinstance(group, Mapping) else None
            if isinstance(kind, str) and "dynamic" in kind:
                raise BitlowerError(
                    f"{name} asks for {kind} rope, whose frequencies change with the longest text so far",
                    hint=f'a fixed factor works: `{key}` with "rope_type": "linear", "yarn" or "llama3", or "default"',
                )
