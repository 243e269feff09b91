"""Adapters: what is trained, what is saved, and that it loads plainly with equal embeddings (invariant 8)."""

from __future__ import annotations

import copy
import json
import logging

import numpy as np
import pytest
import torch
from jinja2 import Environment, meta
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import AutoModel, PreTrainedModel

from st_btok import BTokLoss, build_model
from st_btok.adapters import (
    base_change,
    base_gap,
    btok_lora_config,
    language_model_linears,
    merge_adapters,
    save_trained,
)
from st_btok.model_parts import checkpoint_tensors, commit_of, embedding_matrix, find_btoks
from st_btok.tools.check import check
from st_btok.training.lm_head import output_embeddings
from tests.backbones import build, llama, picture, takes


def probes(family):
    texts = ["a", "What is the city?"]
    return [*texts, {"image": picture(28, 28, 2), "text": "what colour?"}] if takes(family, "image") else texts


def adapted(model, base=None, **options):
    """The model with an adapter whose every part has been moved, as training does."""
    options = {"r": 4, "alpha": 8, "dropout": 0.0, "init_lora_weights": False, **options}
    torch.manual_seed(1)
    model.add_adapter(btok_lora_config(model, base=base, **options))
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model.eval()


def trained(model):
    return {name: p for name, p in model[0].model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_a_trained_adapter_reloads_plainly(model, family, use_dora, tmp_path):
    """Adapter-only and merged; ST #3052, #3434 and colpali 0.3.14 lost parameters here."""
    inputs = probes(family)
    before = model.encode(inputs)
    adapted(model, base=tmp_path / "base", use_dora=use_dora)
    expected = model.encode(inputs)
    assert np.abs(expected - before).max() > 0.01
    assert "adapters alone" in save_trained(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter/model.safetensors").exists()
    np.testing.assert_allclose(SentenceTransformer(str(tmp_path / "adapter")).encode(inputs), expected, atol=1e-6)
    assert merge_adapters(model) is model
    np.testing.assert_allclose(model.encode(inputs), expected, atol=1e-5)
    assert not any("lora" in name or "token_adapter" in name for name, _ in model.named_modules())
    assert "no adapters" in save_trained(model, tmp_path / "merged")
    np.testing.assert_allclose(SentenceTransformer(str(tmp_path / "merged")).encode(inputs), expected, atol=1e-5)


def test_float32_adapters_over_a_half_precision_base(tmp_path):
    """They load in the type of the base, rounded; asked for, as float32, unchanged."""
    backbone, processor = build("llama")
    backbone.to(torch.bfloat16).save_pretrained(tmp_path / "backbone")
    processor.save_pretrained(tmp_path / "backbone")
    model = build_model(tmp_path / "backbone", device="cpu")
    adapted(model, base=tmp_path / "base")
    for parameter in trained(model).values():
        parameter.data = parameter.data.float() + 1e-4  # less than bfloat16 holds
    kept = {name: parameter.clone() for name, parameter in trained(model).items()}
    save_trained(model, tmp_path / "saved")
    plain = SentenceTransformer(str(tmp_path / "saved"))
    exact = SentenceTransformer(str(tmp_path / "saved"), model_kwargs={"dtype": "float32"})
    assert {parameter.dtype for parameter in plain[0].model.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in exact[0].model.parameters()} == {torch.float32}
    loaded = dict(exact[0].model.named_parameters())
    assert kept and all(torch.equal(loaded[name], value) for name, value in kept.items())
    texts = ["one two", "three"]
    np.testing.assert_allclose(exact.encode(texts), model.float().encode(texts), atol=1e-6)


def test_only_the_language_model_and_the_btok_rows_train(model, family):
    backbone = model[0].model
    inside = {id(parameter) for parameter in backbone.get_decoder().parameters()}
    linears = {
        name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear) and id(module.weight) in inside
    }
    model.add_adapter(btok_lora_config(model, r=2))
    rows = [name for name in trained(model) if name.endswith("trainable_tokens_delta.default")]
    layers = {name.split(".lora_")[0] for name in trained(model) if ".lora_" in name}
    assert len(rows) == 1 and trained(model)[rows[0]].shape[0] == 4
    assert len(trained(model)) == 1 + 2 * len(layers)
    assert layers <= linears
    # Mixers with a recurrence keep what their fused kernels read directly; attention and MLPs are adapted completely.
    assert all("mixer" in name or "linear_attn" in name for name in linears - layers)


def test_every_adapted_layer_learns(model, family):
    """An adapter on a weight that the model reads directly would never get a gradient."""
    adapted(model)
    features = model.preprocess(probes(family))
    embeddings = model(features)["sentence_embedding"]
    (embeddings * torch.randn(embeddings.shape)).sum().backward()
    silent = [name for name, p in trained(model).items() if p.grad is None or not p.grad.abs().max() > 0]
    assert not silent


def test_the_loss_reads_the_base_matrix_as_head(qwen):
    """BTok rows are never targets: the value is that of the merged model with the base matrix as its head."""
    features = [qwen.preprocess([picture(), "a text"]), qwen.preprocess(["red", "blue"])]
    head = embedding_matrix(qwen[0].model).detach().clone()
    adapted(qwen)
    assert torch.equal(embedding_matrix(qwen[0].model), head)
    merged = merge_adapters(copy.deepcopy(qwen)).requires_grad_(True)
    expected = BTokLoss(merged, lm_head=head)([dict(column) for column in features])
    found = BTokLoss(qwen)([dict(column) for column in features])
    for name in ("ranking", "condensation"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-5)
    found["condensation"].backward()
    for name, parameter in trained(qwen).items():
        assert parameter.grad.abs().max() > 0, name


def test_peft_reads_the_saved_dora_too(tmp_path):
    """The key for DoRA's magnitudes suits both readers."""
    model, tokenizer = build("llama")
    model = build_model(model, processor=tokenizer, device="cpu")
    adapted(model, base=tmp_path / "base", use_dora=True)
    save_trained(copy.deepcopy(model), tmp_path / "adapter")  # from a copy: the keys must not hang on the original
    keys = [key for key in load_file(tmp_path / "adapter/adapter_model.safetensors") if "magnitude" in key]
    assert len(keys) == 14 and all(key.endswith("lora_magnitude_vector.weight") for key in keys)
    read = PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    features = model.preprocess(["a", "What is the city?"])
    inputs = {key: features[key] for key in ("input_ids", "attention_mask")}
    torch.testing.assert_close(read(**inputs)[0], model[0].model(**inputs)[0], atol=1e-5, rtol=1e-5)


def test_a_base_that_cannot_be_loaded_is_told_and_merged(qwen, tmp_path, caplog):
    """Built from a model in memory: there is nothing an adapter could refer to."""
    with caplog.at_level(logging.WARNING):
        adapted(qwen)
    assert "can't be loaded or resumed" in caplog.text and "built from a model in memory" in caplog.text
    expected = qwen.encode(["a"])
    assert "adapters merged, because their base can't be loaded" in save_trained(qwen, tmp_path)
    np.testing.assert_allclose(SentenceTransformer(str(tmp_path)).encode(["a"]), expected, atol=1e-5)


def test_rows_beyond_the_base_vocabulary(tmp_path):
    """A base without spare rows can't take the K rows of an adapter (invariant 8)."""
    model, tokenizer = llama()
    model.resize_token_embeddings(len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "backbone")
    grown = build_model(str(tmp_path / "backbone"), device="cpu")
    rows = len(tokenizer)
    assert base_gap(grown).endswith(f"has {rows} embedding rows, the model with its bottleneck tokens has {rows + 4}")
    expected = adapted(copy.deepcopy(grown)).encode(["a", "b"])
    assert "merged" in save_trained(adapted(copy.deepcopy(grown)), tmp_path / "merged")
    assert "alone" in save_trained(adapted(grown, base=tmp_path / "base"), tmp_path / "adapter")
    for form in ("merged", "adapter"):
        loaded = SentenceTransformer(str(tmp_path / form))
        np.testing.assert_allclose(loaded.encode(["a", "b"]), expected, atol=1e-5)


def test_spare_rows_of_the_base_need_nothing(tmp_path):
    """The adapter holds the K rows, so the base on the hub may hold anything there; without them it may not."""
    model, processor = build("qwen2_vl")
    for part in (model, processor):
        part.save_pretrained(tmp_path / "backbone")
    built = build_model(str(tmp_path / "backbone"), device="cpu", init="random", seed=3)
    assert base_gap(built) is None
    plain = adapted(copy.deepcopy(built), trainable_token_indices=None)
    assert "don't hold the rows" in base_gap(plain)
    expected = plain.encode(["a"])
    assert "merged" in save_trained(plain, tmp_path / "plain")
    np.testing.assert_allclose(SentenceTransformer(str(tmp_path / "plain")).encode(["a"]), expected, atol=1e-5)
    adapted(built)
    assert "alone" in save_trained(built, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "backbone"
    )
    loaded = SentenceTransformer(str(tmp_path / "adapter"))
    np.testing.assert_allclose(loaded.encode(["a"]), built.encode(["a"]), atol=1e-6)


def test_a_merged_model_trains_on(qwen):
    adapted(qwen, use_dora=True)
    merge_adapters(qwen)
    assert base_gap(qwen) and merge_adapters(qwen) is qwen
    adapted(qwen)
    assert any("lora_A" in name for name in trained(qwen))


@pytest.fixture
def from_disk(tmp_path):
    """A model whose backbone lies on disk, with spare rows: adapters of it need no `base`."""
    for part in build("qwen2_vl"):
        part.save_pretrained(tmp_path / "backbone")
    return build_model(str(tmp_path / "backbone"), device="cpu")


def test_an_adapter_of_ones_own_that_loses_the_btoks_is_told_before_training(from_disk, tmp_path, caplog):
    """As sentence-transformers' own pages add one: its checkpoint holds no embeddings of the BToks."""
    from_disk.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    BTokLoss(from_disk)
    assert "save only after merge_adapters(model)" in caplog.text
    expected = from_disk.eval().encode(["a", "b"])
    from_disk.save_pretrained(str(tmp_path / "saved"))
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert np.abs(loaded.encode(["a", "b"]) - expected).max() > 1e-2, "what the warning is about"
    caplog.clear()
    merge_adapters(from_disk).save_pretrained(str(tmp_path / "merged"))
    loaded = SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    np.testing.assert_allclose(loaded.encode(["a", "b"]), expected, atol=1e-5)
    BTokLoss(adapted(loaded, base=tmp_path / "base"))
    assert "merge_adapters" not in caplog.text


def test_a_second_adapter_stands_on_what_the_first_left(from_disk, tmp_path, caplog):
    """The origin's weights are not the base any more, though the model still bears its name."""
    merge_adapters(adapted(from_disk))
    with caplog.at_level(logging.WARNING):
        adapted(from_disk)
    assert "can't be loaded or resumed" in caplog.text and "were adapters merged into it?" in caplog.text
    expected = from_disk.encode(["a", "b"])
    from_disk.save_pretrained(str(tmp_path / "checkpoint"))  # as the Trainer does
    with pytest.raises(Exception, match="changed in memory: pass base= to btok_lora_config"):
        SentenceTransformer(str(tmp_path / "checkpoint"))
    assert "adapters merged" in save_trained(from_disk, tmp_path / "saved")
    np.testing.assert_allclose(SentenceTransformer(str(tmp_path / "saved")).encode(["a", "b"]), expected, atol=1e-5)
    adapted(from_disk, base=tmp_path / "second")
    expected = from_disk.encode(["a", "b"])
    assert "alone" in save_trained(from_disk, tmp_path / "third")
    np.testing.assert_allclose(SentenceTransformer(str(tmp_path / "third")).encode(["a", "b"]), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["visual.blocks.0.mlp.fc1.bias", "language_model.embed_tokens.weight"])
def test_an_adapter_after_training_in_memory(from_disk, tmp_path, caplog, name):
    with torch.no_grad():
        from_disk[0].model.get_parameter(name)[5] += 0.01
    assert f"no longer those of their base '{tmp_path / 'backbone'}' ({name} differs)" in base_gap(from_disk)
    adapted(from_disk)
    assert f"{name} differs" in caplog.text
    expected = from_disk.encode(["a", {"image": picture(28, 28, 2)}])
    assert "adapters merged" in save_trained(from_disk, tmp_path / "saved")
    found = SentenceTransformer(str(tmp_path / "saved")).encode(["a", {"image": picture(28, 28, 2)}])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_another_type_is_no_other_base(from_disk):
    assert base_gap(from_disk) is None
    from_disk.bfloat16()
    assert base_gap(from_disk) is None


def test_every_weight_of_a_checkpoint_is_read_in_parts(family, tmp_path):
    """Under the names of the class and part by part, as the whole class loads it."""
    model, _ = build(family)
    model.save_pretrained(tmp_path)
    expected = AutoModel.from_pretrained(tmp_path)
    found = dict(checkpoint_tensors(type(expected), str(tmp_path), max_numbers=4000))
    assert found.keys() == expected.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in expected.state_dict().items())


