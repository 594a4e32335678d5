"""The vectors that clustering starts from: matrix files, model folders, runs, co-occurrence in token shards."""
