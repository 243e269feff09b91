"""`build_model`: what comes out, what it computes, how it is saved, and every refusal.

Independent truths: the mean of hidden states computed by hand from the bare backbone, and the same inputs one by one.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from st_btok import build_model
from st_btok.model import _token_placeholder
from st_btok.model_parts import find_btoks, media_tokens
from tests.backbones import (
    BUILDERS,
    LLAMA_TEMPLATE,
    build,
    inputs,
    llama,
    picture,
    takes,
    tokenizer,
    videos,
)


def by_hand(model, sample, readout="mean"):
    """Embedding of one input from the bare backbone: pick the BTok states by id, mean, normalise."""
    rows = states_of(model, model[0].preprocess([sample]))
    pooled = rows.mean(0) if readout == "mean" else rows[-1]
    return (pooled / pooled.norm()).numpy()


def states_of(model, features):
    """(K, D) BTok states of the bare backbone, picked by id."""
    transformer, ids = find_btoks(model)
    names = inspect.signature(transformer.model.forward).parameters
    with torch.no_grad():
        states = transformer.model(**{k: v for k, v in features.items() if k in names}).last_hidden_state[0]
    return torch.stack([states[features["input_ids"][0].tolist().index(token)] for token in ids])


def test_modules_are_stock(model):
    assert [type(module).__module__.split(".")[0] for module in model] == ["sentence_transformers"] * 4
    assert not any(p.requires_grad for p in model[1].parameters())


@pytest.mark.parametrize("readout", ["mean", "last"])
def test_embedding_is_the_readout_of_the_btok_states(btok_model, family, readout):
    model = btok_model(family, readout=readout)
    for sample in inputs(family) + videos(family):
        np.testing.assert_allclose(model.encode([sample])[0], by_hand(model, sample, readout), atol=1e-6)


def test_attention_weighs_the_btok_states(btok_model, family, tmp_path):
    """softmax over the K, an MLP and a LayerNorm (release, v2), of weights that the folder keeps."""
    model = btok_model(family, readout="attention").eval()
    assert len(model) == 3
    pooling = model[1]
    sample = inputs(family)[0]
    features = model[0].preprocess([sample])
    with torch.no_grad():
        rows = states_of(model, features)
        weights = torch.softmax(rows @ pooling.attention.weight[0] / rows.shape[1] ** 0.5, 0)
        summary = weights @ rows
        wanted = torch.nn.functional.normalize(pooling.layer_norm(summary + pooling.mlp(summary)), dim=0)
    assert weights.max() - weights.min() > 1e-4, "not the mean"
    np.testing.assert_allclose(model.encode([sample])[0], wanted, atol=1e-6)
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
    np.testing.assert_allclose(loaded.encode([sample])[0], wanted, atol=1e-6)
    with pytest.raises(ValueError, match="trust_remote_code"):
        SentenceTransformer(str(tmp_path / "saved"), device="cpu")


@pytest.mark.parametrize("template", ["chat", "plain"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_order_and_padding_side_do_not_matter(btok_model, family, template, side):
    model = btok_model(family, template=template)
    model.tokenizer.padding_side = side
    samples = inputs(family)[:-1]  # conversations with media must not share a batch with other inputs
    single = np.concatenate([model.encode([sample]) for sample in samples])
    together = model.encode(samples, batch_size=len(samples))
    shuffled = model.encode(samples[::-1], batch_size=3)[::-1]
    np.testing.assert_allclose(together, single, atol=1e-5)
    np.testing.assert_allclose(shuffled, single, atol=1e-5)
    distances = np.linalg.norm(single[:, None] - single[None], axis=-1) + np.eye(len(single))
    assert distances.min() > 1e-2, "the inputs must differ for this to mean anything"


def test_saved_models_load_without_the_package(btok_model, tmp_path):
    """Invariant 2, in a process where importing st_btok fails; text, and an image given by path."""
    picture(56, 28, 1).save(tmp_path / "image.png")
    expected, samples = {}, {}
    for family in BUILDERS:
        model = btok_model(family)
        samples[family] = ["a", "What is the city?"] + (["image.png"] if takes(family, "image") else [])
        with contextlib.chdir(tmp_path):
            expected[family] = model.encode(samples[family])
        model.save_pretrained(str(tmp_path / family))
    code = f"""
        import sys, json
        sys.modules["st_btok"] = None  # makes every import of it fail
        from sentence_transformers import SentenceTransformer
        for family, samples in {samples!r}.items():
            model = SentenceTransformer(family, device="cpu")
            print("EMBEDDINGS", family, json.dumps(model.encode(samples).tolist()))
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    lines = [line.split(" ", 2)[1:] for line in run.stdout.splitlines() if line.startswith("EMBEDDINGS")]
    assert [family for family, _ in lines] == list(BUILDERS)
    for family, found in lines:
        np.testing.assert_allclose(np.array(json.loads(found)), expected[family], atol=1e-6, err_msg=family)


