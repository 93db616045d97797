"""From a Program to an ONNX graph in which the low-bit operators still stand as themselves."""
