"""The two ways in which MMEB-V2 is scored: the benchmark's own harness, and the release behind the paper.

`vlm2vec` is github TIGER-AI-Lab/VLM2Vec 6e1e1d4, whose numbers stand on the leaderboard. `btoks` is github
siryuson/BottleneckTokens 896c2df, whose numbers stand in the paper (arXiv 2604.11095): other pools for MVBench and
K700, other candidates for Video-MME and EgoSchema, and a whitespace of its own. The two are not comparable, so the
protocol is part of every stored name and printed with every score.
"""

from __future__ import annotations

from dataclasses import replace

from evaluation.dataset import PROTOCOLS, MMEBDataset, Protocol

CROP = "Represent the given cropped image of the object"


def with_protocol(row: MMEBDataset, protocol: Protocol) -> MMEBDataset:
    """The row as a protocol scores it.

    Args:
        row: Any row of the suite, which is `vlm2vec`'s.
        protocol: `vlm2vec` or `btoks`.

    Returns:
        The row itself, or one with the other pool: `btoks` ranks image labels and MVBench's options against all that
        occur in the data set, and takes as video labels those that occur.

    Raises:
        ValueError: Another protocol.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {PROTOCOLS}, got {protocol!r}")
    if protocol == "vlm2vec":
        return row
    row = replace(row, protocol=protocol)
    if row.modality != "image" and row.family in ("captions", "clips", "moments", "beir"):
        row = replace(row, candidate_text=finished(row, row.candidate_text))  # the others' candidates are texts
    if row.family == "labels":
        return replace(row, num_candidates=None)  # K700's 1,000 rows need not show each of its 700 classes
    # where every query lists the whole label set, as in the image classification sets, this changes nothing
    return replace(row, candidates="global") if row.group == "I-CLS" or row.family == "mvbench" else row


def clean_lines(text: str) -> str:
    """A text as the release cleans it: Unix line ends, no blanks at the ends of lines nor at its start."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    cleaned = "\n".join(line.rstrip(" \t") for line in lines).strip(" \t")
    return cleaned if cleaned.strip() else ""


def finished(row: MMEBDataset, text: str) -> str:
    """The text of a query, or of a candidate with media, as a protocol ends it.

    Image sets (`image_texts`) and questions about videos (`video`) have ways of their own in the release.

    Args:
        row: The row; its protocol decides.
        text: The harness' text.

    Returns:
        The same for `vlm2vec`; for `btoks` without blanks at the ends of its lines and with one final newline.
    """
    return text if row.protocol == "vlm2vec" else f"{clean_lines(text).strip()}\n"
