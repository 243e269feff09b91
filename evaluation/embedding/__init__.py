"""Encoding for evaluation: every input once, stored under the model's and the corpus' fingerprints.

Rule: imports nothing of `evaluation` but its own files.
"""
