"""From a user's row to a model's input: identify, open, bound, decode, normalise; and encoding of long lists of them.

Rule: imports the top of `st_btok` only, never `training` or `tools`. The only place that opens media.

Size: 2,397 lines (`cat st_btok/inputs/*.py | wc -l`, 29 November 2026), where 1,800 were planned. `images` and
`videos` are nearly 900 of them: each rule there answers a file that plain `encode` reads wrongly, refuses or
crashes on, and has a test with that file.
"""
