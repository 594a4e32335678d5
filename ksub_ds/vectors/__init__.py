"""The vectors that clustering starts from, and the commands that make code files of them.

Vectors come from matrix files, model folders, runs, and co-occurrence in token shards.
"""
