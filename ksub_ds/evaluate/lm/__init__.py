"""Bits per byte of text under a causal language model: choosing text, tokens, windows and sums."""
