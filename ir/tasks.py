"""What a Hugging Face model is for: tasks by their pipeline names, each with transformers' class and its outputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A task.

    Args:
        auto_class: the class of transformers that makes a model for it.
        outputs: what the model returns for it; whatever it returns, if empty.
        whole: whether an encoder with a decoder behind it does the task in one run.
        sequence_to_sequence: whether an encoder reads a source, and a decoder writes a target from it token by token.
        pictures: whether the model reads pictures alone.
        sounds: whether it reads sound alone, and does its task in one run.
        captions: whether it reads texts and pictures, so many of each, and says how well they fit.
    """

    auto_class: str
    outputs: tuple[str, ...] = ()
    whole: bool = False
    sequence_to_sequence: bool = False
    pictures: bool = False
    sounds: bool = False
    captions: bool = False


TEXT_GENERATION = "text-generation"
TEXT_TO_TEXT = "text2text-generation"
SPEECH_RECOGNITION = "automatic-speech-recognition"
PICTURE_FEATURES = "image-feature-extraction"
SOUND_CLASSES = "audio-classification"
CTC = "ctc"
CAPTIONS = "zero-shot-image-classification"
TASKS = {
    "feature-extraction": Task("AutoModel"),
    "text-classification": Task("AutoModelForSequenceClassification", ("logits",), whole=True),
    "token-classification": Task("AutoModelForTokenClassification", ("logits",), whole=True),
    "question-answering": Task("AutoModelForQuestionAnswering", ("start_logits", "end_logits"), whole=True),
    "fill-mask": Task("AutoModelForMaskedLM", ("logits",)),
    "pre-training": Task("AutoModelForPreTraining"),
    TEXT_GENERATION: Task("AutoModelForCausalLM"),
    TEXT_TO_TEXT: Task("AutoModelForSeq2SeqLM", sequence_to_sequence=True),
    SPEECH_RECOGNITION: Task("AutoModelForSpeechSeq2Seq", sequence_to_sequence=True),
    "image-classification": Task("AutoModelForImageClassification", ("logits",), pictures=True),
    PICTURE_FEATURES: Task("AutoModel", pictures=True),
    SOUND_CLASSES: Task("AutoModelForAudioClassification", ("logits",), sounds=True),
    CTC: Task("AutoModelForCTC", ("logits",), sounds=True),
    CAPTIONS: Task(
        "AutoModelForZeroShotImageClassification",
        ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds"),
        captions=True,
    ),
}
"""All tasks, by the names that transformers' pipelines have (``pre-training`` and ``ctc``, which have none, by their
classes)."""
_ENCODER = "EncoderModel"


def auto_class(task: str, architectures: Iterable[str] = ()) -> str:
    """The class of transformers that makes the model; the encoder alone, where the architecture says so.

    Args:
        task: one of :data:`TASKS`.
        architectures: as the configuration names them.
    """
    if task == "feature-extraction" and any(name.endswith(_ENCODER) for name in architectures):
        return "AutoModelForTextEncoding"
    return TASKS[task].auto_class
