"""The vLLM plugin's own functions, with vLLM's modules replaced: what it lets in is pooled as `encode` does.

With vLLM itself: `make engines`.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from st_btok import build_model, read_budget
from st_btok.tokens import btok_ids
from tests.backbones import build

QUESTION = "Which town lies by the sea?"
MODULES = (
    "config",
    "entrypoints.pooling.base.io_processor",
    "model_executor.layers.pooler.seqwise",
    "model_executor.layers.pooler.seqwise.methods",
    "plugins.io_processors.interface",
    "transformers_utils.repo_utils",
)


@pytest.fixture
def plugin(monkeypatch):
    names = {"vllm"} | {f"vllm.{'.'.join(name.split('.')[:n])}" for name in MODULES for n in range(1, 6)}
    modules = {name: MagicMock() for name in names}
    modules["vllm.model_executor.layers.pooler.seqwise.methods"].SequencePoolingMethod = torch.nn.Module
    modules["vllm.plugins.io_processors.interface"].IOProcessor = object
    modules["vllm.transformers_utils.repo_utils"].get_hf_file_to_dict = lambda file, model, revision: json.loads(
        (Path(model) / file).read_text()
    )
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "st_btok.serving.vllm_plugin", raising=False)
    yield importlib.import_module("st_btok.serving.vllm_plugin")
    sys.modules.pop("st_btok.serving.vllm_plugin", None)


@pytest.mark.parametrize("budget", [4, 2, 1])
def test_what_is_let_in_is_pooled_as_encode_does(plugin, budget, tmp_path):
    backbone, processor = build("llama")
    model = build_model(backbone, processor=processor, device="cpu")
    model = model if budget == 4 else read_budget(model, budget)
    model.save_pretrained(str(tmp_path))
    expected = model.encode([QUESTION])[0]
    tokenizer, served = AutoTokenizer.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path).eval()
    pooling = plugin.BTokMeanPool(plugin.averaged_btoks(str(tmp_path), None))
    chat = [{"role": "user", "content": QUESTION}]
    for ids in (tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"], tokenizer.encode(QUESTION)):
        plugin.check_prompt(ids, tokenizer)
        plugin.check_bare(ids, tokenizer.encode(""), tokenizer.all_special_ids)
        with torch.no_grad():
            states = served(torch.tensor([ids])).last_hidden_state[0]
        cursor = SimpleNamespace(is_partial_prefill=lambda: False, last_token_indices_gpu=torch.tensor([len(ids) - 1]))
        pooled = pooling(states, SimpleNamespace(get_pooling_cursor=lambda cursor=cursor: cursor))[0]
        np.testing.assert_allclose(torch.nn.functional.normalize(pooled, dim=0), expected, atol=1e-5)
        for wrong in (ids[:-1], [*ids[:-budget], *btok_ids(tokenizer)[::-1]], [btok_ids(tokenizer)[0], *ids]):
            with pytest.raises(ValueError, match="must end with its"):
                plugin.check_prompt(wrong, tokenizer)
