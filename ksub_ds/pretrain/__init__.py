"""Floor 3: the training run. recipe -> engine -> loop -> checkpoint -> export; start with loop.py."""
