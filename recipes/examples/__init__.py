"""Five flat scripts to copy and edit, each from top to bottom.

Rule: they import published packages and public names of `st_btok` only. `tests/recipes/test_examples.py` runs all of
them on tiny models.
"""