def test_a_relative_base_is_found_from_anywhere(qwen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapted(qwen, base="base")
    expected = qwen.encode(["a"])
    save_trained(qwen, "adapter")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    np.testing.assert_allclose(SentenceTransformer("../adapter").encode(["a"]), expected, atol=1e-6)


def test_a_relative_backbone_is_found_from_anywhere(tmp_path, monkeypatch):
    backbone, processor = build("llama")
    monkeypatch.chdir(tmp_path)
    backbone.save_pretrained("backbone")
    processor.save_pretrained("backbone")
    model = adapted(build_model("backbone", device="cpu"))
    expected = model.encode(["a"])
    assert save_trained(model, "adapter").startswith("the adapters alone")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    np.testing.assert_allclose(SentenceTransformer("../adapter").encode(["a"]), expected, atol=1e-6)


def test_a_folder_that_holds_another_base_is_refused(qwen, tmp_path):
    """As where a second training names the folder of the first: the first adapter would load with other vectors."""
    adapted(qwen, base=tmp_path / "base")
    expected = qwen.encode(["a"])
    save_trained(qwen, tmp_path / "adapter")
    second = merge_adapters(qwen)
    with pytest.raises(ValueError, match="base must be a folder of its own, but .*base holds another model"):
        btok_lora_config(second, base=tmp_path / "base")
    np.testing.assert_allclose(SentenceTransformer(str(tmp_path / "adapter")).encode(["a"]), expected, atol=1e-6)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("base")] == ["base"]
    adapted(second, base=tmp_path / "second")
    btok_lora_config(SentenceTransformer(str(tmp_path / "base"), device="cpu"), base=tmp_path / "base")  # the same


