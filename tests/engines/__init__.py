"""Jobs of their own, not part of `make test`: `make engines` and `make tools` run real engines and tools.

Each job writes the rows it measured to `docs/serve.json`; `tests/engines/table.py` draws the tables of `docs/serve.md`
from them.
"""
