"""Files, processes, options and logs. Knows nothing of tokens or models."""