@pytest.mark.parametrize("trained_on", [False, True], ids=["saved again", "trained on"])
def test_a_loaded_dora_adapter_keeps_its_magnitudes(qwen, tmp_path, trained_on):
    adapted(qwen, base=tmp_path / "base", use_dora=True)
    save_trained(qwen, tmp_path / "first")
    loaded = SentenceTransformer(str(tmp_path / "first"), device="cpu")
    if trained_on:
        BTokLoss(loaded)
        with torch.no_grad():
            for name, parameter in loaded.named_parameters():
                if "lora_magnitude" in name:
                    parameter *= 1.1
        loaded.save_pretrained(str(tmp_path / "second"))  # as the Trainer's checkpoints
    else:
        save_trained(loaded, tmp_path / "second")
    again = SentenceTransformer(str(tmp_path / "second"), device="cpu")
    np.testing.assert_allclose(again.encode(["a", "b"]), loaded.encode(["a", "b"]), atol=1e-6)


def test_an_overwritten_base_is_noticed(qwen, tmp_path):
    other = copy.deepcopy(qwen)
    adapted(qwen, base=tmp_path / "base")
    save_trained(qwen, tmp_path / "adapter")
    assert base_change(SentenceTransformer(str(tmp_path / "adapter"))) is None
    first = check(tmp_path / "adapter", device="cpu")[0]
    assert (first.name, first.status) == ("base of the adapter", "ok")
    with torch.no_grad():
        embedding_matrix(other[0].model)[65] += 0.5
    other.save_pretrained(str(tmp_path / "base"))
    assert "overwritten since" in base_change(SentenceTransformer(str(tmp_path / "adapter")))
    first = check(tmp_path / "adapter", device="cpu")[0]
    assert first.status == "failed" and str(tmp_path / "base") in first.note
    assert base_change(merge_adapters(SentenceTransformer(str(tmp_path / "adapter")))) is None


