"""Floor 4, looking inside: the geometry of embeddings and hidden states as numbers and figures, and the report of a run."""
