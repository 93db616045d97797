"""The files of an artifact: models, their data, and the configuration of onnxruntime-genai."""
