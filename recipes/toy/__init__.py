"""The synthetic world of the quickstart: scenes, pairs, and the optimizer of the small backbone's pre-training."""
