"""The check of an ONNX artifact: outputs, every code, every constant, and the kernels that really run."""
