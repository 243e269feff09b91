"""What is run beside training and encoding: `check`, `convert`, `explain`, and the console script `st-btok`.

Rule: may import all of `st_btok`; nothing but the package's own `__init__` imports it.
"""
