"""The mini benchmark: MMEB-V2's nine meta-tasks in small, drawn on the spot.

Rule: imports the top of `evaluation` where needed, never another suite.
"""

from evaluation.mini.benchmark import MINI, evaluator_for, mini_benchmark

__all__ = ["MINI", "evaluator_for", "mini_benchmark"]
