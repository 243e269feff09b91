"""Further families, each with its own classes and a template of its published shape: what must hold for every one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch.nn import functional as F
from transformers import AutoModel

from st_btok import BTokLoss, CachedBTokLoss, build_model
from st_btok.limits import video_form
from st_btok.model_parts import embedding_matrix, find_btoks, logit_rule
from st_btok.training.content import content_reader, read_back
from st_btok.training.lm_head import output_embeddings
from st_btok.training.reference import training_step
from tests.backbones import build, clip, picture, published_btok, takes, total
from tests.published_templates import NEWER

# Their layers move information around any mask: short convolutions, linear attention.
MASKLESS = {"lfm2_vl", "minicpmv4_6"}
# GLM's processors write a video's frames as images, Molmo 2's model takes images or videos: an error in one batch.
APART = {"glm4v", "glm46v", "molmo2"}
# transformers 5.23 counts 4 tokens for one of a video: an error.
NO_VIDEO = {"kimi_k25"}
# Which entries of the pictures' tensor belong to which row can't be told: no axis for them, crops without a count.
UNSPLIT = {"minicpmv4_6", "molmo2"}


# In transformers 5.23 a picture of Phi-4 hangs on the shapes of the others in its batch: the table says so.
FAMILIES = [name for name in NEWER if name != "phi4_multimodal"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param, *published_btok(request.param)


def head_of(model):
    """The embeddings where the head is another matrix, which the built model does not hold (Molmo 2 never ties)."""
    backbone = find_btoks(model)[0].model
    return None if backbone.config.tie_word_embeddings else embedding_matrix(backbone).detach()


def rows_of(name, model):
    rows = ["a", "Which town is it?"]
    if takes(name, "image"):
        rows += [
            picture(56, 28, 1),
            {"image": picture(28, 84, 2), "text": "what colour?"},
            {"text": "text first", "image": [picture(112, 56, 3), picture(56, 56, 4)]},
        ]
    if takes(name, "video") and name not in APART | NO_VIDEO:
        rows.append({"video": video_form(model[0])(clip()), "text": "what happens?"})
    return rows


def test_rows_generate_their_own_text(family):
    name, model, end = family
    assert model.tokenizer.convert_ids_to_tokens(content_reader(model[0]).end) == end
    found = read_back(model[0])
    kinds = {"text", "text with newlines at both ends", "conversation", "texts and a conversation"}
    for medium in ("image", "video", "audio"):
        if takes(name, medium):
            kinds |= {medium, f"{medium} before text", f"text before {medium}"}
    if takes(name, "image"):
        kinds.add("conversation with image")
    prompted = {f"{kind}, with a prompt" for kind in kinds if "conversation" not in kind}
    assert kinds | prompted <= found.keys() and not any(found.values())


def test_prompts_reach_the_input_before_the_text(family):
    name, model, _ = family
    for row in ["a red kite", {"text": "a red kite", "image": picture()}][: 1 + takes(name, "image")]:
        shown = model.tokenizer.decode(model.preprocess([row], prompt="Find boats:")["input_ids"][0])
        assert "a red kite" in shown.partition("Find boats:")[2]


def test_rows_of_all_kinds_in_a_batch_and_after_a_plain_reload(family, tmp_path):
    name, model, _ = family
    rows = rows_of(name, model)
    expected = np.concatenate([model.encode([row]) for row in rows])
    assert np.abs(expected[:, None] - expected[None]).sum(-1)[~np.eye(len(rows), dtype=bool)].min() > 0.01
    np.testing.assert_allclose(model.encode(rows, batch_size=8), expected, atol=1e-5)
    model.save_pretrained(str(tmp_path))
    np.testing.assert_allclose(SentenceTransformer(str(tmp_path)).encode(rows[::-1])[::-1], expected, atol=1e-5)


def test_the_loss_is_the_straight_step_in_mini_batches_too(family):
    name, model, _ = family
    loss = BTokLoss(model, lm_head=head_of(model))
    queries = rows_of(name, model)
    columns = [model.preprocess(queries), model.preprocess([f"target {i} " + "x" * i for i in range(len(queries))])]
    value = total(loss([dict(column) for column in columns]))
    value.backward()
    matrix = embedding_matrix(find_btoks(model)[0].model)
    grad = matrix.grad.clone()
    if name in MASKLESS:
        assert loss.route == "prefix"
    else:
        nothing = [torch.zeros(0, dtype=torch.long)] * len(queries)
        targets = [nothing if column is None else column for column in loss.targets(columns)]
        assert loss.route == "attention" and sum(len(ids) for column in targets for ids in column) > 10
        torch.testing.assert_close(value, training_step(model, columns, targets), atol=1e-5, rtol=1e-5)
    model.zero_grad()
    if name in UNSPLIT:
        with pytest.raises(ValueError, match="Use BTokLoss"):
            CachedBTokLoss(model, mini_batch_size=1, lm_head=head_of(model))([dict(column) for column in columns])
        return
    cached = total(
        CachedBTokLoss(model, mini_batch_size=1, lm_head=head_of(model))([dict(column) for column in columns])
    )
    cached.backward()
    torch.testing.assert_close(cached, value, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(matrix.grad / grad.abs().max(), grad / grad.abs().max(), atol=2e-5, rtol=0)
    model.zero_grad()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_vector_that_hangs_on_its_batch_is_warned_of(attention, tmp_path, caplog):
    """Phi-4's under SDPA: nothing here can mend it, and `encode` would not say a word."""
    backbone, processor = build("phi4_multimodal")
    backbone.set_attn_implementation(attention)
    with caplog.at_level("WARNING"):
        build_model(
            backbone,
            processor=processor,
            template="plain",
            device="cpu",
            model_kwargs={"attn_implementation": attention},
        )
    assert ("change each other's vectors on phi4_multimodal" in caplog.text) == (attention == "sdpa")


def test_a_processor_that_loses_its_template_when_saved(tmp_path):
    """Phi-4's: without the template that the model keeps, every input of the loaded model would be an error."""
    model, _ = published_btok("phi4_multimodal")
    rows = ["a", {"image": picture(), "text": "what colour?"}]
    expected = np.concatenate([model.encode([row]) for row in rows])
    model.save_pretrained(str(tmp_path))
    np.testing.assert_allclose(SentenceTransformer(str(tmp_path)).encode(rows, batch_size=1), expected, atol=1e-6)


@pytest.mark.parametrize("name", [*FAMILIES, "gemma2"])
def test_logits_are_those_that_transformers_generates_with(name, tmp_path):
    """Those of an untied head, scaled (Granite) or capped (Gemma 2 and 4) as the class does it."""
    built, _ = build(name, tied=False)
    built.save_pretrained(tmp_path)
    full, backbone = type(built).from_pretrained(tmp_path).eval(), AutoModel.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[65, 66, 67, 68]])
    with torch.no_grad():
        expected = full(input_ids=ids, mm_token_type_ids=torch.zeros_like(ids)).logits
        states = backbone(input_ids=ids, mm_token_type_ids=torch.zeros_like(ids)).last_hidden_state
        rule = logit_rule(backbone.config)
        torch.testing.assert_close(rule(F.linear(states, output_embeddings(backbone))), expected)
    assert (rule.scale, rule.cap) == {"granite": (0.125, None), "gemma2": (1.0, 30.0), "gemma4": (1.0, 3.0)}.get(
        name, (1.0, None)
    )
