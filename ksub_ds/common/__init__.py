"""Floor 0: files, ranks and logs. Knows nothing of tokens or models."""