def test_saved_model_gives_equal_embeddings_for_every_input(model, family, tmp_path):
    model.save_pretrained(str(tmp_path))
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    for samples in filter(None, (inputs(family)[:-1], videos(family))):
        np.testing.assert_allclose(loaded.encode(samples), model.encode(samples), atol=1e-6)
    assert loaded[0].processing_kwargs == model[0].processing_kwargs
    card = (tmp_path / "README.md").read_text()
    assert len(card) < 50_000, "the vocabulary must not be printed into the model card"


def test_a_model_that_stays_on_the_disk_reads_as_one_in_memory(qwen, tmp_path):
    qwen.save_pretrained(str(tmp_path / "saved"))
    offload = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "offload")}
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu", model_kwargs=offload)
    assert {weight.device.type for weight in loaded[0].model.parameters()} == {"meta"}
    samples = inputs("qwen2_vl")[:-1]
    np.testing.assert_allclose(loaded.encode(samples), qwen.encode(samples), atol=1e-6)


def test_building_leaves_a_model_where_its_device_map_put_it(monkeypatch, tmp_path):
    for part in llama():
        part.save_pretrained(tmp_path)
    monkeypatch.setattr("sentence_transformers.base.model.get_device_name", lambda: "meta")  # a place it must not go
    options = {"template": "plain", "max_seq_length": 64}
    model = build_model(str(tmp_path), model_kwargs={"device_map": {"": "cpu"}}, **options)
    assert {weight.device.type for weight in model.parameters()} == {"cpu"}
    offload = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "offload")}
    with pytest.raises(ValueError, match="offloaded .*Build without device_map"):
        build_model(str(tmp_path), model_kwargs=offload, **options)


def test_saved_model_loads_in_bare_transformers(qwen, tmp_path):
    qwen.save_pretrained(str(tmp_path))
    backbone = AutoModel.from_pretrained(tmp_path).eval()
    _, ids = find_btoks(qwen)
    features = qwen[0].preprocess(["hello"])
    with torch.no_grad():
        states = backbone(input_ids=features["input_ids"], attention_mask=features["attention_mask"])[0]
    pooled = states[torch.isin(features["input_ids"], torch.tensor(ids))].mean(0)
    np.testing.assert_allclose((pooled / pooled.norm()).numpy(), qwen.encode(["hello"])[0], atol=1e-6)


def test_attention_implementations_agree(model, family):
    backbone = model[0].model
    if not backbone._supports_sdpa:
        pytest.skip(f"{type(backbone).__name__} has one attention implementation only")
    by_name = {}
    for name in ("eager", "sdpa"):
        backbone.set_attn_implementation(name)
        by_name[name] = model.encode(inputs(family)[:-1])
    np.testing.assert_allclose(by_name["eager"], by_name["sdpa"], atol=1e-4)
    assert family == "mamba" or not np.array_equal(by_name["eager"], by_name["sdpa"]), "the switch did something"


def test_prompts_change_the_embedding_and_survive_saving(model, tmp_path):
    model.prompts = {"query": "Find: ", "document": "Text: "}
    plain, query, document = model.encode(["a"]), model.encode_query(["a"]), model.encode_document(["a"])
    assert np.abs(plain - query).max() > 1e-3 and np.abs(query - document).max() > 1e-3
    np.testing.assert_allclose(model.encode(["a"], prompt="Find: "), query, atol=1e-6)
    model.save_pretrained(str(tmp_path))
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_allclose(loaded.encode_query(["a"]), query, atol=1e-6)


