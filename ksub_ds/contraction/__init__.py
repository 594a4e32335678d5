"""Folds of the codes' trie: the sum over all tokens, and the best of them, without a number per token and row."""
