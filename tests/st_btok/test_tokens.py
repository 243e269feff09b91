"""Bottleneck tokens in tokenizer and embedding matrices."""

from __future__ import annotations

import pytest
import torch
from tokenizers import normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from st_btok import add_btoks, btok_ids, btok_tokens
from st_btok.model_parts import tokenizer_of
from st_btok.tokens import control_tokens
from tests.backbones import SPECIAL, TEXT, build, llama, tokenizer


def test_names_are_the_authors():
    assert btok_tokens(3) == ["<|btok_0|>", "<|btok_1|>", "<|btok_2|>"]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        btok_tokens(0)


def test_ids_are_in_the_order_of_their_numbers():
    own = tokenizer()
    assert btok_ids(own) == []
    own.add_special_tokens({"additional_special_tokens": ["<|btok_1|>", "<|btok_0|>"]})
    zero, one = btok_ids(own)
    assert own.convert_ids_to_tokens([zero, one]) == ["<|btok_0|>", "<|btok_1|>"] and zero > one
    own.add_special_tokens({"additional_special_tokens": ["<|btok_3|>"]}, replace_extra_special_tokens=False)
    with pytest.raises(ValueError, match=r"without a gap, found \[0, 1, 3\]"):
        btok_ids(own)


def test_ids_are_remembered_until_tokens_are_added():
    own = tokenizer()
    assert btok_ids(own) == []
    own.add_special_tokens({"additional_special_tokens": ["<|btok_0|>"]})
    btok_ids(own).append(7)
    assert btok_ids(own) == [own.convert_tokens_to_ids("<|btok_0|>")], "what a caller does with its list stays there"


def test_other_special_tokens_stay(family):
    _, processor = build(family)
    own = getattr(processor, "tokenizer", processor)
    before = set(own.all_special_tokens)
    add_btoks(build(family)[0], own)
    assert before < set(own.all_special_tokens)
    assert own("<|btok_2|>", add_special_tokens=False)["input_ids"] == [btok_ids(own)[2]]


@pytest.mark.parametrize("rows", [288, 270])
def test_embeddings_of_the_layers_get_rows_too(rows):
    """Gemma 4 looks up every token once more for its layers: spare rows there hold anything, new ones noise."""
    model, processor = build("gemma4", text={"vocab_size": rows, "vocab_size_per_layer_input": rows})
    ids = add_btoks(model, processor.tokenizer, 4, init="newline")
    (newline,) = processor.tokenizer("\n", add_special_tokens=False)["input_ids"]
    matrix = model.get_decoder().embed_tokens_per_layer.weight
    expected = matrix[newline].expand(4, -1)
    assert len(matrix) >= max(ids) + 1 and expected.abs().mean() > 0.1
    torch.testing.assert_close(matrix[ids], expected, atol=0.1, rtol=0)
    assert not torch.equal(matrix[ids[0]], matrix[ids[1]]), "the noise that tells them apart"


@pytest.mark.parametrize("rows", [288, 263, 264])
@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_written_with_and_without_spare_rows(rows, tied):
    """288 rows are enough for 267 tokens: nothing is resized, and the rows must be written all the same."""
    torch.manual_seed(0)
    model, own = LlamaForCausalLM(LlamaConfig(**{**TEXT, "vocab_size": rows}, tie_word_embeddings=tied)), tokenizer()
    spare = model.get_input_embeddings().weight[263:].clone()
    (newline,) = own("\n")["input_ids"]
    matrices = model.get_input_embeddings(), model.get_output_embeddings()
    expected = [matrix.weight[newline].clone() for matrix in matrices]
    ids = add_btoks(model, own, 4)
    assert ids == [263, 264, 265, 266]
    assert len(model.get_input_embeddings().weight) == max(rows, 267) == model.config.vocab_size
    for matrix, start in zip((model.get_input_embeddings(), model.get_output_embeddings()), expected, strict=True):
        written = matrix.weight[ids]
        assert (written - start).abs().max() < 0.2 * start.abs().max(), "each row starts from that of the line break"
        assert torch.pdist(written).min() > 0, "the rows differ"
    if len(spare):
        assert not torch.allclose(model.get_input_embeddings().weight[263 : 263 + len(spare)][:4], spare[:4])


@pytest.mark.parametrize("init", ["eos", "mean", "random", "summary"])
def test_other_starts(init):
    model, own = build("llama")
    rows = model.get_input_embeddings().weight.detach().clone()
    written = model.get_input_embeddings().weight[add_btoks(model, own, 4, init)].detach()
    if init == "random":
        assert 0.5 < (written.std() / rows[:263].std()).item() < 1.5
    else:
        ids = {"mean": list(range(263)), "eos": [own.eos_token_id]}.get(init, own(init)["input_ids"])
        torch.testing.assert_close(written, rows[ids].mean(0).expand(4, -1), atol=0.05, rtol=0.2)


