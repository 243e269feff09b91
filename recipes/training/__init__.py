"""What `recipes.train` rests on: its settings, the authors' presets, resuming, and the scores on held-out rows.

Rule: imports `data` only.
"""
