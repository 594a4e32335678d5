"""Analysis: embeddings and hidden states in numbers and figures, and the report of a run."""
