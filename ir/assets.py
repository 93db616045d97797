"""What belongs to a model beside its weights: the files of its tokenizer and processor, and how its results are pooled.

Files are known by their names: those that transformers' tokenizers and processors read, those of SentencePiece,
tiktoken and Mistral, and those of a sentence-transformers folder, whose ``modules.json`` names the folders of the
modules that follow the transformer. Licences go along too, and so does the model's card, which says what it is.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from bitlower.ir.diagnostics import BitlowerError
from bitlower.ir.files import is_file, read_bytes, read_text, reason
from bitlower.ir.json_files import parse_json
from bitlower.ir.model_card import CARD

GENERATION = "generation_config.json"
MODULES = "modules.json"
TOKENIZERS = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges*.txt", "bpe.codes",
    "dict*.txt", "*.model", "*.model.v*", "*.spm", "*.tiktoken", "*.tokenizer", "tekken*.json", "emoji.json",
    "normalizer.json", "byte_maps.json", "entity_vocab.json", "target_vocab.json", "word_pronunciation.json",
    "word_shape.json",
)  # fmt: skip
"""Patterns of the names of tokenizers' files."""
_OTHERS = (
    "chat_template*", "additional_chat_templates/*.jinja", GENERATION, "*preprocessor_config.json",
    "processor_config.json", "audio_tokenizer_config.json", MODULES, "config_sentence_transformers.json",
    "sentence_*_config.json",
)  # fmt: skip
_LICENCES = ("licen[sc]e*", "notice*", "use_policy*")
"""Patterns of the names of files that say what may be done with a model, in small letters."""
_MODEL = (
    "config.json", "manifest.json", "verification.json", "ledger.json", "recipe.yaml", "*.safetensors", "*.index.json",
    "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.onnx.data", "*.gguf", "*.tflite",
    "onnx", "openvino", "coreml", "tf_model", "original",
)  # fmt: skip
"""The model itself, in whatever format, and what artifacts hold of our own."""
_ABOUT = (
    "readme*", "licen[sc]e*", "notice*", "use_policy*", "*.md", "*.pdf", "*.png", "*.jpg", "*.svg", "*.gif", "figures",
    "assets", "images", "modelcard.json", "eval", "trainer_state.json", "training_args*", "*_results.json",
    "similarity_evaluation*",
)  # fmt: skip
"""What is about the model, and read by no program that runs it."""
TRANSFORMER = "Transformer"
"""The kind of the module that is the model itself."""
_NORMALIZE = "Normalize"


def read_assets(folder: Path, others: Collection[str] = ()) -> dict[str, bytes]:
    """The files that go along with the model in ``folder``, by their path in an artifact, in order.

    A transformer in a folder of its own (``0_Transformer``) comes to lie beside the modules that follow it, and
    ``modules.json`` says so.

    Args:
        folder: the model's.
        others: further files, which the tokenizer is known to read.

    Raises:
        BitlowerError: ``modules.json`` is damaged, or names a folder that is not inside its own or not there.
    """
    root = modules_root(folder)
    files = _read(folder, {name for name in _names(folder) if _belongs(name) or name in others})
    if root is None:
        return files
    if root != folder:
        files |= _read(root, {name for name in _names(root) if _belongs(name)})
        files[MODULES] = _beside_transformer(root / MODULES)
    followers = (place for place, kind in _places(root / MODULES) if place and kind != TRANSFORMER)
    files |= _read(root, {name for place in followers for name in _files_below(root, place)})
    return dict(sorted(files.items()))


def modules_root(folder: Path) -> Path | None:
    """Where ``modules.json`` lies: beside the transformer in ``folder``, or above it; None: nowhere.

    Raises:
        BitlowerError: it is damaged.
    """
    if is_file(folder / MODULES):
        return folder
    above = folder.absolute().parent
    if is_file(above / MODULES) and (folder.absolute().name, TRANSFORMER) in _places(above / MODULES):
        return above
    return None