def test_the_rest_of_encode(qwen):
    samples = inputs("qwen2_vl")[:-1]
    full = qwen.encode(samples)
    short = qwen.encode(samples, truncate_dim=8, normalize_embeddings=True)
    expected = full[:, :8] / np.linalg.norm(full[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(short, expected, atol=1e-6)
    binary = qwen.encode(samples, precision="ubinary")
    np.testing.assert_array_equal(binary, np.packbits(full > 0, axis=1))
    calibration = qwen.encode([f"{i}" for i in range(120)])
    assert qwen.encode(samples, precision="int8").dtype == np.int8 and len(calibration) == 120
    assert qwen.encode(samples, convert_to_tensor=True).shape == (len(samples), 32)
    assert qwen.similarity(full, full).shape == (len(samples), len(samples))
    assert qwen.get_embedding_dimension() == 32


@pytest.mark.slow
def test_multi_process_pool(qwen):
    samples = inputs("qwen2_vl")[:-1]
    pool = qwen.start_multi_process_pool(["cpu", "cpu"])
    try:
        pooled = qwen.encode(samples, pool=pool, batch_size=2)
    finally:
        qwen.stop_multi_process_pool(pool)
    np.testing.assert_allclose(pooled, qwen.encode(samples), atol=1e-5)


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_long_inputs_lose_text_only(btok_model, family, template):
    """Invariant 11: K BToks, every medium, and the text cut at its end."""
    model = btok_model(family, template=template, max_seq_length=200)
    transformer, ids = find_btoks(model)
    long = "abcdefghij" * 100
    samples = [long]
    if takes(family, "image"):
        samples += [{"image": picture(), "text": long}, {"text": long, "image": [picture(28, 28), picture(28, 28)]}]
    for sample in samples:
        row = transformer.preprocess([sample])
        tokens = row["input_ids"][0].tolist()
        assert tokens[-4:] == ids
        text = model.tokenizer.decode(tokens)
        assert "abcdefghij" in text and long not in text
        assert len(tokens) == 200 if isinstance(sample, str) else len(tokens) <= 200
        if not isinstance(sample, str):
            alone = transformer.preprocess([{"image": sample["image"], "text": "a"}])["input_ids"][0]
            placeholder = torch.tensor([*media_tokens(transformer).values()])
            kept = torch.isin(row["input_ids"][0], placeholder).sum()
            assert kept == torch.isin(alone, placeholder).sum() > 0, "every medium with all of its tokens"
    model.encode(samples)


def test_conversations_beside_other_inputs_keep_their_text(model, family):
    """sentence-transformers 6.2 wraps them in a part that templates skip: the content was lost without a word."""
    turns = [{"role": "user", "content": "a red kitten"}]
    np.testing.assert_allclose(model.encode([turns, "b"])[0], model.encode([turns])[0], atol=1e-6)
    assert np.abs(model.encode([turns])[0] - model.encode([""])[0]).max() > 1e-3
    if takes(family, "image"):
        turns = [{"role": "user", "content": [{"type": "image", "image": picture()}]}]
        assert model.encode([turns]).shape == (1, 32)
        with pytest.raises(Exception, match="image content can't share a batch"):
            model.encode([turns, "b"])


def test_max_chars_can_be_set_for_one_call(qwen):
    _, ids = find_btoks(qwen)
    row = qwen.preprocess(["abcdef"], processing_kwargs={"chat_template": {"max_chars": 3}})["input_ids"][0].tolist()
    text = qwen.tokenizer.decode(row)
    assert "abc" in text and "abcd" not in text and row[-4:] == ids


def test_media_that_cannot_fit_are_an_error_naming_the_row(btok_model, family):
    if not takes(family, "image"):
        pytest.skip("text only: there are no media that could not fit")
    model = btok_model(family, max_seq_length=180)
    del model[0].preprocess  # which counts real tokens for a loss
    fits, too_many = {"image": [picture()] * 2, "text": "ok"}, {"image": [picture()] * 30, "text": "nine kittens"}
    with pytest.raises(Exception, match=r"nine kittens.*may take \d+ tokens, the limit max_tokens is 180"):
        model.encode([fits, too_many])
    assert model.encode([fits]).shape == (1, 32)


def test_pixel_limits_are_set_together(qwen):
    limits = qwen[0].processing_kwargs["image"]
    assert limits == {"size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16}}
    backbone, processor = build("qwen2_vl")
    model = build_model(backbone, processor=processor, max_pixels=28 * 28 * 4, device="cpu")
    grid = model[0].preprocess([picture(280, 280)])["image_grid_thw"]
    assert int(grid.prod()) * 14 * 14 <= 28 * 28 * 4
    assert int(qwen[0].preprocess([picture(280, 280)])["image_grid_thw"].prod()) * 14 * 14 > 28 * 28 * 4


def test_the_video_cap_is_saved_and_nothing_is_warned_about(qwen, tmp_path, caplog):
    """transformers 5.22 on warns where it is unset; unset and False are the same up to about 300 large frames."""
    qwen.save_pretrained(str(tmp_path))
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    processor = loaded[0].processor.video_processor
    assert processor.cap_pixels_per_frame is True
    video = videos("qwen2_vl")[0]
    capped = loaded.encode([video])
    assert "cap" not in caplog.text
    processor.cap_pixels_per_frame = False
    np.testing.assert_array_equal(loaded.encode([video]), capped)


def test_a_loaded_backbone_is_not_changed():
    backbone, processor = build("qwen2_vl")
    before = {name: p.clone() for name, p in backbone.named_parameters()}
    length = len(processor.tokenizer)
    build_model(backbone, processor=processor, device="cpu")
    assert len(processor.tokenizer) == length
    assert all(torch.equal(before[name], p) for name, p in backbone.named_parameters())


def test_building_from_a_path_and_from_objects_agree(family, tmp_path):
    backbone, processor = build(family)
    backbone.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    from_path = build_model(tmp_path, device="cpu")
    from_objects = build_model(backbone, processor=processor, device="cpu")
    np.testing.assert_array_equal(from_path.encode(["a"]), from_objects.encode(["a"]))


def test_building_on_a_built_model_keeps_its_tokens(qwen, tmp_path):
    expected = qwen.encode(["a"])
    qwen.save_pretrained(str(tmp_path))
    again = build_model(tmp_path, device="cpu")
    np.testing.assert_allclose(again.encode(["a"]), expected, atol=1e-6)
    with pytest.raises(ValueError, match="already has 4 bottleneck tokens.*num_btoks=2"):
        build_model(tmp_path, num_btoks=2)


@pytest.mark.parametrize("num_btoks", [0, -1])
def test_fewer_than_one_btok_is_refused(num_btoks):
    with pytest.raises(ValueError, match="at least 1"):
        build_model("does/not-matter", num_btoks=num_btoks)


@pytest.mark.parametrize("option", [{"readout": "max"}, {"template": "other"}])
def test_unknown_options_are_refused_before_anything_is_loaded(option):
    with pytest.raises(ValueError, match="must be"):
        build_model("does/not-matter", **option)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_btoks": "4"}, "num_btoks must be a whole number, at least 1, got '4'"),
        ({"prompts": "query: "}, "prompts must be instructions by name, such as {\"query\": .*got 'query: '"),
        ({"backbone": 3}, "backbone must be a name, a path or a transformers model, got int"),
    ],
    ids=str,
)
def test_arguments_of_another_kind_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_model(**{"backbone": "not loaded", **arguments})


def test_the_parts_of_an_embedder_are_what_the_error_asks_for(qwen):
    with pytest.raises(ValueError, match=r"got SentenceTransformer.*build_model\(model\[0\]\.model, processor="):
        build_model(qwen)
    build_model(qwen[0].model, processor=qwen[0].processor, device="cpu")


def test_a_name_that_is_no_folder_is_said_to_be_none(monkeypatch):
    with pytest.raises(OSError, match="there is no folder 'recipes/backbon' here, and no model of that name"):
        build_model("recipes/backbon")


def test_encoders_are_refused():
    own = tokenizer()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertLMHeadModel(BertConfig(vocab_size=288, **sizes))
    with pytest.raises(ValueError, match="is an encoder"):
        build_model(bert, processor=own)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=288, d_model=16, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="encoder-decoder"):
        build_model(t5, processor=own)


