"""How an ONNX artifact is loaded, in the words of its model card."""

from __future__ import annotations

from bitlower.backends.artifact.card import Usage
from bitlower.backends.onnx_qdq.write.files import MODEL
from bitlower.backends.onnx_qdq.write.optimum import OPTIMUM, Layout, misreadings
from bitlower.ir import Program
from bitlower.ir.assets import MODULES
from bitlower.ir.stages import is_encoder_decoder
from bitlower.ir.tasks import SPEECH_RECOGNITION, TEXT_GENERATION
from bitlower.ir.tokens import TOKENS

_TAGS = ("onnx", "onnxruntime")
_SENTENCES = """
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(folder, backend="onnx", model_kwargs={"file_name": "model.onnx"})
embeddings = model.encode(["A text."])
"""
_WRITES = """
import bitlower
from transformers import AutoTokenizer

model, tokenizer = bitlower.load(folder), AutoTokenizer.from_pretrained(folder)
prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(prompt["input_ids"], max_new_tokens=32)[0]))
"""
_READS = f"""
import onnxruntime
from transformers import AutoTokenizer

model = onnxruntime.InferenceSession(f"{{folder}}/{MODEL}", providers=["CPUExecutionProvider"])
tokens = AutoTokenizer.from_pretrained(folder)(["A text."], return_tensors="np")
inputs = {{value.name: tokens[value.name].astype("int64") for value in model.get_inputs()}}
outputs = dict(zip([value.name for value in model.get_outputs()], model.run(None, inputs)))
"""
_RUNS = f"""
import onnxruntime

model = onnxruntime.InferenceSession(f"{{folder}}/{MODEL}", providers=["CPUExecutionProvider"])
print([(value.name, value.type, value.shape) for value in model.get_inputs()])
"""
_OPTIMUM = """
from optimum.onnxruntime import {model_class}

model = {model_class}.from_pretrained(folder)
"""
_SEQUENCES, _SPEECH = "ORTModelForSeq2SeqLM", "ORTModelForSpeechSeq2Seq"
_LOADS = """
import bitlower

model = bitlower.load(folder)
"""


def usage_of(program: Program, layout: Layout = "genai") -> Usage:
    """With sentence-transformers where its files lie beside the model; else onnxruntime, or bitlower above it.

    An encoder-decoder in the layout of optimum, with that.
    """
    if MODULES in program.assets:
        return Usage("sentence-transformers", _SENTENCES, "'sentence-transformers[onnx]'", _TAGS)
    if program.task == TEXT_GENERATION:
        return Usage("bitlower", _WRITES, "bitlower", _TAGS)
    if is_encoder_decoder(program) and layout == OPTIMUM and not any(misreadings(program)):
        code = _OPTIMUM.format(model_class=_SPEECH if program.task == SPEECH_RECOGNITION else _SEQUENCES)
        return Usage("transformers", code, "'optimum-onnx[onnxruntime]'", (*_TAGS, "optimum", "transformers.js"))
    if is_encoder_decoder(program):
        return Usage("bitlower", _LOADS, "bitlower", _TAGS)
    read = {"input_ids", "attention_mask", "token_type_ids"}
    reads = any(spec.name == TOKENS for spec in program.inputs) and {spec.name for spec in program.inputs} <= read
    if reads and program.assets:
        return Usage("transformers", _READS, "onnxruntime transformers", _TAGS)
    return Usage("onnxruntime", _RUNS, "onnxruntime", _TAGS)
