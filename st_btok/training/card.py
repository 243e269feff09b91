"""The model card of a training on columns that hold more than text.

sentence-transformers 6.2 shows columns of pictures as files beside the card. Columns of dicts, which hold a picture
and its question, it takes for columns of text: their pictures end up as widget examples, which YAML writes and can't
read back, so that the whole card is dropped with an error; and as `<PIL.Image ... at 0x...>` among the examples.
"""

from __future__ import annotations

from typing import Any

from PIL.Image import Image
from sentence_transformers.base.model_card import BaseModelCardData

# BibTeX of the method.
CITATION = """
@misc{bottlenecktokens2026,
    title={Bottleneck Tokens for Unified Multimodal Retrieval},
    year={2026},
    eprint={2604.11095},
    archivePrefix={arXiv},
    primaryClass={cs.CV},
    url={https://arxiv.org/abs/2604.11095},
}
"""


def mend_card(card: BaseModelCardData) -> None:
    """Leave widget examples of text only, and say in words what dicts and lists among the examples hold.

    Args:
        card: The card data of a model whose Trainer is made: that is when the examples are taken.
    """
    card.widget = [example for example in card.widget if all(map(_is_text, example.values()))]
    for info in [*card.train_datasets, *card.eval_datasets]:
        examples: Any = info.get("examples") or {}
        for column, values in examples.items():
            # A picture by itself stays: it becomes a file.
            examples[column] = [_in_words(value) if isinstance(value, dict | list) else value for value in values]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _in_words(value: Any) -> Any:
    """The same structure, with words where media stood."""
    if isinstance(value, dict):
        return {key: _in_words(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_in_words(item) for item in value]
    if isinstance(value, Image):
        return f"picture of {value.width}x{value.height} px"
    return value if isinstance(value, str | int | float | None) else type(value).__name__


def settings_of(loss: Any) -> dict[str, Any]:
    """Settings of a `BTokLoss` for the model card.

    Args:
        loss: The loss.

    Returns:
        Values by name.
    """
    weight = loss.schedule.weight
    return {
        "condensation_weight": getattr(weight, "__name__", repr(weight)) if callable(weight) else weight,
        "condensation_steps": loss.schedule.steps,
        "condensation_warmup": loss.schedule.warmup,
        "condensation_btoks": len(loss.condensed),
        "target": loss.target,
        "route": loss.route,
        "max_target_tokens": loss.max_target_tokens,
        "btok_budgets": loss.budgets,
        "false_negative_margin": loss.filter.margin if loss.filter else None,
        "same_modality_negatives": loss.filter.same_modality if loss.filter else False,
        **loss.ranking.get_config_dict(),
        "gather_across_devices": loss.gather_across_devices,
    }
