"""Text that a processor itself writes around the frames of a video: time stamps, frame numbers, an introduction.

It stands between the placeholders as ordinary tokens (`<0.2 seconds>` with Qwen3-VL, `Frame1: ` with InternVL, a whole
sentence with SmolVLM), so without care it would be taken for content and be generated as a target. It is learnt from
the processor: short videos without any text are rendered, and what stands before each frame becomes a pattern in which
numbers, and words that differ between lengths ("two frames", "four frames"), may be anything.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from sentence_transformers.base.modules.transformer import Transformer

from st_btok.limits import UNLIMITED
from st_btok.model_parts import tokenizer_of

_FRAMES = (2, 4, 8)


class MediaText:
    """Finds the processor's own text in token ids, for one model.

    Args:
        transformer: The model's first module.
        special: Ids that are not text: control tokens and placeholders.
        header: Ids that open the content's turn.
    """

    def __init__(self, transformer: Transformer, special: set[int], header: list[int]) -> None:
        self.tokenizer = tokenizer_of(transformer)
        self.special = special
        pieces: set[str] = set()
        if "video" in transformer.modality_config:
            for frames in _FRAMES:
                probe: Any = {"video": np.zeros((frames, 56, 56, 3), np.uint8)}
                row = transformer.preprocess([probe], processing_kwargs=UNLIMITED)["input_ids"][0]
                pieces.update(str(self.tokenizer.decode(run)).strip() for run in self._runs(row.tolist(), header))
        patterns = sorted(_patterns(pieces - {""}), key=len, reverse=True)
        self.pattern = re.compile(rf"\s*(?:{'|'.join(patterns)})\s*") if patterns else None
        self.ending = re.compile(rf"{self.pattern.pattern}\Z") if self.pattern else None
        # Characters, hence tokens, that the processor's text may have: room for longer numbers and words than in the
        # probes. Without a bound a row would cost the square of its text.
        self.longest = 2 * max(map(len, pieces), default=0) + 64

    def _runs(self, row: list[int], header: list[int]) -> list[list[int]]:
        """Text before each special token behind the header; what follows the last one is the template's."""
        start = next((i + len(header) for i in range(len(row)) if header and row[i : i + len(header)] == header), 0)
        runs: list[list[int]] = [[]]
        for token in row[start:]:
            if token in self.special:
                runs.append([])
            else:
                runs[-1].append(token)
        return runs[:-1]

    def remove(self, content: list[int]) -> list[int]:
        """Leave out what the processor wrote.

        Args:
            content: Ids of one row's content, placeholders included.

        Returns:
            The text of the input itself, without special tokens.
        """
        kept: list[int] = []
        run: list[int] = []
        for token in content:
            if token not in self.special:
                run.append(token)
                continue
            kept += self._without_end(run)
            run = []
        return kept + run

    def _without_end(self, run: list[int]) -> list[int]:
        """The run without the longest end that the processor wrote: an input's own text may stand before it."""
        if self.pattern is None or self.ending is None or not run:
            return run
        found = self.ending.search(str(self.tokenizer.decode(run[-self.longest :])))
        if found is None:
            return run
        # A character is a token at most, and some tokenizers drop one blank at the start of what they decode.
        for start in range(max(0, len(run) - len(found.group()) - 1), len(run)):
            if self.pattern.fullmatch(str(self.tokenizer.decode(run[start:]))):
                return run[:start]
        return run


def _patterns(pieces: set[str]) -> set[str]:
    """Regular expressions for the pieces: any number for a number, any word where pieces differ in one word."""
    groups: dict[int, set[tuple[str, ...]]] = {}
    for piece in pieces:
        words = tuple(re.sub(r"\d+", r"\\d+", re.escape(word)) for word in piece.split())
        groups.setdefault(len(words), set()).add(words)
    found = set()
    for group in groups.values():
        for words in group:
            free = {
                index
                for other in group
                for index in range(len(words))
                if sum(a != b for a, b in zip(words, other, strict=True)) == 1 and words[index] != other[index]
            }
            found.add(r"\s+".join(r"\S+" if index in free else word for index, word in enumerate(words)))
    return found
