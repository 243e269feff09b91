"""`decode_btoks` and `btok_attention`: generated texts and attention maps.

Independent truths: one forward pass of the bare backbone under a mask written out by hand, the loss' own likelihood,
exhaustive search over all texts, and the attention weights that transformers itself returns.
"""

from __future__ import annotations

import importlib
import itertools
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from st_btok import btok_ids, build_model, condensation_attention
from st_btok.model_parts import find_btoks
from st_btok.tools import explain_figure
from st_btok.tools.command import main
from st_btok.tools.explain import BTokAttention, Medium, _search, btok_attention, decode_btoks, find_media
from st_btok.tools.explain_figure import draw_attention
from st_btok.training.content import closing_token
from st_btok.training.targets import join_targets
from tests.backbones import build, clip, picture, published_btok

SAMPLES = {
    "qwen2_vl": ["a red kitten", picture(56, 84, 1), {"image": picture(28, 56, 2), "text": "what colour?"}],
    "llama": ["a red kitten", "What is the city?"],
}


def make(name: str, **options: object):
    backbone, processor = build(name)
    return build_model(backbone, processor=processor, device="cpu", **options)


def likelihood(model, sample, targets: list[torch.Tensor], head: torch.Tensor | None = None) -> torch.Tensor:
    """Log-likelihood of each target, teacher forced."""
    transformer, btoks = find_btoks(model)
    batch = join_targets(transformer.preprocess([sample] * len(targets)), targets, btoks)
    with torch.no_grad(), condensation_attention(transformer.model, batch.segments):
        states = transformer(dict(batch.features))["token_embeddings"]
    rows, positions = batch.predictors.T
    head = transformer.model.get_input_embeddings().weight if head is None else head
    logits = F.linear(states[rows, positions], head).float()
    nll = F.cross_entropy(logits, batch.labels, reduction="none").detach()
    return -torch.zeros(len(targets)).index_add(0, rows, nll)


def logits_by_hand(model, sample, ids: torch.Tensor) -> torch.Tensor:
    """(N, V) logits of every generated position from one pass of the backbone under a 4-D mask made in a loop."""
    transformer, btoks = find_btoks(model)
    backbone = transformer.model
    features = transformer.preprocess([sample])
    source = features["input_ids"][0]
    joint = torch.cat([source, ids])[None]
    length, size = len(source), joint.shape[1]
    mask = torch.full((1, 1, size, size), torch.finfo(torch.float32).min)
    for query in range(size):
        for key in range(query + 1):
            if query < length or key >= length - len(btoks):
                mask[0, 0, query, key] = 0
    inputs = {"input_ids": joint, "attention_mask": mask, "position_ids": torch.arange(size)[None]}
    if hasattr(backbone, "get_rope_index"):
        kinds = torch.cat([features["mm_token_type_ids"], torch.zeros(1, len(ids), dtype=torch.long)], 1)
        grid = features.get("image_grid_thw")
        ones = torch.ones_like(joint)
        positions, _ = backbone.get_rope_index(
            joint, mm_token_type_ids=kinds, image_grid_thw=grid, attention_mask=ones
        )
        inputs["position_ids"] = positions
        inputs["mm_token_type_ids"] = kinds
        inputs.update({key: features[key] for key in ("pixel_values", "image_grid_thw") if key in features})
    with torch.no_grad():
        states = backbone(**inputs).last_hidden_state[0, length - 1 : -1]
    return F.linear(states, backbone.get_input_embeddings().weight)


@pytest.mark.parametrize("name", SAMPLES)
def test_greedy_tokens_are_the_argmax_of_one_masked_pass(name):
    model = make(name)
    texts = []
    for sample in SAMPLES[name]:
        (decoded,) = decode_btoks(model, [sample], max_new_tokens=6)
        logits = logits_by_hand(model, sample, decoded.ids)
        assert decoded.ids.tolist() == logits.argmax(-1).tolist()
        scores = logits.log_softmax(-1).gather(1, decoded.ids[:, None])[:, 0]
        torch.testing.assert_close(decoded.scores, scores, atol=1e-5, rtol=1e-5)
        texts.append(decoded.ids.tolist())
    assert all(a != b for a, b in itertools.combinations(texts, 2)), "what is generated must depend on the input"


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("name", SAMPLES)
def test_scores_are_the_likelihood_of_the_loss(name, num_beams):
    model = make(name)
    found = decode_btoks(model, SAMPLES[name], max_new_tokens=5, num_beams=num_beams)
    for sample, decoded in zip(SAMPLES[name], found, strict=True):
        expected = likelihood(model, sample, [decoded.ids])
        assert decoded.scores.sum().item() == pytest.approx(expected.item(), abs=1e-5)