def test_a_backbone_that_looks_ahead_is_refused():
    backbone, processor = build("llama")
    backbone.config.is_causal = False
    with pytest.raises(ValueError, match="must be causal.*changed earlier states"):
        build_model(backbone, processor=processor)


def test_prefix_attention_is_refused():
    """PaliGemma: image and prompt see each other in both directions, so the input's states see the BToks."""
    backbone, processor = build("paligemma")
    with pytest.raises(ValueError, match="must be causal.*paligemma.*both directions"):
        build_model(backbone, processor=processor, template="plain")


def test_causality_is_asked_of_the_model_on_its_device(monkeypatch):
    """Flash attention, which runs on a GPU only, could not answer before the model is there."""
    backbone, processor = build("llama")
    happened = []
    move = SentenceTransformer.to
    monkeypatch.setattr(SentenceTransformer, "to", lambda self, *to: happened.append("moved") or move(self, *to))
    monkeypatch.setattr("st_btok.model.check_causal", lambda transformer: happened.append("asked"))
    build_model(backbone, processor=processor)
    assert happened[-1] == "asked" and "moved" in happened


def test_positions_that_count_padding_are_padded_on_the_right(tmp_path):
    """GPT-2's first token has position 0, padding or not: padded on the left, an embedding hangs on its batch."""
    backbone, own = GPT2LMHeadModel(GPT2Config(vocab_size=288, n_embd=32, n_layer=2, n_head=4)), llama()[1]
    with torch.no_grad():
        backbone.transformer.wpe.weight.normal_(0, 0.5)
    own.padding_side = own.init_kwargs["padding_side"] = "left"  # the second is what it saves
    model = build_model(backbone, processor=own, device="cpu")
    rows = ["a", "What is the city?", "red kitten " * 5]
    expected = np.concatenate([model.encode([row]) for row in rows])
    np.testing.assert_allclose(model.encode(rows), expected, atol=1e-5)
    model.save_pretrained(str(tmp_path))
    np.testing.assert_allclose(SentenceTransformer(str(tmp_path)).encode(rows), expected, atol=1e-5)


