"""The training run: recipe, DeepSpeed engine, loop, checkpoints. Start reading with loop.py."""
