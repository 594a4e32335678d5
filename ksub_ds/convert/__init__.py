"""Models into other forms: exported, compressed, one-file code, ONNX."""
