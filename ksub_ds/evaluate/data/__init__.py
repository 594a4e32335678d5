"""Labelled data and scores: rows, tasks, metrics, tables and the paper's results."""
