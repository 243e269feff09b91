"""Figures and tables made of stored scores.

Rule: imports the top of `evaluation` and the names of the suites, never their loaders.
"""
