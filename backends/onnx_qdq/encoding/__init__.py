"""How codes lie in an ONNX file: pure functions of arrays, which the writer and the verifier share."""
