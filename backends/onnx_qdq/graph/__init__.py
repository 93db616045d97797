"""Reading ONNX graphs: nodes, constants, and where quantization stands in them."""
