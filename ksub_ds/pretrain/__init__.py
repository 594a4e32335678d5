"""The training run: recipe, resolved run, engine, loop, checkpoints, and opening a run. Start with loop.py."""
