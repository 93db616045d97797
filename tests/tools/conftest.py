"""Models and texts for the tests of the tools: small, made here, saved as Hugging Face folders."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from bitlower.backends.base import Backend
from bitlower.backends.onnx_qdq.sizes import OnnxSizes
from bitlower.backends.registry import BACKENDS
from bitlower.frontends import load
from bitlower.ir import Batch, Level, Program

os.environ.setdefault("HF_HUB_OFFLINE", "1")

TEXT = (
    "the a cat dog bird house tree river sings runs sleeps falls near under over with red old small quick and but "
    "because never always rain snow wind comes goes stays . , ?"
)
WORDS = TEXT.split()


def sentences(count: int, seed: int = 0) -> list[str]:
    """Different sentences of 4 to 12 words."""
    import random

    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(4, 12))) for _ in range(count)]


def save_tokenizer(folder: Path) -> None:
    """A WordPiece tokenizer over ``WORDS`` with BERT's special tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import BertTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(c) for c in range(97, 123)]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS, *letters, *(f"##{c}" for c in letters)])}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    BertTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def save_bert(folder: Path, *, labels: int | None = None) -> Path:
    """A BERT of 2 layers and width 32 with its tokenizer; a classifier if it has ``labels``."""
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, num_labels=labels or 2,
    )  # fmt: skip
    model = BertForSequenceClassification(config) if labels else BertModel(config)
    model.eval().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables as wide as they need to be, whatever the terminal of the test run has."""
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="session")
def save_head(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``save_head("TokenClassification", num_labels=5)``: the tiny encoder with a head, its weights large enough that
    tokens differ; not to be written to."""

    def save(head: str, **settings: Any) -> Path:
        import transformers

        folder = tmp_path_factory.mktemp("models") / head
        torch.manual_seed(1)
        config = transformers.BertConfig(
            vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=64, **settings,
        )  # fmt: skip
        model = getattr(transformers, f"BertFor{head}")(config).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder)
        save_tokenizer(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder; not to be written to."""
    return save_bert(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def bert_program(bert: Path) -> Program:
    """The tiny encoder, traced once."""
    return load(str(bert))


@pytest.fixture
def traced(bert: Path, bert_program: Program, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing the tiny encoder, and the tiny decoder where a test has it, takes no time."""

    def quick(model: Any, **options: Any) -> Program:
        if os.fspath(model) == str(bert):
            return bert_program.clone()
        if "llama" in request.fixturenames and os.fspath(model) == str(request.getfixturevalue("llama")):
            return request.getfixturevalue("llama_program").clone()
        return load(model, **options)

    for user in ("runs.flow", "planning.plan", "evaluation.language_model"):
        monkeypatch.setattr(f"bitlower.tools.{user}.load", quick)


class Report(dict[str, Any]):
    """What the stub of a backend reports."""

    to_dict = dict[str, Any].copy


CALLS: list[tuple[Program, int, Sequence[Batch]]] = []


@dataclass(frozen=True)
class Stub(Backend):
    """Stands in for every backend."""

    name: ClassVar[str] = "onnx-qdq"
    levels: ClassVar[frozenset[Level]] = frozenset(Level)
    opset: int = 21
    form: str = "qdq"

    def export(self, program: Program, folder: Path, batches: Sequence[Batch], provenance: Any = None) -> Report:
        CALLS.append((program, self.opset, batches))
        (folder / "model.txt").write_text(program.digest())
        (folder / "manifest.json").write_text("{}")
        return Report({"kernels": {"got": 3, "expected": 3}, "worst": 0.5})

    @classmethod
    def verify(cls, folder: Path) -> Report:
        return Report()

    def sizes(self, placed: Program) -> OnnxSizes:
        return OnnxSizes()


Stub.__module__ = "bitlower.backends.stub"  # one of ours, whose faults are not those of a third party
sys.modules[Stub.__module__] = sys.modules[__name__]


@dataclass(frozen=True)
class Other(Stub):
    """Another one."""

    name: ClassVar[str] = "other"
    formats: ClassVar[Mapping[str, Mapping[str, Any]]] = {"gptq-v2": {}}


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch, traced: None) -> SimpleNamespace:
    """Stands in for every backend; ``calls`` tells how it was called, ``replace(member=…)`` changes it."""
    CALLS.clear()

    def replace(**members: Any) -> None:
        for name, value in members.items():
            monkeypatch.setattr(Stub, name, value)

    monkeypatch.setattr(BACKENDS, "folder", Path(os.devnull))
    monkeypatch.setattr(BACKENDS, "loose", {cls.name: (Path(__file__), cls) for cls in (Stub, Other)})
    return SimpleNamespace(calls=CALLS, replace=replace, report=Report)


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny classifier of two labels; not to be written to."""
    return save_bert(tmp_path_factory.mktemp("models") / "classifier", labels=2)


def save_llama(folder: Path) -> Path:
    """A Llama of 2 layers, width 32 and 2 KV heads, its head not tied, and a word tokenizer without padding token."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *dict.fromkeys(WORDS)])}
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny decoder; not to be written to."""
    return save_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def llama_program(llama: Path) -> Program:
    """The tiny decoder, traced once."""
    return load(str(llama))


@pytest.fixture
def story(tmp_path: Path) -> Path:
    """A text of 40 lines, about 300 words."""
    path = tmp_path / "story.txt"
    path.write_text("\n".join(sentences(40)) + "\n")
    return path


@pytest.fixture
def own_bert(bert: Path, tmp_path: Path) -> Path:
    """A copy of the tiny encoder, to damage."""
    return Path(shutil.copytree(bert, tmp_path / "model"))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """40 sentences, one a line."""
    path = tmp_path / "sentences.txt"
    path.write_text("\n".join(sentences(40)) + "\n")
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder of the test's own, but for the traces, which all tests share."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "bitlower").mkdir()
    (folder / "bitlower" / "traces").symlink_to(os.environ["BITLOWER_TRACES"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    yield folder / "bitlower"
    shutil.rmtree(folder, ignore_errors=True)
