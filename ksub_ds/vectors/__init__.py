"""Where the vectors to cluster come from; ksub_ds.codes itself takes only a matrix."""
