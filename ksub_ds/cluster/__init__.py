"""Layer 5: start a run on several machines, watch it, and start it again."""
