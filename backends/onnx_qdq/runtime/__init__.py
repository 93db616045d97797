"""onnxruntime: sessions, and what this processor makes of products of bytes."""
