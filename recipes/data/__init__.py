"""Data: users' own pairs, the MMEB-V2 mix, corpora, packages; held-out rows, same-source blocks, hard negatives.

Read `training_pairs` (one source, checked) first, then its readers: `user_data` over `tables`, `mmeb_train`,
`streaming`. `corpus` and `shards` are the corpus job; `real` and `debian` make pairs from packages.
"""
