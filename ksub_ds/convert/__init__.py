"""Models converted to other forms: exported, compressed, one-file code, ONNX."""
