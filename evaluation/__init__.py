"""What is measured, and how: MMEB-V2 and an offline mini benchmark as ordinary mteb tasks.

Protocol. Every data set is a retrieval task (`AbsTaskRetrieval`): a query ranks either its own candidate list
(`candidates="local"`, mteb's `top_ranked`) or the whole corpus (`"global"`). Image and video data sets score hit@1,
visual documents nDCG@5 with linear gain. Texts and pools are those of the official evaluator (github
TIGER-AI-Lab/VLM2Vec, commit 6e1e1d4), or, as protocol `btoks`, those of the release behind the paper; without media
tokens: the model's own chat template places the media, before the text. Every score carries its protocol.

Split version. Two data sets, ViDoSeek-page and MMLongBench-page, exist twice: `page-fixed` (since 2025-11-03, the
leaderboard's) and the broken `page`. Averages of the two are 1 to 4 points apart and never mixed; every score carries
its split label.

Aggregation. Every average is the plain mean over its data sets: overall is the mean of 78, not of groups or
modalities. An average over an incomplete set is never printed as if it were complete.

`wrap(model)` is what mteb's own benchmarks need of a model with pictures:

    mteb.evaluate(evaluation.wrap(model), mteb.get_benchmark("MIEB(lite)"))

Nothing here imports `st_btok` or `recipes`: any SentenceTransformer is scored the same way. Importing this package
loads nothing heavy: `wrap` brings its module along when it is first asked for (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaluation.wrapping import wrap

__all__ = ["wrap"]


def __getattr__(name: str) -> Any:
    if name == "wrap":
        return import_module("evaluation.wrapping").wrap
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