def test_wide_beams_find_the_best_text_of_all():
    """All 5 x 5 x 5 texts of three tokens over a head of five rows, by the likelihood of the loss."""
    model = make("qwen2_vl")
    head = model[0].model.get_input_embeddings().weight.detach()[:5]
    texts = [torch.tensor(text) for text in itertools.product(range(5), repeat=3)]
    for sample in SAMPLES["qwen2_vl"]:
        totals = likelihood(model, sample, texts, head)
        (decoded,) = decode_btoks(model, [sample], max_new_tokens=3, num_beams=25, lm_head=head)
        assert decoded.ids.tolist() == texts[int(totals.argmax())].tolist()
        assert decoded.scores.sum().item() == pytest.approx(totals.max().item(), abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_search_over_texts_that_close(seed):
    """Random tables of four tokens, one of them the end: the best closed text of at most three tokens."""
    generator = torch.Generator().manual_seed(seed)
    prefixes = [text for size in range(3) for text in itertools.product(range(4), repeat=size)]
    table = {prefix: torch.randn(4, generator=generator) * 2 for prefix in prefixes}
    totals = {}
    for text in (text for size in (1, 2, 3) for text in itertools.product((1, 2, 3), repeat=size - 1)):
        closed = (*text, 0)
        totals[closed] = sum(table[closed[:i]].log_softmax(0)[token].item() for i, token in enumerate(closed))
    best = max(totals, key=totals.get)

    def step(ids):
        return torch.stack([table[tuple(row)] for row in ids.tolist()])

    ids, scores = _search(step, end=0, max_new_tokens=3, num_beams=9)
    assert tuple(ids.tolist()) == best and scores.sum().item() == pytest.approx(totals[best], abs=1e-5)
    greedy, _ = _search(step, end=0, max_new_tokens=3, num_beams=1)
    expected: list[int] = []
    while len(expected) < 3 and 0 not in expected:
        expected.append(int(table[tuple(expected)].argmax()))
    assert greedy.tolist() == expected


def test_the_end_of_turn_closes_a_text():
    model = make("llama")
    end = closing_token(model[0])
    state = model[0](model.preprocess(["a"]))["token_embeddings"][0, -1].detach()
    head = model[0].model.get_input_embeddings().weight.detach().clone()
    head[end] = 10 * state
    (decoded,) = decode_btoks(model, ["a"], lm_head=head)
    assert decoded.ids.tolist() == [end] and decoded.text == ""


def test_prefix_route_reads_the_last_layer_states():
    model = make("llama")
    (decoded,) = decode_btoks(model, ["a red kitten"], max_new_tokens=5, route="prefix")
    backbone = model[0].model
    with torch.no_grad():
        prefix = model[0](model.preprocess(["a red kitten"]))["token_embeddings"][:, -4:]
        joint = torch.cat([prefix, backbone.get_input_embeddings()(decoded.ids[None])], 1)
        states = backbone(inputs_embeds=joint).last_hidden_state[0, 3:-1]
    logits = F.linear(states, backbone.get_input_embeddings().weight)
    assert decoded.ids.tolist() == logits.argmax(-1).tolist()
    (masked,) = decode_btoks(model, ["a red kitten"], max_new_tokens=5)
    assert masked.ids.tolist() != decoded.ids.tolist(), "the two routes must differ for this to mean anything"


@pytest.mark.parametrize(("name", "message"), [("qwen3_5", 'around the mask. Use route="prefix"'), ("mamba", "SDPA")])
def test_backbones_that_no_mask_can_cut_take_the_prefix_route(name, message):
    model = make(name, init="eos")  # random weights answer alike where the rows start as a line break
    with pytest.raises(ValueError, match=message):
        decode_btoks(model, ["a red kitten"])
    decoded, other = decode_btoks(model, ["a red kitten", "What is the city?"], max_new_tokens=3, route="prefix")
    assert decoded.ids.tolist() != other.ids.tolist()


def test_attention_weights_need_attention_layers():
    with pytest.raises(ValueError, match="no attention weights"):
        btok_attention(make("mamba"), "a red kitten")
    hybrid = btok_attention(make("qwen3_5"), "a red kitten")
    torch.testing.assert_close(hybrid.weights.sum(1), torch.ones(4))


def test_looking_inside_changes_nothing(qwen):
    before = qwen.encode(["a red kitten"])
    qwen.train()
    names = [module.config._attn_implementation for module in qwen.modules() if hasattr(module, "config")]
    decode_btoks(qwen, ["a red kitten"], max_new_tokens=2)
    btok_attention(qwen, "a red kitten")
    assert qwen.training and all(p.grad is None for p in qwen.parameters())
    after = [module.config._attn_implementation for module in qwen.modules() if hasattr(module, "config")]
    assert after == names and "sdpa" in names
    np.testing.assert_array_equal(qwen.encode(["a red kitten"]), before)


def test_wrong_numbers_are_refused(qwen):
    with pytest.raises(ValueError, match="at least 1, got 0 and 1"):
        decode_btoks(qwen, ["a"], max_new_tokens=0)
    with pytest.raises(ValueError, match='"attention" or "prefix", got \'kv\''):
        decode_btoks(qwen, ["a"], route="kv")
    with pytest.raises(ValueError, match="layers must be numbers from -2 to 1, got \\[2\\]"):
        btok_attention(qwen, "a", [2])


@pytest.mark.parametrize("name", SAMPLES)
def test_attention_is_that_of_the_btok_positions(name):
    model = make(name, model_kwargs={"attn_implementation": "eager"})
    sample = SAMPLES[name][-1]
    found = btok_attention(model, sample)
    features = {k: v for k, v in model.preprocess([sample]).items() if torch.is_tensor(v) and "per_sample" not in k}
    with torch.no_grad():
        layers = model[0].model(**features, output_attentions=True).attentions
    expected = torch.stack([layer[0, :, -4:].mean(0) for layer in layers])  # (layers, K, T)
    torch.testing.assert_close(found.weights, expected.mean(0))
    torch.testing.assert_close(btok_attention(model, sample, [-1]).weights, expected[-1])
    torch.testing.assert_close(found.weights.sum(1), torch.ones(4))
    assert found.weights[0, -3:].abs().max() == 0, "the first BTok sees none of the later ones"
    assert found.tokens[-4:] == [f"<|btok_{k}|>" for k in range(4)]
    sdpa = btok_attention(make(name), sample)
    torch.testing.assert_close(sdpa.weights, found.weights, atol=1e-5, rtol=1e-4)
    words = "".join(found.tokens)
    assert ("what colour?" if name == "qwen2_vl" else "What is the city?") in words


def test_grids_of_images_and_videos(qwen):
    sample = {"image": [picture(28, 56, 1), picture(84, 56, 2)], "video": clip(8), "text": "all"}
    found = btok_attention(qwen, sample)
    assert [(medium.kind, medium.grid) for medium in found.media] == [
        ("image", (1, 2, 1)),
        ("image", (1, 2, 3)),
        ("video", (4, 2, 2)),
    ]
    ids = qwen.preprocess([sample])["input_ids"][0]
    config = qwen[0].config
    for medium in found.media:
        assert set(ids[medium.positions].tolist()) == {getattr(config, f"{medium.kind}_token_id")}
    flat = torch.cat([medium.positions for medium in found.media])
    assert len(set(flat.tolist())) == len(flat) == 2 + 6 + 16
    weights = found.media_weights(1)
    assert weights.shape == (4, 1, 2, 3)
    assert weights[2, 0, 1, 0] == found.weights[2, found.media[1].positions[3]], "row by row"


@pytest.mark.parametrize("name", ["smolvlm", "internvl", "gemma3", "llava", "llava_onevision"])
def test_grids_elsewhere_are_square_tiles_or_none(name):
    model = make(name)
    features = model.preprocess([{"image": picture(56, 56, 1), "text": "a"}])
    media = find_media(model[0], features)
    count = int((features["input_ids"] == model[0].config.image_token_id).sum())
    assert media and sum(len(medium.positions) for medium in media) == count
    for medium in media:
        if medium.grid is not None:
            assert medium.grid[1] == medium.grid[2] and medium.grid[1] ** 2 == len(medium.positions)
    cropped = name == "llava"  # LLaVA 1.5 sees the middle of a picture only
    assert all(medium.grid is None for medium in media) == (cropped or name == "llava_onevision")


def test_a_grid_of_patches_is_the_towers_own_map():
    """FastVLM's processor knows a patch's size, and its tower gives a map of rows and columns."""
    model, _ = published_btok("fast_vlm")
    features = model.preprocess([picture(56, 56, 1)])
    (medium,) = find_media(model[0], features)
    found = model[0].model.vision_tower(features["pixel_values"], return_dict=True).last_hidden_state
    assert medium.grid == (1, *found.shape[-2:]) and len(medium.positions) > 1


def test_figures_show_where_attention_is(tmp_path):
    """One hot patch: the brightest part of the first map is its quarter of the panel."""
    weights = torch.zeros(1, 6)
    weights[0, 2] = 1.0
    attention = BTokAttention(weights, ["a", "", "", "", "", "b$_"], [Medium("image", torch.arange(1, 5), (1, 2, 2))])
    draw_attention(attention, tmp_path / "a.png", [Image.new("RGB", (64, 64), "gray")], "title")
    drawn = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    panel = drawn[:, drawn.shape[1] // 2 :]
    rows, columns = np.nonzero((panel[..., 0] > 200) & (panel[..., 1] > 200) & (panel[..., 2] < 200))  # inferno's top
    assert len(rows) > 200
    dark_rows, dark_columns = np.nonzero(panel.sum(-1) < 150)
    assert rows.mean() < dark_rows.mean() and columns.mean() > dark_columns.mean(), "upper right of a 2 x 2 grid"


def test_figures_of_every_kind_of_input(qwen, tmp_path):
    samples = {
        "text": ("a text of more than forty-eight tokens, one for each byte of it", []),
        "image": ({"image": picture(56, 84), "text": "a"}, [picture(56, 84)]),
        "video": ({"video": clip(8), "text": "a"}, [clip(8)]),
        "bare": ({"image": [picture(), picture()], "text": "a"}, []),
    }
    sizes = {}
    for name, (sample, pictures) in samples.items():
        draw_attention(btok_attention(qwen, sample), tmp_path / f"{name}.png", pictures)
        sizes[name] = Image.open(tmp_path / f"{name}.png").size
    assert sizes["video"][1] > sizes["image"][1], "one row of panels per step in time"
    with pytest.raises(ValueError, match="each of the 2 media .* got 1"):
        draw_attention(btok_attention(qwen, samples["bare"][0]), tmp_path / "no.png", [picture()])


def test_command_line(qwen, tmp_path, capsys):
    qwen.save_pretrained(str(tmp_path / "model"))
    picture(56, 56).save(tmp_path / "in.png")
    command = ["explain", str(tmp_path / "model"), "--image", str(tmp_path / "in.png"), "--text", "what?"]
    assert main([*command, "--out", str(tmp_path / "out.png"), "--layers", "-1", "--beams", "2"]) == 0
    assert "generated from the bottleneck tokens: " in capsys.readouterr().out
    assert Image.open(tmp_path / "out.png").size[0] > 100
    assert btok_ids(qwen.tokenizer)


def test_a_photograph_is_explained_upright(qwen, tmp_path, monkeypatch):
    """Its EXIF orientation counts, in the picture that is drawn and in what the model reads; errors are one line."""
    qwen.save_pretrained(str(tmp_path / "model"))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(112, 56).save(tmp_path / "phone.png", exif=exif)
    drawn = []
    monkeypatch.setattr(
        explain_figure, "draw_attention", lambda attention, out, pictures, _: drawn.append(pictures[0])
    )
    command = ["explain", str(tmp_path / "model"), "--out", str(tmp_path / "out.png"), "--image"]
    assert main([*command, str(tmp_path / "phone.png")]) == 0
    upright = picture(112, 56).rotate(-90, expand=True)
    assert np.array_equal(np.asarray(drawn[0]), np.asarray(upright))


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # makes its import fail
    monkeypatch.delitem(sys.modules, "st_btok.tools.explain_figure")
    with pytest.raises(ImportError, match=r"pip install matplotlib"):
        importlib.import_module("st_btok.tools.explain_figure")
