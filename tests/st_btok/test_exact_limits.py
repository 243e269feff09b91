"""The limit in tokens, in every script, in the stock checkpoint: saved, loaded by sentence-transformers alone.

14 scripts by three tokenizers: byte-level (the shipped backbone's: a token per byte), byte-level BPE (SmolLM2's, from
the file that a pip package ships) and sentencepiece-like (Unigram with byte fallback and NFKC, trained here).
"""

from __future__ import annotations

import base64
import inspect
import json
import random
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from st_btok import build_model, encode_checked
from st_btok.limits import set_max_seq_length
from st_btok.model_parts import find_btoks
from tests.backbones import LLAMA_TEMPLATE, QWEN_TEMPLATE, SPECIAL, TEXT, picture, tokenizer
from tests.st_btok.test_pretrained import gguf_file
from tests.tiny_qwen import MROPE, VISION

LIMIT = 512
# One or two sentences of each script, each repeated beyond the limit.
SAMPLES = {
    "latin": "Die Grenze wird in Zeichen gemessen, la limite est exacte, and the text is cut at its end. ",
    "chinese": "文本在末尾被截断，图像和特殊标记始终保持完整。长文档的开头部分通常最重要。",
    "japanese": "テキストは末尾で切り取られ、画像と特別なトークンはそのまま残ります。長い文書です。",
    "korean": "텍스트는 끝에서 잘리고 이미지와 특수 토큰은 그대로 유지됩니다. 긴 문서입니다. ",
    "thai": "ข้อความจะถูกตัดที่ส่วนท้าย ส่วนรูปภาพและโทเค็นพิเศษจะยังคงอยู่ครบถ้วน",
    "hindi": "पाठ को अंत में काटा जाता है, और चित्र तथा विशेष टोकन पूरे रहते हैं। क़लम और ज़मीन। ",
    "arabic": "يُقتطع النص من نهايته وتبقى الصور والرموز الخاصة كاملة دائمًا. ",
    "hebrew": "הטקסט נחתך בסופו, והתמונות והאסימונים המיוחדים נשארים שלמים. שׁלוֹם ",
    "amharic": "ጽሑፉ መጨረሻው ላይ ይቆረጣል፤ ምስሎችና ልዩ ምልክቶች ሙሉ ሆነው ይቀራሉ። ",
    "tibetan": "ཡི་གེ་མཇུག་ནས་གཅོད་པ་དང་པར་རིས་ཆ་ཚང་བར་གནས་སོ། །",
    "emoji": "😀🚀👩‍👩‍👧‍👦🏳️‍🌈🧪🎉🇨🇭👍🏽🪿",
    "digits": "3141592653589793238462643383279502884197 ",
    "base64": base64.b64encode(random.Random(0).randbytes(300)).decode(),
    "code": inspect.getsource(textwrap),
}
TEXTS = {script: sample * (8000 // len(sample) + 1) for script, sample in SAMPLES.items()}
BACKBONE = Path(__file__).parents[2] / "recipes" / "backbone"


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Unigram with byte fallback, blanks as U+2581 and NFKC, which lengthens a few characters."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()])
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    corpus = [SAMPLES[script] for script in ("latin", "chinese", "japanese", "korean", "hindi", "arabic", "code")]
    trainer = trainers.UnigramTrainer(vocab_size=900, special_tokens=["<unk>", *fallback], unk_token="<unk>")
    backend.train_from_iterator(corpus * 3, trainer)
    vocabulary = [tuple(entry) for entry in json.loads(backend.to_str())["model"]["vocab"]]
    backend.model = models.Unigram(vocabulary, unk_id=0, byte_fallback=True)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@pytest.fixture(scope="module", params=["byte-level", "SmolLM2", "sentencepiece-like"])
def named_tokenizer(request) -> tuple[str, PreTrainedTokenizerFast]:
    if request.param == "byte-level":
        found = AutoTokenizer.from_pretrained(BACKBONE)
    elif request.param == "SmolLM2":
        path = gguf_file()
        found = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    else:
        found = sentencepiece_like()
    found.add_special_tokens({"additional_special_tokens": list(SPECIAL)}, replace_extra_special_tokens=False)
    found.eos_token, found.pad_token, found.chat_template = "<|im_end|>", "<|endoftext|>", QWEN_TEMPLATE
    return request.param, found


@pytest.fixture(scope="module")
def stock(named_tokenizer, tmp_path_factory) -> SentenceTransformer:
    """A model of images (at most 256 tokens) and text, built, saved and loaded plainly."""
    _, own = named_tokenizer
    ids = dict(zip(SPECIAL, own.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config={**TEXT, "vocab_size": len(own) + 8, "rope_parameters": MROPE},
        vision_config={**VISION, "embed_dim": 16, "hidden_size": 32, "patch_size": 14},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 256}
    images, videos = Qwen2VLImageProcessor(size=size), Qwen2VLVideoProcessor(size=size)
    processor = Qwen2VLProcessor(images, own, videos, chat_template=QWEN_TEMPLATE)
    backbone = Qwen2VLForConditionalGeneration(config)
    model = build_model(backbone, processor=processor, max_seq_length=LIMIT, device="cpu")
    folder = str(tmp_path_factory.mktemp("stock"))
    model.save_pretrained(folder)
    return SentenceTransformer(folder, device="cpu")


def rows(model: SentenceTransformer, inputs: list) -> list[list[int]]:
    """Token ids of inputs that share a batch, without padding."""
    features = model[0].preprocess(inputs)
    pairs = zip(features["input_ids"], features["attention_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in pairs]


def assert_whole(model: SentenceTransformer, row: list[int]) -> None:
    """The turn's closing and the K BToks stand at the end, once."""
    _, btoks = find_btoks(model)
    closing = model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert row[-4:] == btoks and sum(token in btoks for token in row) == 4
    assert closing in row[-4 - 3 : -4]  # a newline follows it


@pytest.mark.parametrize("side", ["left", "right"])
def test_text_has_exactly_the_limit_in_every_script(stock, side):
    stock.tokenizer.padding_side = side
    found = rows(stock, [*TEXTS.values(), "short"])
    for script, row in zip(TEXTS, found, strict=False):
        assert len(row) == LIMIT, script
        assert_whole(stock, row)
    assert len(found[-1]) < 60
    vectors = stock.encode([*TEXTS.values()], batch_size=14)
    assert np.isfinite(vectors).all() and np.linalg.norm(vectors, axis=1).min() > 0.99
    text = stock.tokenizer.decode(found[0])
    assert text.count("Die Grenze") >= 1, "the beginning stays"


def test_image_and_text_stay_below_it_and_use_what_the_bound_allows(stock, named_tokenizer):
    """A template counts a UTF-8 byte as a token: so 90 % of the limit is used by that count, in every script."""
    image = picture(448, 448)
    alone = rows(stock, [{"image": image, "text": ""}])[0]
    for script, text in TEXTS.items():
        for sample in ({"image": image, "text": text}, {"text": text, "image": image}):
            row = rows(stock, [sample, "short"])[0]
            assert len(row) <= LIMIT, script
            assert_whole(stock, row)
            pad = stock.tokenizer.convert_tokens_to_ids("<|image_pad|>")
            assert row.count(pad) == alone.count(pad) == 256
        kept = stock[0].processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
            **stock[0].processing_kwargs["chat_template"],
        )
        start = kept.index("<|vision_end|>") + len("<|vision_end|>")
        used = len(kept[start : kept.index("<|im_end|>", start)].encode())
        grows = sum(kept.count(c) for c in stock[0].processing_kwargs["chat_template"]["growing"])
        assert len(alone) + used + grows * 30 >= 0.9 * LIMIT, script
        if named_tokenizer[0] == "byte-level":
            assert len(row) >= 0.9 * LIMIT, script


def test_the_checked_path_uses_the_limit_to_the_token_with_an_image_too(stock):
    """At least 90 % is asked for; a character of several tokens is dropped whole, so the last few can be missing."""
    image = picture(448, 448)
    for order in (("image", "text"), ("text", "image")):
        samples = []
        for text in TEXTS.values():
            both = {"image": image, "text": text}
            samples.append({kind: both[kind] for kind in order})
        states = encode_checked(stock, samples, output_value="token_embeddings").embeddings
        for script, row in zip(TEXTS, states, strict=True):
            assert LIMIT - 4 <= len(row) <= LIMIT, (script, order)
        vectors = encode_checked(stock, samples).embeddings
        assert np.linalg.norm(vectors, axis=1).min() > 0.99
    short = [{"image": image, "text": text[:30]} for text in TEXTS.values()]
    np.testing.assert_allclose(encode_checked(stock, short).embeddings, stock.encode(short), atol=1e-5)


def test_roles_instructions_and_many_turns_count(stock):
    long = TEXTS["thai"]
    turn = {"role": "user", "content": [{"type": "text", "text": "kitten"}]}
    conversations = [
        [{**turn, "role": "a" * 20_000}],
        [turn] * 300,
        [{"role": "system", "content": [{"type": "text", "text": long}]}, turn],
        [{"role": "user", "content": [{"type": "text", "text": "abc "}] * 700}],
        [turn, {"role": "assistant", "content": [{"type": "text", "text": long}]}],
    ]
    for row in rows(stock, conversations):
        assert len(row) == LIMIT
        assert_whole(stock, row)
    for row in rows(stock, [conversations[4], {"image": picture(28, 28)}]):  # ST wraps it: cut by bytes
        assert len(row) <= LIMIT
        assert_whole(stock, row)
    image = {"type": "image", "image": picture(28, 28)}
    instruction = {"role": "system", "content": [{"type": "text", "text": long}]}
    long_role, many = {"role": "a" * 2000, "content": [image]}, [{"role": "user", "content": [image]}] * 3
    for conversation in ([long_role], many, [instruction], [instruction, {"role": "user", "content": [image]}]):
        with pytest.raises(Exception, match="beside its instruction and turns.*the limit max_tokens is 512"):
            rows(stock, [conversation])
    assert_whole(stock, rows(stock, [[turn, {**turn, "content": [image, *turn["content"]]}]])[0])


def test_prompts_count(stock):
    features = stock[0].preprocess([TEXTS["korean"]], prompt="Find the page: ")
    assert features["input_ids"].shape[1] == LIMIT
    assert "Find the page" in stock.tokenizer.decode(features["input_ids"][0])


@pytest.mark.parametrize("limit", [100, 400])
def test_the_limit_can_be_set_later(stock, limit):
    """By a user, or by mteb: for text; with media through the function that tells the template too."""
    model = SentenceTransformer(modules=list(stock))
    kept = stock[0].processing_kwargs
    try:
        model.max_seq_length = limit
        for row in rows(model, list(TEXTS.values())):
            assert len(row) == limit
            assert_whole(model, row)
        set_max_seq_length(model[0], 2 * LIMIT)  # to raise it: the template drops what lies far beyond the limit
        assert {len(row) for row in rows(model, list(TEXTS.values()))} == {2 * LIMIT}
        set_max_seq_length(model[0], max(limit, 330))
        assert model.max_seq_length == max(limit, 330)
        for text in TEXTS.values():
            row = rows(model, [{"image": picture(448, 448), "text": text}])[0]
            assert len(row) <= max(limit, 330)
            assert_whole(model, row)
    finally:
        model[0].processing_kwargs = kept
        model.max_seq_length = LIMIT


def test_a_gpt2_of_256_positions_embeds_chinese():
    own = tokenizer(LLAMA_TEMPLATE)
    torch.manual_seed(0)
    sizes = {"n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": None, "eos_token_id": 258}
    backbone = GPT2LMHeadModel(GPT2Config(vocab_size=len(own) + 8, **sizes))
    model = build_model(backbone, processor=own, device="cpu")
    assert model.max_seq_length == 256
    vectors = model.encode([TEXTS["chinese"], TEXTS["emoji"], "a"])
    assert np.isfinite(vectors).all() and len(rows(model, [TEXTS["chinese"]])[0]) == 256
