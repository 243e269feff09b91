"""What the chat template costs: `preprocess` of a BTok model against the backbone's own, in paired rounds.

python -m recipes.bench preprocess --backbone recipes/backbone

Both are timed on 1,000 texts of 5 to 20 words in batches of 32 and on 8 texts
of 20,000 characters. The other side is the `Transformer` of sentence-transformers with the backbone's own template
and the same limit. A BTok model's inputs are K tokens longer; that is in the ratio.
"""

from __future__ import annotations

import random
import statistics
from functools import partial

from sentence_transformers.base.modules.transformer import ModalityParams, Transformer

from recipes.bench.paired import ratios, seconds_of, spread
from recipes.bench.settings import PreprocessConfig
from st_btok import build_model

_WORDS = "a cat on the mat reads some long paper about tokens and limits every day of the summer".split()
_BATCH = 32


def own_template(backbone: str, limit: int) -> Transformer:
    """The backbone with its own template, through which texts go as messages, as in a BTok model."""
    transformer = Transformer(backbone)
    transformer.max_seq_length = limit
    message = ModalityParams(method="forward", method_output_name="last_hidden_state")
    message["format"] = transformer.input_formatter.message_format
    transformer.modality_config["message"] = message
    return transformer


def _preprocess(transformer: Transformer, texts: list[str]) -> None:
    for first in range(0, len(texts), _BATCH):
        transformer.preprocess(texts[first : first + _BATCH])


def main(config: PreprocessConfig) -> None:
    """Print the ratios."""
    own = own_template(config.backbone, config.max_seq_length)
    btok = build_model(config.backbone, device="cpu", max_seq_length=config.max_seq_length)[0]
    draw = random.Random(0)
    short = [" ".join(draw.choices(_WORDS, k=draw.randint(5, 20))) for _ in range(1000)]
    long = [" ".join(draw.choices(_WORDS, k=5000))[:20_000] for _ in range(8)]
    for name, texts in (("1,000 short texts", short), ("8 texts of 20,000 characters", long)):
        sides = {"own": partial(_preprocess, own, texts), "btok": partial(_preprocess, btok, texts)}
        seconds = seconds_of(sides, config.rounds, warm=1)
        ours, theirs = (statistics.median(seconds[side]) / len(texts) * 1e3 for side in ("btok", "own"))
        ratio = spread(ratios(seconds, "btok", "own"))
        print(f"{name}: {ratio}, {ours:.2f} against {theirs:.2f} ms of CPU a row")
