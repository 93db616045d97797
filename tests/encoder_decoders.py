"""Small encoder-decoders with random weights, traced once a process, and batches for them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import fx
from transformers import PreTrainedModel

from bitlower.frontends import load
from bitlower.ir import Program
from bitlower.ir.operators import graph_results, set_graph_results

_TEXT = "the a cat dog bird river sings runs sleeps falls near under old small quick and never"
ENTRIES = 32
SPEECH = ("<|startoftranscript|>", "<|en|>", "<|de|>", "<|transcribe|>", "<|notimestamps|>", "<|endoftext|>")
"""Tokens that Whisper's tokenizer has beside words."""
_TOKENS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
_BART = {
    "vocab_size": ENTRIES, "d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "forced_eos_token_id": None, **_TOKENS,
}  # fmt: skip
_T5 = {"vocab_size": ENTRIES, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2}
CONFIGS: dict[str, Any] = {
    "bart": lambda: transformers.BartConfig(**_BART, max_position_embeddings=24),
    "marian": lambda: transformers.MarianConfig(
        **_BART, max_position_embeddings=24, decoder_vocab_size=ENTRIES, share_encoder_decoder_embeddings=False
    ),
    "t5": lambda: transformers.T5Config(
        **_T5, num_heads=2, pad_token_id=1, eos_token_id=2, decoder_start_token_id=1, feed_forward_proj="gated-gelu"
    ),
    "whisper": lambda: transformers.WhisperConfig(
        **_BART, num_mel_bins=8, max_source_positions=50, max_target_positions=20
    ),
}


@cache
def model_of(kind: str) -> PreTrainedModel:
    """The model; weights are large enough for each to matter."""
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    auto = transformers.AutoModelForSpeechSeq2Seq if kind == "whisper" else transformers.AutoModelForSeq2SeqLM
    model: PreTrainedModel = auto.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.1 if parameter.dim() == 1 else 0.0, std=0.3)
    return model


@cache
def traced(kind: str) -> Program:
    """Its Program; not to be changed."""
    return load(model_of(kind))


def source(kind: str, rows: int = 2, length: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    """What the encoder reads; the last row of tokens ends with padding."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "whisper":
        return {"input_features": torch.randn(rows, 8, 100, generator=generator)}
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[-1, length - 2 :] = 0
    ids = torch.randint(3, ENTRIES, (rows, length), generator=generator)
    return {"input_ids": ids.where(mask.bool(), 1), "attention_mask": mask}


def target(rows: int = 2, length: int = 5, seed: int = 0, *, padded: bool = False) -> dict[str, torch.Tensor]:
    """What the decoder reads; the last row ends with padding if it is ``padded``."""
    generator = torch.Generator().manual_seed(100 + seed)
    mask = torch.ones(rows, length, dtype=torch.int64)
    if padded:
        mask[-1, length - 2 :] = 0
    ids = torch.randint(3, ENTRIES, (rows, length), generator=generator)
    return {"decoder_input_ids": ids.where(mask.bool(), 1), "decoder_attention_mask": mask}


def batches(kind: str, count: int = 3, *, padded: bool = True) -> list[dict[str, torch.Tensor]]:
    """Batches of different lengths."""
    return [{**source(kind, length=6 + n, seed=n), **target(length=4 + n, seed=n, padded=padded)} for n in range(count)]


def reading_source() -> Program:
    """A BART whose decoder adds the mean of the source's embeddings to its logits: it cannot be cut in two."""
    program = traced("bart").clone()
    results = list(graph_results(program.graph))
    first = next(node for node in program.graph.nodes if node.target is torch.ops.aten.embedding.default)
    with program.graph.inserting_after(results[0]):
        mean: fx.Node = program.graph.call_function(torch.ops.aten.mean.default, (first,))
    with program.graph.inserting_after(mean):
        logits = program.graph.call_function(torch.ops.aten.add.Tensor, (results[0], mean))
    logits.meta = dict(results[0].meta)
    mean.meta = {"type": results[0].meta["type"]}
    set_graph_results(program.graph, [logits, *results[1:]])
    return program


def save(kind: str, folder: Path) -> Path:
    """The model as a Hugging Face folder, with a tokenizer over ``_TEXT``, which ends each text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    model_of(kind).save_pretrained(folder)
    entries = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3} | {word: 4 + i for i, word in enumerate(_TEXT.split())}
    if kind == "whisper":
        entries |= {token: len(entries) + i for i, token in enumerate(SPEECH)}
    tokenizer = Tokenizer(models.WordLevel(entries, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
