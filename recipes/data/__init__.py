"""Training pairs: users' own, the MMEB-V2 mix, held-out rows, same-source blocks, hard negatives."""
