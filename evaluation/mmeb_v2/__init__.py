"""MMEB-V2: its 78 data sets as frozen rows, and the loaders that read their files.

Rule: imports the top of `evaluation` where needed, never another suite.
"""

from evaluation.mmeb_v2.rows import GROUPS, MMEB_V2, MMEBDataset

__all__ = ["GROUPS", "MMEB_V2", "MMEBDataset"]
