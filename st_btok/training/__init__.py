"""How a BTok model is trained. First file to read: `reference.py`, one training step as straight code.

Rule: imports the top of `st_btok` only. What a saved model needs never stands here.

Size: 3,057 lines (`cat st_btok/training/*.py | wc -l`, 29 November 2026), where 2,100 were planned. A third of
them are docstrings: formulas, shapes and arguments of losses that users call. `content` came after the plan: it
carries a row's own text to the losses, because text that is read back out of token ids was wrong on five
families. Three routes stay, as flash attention takes no mask, and recurrent layers pass around one.
"""
