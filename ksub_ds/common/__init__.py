"""Layer 0: errors, exit codes, files, logs, command lines and ranks. Knows nothing of tokens or models."""
