"""From text to batches: tokenizers, token shards, sampling, masking."""
