"""From low-bit operators to those that onnxruntime runs, rule by rule."""