def test_a_padding_side_that_does_no_harm_stays():
    backbone, own = llama()
    own.padding_side = own.init_kwargs["padding_side"] = "left"  # the second is what it saves
    assert build_model(backbone, processor=own, device="cpu").tokenizer.padding_side == "left"


def test_images_and_videos_of_smolvlm_need_calls_of_their_own(btok_model):
    """Its processor keeps both kinds of pixels under one name; the mix is an error, not a wrong embedding."""
    model = btok_model("smolvlm")
    assert model.encode([*videos("smolvlm"), "a text"]).shape == (2, 32)
    with pytest.raises(ValueError, match="features and image tokens do not match"):
        model.encode([*videos("smolvlm"), picture()])


def test_a_template_that_drops_the_btoks_is_refused():
    backbone, _ = build("llama")
    names = "".join(f"<|btok_{i}|>" for i in range(4))
    template = LLAMA_TEMPLATE + "{%- if messages | length > 1 -%}{{- '" + names + "' -}}{%- endif -%}"
    with pytest.raises(ValueError, match="bottleneck tokens at the end of every input"):
        build_model(backbone, processor=tokenizer(template))


def test_a_base_model_without_template_needs_the_plain_layout():
    torch.manual_seed(0)
    backbone, own = llama(chat_template=None)
    with pytest.raises(ValueError, match='template="plain"'):
        build_model(backbone.eval(), processor=own)
    model = build_model(backbone.eval(), processor=own, template="plain", device="cpu")
    assert model.tokenizer.decode(model.preprocess(["hi"])["input_ids"][0][:-4]) == "hi"


@pytest.mark.parametrize("family", [name for name in BUILDERS if takes(name, "image")])
def test_a_multimodal_base_model_gets_the_placeholders_of_its_processor(family):
    """The plain layout without a chat template is the one that is read off the template, token for token."""
    rows = []
    samples = [s for s in inputs(family)[:-1] if family != "smolvlm" or not (isinstance(s, dict) and "video" in s)]
    for has_template in (True, False):
        backbone, processor = build(family)
        if not has_template:
            processor.chat_template = processor.tokenizer.chat_template = None
            with pytest.raises(ValueError, match='template="plain"'):
                build_model(backbone, processor=processor, device="cpu")
        model = build_model(backbone, processor=processor, template="plain", device="cpu")
        rows.append([model.preprocess([sample])["input_ids"][0].tolist() for sample in samples])
    assert rows[1] == rows[0]
    distances = np.linalg.norm(np.diff(model.encode(samples), axis=0), axis=1)
    assert distances.min() > 1e-4


