"""The pipeline from Common Crawl's WET files to token shards, by CCNet's rules."""
