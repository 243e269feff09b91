"""Embeddings are finite, or an error says which is not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class NonFiniteError(ValueError):
    """A model made an embedding with NaN or infinite numbers, which no score may rest on; the message says of what."""


def check_finite(vectors: Sequence[np.ndarray] | np.ndarray, names: Sequence[str], where: str) -> None:
    """Refuse embeddings with NaN or infinite numbers, before anything is stored or scored.

    Args:
        vectors: (rows, width), or an array of any shape for each row.
        names: The rows' ids.
        where: What is encoded, for the message.

    Raises:
        NonFiniteError: With the first such row.
    """
    wrong = np.array([np.count_nonzero(~np.isfinite(vector)) for vector in vectors])
    rows = np.flatnonzero(wrong)
    if len(rows):
        row = rows[0]
        raise NonFiniteError(
            f"{where}: of the embedding of row {names[row]!r}, {wrong[row]} of {vectors[row].size} numbers are NaN or "
            f"infinite, and so it is with {len(rows) - 1} others of this call's {len(vectors)} rows. None is stored. "
            "Load the model in float32 or bfloat16, and encode this row alone to see where it breaks."
        )
