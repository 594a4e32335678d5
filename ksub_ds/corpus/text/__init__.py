"""Text files and hub data sets in, token shards out."""
