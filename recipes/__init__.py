"""Runnable scripts: pre-training of the small backbone, the quickstart, and training recipes."""
