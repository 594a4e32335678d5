"""Floor 3: where the vectors to cluster come from. The codes room itself takes only a matrix."""
