"""Token shards: the files, the folder that holds them, writing and reading."""
