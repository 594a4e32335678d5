"""Labelled data and scores: rows, tasks, metrics and tests of significance, tables and the paper's results."""