def test_a_base_on_the_hub_is_known_by_its_commit(tmp_path, monkeypatch):
    """Offline, from a cache as the hub's client lays it out; `main` then moves on to another commit."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cache = tmp_path / "hub/models--someone--tiny"

    def publish(commit, seed):
        backbone, tokenizer = build("llama")
        torch.manual_seed(seed)
        with torch.no_grad():
            backbone.get_input_embeddings().weight.normal_(0, 0.2)
        backbone.save_pretrained(cache / "snapshots" / commit)
        tokenizer.save_pretrained(cache / "snapshots" / commit)
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs/main").write_text(commit)

    assert commit_of("someone/tiny") is None, "nothing there yet"
    publish("a" * 40, seed=1)
    model = build_model("someone/tiny", device="cpu")
    head = output_embeddings(model[0].model, model[0].model.name_or_path).clone()
    adapted(model)
    expected = model.encode(["a", "b"])
    assert "alone" in save_trained(model, tmp_path / "adapter")
    kept = json.loads((tmp_path / "adapter/sentence_bert_config.json").read_text())["processing_kwargs"]
    assert kept["chat_template"]["base_fingerprint"] == "commit:" + "a" * 40
    loaded = SentenceTransformer(str(tmp_path / "adapter"))
    np.testing.assert_allclose(loaded.encode(["a", "b"]), expected, atol=1e-6)
    assert base_change(loaded) is None
    publish("b" * 40, seed=2)
    moved = SentenceTransformer(str(tmp_path / "adapter"))
    assert np.abs(moved.encode(["a", "b"]) - expected).max() > 0.01, "loaded over the other base, without an error"
    assert "'someone/tiny' is not the one that the adapter was trained on" in base_change(moved)
    # The head of the model in memory is still read from its own commit.
    assert torch.equal(output_embeddings(model[0].model, model[0].model.name_or_path), head)


@pytest.mark.parametrize("form", ["list", "dict"])
def test_own_tokens_train_beside_the_btoks(from_disk, tmp_path, form):
    own, (_, ids) = [65, 66], find_btoks(from_disk)
    adapted(from_disk, trainable_token_indices=own if form == "list" else {"embed_tokens": own})
    rows = next(value for name, value in trained(from_disk).items() if "trainable_tokens_delta" in name)
    assert len(rows) == len(ids) + len(own)
    expected = from_disk.encode(["ABBA"])
    assert "alone" in save_trained(from_disk, tmp_path / "saved")
    np.testing.assert_allclose(SentenceTransformer(str(tmp_path / "saved")).encode(["ABBA"]), expected, atol=1e-6)


def test_nested_models_keep_their_own_layers():
    """A decoder that is the whole model, with a tower inside: the tower's layers are not the language model's."""
    model, _ = build("llama")
    tower, _ = build("llama")
    backbone = model.model
    assert isinstance(tower, PreTrainedModel) and backbone.get_decoder() is backbone
    expected = language_model_linears(backbone)
    backbone.tower = tower
    assert language_model_linears(backbone) == expected


def test_wrong_arguments(qwen):
    for options in ({"r": 0}, {"dropout": 1.0}):
        with pytest.raises(ValueError, match="r must be at least 1 and dropout"):
            btok_lora_config(qwen, **options)
    config = btok_lora_config(qwen, use_rslora=True)
    assert isinstance(config, LoraConfig) and config.use_rslora
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_dora) == (16, 32, 0.05, False)
    assert config.trainable_token_indices == find_btoks(qwen)[1]
    qwen.add_adapter(config)
    with pytest.raises(ValueError, match="merge_adapters"):
        btok_lora_config(qwen)


def test_the_template_knows_the_fingerprint_and_renders_as_before(qwen, tmp_path):
    """An argument that the template does not mention goes to the processor, which loses its padding by that."""
    row = [{"image": picture(), "text": "what?"}, "a text"]
    before, ids = qwen[0].processor.chat_template, qwen.preprocess(row)["input_ids"]
    qwen.add_adapter(btok_lora_config(qwen, r=4, base=str(tmp_path / "base")))
    for holder in (qwen[0].processor, qwen.tokenizer):
        names = meta.find_undeclared_variables(Environment().parse(holder.chat_template))
        assert qwen[0].processing_kwargs["chat_template"].keys() <= names
    assert torch.equal(qwen.preprocess(row)["input_ids"], ids)
    assert merge_adapters(qwen)[0].processor.chat_template == before
