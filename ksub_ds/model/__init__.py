"""Sub-embedding tables, the exact softmax over them, and HuggingFace models built on both."""
