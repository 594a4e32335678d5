"""Common Crawl's WET files in, token shards out, by CCNet's rules."""