def transformer_folder(root: Path) -> Path | None:
    """The folder of the transformer of a sentence-transformers model whose root holds no ``config.json`` itself.

    Raises:
        BitlowerError: ``modules.json`` is damaged.
    """
    if not is_file(root / MODULES):
        return None
    named = (root / place for place, kind in _places(root / MODULES) if place and kind == TRANSFORMER)
    return next((place for place in named if is_file(place / "config.json")), None)


def is_tokenizer(name: str) -> bool:
    """Whether ``name`` is that of a file that a tokenizer reads."""
    return _matches(name, TOKENIZERS)


def is_inside(name: str) -> bool:
    """Whether ``name`` is a plain relative path, which stays inside the folder that it is joined to."""
    path = PurePosixPath(name)
    parts = path.parts
    return bool(parts) and path.as_posix() == name and not path.is_absolute() and not {"..", "."} & set(parts) and (
        "\\" not in name and "\0" not in name
    )  # fmt: skip


def left_behind(folder: Path, assets: Collection[str]) -> list[str]:
    """Files and folders beside the model that are neither among ``assets`` nor the model, and not only about it."""
    tops = {name.partition("/")[0] for name in assets}
    entries = sorted(entry.name for entry in folder.iterdir() if entry.exists())
    return [
        name
        for name in entries
        if name not in tops and not name.startswith(".") and not _matches(name.lower(), (*_MODEL, *_ABOUT))
    ]


def _belongs(name: str) -> bool:
    about = name == CARD or _matches(name.lower(), _LICENCES)
    return about or is_tokenizer(name) or _matches(name, _OTHERS)


def _read(folder: Path, names: Collection[str]) -> dict[str, bytes]:
    return {name: read_bytes(folder / name, (folder / name).stat().st_size) for name in sorted(names)}


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)


def _names(folder: Path) -> Iterator[str]:
    """The regular files of ``folder`` and of the folders in it, not hidden ones."""
    for path in (*folder.glob("*"), *folder.glob("*/*")):
        if not path.name.startswith(".") and is_file(path):
            yield path.relative_to(folder).as_posix()


def _places(path: Path) -> list[tuple[str, str]]:
    """The folder and the kind of each module of a sentence-transformers model, as ``modules.json`` at ``path`` says."""
    places = []
    for module in _modules(path):
        place, kind = module.get("path"), module.get("type")
        if not isinstance(place, str) or not isinstance(kind, str):
            raise BitlowerError(f"{path}: a module has no path or no type", hint="fetch the file again")
        kind = kind.rpartition(".")[2]
        if place and not is_inside(place):
            raise BitlowerError(f"{path} names a folder outside of the model's: {place!r}")
        if place and kind != _NORMALIZE and not (path.parent / place).is_dir():  # which has no files
            raise BitlowerError(f"{path} names the folder {place!r}, which is missing", hint="fetch the model again")
        places.append((place, kind))
    return places


def _beside_transformer(path: Path) -> bytes:
    """``modules.json`` for a folder in which the transformer lies at the top."""
    modules = _modules(path)
    for module in modules:
        if str(module["type"]).rpartition(".")[2] == TRANSFORMER:
            module["path"] = ""
    return json.dumps(modules, indent=2).encode() + b"\n"


def _modules(path: Path) -> list[dict[str, Any]]:
    try:
        form = parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise BitlowerError(f"{path} cannot be read: {reason(error)}", hint="fetch the file again") from None
    if not isinstance(form, list) or not all(isinstance(module, dict) for module in form):
        raise BitlowerError(f"{path} must hold a list of modules", hint="fetch the file again")
    return form


def _files_below(folder: Path, place: str) -> Iterator[str]:
    for path in (folder / place).rglob("*"):
        if is_file(path) and not path.name.startswith("."):
            yield path.relative_to(folder).as_posix()


def generation_settings(assets: Mapping[str, bytes]) -> dict[str, Any]:
    """What ``generation_config.json`` says, without what it leaves open; nothing where it is missing or damaged."""
    try:
        form = parse_json(assets.get(GENERATION, b"{}"), finite=False)
    except ValueError:
        return {}
    return {key: value for key, value in form.items() if value is not None} if isinstance(form, dict) else {}
