"""Token shards: packing, writing and reading them, and the folder that holds them."""