def test_without_template_and_token_the_placeholder_is_asked_for(qwen):
    qwen[0].processor.image_token = None
    with pytest.raises(ValueError, match="must know what stands for one image.*chat_template"):
        _token_placeholder(qwen[0], "image")


def test_a_decoder_that_transformers_does_not_know_is_told_what_to_do(tmp_path):
    class OwnConfig(LlamaConfig):
        model_type = "own_decoder"

    AutoConfig.register("own_decoder", OwnConfig)
    OwnConfig(hidden_size=64, num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"in none of its mappings .*AutoModelForCausalLM.register\(OwnConfig"):
        build_model(tmp_path)


def test_plain_layout_is_the_authors(qwen):
    backbone, processor = build("qwen2_vl")
    model = build_model(backbone, processor=processor, template="plain", device="cpu")
    sample = {"text": "what is it?", "image": picture(28, 28)}  # media come first whatever the order
    rendered = model.tokenizer.decode(model.preprocess([sample])["input_ids"][0])
    btoks = "".join(f"<|btok_{i}|>" for i in range(4))
    assert rendered == f"<|vision_start|><|image_pad|><|vision_end|>\nwhat is it?\n{btoks}"
    prompted = model.preprocess(["a kitten\n"], prompt="Find: ")["input_ids"][0]
    assert model.tokenizer.decode(prompted) == f"Find: a kitten\n{btoks}"


def test_loaded_objects_need_their_processor(tmp_path):
    backbone, processor = build("llama")
    with pytest.raises(ValueError, match="needs its processor"):
        build_model(backbone)
    with pytest.raises(ValueError, match="goes with a loaded model"):
        build_model(tmp_path, processor=processor)


def test_find_btoks_refuses_a_model_without_them():
    backbone, processor = build("llama")
    model = build_model(backbone, processor=processor, device="cpu")
    model[0].processor = tokenizer()
    with pytest.raises(ValueError, match="no bottleneck tokens"):
        find_btoks(model)


@pytest.mark.parametrize(("readout", "named"), [("mean", True), ("last", False), ("attention", True)])
def test_engines_that_skip_word_weights_refuse_the_saved_model(btok_model, tmp_path, readout, named):
    # vLLM starts no model whose config.json asks for a plugin that it does not have.
    btok_model("qwen2_vl", readout=readout).save_pretrained(str(tmp_path / "once"))
    own = readout == "attention"
    SentenceTransformer(str(tmp_path / "once"), device="cpu", trust_remote_code=own).save_pretrained(
        str(tmp_path / "twice")
    )
    for folder in ("once", "twice"):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert (config.get("io_processor_plugin") == "st_btok") == named


@pytest.mark.parametrize("family", ["llama", "qwen2_vl"])
def test_tokens_can_be_added_after_building(family, tmp_path, btok_model):
    """In sentence-transformers' documented way; the weights of the readout have room for them."""
    model = btok_model(family)
    transformer, ids = find_btoks(model)
    names = [f"[NEW{number}]" for number in range(100)]
    tokenizer = transformer.tokenizer
    tokenizer.add_tokens(names, special_tokens=True)
    transformer.auto_model.resize_token_embeddings(len(tokenizer))
    text = f"{names[-1]} opens"
    features = model.preprocess([text])
    assert int(features["input_ids"].max()) == len(tokenizer) - 1
    states = transformer(dict(features))["token_embeddings"][0]
    expected = torch.nn.functional.normalize(
        states[torch.isin(features["input_ids"][0], torch.tensor(ids))].mean(0), dim=0
    )
    np.testing.assert_allclose(model.encode(text), expected.detach().numpy(), atol=1e-6)
    model.save_pretrained(str(tmp_path))
    np.testing.assert_allclose(SentenceTransformer(str(tmp_path)).encode(text), model.encode(text), atol=1e-6)
