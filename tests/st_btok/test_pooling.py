"""Readouts against hand-computed values, saving, and the stock equivalents."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize
from torch.nn import functional as F

from st_btok import BTokPooling, build_model
from st_btok.model_parts import find_btoks
from tests.backbones import build, inputs, picture

IDS = [7, 8, 9]


def features():
    """Two rows; the BToks stand at different places, once before other tokens."""
    return {
        "input_ids": torch.tensor([[0, 1, 2, 7, 8, 9], [7, 8, 9, 3, 0, 0]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
        "token_embeddings": torch.arange(48.0).view(2, 6, 4),
    }


def test_mean_last_and_vectors_by_hand():
    states = features()["token_embeddings"]
    expected = torch.stack([states[0, 3:6], states[1, 0:3]])
    assert torch.equal(BTokPooling(4, IDS)(features())["sentence_embedding"], expected.mean(1))
    assert torch.equal(BTokPooling(4, IDS, "last")(features())["sentence_embedding"], expected[:, -1])
    vectors = BTokPooling(4, IDS, "vectors")(features())
    assert torch.equal(vectors["token_embeddings"], expected)
    assert vectors["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 1]]
    assert torch.equal(BTokPooling(4, [9, 7], "vectors")(features())["token_embeddings"], expected[:, [2, 0]])


def test_attention_is_the_authors_formula():
    pooling = BTokPooling(4, IDS, "attention", mlp_ratio=2.0).eval()
    assert {name for name, _ in pooling.named_parameters()} == {
        *(f"{part}.{kind}" for part in ("attention", "mlp.0", "mlp.3", "layer_norm") for kind in ("weight", "bias"))
    }, "the authors' names, so that their weights load"
    h = torch.stack([features()["token_embeddings"][0, 3:6], features()["token_embeddings"][1, 0:3]])
    weights = torch.softmax((h @ pooling.attention.weight.T + pooling.attention.bias) / math.sqrt(4), dim=1)
    s = (weights * h).sum(1)
    hidden = F.gelu(s @ pooling.mlp[0].weight.T + pooling.mlp[0].bias)
    y = s + hidden @ pooling.mlp[3].weight.T + pooling.mlp[3].bias
    y = (y - y.mean(-1, keepdim=True)) / torch.sqrt(y.var(-1, unbiased=False, keepdim=True) + 1e-5)
    torch.testing.assert_close(pooling(features())["sentence_embedding"], y)


@pytest.mark.parametrize("broken", [[1, 2, 3, 7, 8, 3], [1, 7, 8, 9, 9, 3]])
def test_rows_without_exactly_their_btoks_are_refused(broken):
    batch = features()
    batch["input_ids"][1] = torch.tensor(broken)
    batch["attention_mask"][1] = 1
    with pytest.raises(ValueError, match="exactly once, but row 1 of the batch"):
        BTokPooling(4, IDS)(batch)


def test_a_padded_btok_does_not_count():
    batch = features()
    batch["attention_mask"][0, -1] = 0
    with pytest.raises(ValueError, match=r"row 0 .* \[1, 1, 0\] times"):
        BTokPooling(4, IDS)(batch)


@pytest.mark.parametrize("readout", ["mean", "last"])
def test_stock_modules_compute_the_same(family, readout):
    backbone, processor = build(family)
    stock = build_model(backbone, readout=readout, processor=processor, device="cpu")
    transformer, ids = find_btoks(stock)
    own = SentenceTransformer(modules=[transformer, BTokPooling(32, ids, readout), Normalize()], device="cpu")
    for side in ("left", "right"):
        transformer.tokenizer.padding_side = side
        np.testing.assert_allclose(own.encode(inputs(family)[:-1]), stock.encode(inputs(family)[:-1]), atol=1e-6)


def test_stock_weights_cover_every_id(qwen):
    weights = qwen[1].emb_layer.weight[:, 0]
    _, ids = find_btoks(qwen)
    assert len(weights) >= len(qwen[0].model.get_input_embeddings().weight), "also ids that are given out later"
    assert weights.nonzero()[:, 0].tolist() == ids and weights.sum() == len(ids)
    assert qwen[1].vocab[ids[-1]] == "<|btok_3|>"
    assert len(repr(qwen)) < 5000, "the vocabulary is not printed"


@pytest.mark.parametrize("readout", ["attention", "vectors"])
def test_readouts_without_stock_modules_say_so(qwen, readout):
    with pytest.raises(ValueError, match=f"readout='{readout}'.*trust_remote_code"):
        BTokPooling(32, IDS, readout).stock_modules(qwen.tokenizer)


@pytest.mark.parametrize("readout", ["mean", "attention"])
def test_saving_and_loading_by_hand_composed_models(qwen, readout, tmp_path):
    transformer, ids = find_btoks(qwen)
    model = SentenceTransformer(modules=[transformer, BTokPooling(32, ids, readout), Normalize()], device="cpu")
    expected = model.encode(["a", picture()])
    model.save_pretrained(str(tmp_path))
    loaded = SentenceTransformer(str(tmp_path), device="cpu", trust_remote_code=True)
    np.testing.assert_allclose(loaded.encode(["a", picture()]), expected, atol=1e-6)
    with pytest.raises(ValueError, match="trust_remote_code"):
        SentenceTransformer(str(tmp_path), device="cpu")


def test_an_engine_that_does_not_know_the_module_refuses_the_saved_model(qwen, tmp_path):
    """As a mean model of `build_model`: without a plugin of this name vLLM does not start."""
    ids = find_btoks(qwen)[1]
    composed = SentenceTransformer(modules=[qwen[0], BTokPooling(32, ids, "last")], device="cpu")
    del qwen[0].model.config.io_processor_plugin
    composed.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["io_processor_plugin"] == "st_btok"
    assert SentenceTransformer(str(tmp_path), device="cpu", trust_remote_code=True)[1].readout == "last"


def test_vectors_serve_late_interaction(qwen):
    transformer, ids = find_btoks(qwen)
    modules = [transformer, BTokPooling(32, ids, "vectors"), Normalize("token_embeddings", "token_embeddings")]
    model = MultiVectorEncoder(modules=modules, device="cpu")
    for encode in (model.encode_query, model.encode_document):
        vectors = encode(["a", "a longer text"])
        assert [v.shape for v in vectors] == [(4, 32), (4, 32)]
    assert np.abs(np.asarray(vectors[0]) - np.asarray(vectors[1])).max() > 1e-3


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="none twice"):
        BTokPooling(4, [7, 7])
    with pytest.raises(ValueError, match="at least one id"):
        BTokPooling(4, [])
    with pytest.raises(ValueError, match="readout must be"):
        BTokPooling(4, IDS, "max")
