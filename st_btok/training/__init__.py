"""How a BTok model is trained. First file to read: `reference.py`, one training step as straight code.

Rule: imports the top of `st_btok` only. What a saved model needs never stands here.
"""
