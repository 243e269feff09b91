"""Every kind of column leaves a model card that a person can read."""

from __future__ import annotations

import pytest
from datasets import Dataset, Image, List, Value
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

from st_btok import BTokCallback, BTokLoss
from tests.backbones import picture

PICTURE = {"image": Image(), "text": Value("string")}
COLUMNS = {
    "texts": (lambda i: f"text {i}", Value("string")),
    "pictures": (lambda i: picture(28, 28, i), Image()),
    "pictures with a question": (lambda i: {"image": picture(28, 28, i), "text": "what?"}, PICTURE),
    "several pictures": (
        lambda i: {"image": [picture(28, 28, i), picture(56, 28, i)], "text": "which?"},
        {"image": List(Image()), "text": Value("string")},
    ),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_every_kind_of_column_has_a_card(qwen, tmp_path, kind):
    make, feature = COLUMNS[kind]
    data = Dataset.from_dict({"query": [make(i) for i in range(8)], "positive": ["red", "blue"] * 4})
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, report_to=[], disable_tqdm=True,
        use_cpu=True, save_strategy="no",
    )  # fmt: skip
    SentenceTransformerTrainer(
        model=qwen, args=args, train_dataset=data.cast_column("query", feature), loss=BTokLoss(qwen),
        callbacks=[BTokCallback()],
    ).train()  # fmt: skip
    qwen.save_pretrained(str(tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text()
    assert "loss:BTokLoss" in card and "dataset_size:8" in card and "<code>red</code>" in card
    assert "PIL" not in card and " at 0x" not in card
    if kind == "pictures with a question":
        assert "{'image': 'picture of 28x28 px', 'text': 'what?'}" in card
