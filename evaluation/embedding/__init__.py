"""Encoding for evaluation: every input once, stored under the model's and the corpus' fingerprints.

Rule: imports the top of `evaluation` (rows and media), never a suite.
"""
