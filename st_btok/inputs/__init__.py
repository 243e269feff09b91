"""From a user's row to a model's input: identify, open, bound, decode, normalise; and encoding of long lists of them.

Rule: imports the top of `st_btok` only, never `training` or `tools`. The only place that opens media.
"""
