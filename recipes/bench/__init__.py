"""What maintainers measure: time and memory of a training step and of encoding, and jobs that are killed.

Rule: may import everything that a user runs. Nothing imports this room but tests.
"""
