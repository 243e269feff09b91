import numpy as np
import pytest
import torch

from st_btok.serving.export import SAMPLES, Pipeline, export, trace

TEXTS = ["b", "a much longer text than the other ones", "c d e"]


def inputs(model, side):
    model.tokenizer.padding_side = side
    features = model.preprocess(TEXTS)
    assert (features["attention_mask"] == 0).any()  # else the side would not matter
    return features["input_ids"], features["attention_mask"]


@pytest.mark.parametrize("readout", ["mean", "last"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_pipeline_gives_the_embeddings_of_encode(btok_model, readout, side):
    model = btok_model("qwen2_vl", readout=readout)
    expected = model.encode(TEXTS)
    with torch.no_grad():
        found = Pipeline(model)(*inputs(model, side))
    assert np.abs(found.numpy() - expected).max() <= 1e-6


def test_backbone_sees_no_row_that_starts_with_padding(btok_model):
    model = btok_model("qwen2_vl")
    seen = []
    model[0].register_forward_pre_hook(lambda module, given: seen.append(given[0]["attention_mask"]))
    with torch.no_grad():
        Pipeline(model)(*inputs(model, "left"))
    (mask,) = seen
    assert (mask[:, 0] == 1).all() and (mask.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("readout", ["mean", "last"])
def test_graph_takes_other_sizes_than_it_was_traced_with(btok_model, readout):
    model = btok_model("llama", readout=readout)
    graph = trace(model).module()
    ids, mask = inputs(model, "left")
    assert len(TEXTS) * ids.shape[1] != len(SAMPLES) * model.preprocess(SAMPLES)["input_ids"].shape[1]
    assert np.abs(graph(ids, mask).detach().numpy() - model.encode(TEXTS)).max() <= 1e-5
    one = model.preprocess(["x"])
    found = graph(one["input_ids"], one["attention_mask"]).detach().numpy()
    assert np.abs(found - model.encode(["x"])).max() <= 1e-5


def test_refusals_come_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("st_btok.serving.export.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install openvino"):
        export("openvino", "nowhere", tmp_path / "out")
    monkeypatch.setattr("st_btok.serving.export.find_spec", lambda name: True)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="not an empty directory"):
        export("onnx", "nowhere", tmp_path)
    with pytest.raises(ValueError, match="one of"):
        export("tflite", "nowhere", tmp_path / "out")
