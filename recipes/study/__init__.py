"""Evidence: every part of the method against its controls, on real pairs, at equal steps and at equal time."""
