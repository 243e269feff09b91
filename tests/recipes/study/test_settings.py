"""What `--quick` means for texts and for pictures."""

from __future__ import annotations

import pytest

from recipes.study.settings import StudyConfig
from recipes.study.variants import BASELINE


def test_quick_takes_the_pictures_that_are_named():
    texts = StudyConfig(quick=True)
    assert texts.backbones == ["shipped"] and texts.corpora == ["languages", "packages"]
    pictures = StudyConfig(quick=True, corpora=["stamps@250"])
    assert pictures.corpora == ["stamps@250"] and pictures.backbones == ["seeing"]
    assert pictures.variants[0] == BASELINE and "last token, prompt" in pictures.variants


def test_half_precision_is_for_untrained_models():
    assert StudyConfig(dtype="bfloat16", steps=0).dtype == "bfloat16"
    with pytest.raises(ValueError, match="training needs float32 weights, got dtype 'bfloat16'"):
        StudyConfig(dtype="bfloat16")