def test_where_there_is_no_line_break_rows_start_as_the_end_of_turn():
    """A tokenizer that takes line breaks for blanks."""
    model, own = build("llama")
    own.backend_tokenizer.normalizer = normalizers.Replace("\n", " ")
    rows = model.get_input_embeddings().weight.detach().clone()
    written = model.get_input_embeddings().weight[add_btoks(model, own)].detach()
    end = rows[own.eos_token_id]
    torch.testing.assert_close(written, end.expand(4, -1), atol=0.1 * end.std().item(), rtol=0.1)


def test_a_blank_before_the_line_break_is_no_part_of_it():
    """As Llama 2's tokenizer writes one."""
    model, own = build("llama")
    own.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    assert len(own("\n")["input_ids"]) == 2
    start = model.get_input_embeddings().weight[198].detach().clone()
    written = model.get_input_embeddings().weight[add_btoks(model, own)].detach()
    torch.testing.assert_close(written, start.expand(4, -1), atol=0.1 * start.std().item(), rtol=0.1)


def test_a_text_of_k_tokens_gives_each_row_its_own():
    """So that the rows start as a prompt that asks for a summary."""
    model, own = build("llama")
    rows, ids = model.get_input_embeddings().weight.detach().clone(), own("sum:")["input_ids"]
    written = model.get_input_embeddings().weight[add_btoks(model, own, 4, "sum:")].detach()
    assert len(ids) == 4
    torch.testing.assert_close(written, rows[ids], atol=0.1 * rows[ids].std().item(), rtol=0.1)
    assert (written[0] - written[1]).norm() > 0.5 * written[0].norm()


def test_a_text_of_another_length_is_told_with_its_number_of_tokens(caplog):
    model, own = build("llama")
    add_btoks(model, own, 4, "summary")
    assert "init='summary' has 7 tokens, and there are 4 bottleneck tokens" in caplog.text
    assert "start from the mean" in caplog.text and "pass a text of 4 tokens" in caplog.text
    caplog.clear()
    for init in ("sum:", "s", "newline", "prompt"):  # one for each, the same one for all, and names
        add_btoks(*build("llama"), 4, init)
    assert not caplog.text


@pytest.mark.parametrize("num_btoks", [1, 4, 6])
@pytest.mark.parametrize("words", [[" The", " topic", " is", " the"], ["The", " topic", " is", " the"]])
def test_rows_start_as_the_prompt_where_the_vocabulary_has_its_words(words, num_btoks):
    model, own = build("llama")
    own.add_tokens(words)
    if words[0] == "The":  # as Llama 2's tokenizer, which writes a blank before every text
        own.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    model.resize_token_embeddings(len(own))
    rows = model.get_input_embeddings().weight.detach().clone()
    written = model.get_input_embeddings().weight[add_btoks(model, own, num_btoks)].detach()
    starts = rows[([198, 198] + own.convert_tokens_to_ids(words))[-num_btoks:]]  # 198 is the line break
    torch.testing.assert_close(written, starts, atol=0.1 * rows.std().item(), rtol=0.1)


def test_the_seed_decides_the_noise():
    rows = []
    for seed in (0, 0, 1):
        model, own = build("llama")
        rows.append(model.get_input_embeddings().weight[add_btoks(model, own, seed=seed)].detach())
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


def test_adding_twice_keeps_trained_rows():
    model, own = build("llama")
    ids = add_btoks(model, own)
    with torch.no_grad():
        model.get_input_embeddings().weight[ids] += 1
    trained = model.get_input_embeddings().weight[ids].detach().clone()
    assert add_btoks(model, own) == ids
    assert torch.equal(model.get_input_embeddings().weight[ids], trained)
    with pytest.raises(ValueError, match="already has 4 bottleneck tokens, but num_btoks=8"):
        add_btoks(model, own, 8)


def test_starts_that_do_not_exist_are_refused():
    model, own = llama()
    with pytest.raises(ValueError, match="has no tokens"):
        add_btoks(model, own, init="")
    own.eos_token = None
    with pytest.raises(ValueError, match="'eos' needs a tokenizer with an eos_token"):
        add_btoks(model, own, init="eos")
    own.backend_tokenizer.normalizer = normalizers.Replace("\n", " ")
    with pytest.raises(ValueError, match="'newline' needs a tokenizer with a newline token or an eos_token"):
        add_btoks(model, own)
    assert btok_ids(own) == [], "a refused call leaves the tokenizer as it was"


def test_a_module_without_tokenizer_is_refused(qwen):
    assert tokenizer_of(qwen[0]) is qwen.tokenizer
    qwen[0].processor = qwen[0].processor.image_processor
    with pytest.raises(ValueError, match="has none"):
        tokenizer_of(qwen[0])


def test_control_tokens_are_special_or_written_by_the_template():
    own = tokenizer()
    own.add_tokens(["<note>", "<free>", "\n", "#"])
    names = control_tokens(own, "{{ '<note>' }}\n#")
    assert set(SPECIAL) < set(names) and "<note>" in names
    assert not {"<free>", "\n", "#"} & set(names), "ordinary added tokens, blanks and single characters stay usable"
