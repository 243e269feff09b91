"""Engines: the check of what an engine serves, the plug-in for vLLM, the export of plain weights.

Rule: imports the top of `st_btok` and `inputs`; only `tools` imports it.
"""
