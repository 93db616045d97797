from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx, nn

from bitlower.frontends import load
from bitlower.ir import Level, Program, TensorType, ValueSpec, get_tensor, set_tensor
from bitlower.ir.document import encode
from bitlower.ir.serialize import decode
from bitlower.passes import Context
from bitlower.passes._machinery.registry import LOSSES, PASSES
from bitlower.passes.canonical.clean import Clean

ROOT = Path(__file__).parents[1]
ACTIVATION, LOGITS = TensorType(torch.float32, ("batch", 16)), TensorType(torch.float32, ("batch", 4))


class TinyModel(torch.nn.Module):
    """A residual block of two linears and a LayerNorm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(16, 32)
        self.down = torch.nn.Linear(32, 16)
        self.norm = torch.nn.LayerNorm(16)
        self.head = torch.nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.norm(x + self.down(torch.nn.functional.gelu(self.up(x))))
        return hidden, self.head(hidden)


@pytest.fixture(scope="module", autouse=True)
def own_plugins() -> Iterator[None]:
    """What a module's tests load of loose files is unknown to the next module's."""
    before = [(catalog, dict(catalog.loose)) for catalog in (PASSES, LOSSES)]
    yield
    for catalog, loose in before:
        catalog.loose = loose


@pytest.fixture(scope="session")
def seq2seq() -> SimpleNamespace:
    """Small encoder-decoders, traced once, and batches for them: what ``encoder_decoders.py`` defines."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("encoder_decoders.py"))))


@pytest.fixture(scope="session")
def sound_models() -> SimpleNamespace:
    """Small models of sound and files of tones: what ``sound_models.py`` defines."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("sound_models.py"))))


@pytest.fixture(scope="session")
def run_script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """``run_script(script, *arguments, env={}, cwd=…)``: as ``python -c`` in a process of its own, which may be killed.

    What ``process_server.py`` imports is imported already: a test of imports starts an interpreter itself.
    """
    server: subprocess.Popen[str] | None = None
    folder = tmp_path_factory.mktemp("scripts")

    def run(script: str, *arguments: object, env: dict[str, str] | None = None, cwd: Path = ROOT) -> Any:
        nonlocal server
        if server is None:
            command = [sys.executable, str(Path(__file__).with_name("process_server.py"))]
            server = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        files = {name: str(folder / name) for name in ("stdout", "stderr")}
        listed = [str(argument) for argument in arguments]
        request = {"script": script, "arguments": listed, "environment": {**os.environ, **(env or {})}}
        print(json.dumps({**request, "folder": str(cwd), **files}), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(listed, code, *(Path(path).read_text() for path in files.values()))

    yield run
    if server is not None:
        server.kill()
        server.wait()


@pytest.fixture
def tiny_program() -> Program:
    """Float program, input ``x``: [batch, 16], outputs ``hidden``: [batch, 16] and ``logits``: [batch, 4]."""
    document, tensors = encode(_traced())
    return decode(document, {name: tensor.clone() for name, tensor in tensors.items()})


@cache
def _traced() -> Program:
    torch.manual_seed(0)
    example = {"x": torch.randn(3, 16)}
    dynamic = {"x": {0: torch.export.Dim.DYNAMIC}}
    exported = torch.export.export(TinyModel().eval(), (), example, dynamic_shapes=dynamic, strict=False)
    module = exported.module()
    for node in list(module.graph.nodes):
        if node.op == "call_module":
            module.graph.erase_node(node)
        elif node.op != "output":
            node.meta = _meta(node)
    module.graph.output_node().meta = {}
    module.graph.set_codegen(fx.graph.CodeGen())
    plain = fx.GraphModule(module, module.graph)
    outputs = (ValueSpec("hidden", ACTIVATION), ValueSpec("logits", LOGITS))
    program = Program({"model": plain}, Level.FLOAT, "text-classification", (ValueSpec("x", ACTIVATION),), outputs)
    program.recompile()
    return program


def _meta(node: fx.Node) -> dict[str, object]:
    """What the program's nodes carry: the type with its symbolic batch by name, and the module path."""
    value = node.meta["val"] if "val" in node.meta else node.graph.owning_module.get_parameter(node.target)
    shape = tuple(size if isinstance(size, int) else "batch" for size in value.shape)
    meta: dict[str, object] = {"type": TensorType(value.dtype, shape)}
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = stack[-1][0] if stack else ""
    if path:
        meta["path"] = path
    if node.op == "call_function":
        meta["source"] = f"tiny.py: {node.name}"
    return meta


_HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60, "max_position_embeddings": 40}
_SIZES = {"hidden_size": 32, "intermediate_size": 48, **_HEADS}
_OPT = {"hidden_size": 32, "ffn_dim": 48, **_HEADS}
_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("Bert", "Model", _SIZES),
    "llama": ("Llama", "ForCausalLM", _SIZES | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "gemma": ("Gemma", "ForCausalLM", _SIZES | {"num_key_value_heads": 2, "head_dim": 8}),
    "gpt2": ("GPT2", "LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60, "n_positions": 40}),
    "opt": ("OPT", "ForCausalLM", _OPT | {"word_embed_proj_dim": 32}),
    "opt-post-norm": ("OPT", "ForCausalLM", _OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "gpt-neox": ("GPTNeoX", "ForCausalLM", _SIZES),
    "phi": ("Phi", "ForCausalLM", _SIZES | {"hidden_size": 36}),
}


@cache
def _cleaned(family: str) -> Program:
    import transformers

    name, kind, settings = _FAMILIES[family]
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    model = getattr(transformers, name + kind)(getattr(transformers, name + "Config")(**settings, **special)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.2 if parameter.dim() == 1 else 0.05) * torch.randn(parameter.shape)
    program = load(model, task="feature-extraction" if kind == "Model" else "text-generation")
    Clean().run(program, Context())
    program.recompile()
    return program


@pytest.fixture(scope="session")
def family() -> Callable[[str], Program]:
    """``family("llama")``: the cleaned program of a tiny random model with 32 channels, 48 inner ones, 2 layers."""
    return lambda name: _cleaned(name).clone()


@pytest.fixture(scope="session")
def in_float64() -> Callable[[Program], Program]:
    """``in_float64(program)``: a copy that computes in double precision."""

    def convert(program: Program) -> Program:
        copy = program.clone()
        for name in {str(node.target) for node in copy.graph.find_nodes(op="get_attr")}:
            tensor = get_tensor(copy.module, name)
            if tensor.is_floating_point():
                wide = tensor.detach().double()
                set_tensor(copy.module, name, nn.Parameter(wide) if isinstance(tensor, nn.Parameter) else wide)
        for node in copy.graph.find_nodes(op="placeholder"):
            if node.meta["type"].is_float:
                node.meta["type"] = node.meta["type"].with_dtype(torch.float64)
        types = [node.meta["type"] for node in copy.graph.find_nodes(op="placeholder")]
        copy.inputs = tuple(ValueSpec(spec.name, kind) for spec, kind in zip(copy.inputs, types, strict=True))
        return copy

    return convert


@pytest.fixture(scope="session")
def feed() -> Callable[..., dict[str, torch.Tensor]]:
    """``feed(program, past=3, seed=0, dtype=torch.float32)``: two rows of five tokens, the first padded on the left."""

    def make(
        program: Program, past: int = 0, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        sizes = {"batch": 2, "sequence": 5, "past": past, "past + sequence": past + 5}
        inputs = {}
        for spec in program.inputs:
            shape = [sizes[size] if isinstance(size, str) else size for size in spec.type.shape]
            if spec.type.is_float:
                inputs[spec.name] = torch.randn(shape, generator=generator, dtype=dtype)
            elif spec.name == "attention_mask":
                inputs[spec.name] = torch.ones(shape, dtype=torch.int64)
                inputs[spec.name][0, :2] = 0
            elif spec.name == "position_ids":
                inputs[spec.name] = torch.arange(past, past + 5).repeat(2, 1)
            else:
                top = 2 if spec.name == "token_type_ids" else 60
                inputs[spec.name] = torch.randint(0, top, shape, generator=generator)
        return inputs

    return make


@pytest.fixture(scope="session")
def save_pictures() -> Callable[..., list[Path]]:
    """``save_pictures(folder, count)``: files of blocks in random colours, PNG and JPEG in turn, of two sizes."""
    import numpy as np
    from PIL import Image

    def save(folder: Path, count: int, seed: int = 0) -> list[Path]:
        folder.mkdir(exist_ok=True, parents=True)
        generator = np.random.default_rng(seed)
        paths = []
        for number in range(count):
            blocks = generator.integers(0, 256, (3, 4, 3), dtype=np.uint8)
            pixels = np.kron(blocks, np.ones((4, 4 + number % 2, 1), np.uint8))
            paths.append(folder / f"{number:02}.{'jpg' if number % 2 else 'png'}")
            Image.fromarray(pixels).save(paths[-1])
        return paths

    return save


WORDS = "This is a photo of the cat dog bird red blue green"


def _save_words(folder: Path) -> None:
    """A tokenizer of a few words, each of which is a token, between a start and an end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = f"<pad> <s> </s> <unk> . {WORDS}".split()
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def caption_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``caption_models("CLIP")``: the folder of a tiny CLIP or Siglip for pictures of 8 × 8 and up to 12 tokens."""
    import transformers

    @cache
    def save(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        texts = {**sizes, **special, "vocab_size": 20, "max_position_embeddings": 12, "projection_size": 16}
        parts = {"text_config": texts, "vision_config": {**sizes, "image_size": 8, "patch_size": 4}}
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(
            **parts, **({"projection_dim": 16} if family == "CLIP" else {})
        )
        model = getattr(transformers, f"{family}Model")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim():
                    parameter += 0.2 * torch.randn(parameter.shape)
        model.save_pretrained(folder)
        _save_words(folder)
        transformers.ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def picture_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random ViT with three classes for pictures of 8 × 8, and its processor's settings."""
    import transformers

    folder = tmp_path_factory.mktemp("vit")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    names = {"id2label": {0: "cat", 1: "dog", 2: "bird"}, "label2id": {"cat": 0, "dog": 1, "bird": 2}}
    config = transformers.ViTConfig(**sizes, **names, image_size=8, patch_size=4)
    model = transformers.ViTForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    transformers.ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder
