"""The kinds of files that the project reads, each with sound ones to begin with and the door that takes it."""

from __future__ import annotations

import functools
import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import mutations
import torch
from harness import Kind
from ruamel.yaml import YAML

from bitlower.backends.artifact.manifest import describe_file
from bitlower.backends.registry import verify_artifact
from bitlower.frontends import batches, load
from bitlower.frontends.gguf import load_gguf
from bitlower.frontends.weights import load_weights
from bitlower.ir import Program, Scheme
from bitlower.ir.storage import map_safetensors
from bitlower.passes import make_pass, parse_pipeline
from bitlower.tools.data.labels import ClassifierHead
from bitlower.tools.data.sources import python_source
from bitlower.tools.data.texts import read_text, split_texts
from bitlower.tools.data.training import read_examples
from bitlower.tools.evaluation.runners import open_runner
from bitlower.tools.recipes.recipe import load_recipe, validate_recipe
from bitlower.tools.report.contents import read_material
from bitlower.tools.report.page import render
from bitlower.tools.runs.flow import quantize
from bitlower.tools.runs.job import Job, RunOptions, run_job
from bitlower.tools.runs.standard import standard_exports

RECIPE = """\
model: {path: package:some-model, task: feature-extraction}
calibration: &data {data: texts.txt, samples: 12, max_length: 16, batch_size: 4, seed: 1}
evaluation: *data
training: {data: table.tsv, column: [text, other], label: label, samples: 8, held_out: 0.2, batch_size: 4, seed: 2}
passes:
  - clean
  - analyze-outliers
  - quantize:
      scheme: {weights: {num_bits: 4, strategy: group, group_size: 32}, overrides: {residual: null}}
      ignore: ["re:.*pooler.*"]
  - calibrate: {weights: mse, activations: running-minmax}
  - qat: {epochs: 2, losses: [{logits: {temperature: 2.0}}, hidden], learning-rate: {weights: 1.0e-5, "re:.*Norm.*": 0}}
  - lower-integer:
export:
  - onnx-qdq: {opset: 21}
"""
PIPELINES = (
    'clean,quantize{scheme=W8A8 ignore=[pooler "re:.*x"]},calibrate{weights=mse},lower-integer',
    'analyze-outliers{batches=4},quantize{scheme="{\\"weights\\":{\\"num_bits\\":4}}"},gptq{damping=0.01 order=full}',
    "smooth{alpha=0.5},peg-permute,assign-precision,adaround{iterations=10 batch=16}",
)
SCHEMES = ("W8A8", "W4A16-g128-asym-e8", "W8A8-token-full", "W4A8-peg6", "W8A8-upeg6-tensor", "W2A16-g32-e16")
DATA = {
    "a.txt": "the cat sings\na dog sleeps\n\nbirds fly over the river\n" * 4,
    "a.tsv": "sentence\tlabel\n" + "a cat\t1\n" * 12,
    "a.csv": 'text,label\n"a, cat",1\n' * 6,
    "a.jsonl": '{"text": "a cat", "label": 1}\n' * 12,
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "cat", "dog", "sings", "sleeps"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Bert": ("Model", SIZES | {"max_position_embeddings": 24}),
    "DistilBert": ("ForSequenceClassification", {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}),
    "Llama": ("ForCausalLM", SIZES | {"num_key_value_heads": 1, "max_position_embeddings": 24}),
    "GPT2": ("LMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24}),
    "Mixtral": ("ForCausalLM", SIZES | {"num_key_value_heads": 1, "num_local_experts": 2}),
}
DOORS = {
    "Model": ("feature-extraction", "AutoModel"),
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "ForCausalLM": ("text-generation", "AutoModelForCausalLM"),
    "LMHeadModel": ("text-generation", "AutoModelForCausalLM"),
}


class Kinds:
    """Every kind by name; sound files are made under ``place`` when a kind is first asked for."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self.makers: dict[str, Callable[[], Kind]] = {
            "recipe": self._recipe, "scheme": self._scheme, "pipeline": self._pipeline, "data": self._data,
            "configuration": self._configuration, "safetensors": self._safetensors, "gguf": self._gguf,
            "tokenizer": self._tokenizer,
            "manifest": lambda: self._artifact("manifest.json", "onnx-qdq"),
            "verification": lambda: self._artifact("verification.json", "onnx-qdq"),
            "library": lambda: self._artifact("library.json", "tvm-kernels"),
            "report": self._report,
        }  # fmt: skip

    def _recipe(self) -> Kind:
        def write(folder: Path, random: Random) -> None:
            text = mutations.text(RECIPE, random).encode("utf-8", "surrogatepass")
            form = mutations.plain(YAML(typ="safe", pure=True).load(RECIPE), random)
            (folder / "recipe.yaml").write_bytes(text if random.random() < 0.5 else mutations.dumps(form))
            (folder / "texts.txt").write_text("a cat\n")
            (folder / "table.tsv").write_text("text\tother\tlabel\na cat\ta dog\t1\n" * 12)

        return Kind(write, lambda folder: validate_recipe(load_recipe(folder / "recipe.yaml")))

    def _scheme(self) -> Kind:
        def write(folder: Path, random: Random) -> None:
            name = random.choice(SCHEMES)
            form = mutations.plain(Scheme.parse(name).to_dict(), random)
            text = mutations.text(name, random).encode("utf-8", "surrogatepass")
            (folder / "scheme").write_bytes(text if random.random() < 0.5 else mutations.dumps(form))

        def attempt(folder: Path) -> object:
            text = (folder / "scheme").read_bytes().decode("utf-8", "surrogatepass")
            try:
                form = json.loads(text)
            except (ValueError, RecursionError):
                return Scheme.parse(text)
            return Scheme.from_dict(form)

        return Kind(write, attempt)

    def _pipeline(self) -> Kind:
        def write(folder: Path, random: Random) -> None:
            text = mutations.text(random.choice(PIPELINES), random)
            (folder / "pipeline").write_bytes(text.encode("utf-8", "surrogatepass"))

        return Kind(write, lambda f: parse_pipeline((f / "pipeline").read_bytes().decode("utf-8", "surrogatepass")))

    def _data(self) -> Kind:
        def write(folder: Path, random: Random) -> None:
            name = random.choice(sorted(DATA))
            changed = mutations.text(DATA[name], random).encode("utf-8", "surrogatepass")
            (folder / name).write_bytes(
                changed if random.random() < 0.5 else mutations.bytes_(DATA[name].encode(), random)
            )

        def attempt(folder: Path) -> object:
            (path,) = folder.iterdir()
            if path.suffix != ".txt":
                rows = tuple(read_examples(path, None, "label"))
                for regression in (False, True):
                    ClassifierHead({"good": 1}, 2, regression).tensor(path, rows)
            return read_text(path), split_texts(path, samples=None)

        return Kind(write, attempt)

    @functools.cached_property
    def _models(self) -> dict[str, Path]:
        import transformers

        folders = {}
        for name, (kind, sizes) in MODELS.items():
            torch.manual_seed(0)
            config = getattr(transformers, f"{name}Config")(**sizes, vocab_size=len(WORDS), pad_token_id=0)
            folders[name] = self._place / name
            getattr(transformers, name + kind)(config).save_pretrained(folders[name])
        return folders

    def _configuration(self) -> Kind:
        models = self._models

        def write(folder: Path, random: Random) -> None:
            name = random.choice(sorted(models))
            (folder / "model.safetensors").symlink_to(models[name] / "model.safetensors")
            form = json.loads((models[name] / "config.json").read_text())
            (folder / "config.json").write_bytes(mutations.document(form, random))
            (folder / "kind").write_text(MODELS[name][0])

        return Kind(write, _load)

    def _safetensors(self) -> Kind:
        models = self._models

        def write(folder: Path, random: Random) -> None:
            name = random.choice(sorted(models))
            data = (models[name] / "model.safetensors").read_bytes()
            size = int.from_bytes(data[:8], "little")
            header = mutations.document(json.loads(data[8 : 8 + size]), random)
            whole = struct.pack("<Q", len(header)) + header + data[8 + size :]
            (folder / "model.safetensors").write_bytes(
                whole if random.random() < 0.7 else mutations.bytes_(data, random)
            )
            shutil.copyfile(models[name] / "config.json", folder / "config.json")
            (folder / "kind").write_text(MODELS[name][0])

        def attempt(folder: Path) -> object:
            return map_safetensors(folder / "model.safetensors"), _load(folder)

        return Kind(write, attempt)

    def _gguf(self) -> Kind:
        sound = _write_gguf(self._place / "sound.gguf")
        begin = sound.index(b"\0" * 16, 400)

        def write(folder: Path, random: Random) -> None:
            head, tail = (sound[:begin], sound[begin:]) if random.random() < 0.8 else (sound, b"")
            (folder / "model.gguf").write_bytes(mutations.bytes_(head, random) + tail)

        return Kind(write, lambda folder: load_gguf(folder / "model.gguf"))

    def _tokenizer(self) -> Kind:
        from transformers import BertTokenizerFast

        folder = self._models["Bert"]
        (self._place / "vocab.txt").write_text("\n".join(WORDS) + "\n")
        BertTokenizerFast(vocab=str(self._place / "vocab.txt"), model_max_length=20).save_pretrained(folder)
        program: Program = load(folder)

        def write(folder: Path, random: Random) -> None:
            name = random.choice(sorted(name for name in program.assets if name.endswith(".json")))
            for other, data in program.assets.items():
                changed = mutations.document(json.loads(data), random) if other == name else data
                (folder / other).write_bytes(changed)

        def attempt(folder: Path) -> object:
            assets = {path.name: path.read_bytes() for path in folder.iterdir()}
            return batches(replace(program, assets=assets), ["the cat sings", "a dog"])

        return Kind(write, attempt)

    def _artifact(self, changed: str, backend: str) -> Kind:
        sound = self._place / backend
        if not sound.exists():
            torch.manual_seed(0)
            module = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 16)).eval()
            given = [{"input": torch.randn(4, 16)} for _ in range(3)]
            quantize(module, calibration=given, example_inputs=given[0], formats=[backend], output=sound)

        def write(folder: Path, random: Random) -> None:
            shutil.copytree(sound, folder, dirs_exist_ok=True)
            form = json.loads((folder / changed).read_text())
            (folder / changed).write_bytes(mutations.document(form, random))
            if changed != "manifest.json":
                manifest = json.loads((folder / "manifest.json").read_text())
                manifest["files"][changed] = describe_file(folder / changed)
                (folder / "manifest.json").write_text(json.dumps(manifest))

        def attempt(folder: Path) -> object:
            return verify_artifact(folder), open_runner(folder)

        return Kind(write, attempt)

    def _report(self) -> Kind:
        sound = self._place / "reported"
        if not sound.exists():
            module = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 16)).eval()
            given = [{"input": torch.randn(4, 16)} for _ in range(10)]
            names = ("clean", "quantize", "calibrate", "analyze-sensitivity", "lower-integer")
            job = Job(
                lambda traces: load(module, example_inputs=given[0]),
                python_source(given, samples=None, seed=0, max_length=None, decoder=False).batches,
                tuple(map(make_pass, names)),
                standard_exports("W8A8"),
            )
            run_job(job, sound, RunOptions(cache=None))

        def write(folder: Path, random: Random) -> None:
            artifact = folder / "artifact"
            shutil.copytree(sound, artifact)
            files = sorted(path for path in (*artifact.glob("*.json"), *artifact.glob("reports/*.json")))
            changed = random.choice([path for path in files if "token" not in path.name])
            changed.write_bytes(mutations.document(json.loads(changed.read_text()), random))

        return Kind(write, lambda folder: render(read_material(folder / "artifact")))


def _load(folder: Path) -> object:
    return load_weights(folder, *DOORS[(folder / "kind").read_text()])


def _write_gguf(path: Path) -> bytes:
    """A Llama of two layers as the gguf package writes it."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    for key, number in (("block_count", 2), ("context_length", 24), ("embedding_length", 32), ("vocab_size", 32)):
        writer.add_uint32(f"llama.{key}", number)
    for key, number in (("feed_forward_length", 32), ("attention.head_count", 2), ("attention.head_count_kv", 2)):
        writer.add_uint32(f"llama.{key}", number)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 1e4)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    words = ["<s>", "</s>", *(chr(97 + n) for n in range(26)), "ab", "cd", "ef", "gh"]
    writer.add_array("tokenizer.ggml.tokens", words)
    writer.add_array("tokenizer.ggml.merges", ["a b", "c d", "e f", "g h"])
    writer.add_uint32("tokenizer.ggml.bos_token_id", 0)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 1)
    square = np.full((32, 32), 0.01, np.float32)
    for layer in range(2):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", square)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", square[0])
    for name, array in (("token_embd", square), ("output_norm", square[0]), ("output", square)):
        writer.add_tensor(f"{name}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()
