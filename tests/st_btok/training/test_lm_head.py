"""The LM head is the one that transformers generates with; untied ones are frozen, and no part of the embedder."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import AutoModel, Qwen2_5OmniConfig, Qwen2_5OmniForConditionalGeneration

from st_btok import BTokLoss, build_model
from st_btok.adapters import base_gap
from st_btok.model_parts import checkpoint_head, embedding_matrix
from st_btok.training.lm_head import output_embeddings
from tests.backbones import build, picture, sound, total

# What the configs say (of the whole, of its text part), and whether the checkpoint holds a head of its own.
CASES = {
    "tied": (True, True, False),
    "untied": (False, False, True),
    "says tied": (True, True, True),
    "text part alone says tied": (False, True, True),
    "text part alone says untied": (True, False, True),
    "text part alone says untied, tied": (True, False, False),
}


def whole(thinker):
    """A Qwen2.5-Omni with a tiny talker and a tiny voice beside the thinker."""
    talker = {"vocab_size": 64, "embedding_size": 32, "hidden_size": 32, "intermediate_size": 32, "head_dim": 16}
    talker |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    talker["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    voice = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8, "emb_dim": 16}
    voice |= {"num_embeds": 9, "mel_dim": 8, "enc_emb_dim": 8, "enc_dim": 8, "enc_channels": [8, 8, 8, 8, 24]}
    voice |= {"enc_attention_channels": 4, "enc_se_channels": 4, "look_ahead_layers": [0], "look_backward_layers": [0]}
    waves = {"mel_dim": 8, "upsample_initial_channel": 64}
    config = Qwen2_5OmniConfig(
        thinker_config=thinker.config.to_dict(),
        talker_config=talker,
        token2wav_config={"dit_config": voice, "bigvgan_config": waves},
    )
    model = Qwen2_5OmniForConditionalGeneration(config)
    model.thinker.load_state_dict(thinker.state_dict())
    return model


def checkpoint(family, case, folder):
    """A full checkpoint on disk, and the class that transformers reads it with."""
    whole, text, own = CASES[case]
    backbone, processor = build(family, tied=not own)
    backbone.config.get_text_config().tie_word_embeddings = text
    backbone.config.tie_word_embeddings = whole
    backbone.save_pretrained(folder)
    processor.save_pretrained(folder)
    return type(backbone)


@pytest.mark.parametrize("case", CASES)
def test_the_head_is_the_one_that_transformers_generates_with(family, case, tmp_path):
    """Wherever it stands in the checkpoint and whatever the flags say; only its two matrices are read."""
    full = checkpoint(family, case, tmp_path).from_pretrained(tmp_path)
    expected, tied = full.get_output_embeddings().weight, full.get_output_embeddings().weight is embedding_matrix(full)
    backbone = AutoModel.from_pretrained(tmp_path)
    found = output_embeddings(backbone)
    assert torch.equal(found, expected)
    assert (found is embedding_matrix(backbone)) is tied
    assert torch.equal(output_embeddings(backbone, str(tmp_path)), expected)
    # What is saved after training holds no head: it is not mistaken for one.
    backbone.save_pretrained(tmp_path / "base")
    saved = checkpoint_head(str(tmp_path / "base"), backbone.config)
    assert (saved[0] is None) is not saved[1]


@pytest.mark.parametrize(
    ("family", "case"),
    [("llama", "says tied"), ("gemma3", "untied"), ("qwen2_vl", "text part alone says tied"), ("qwen3", "tied")],
)
def test_a_built_model_says_whether_its_head_is_tied_ever_after(family, case, tmp_path):
    """A saved model holds no head; trained on, it would take the embeddings for one where the config is wrong."""
    head = (
        checkpoint(family, case, tmp_path / "full").from_pretrained(tmp_path / "full").get_output_embeddings().weight
    )
    model = build_model(tmp_path / "full", device="cpu")
    tied = case == "tied"
    assert model[0].model.config.tie_word_embeddings is tied
    expected = BTokLoss(model).lm_head
    assert expected is None if tied else torch.equal(expected, head)
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = SentenceTransformer(str(tmp_path / "saved"))
    if tied:
        assert BTokLoss(loaded).lm_head is None
        return
    with pytest.raises(ValueError, match="LM head is not tied to its embeddings, and must be found: .* holds none"):
        BTokLoss(loaded)
    assert torch.equal(BTokLoss(loaded, lm_head=str(tmp_path / "full")).lm_head, head)


def test_a_loaded_model_says_it_too():
    """Its head differs from its embeddings, so a config that says tied is corrected; the head is then named."""
    backbone, tokenizer = build("llama")
    backbone.lm_head.weight = nn.Parameter(torch.randn_like(backbone.lm_head.weight))
    model = build_model(backbone, processor=tokenizer, device="cpu")
    assert backbone.config.tie_word_embeddings and not model[0].model.config.tie_word_embeddings
    with pytest.raises(ValueError, match="LM head is not tied"):
        BTokLoss(model)
    assert torch.equal(BTokLoss(model, lm_head=backbone.lm_head).lm_head, backbone.lm_head.weight)


@pytest.mark.parametrize("form", ["module", "tensor", "path", "name_in_config"])
def test_untied_heads(form, tmp_path):
    torch.manual_seed(0)
    full, processor = build("qwen2_vl", tied=False)
    full.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model = build_model(tmp_path, device="cpu")
    backbone = model[0].model
    given = {"module": full.lm_head, "tensor": full.lm_head.weight, "path": str(tmp_path), "name_in_config": None}[
        form
    ]
    torch.testing.assert_close(output_embeddings(backbone, given), full.lm_head.weight)
    assert not torch.equal(output_embeddings(backbone, given), backbone.get_input_embeddings().weight[:288])
    loss = BTokLoss(model, lm_head=given)
    features = [model.preprocess(["a", "b"]), model.preprocess(["c", "d"])]
    total(loss(features)).backward()
    assert loss.lm_head is not None and loss.lm_head.grad is None, "frozen"
    assert "lm_head" not in "".join(model.state_dict()), "not part of the embedder"


def test_sharded_heads_are_read_without_the_rest(tmp_path):
    full, _ = build("llama", tied=False)
    full.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    torch.testing.assert_close(output_embeddings(full.model, str(tmp_path)), full.lm_head.weight)


def test_a_missing_head_is_an_error_with_the_way_out(tmp_path):
    full, processor = build("llama", tied=False)
    model = build_model(full, processor=processor, device="cpu")
    with pytest.raises(ValueError, match="not tied.*BTokLoss"):
        BTokLoss(model, lm_head=str(tmp_path))
    model[0].model.config.name_or_path = ""
    with pytest.raises(ValueError, match="lm_head=full_model.get_output_embeddings"):
        BTokLoss(model)
    BTokLoss(model, target="none")


def test_tied_head_is_the_live_matrix(qwen):
    backbone = qwen[0].model
    assert output_embeddings(backbone) is backbone.get_input_embeddings().weight
    assert BTokLoss(qwen).lm_head is None


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_of_a_thinker_stands_in_the_whole_omni_checkpoint(tied, tmp_path):
    """Under `thinker.lm_head.weight`, beside a talker that is not read."""
    thinker, processor = build("qwen2_5_omni", tied=tied)
    whole(thinker).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    head, found = checkpoint_head(str(tmp_path), thinker.config)
    assert torch.equal(head, thinker.lm_head.weight) and found is tied
    # By path, the thinker is what is built, and the whole is where the head is found.
    model = build_model(tmp_path, device="cpu")
    rows = ["a", {"image": picture(), "text": "what?"}, {"audio": sound(), "text": "who?"}]
    expected = build_model(thinker, processor=processor, device="cpu").encode(rows)
    assert (model.encode(rows) == expected).all()
    own = BTokLoss(model).lm_head
    assert own is None if tied else torch.equal(own, thinker.lm_head.weight)
    assert "is a qwen2_5_omni model, the adapted one a part of it" in base_gap(model)
