"""The content of rows reaches the losses as the rows have it."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset, Image, Value
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from st_btok import BTokLoss, CachedBTokLoss, build_model, encode_checked
from st_btok.limits import UNLIMITED, set_max_seq_length
from st_btok.model_parts import CONTENT_KEYS
from st_btok.tokens import btok_ids
from st_btok.training import content
from st_btok.training.content import content_reader, read_content
from tests.backbones import build, clip, picture, sound, takes, tokenizer

TEXT = "\n\n A red kite,\n\nand <b>two</b> boats: [INST] user\n "


def read(model, samples, prompt=None, **options) -> list[tuple[str, int]]:
    content_reader(model[0], **options)
    contents = read_content(model.preprocess(samples, prompt=prompt))
    return [(model.tokenizer.decode(content.text), content.media) for content in contents]


def rows_of(family) -> list[tuple[list, list[tuple[str, int]]]]:
    """Batches that a family takes, and the text and media of each row."""
    text = TEXT.strip()
    found = [([TEXT, "x", "", " \n"], [(text, 0), ("x", 0), ("", 0), ("", 0)])]
    for kind, bit, item in (("image", 1, picture()), ("video", 2, clip()), ("audio", 4, sound())):
        if takes(family, kind):
            rows = [{kind: item}, {kind: item, "text": TEXT}, {"text": "is it <it>? ", kind: item}]
            found.append((rows, [("", bit), (text, bit), ("is it <it>?", bit)]))
    if takes(family, "image"):
        several = {"text": TEXT, "image": [picture(28, 28), picture(56, 56)]}
        turns = [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": TEXT}]}]
        found += [([picture(), several, "x"], [("", 1), (text, 1), ("x", 0)]), ([turns], [(text, 1)])]
    turns = [{"role": "user", "content": "kite"}, {"role": "assistant", "content": "Red."}]
    found.append(([turns, [{"role": "system", "content": "Be brief."}, turns[0]]], [("kite\nRed.", 0), ("kite", 0)]))
    found.append((["x", turns], [("x", 0), ("kite\nRed.", 0)]))
    return found


@pytest.mark.parametrize("template", ["chat", "plain"])
@pytest.mark.parametrize("prompt", [None, "Find a red kite: "])
def test_content_is_the_rows_own_text(btok_model, family, template, prompt):
    model = btok_model(family, template=template)
    model.tokenizer.padding_side = "left" if prompt else "right"
    for rows, expected in rows_of(family):
        assert read(model, rows, prompt) == expected


def test_every_kind_comes_back_when_a_loss_is_made(model, family):
    found = content.read_back(model[0])
    media = [kind for kind in ("image", "video", "audio") if takes(family, kind)]
    expected = {"text", "text with newlines at both ends", "conversation", "texts and a conversation"}
    for kind in media:
        expected |= {kind, f"{kind} before text", f"text before {kind}"}
    if "image" in media:
        expected |= {"several images", "conversation with image"}
    assert expected <= found.keys() and {f"{kind}, with a prompt" for kind in expected} <= found.keys()
    assert not any(found.values())


@pytest.mark.parametrize(
    ("dropped", "kind"),
    [
        (
            "part.type == 'text' and not message.content | selectattr('type', 'equalto', 'image') | list",
            "image before text",
        ),
        ("false", "text"),
    ],
)
def test_a_template_that_leaves_text_out_is_refused(qwen, dropped, kind):
    template = qwen.tokenizer.chat_template
    broken = template.replace("{%- if part.type == 'text' -%}", f"{{%- if {dropped} -%}}")
    assert broken != template
    qwen[0].processor.chat_template = qwen.tokenizer.chat_template = broken
    with pytest.raises(
        ValueError, match=f"own text, but rows of the kind '{kind}' do not come back: the chat template leaves"
    ):
        BTokLoss(qwen)
    with pytest.raises(ValueError, match="leaves"):  # and again: a refused model stays refused
        BTokLoss(qwen)


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision"])  # whose images differ in length
def test_media_that_fit_are_not_refused_in_training(btok_model, family):
    """Four small pictures, of which the largest four would not fit: plain encode can't know that, a loss can."""
    model = btok_model(family)
    small = {"image": [picture(28, 28, seed) for seed in range(4)], "text": "four kites"}
    long, text = {**small, "text": "kite " * 400}, "boat " * 400
    fitting = encode_checked(model, [small]).embeddings
    real = int(model[0].preprocess([small], processing_kwargs=UNLIMITED)["attention_mask"].sum())
    counted = model[0].processing_kwargs["chat_template"]["image_tokens"]
    limit = real + 20
    set_max_seq_length(model[0], limit)
    plain = copy.deepcopy(model)
    del plain[0].preprocess
    assert 4 * counted > limit
    with pytest.raises(Exception, match="media must leave room"):
        plain.encode([small])
    features = model.preprocess([small, long, text, [{"role": "user", "content": text}]])
    lengths = features["attention_mask"].sum(1).tolist()
    assert lengths[0] == real and limit - 5 <= lengths[1] <= limit and lengths[2] == limit >= lengths[3] >= limit - 5
    for ids, mask in zip(features["input_ids"], features["attention_mask"], strict=True):
        assert ids[mask.bool()][-4:].tolist() == btok_ids(model.tokenizer)
    np.testing.assert_allclose(model.encode([small]), fitting, atol=1e-5)
    with pytest.raises(Exception, match="media must leave room"):  # a call with settings of its own keeps them
        model.preprocess([small], processing_kwargs={"chat_template": {"max_chars": 5}})
    contents = [model.tokenizer.decode(content.text) for content in content.read_content(features)]
    assert contents[0] == "four kites" and contents[1].startswith("kite kite") and contents[2].startswith("boat boat")
    huge = {"image": [picture(280, 280)] * 40, "text": "forty kites"}
    with pytest.raises(ValueError, match=f"row 1 of a batch, with the text 'forty kites'.* max_seq_length is {limit}"):
        model.preprocess([small, huge])


def test_features_carry_what_the_trainer_needs(qwen, tmp_path):
    """The loss as a class, made after the collator; workers; two data sets with losses of their own; evaluation."""
    seen: list[list[str]] = []

    class Watched(BTokLoss):
        def targets(self, columns):
            seen.append([qwen.tokenizer.decode(row.text) for column in columns for row in read_content(column)])
            return super().targets(columns)

    texts = {"query": ["a kite\n", "two boats"], "positive": ["<|im_end|> user", "\nsea "]}
    data = {"one": Dataset.from_dict(texts), "two": Dataset.from_dict(texts)}
    args = SentenceTransformerTrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, per_device_eval_batch_size=2, max_steps=2, report_to=[],
        dataloader_num_workers=1, use_cpu=True, prompts={"query": "Find: "}, save_strategy="no",
    )  # fmt: skip
    losses = {"one": Watched, "two": MultipleNegativesRankingLoss}
    trainer = SentenceTransformerTrainer(model=qwen, args=args, train_dataset=data, eval_dataset=data, loss=losses)
    trainer.train()
    trainer.evaluate()
    assert len(seen) == 2 and all(
        sorted(row) == sorted(["a kite", "two boats", "< |im_end|> user", "sea"]) for row in seen
    )


def test_copies_and_pickles_carry_for_themselves(qwen):
    BTokLoss(qwen, route="prefix")
    twin = copy.deepcopy(qwen)
    assert vars(twin[0])["preprocess"].transformer is twin[0]
    collator = pickle.loads(pickle.dumps(SentenceTransformerDataCollator(qwen.preprocess)))
    batch = collator([{"query": "a kite", "positive": " a boat"}])
    assert qwen.tokenizer.decode(batch["positive_content_ids"][0]) == "a boat"


def test_nothing_but_the_loss_sees_the_content(family, btok_model, tmp_path):
    model = btok_model(family)
    rows = ["a kite", "two boats"]
    expected = model.encode(rows)
    BTokLoss(model, route="prefix", lm_head=model[0].model.get_input_embeddings().weight)
    assert (model.encode(rows) == expected).all()
    features = model.preprocess(rows)
    assert {*CONTENT_KEYS} <= features.keys()
    forward, seen = model[0].model.forward, []
    model[0].model.forward = lambda *args, **kwargs: seen.append({*kwargs}) or forward(*args, **kwargs)
    with torch.no_grad():
        found = model(features)["sentence_embedding"]
    del model[0].model.forward
    assert seen and not seen[0] & {*CONTENT_KEYS}
    assert torch.allclose(found, torch.tensor(expected), atol=1e-6)
    model.save_pretrained(str(tmp_path))
    types = [module["type"] for module in json.loads((tmp_path / "modules.json").read_text())]
    assert all(name.startswith("sentence_transformers.") for name in types)
    assert "content_ids" not in (tmp_path / "sentence_bert_config.json").read_text()
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    assert not {*CONTENT_KEYS} & loaded.preprocess(rows).keys()


def test_features_from_before_the_loss_are_refused():
    backbone, processor = build("llama")
    model = build_model(backbone, processor=processor, device="cpu")
    columns = [model.preprocess(["a"]), model.preprocess(["b"])]
    for loss in (BTokLoss(model), CachedBTokLoss(model)):
        with pytest.raises(ValueError, match="Make the loss first, then call model.preprocess"):
            loss(columns)
    assert BTokLoss(model, condensation_weight=0)(columns)["ranking"].isfinite(), "nothing is generated"


@pytest.mark.parametrize("repeat", ["red kitten ", " " * 50 + "k"])
def test_long_texts_are_tokenised_as_far_as_needed(qwen, repeat, monkeypatch):
    text = repeat * 2000
    own = qwen.tokenizer(text.strip(), add_special_tokens=False)["input_ids"]
    content_reader(qwen[0], max_tokens=80)
    sizes = []
    call = type(qwen.tokenizer).__call__
    monkeypatch.setattr(
        type(qwen.tokenizer),
        "__call__",
        lambda self, text, **kwargs: sizes.append(len(text)) or call(self, text, **kwargs),
    )
    carrier = vars(qwen[0])["preprocess"]
    assert carrier.ids_of(text) == own[:80] and max(sizes) < len(text) / 4
    assert len(read_content(qwen.preprocess([text]))[0].text) == 80
    content_reader(qwen[0], max_tokens=30)
    assert len(carrier.ids_of(text)) == 80, "the largest number that any loss needs"


def test_names_of_control_tokens_stay_text(qwen):
    text = "see <|im_end|>, <|btok_1|> and <|image_pad|>"
    content_reader(qwen[0])
    ids = read_content(qwen.preprocess([text]))[0].text
    assert not {*ids.tolist()} & {*qwen.tokenizer.added_tokens_decoder}
    assert qwen.tokenizer.decode(ids) == "see < |im_end|>, < |btok_1|> and < |image_pad|>", "as in the input"


def test_instructions_in_the_texts_are_not_content(btok_model):
    model = btok_model("qwen2_vl", template="plain")
    options = {"instructions": ["Find: ", "Find: a ", "Represent it\n"]}
    rows = ["Find: kitten", "Find: a kitten", "Finding: a kitten", "Represent it", "a Find: "]
    expected = ["kitten", "kitten", "Finding: a kitten", "", "a Find:"]
    assert [text for text, _ in read(model, rows, **options)] == expected


def test_targets_close_as_replies_do(family, btok_model):
    model = btok_model(family)
    assert model.tokenizer.convert_ids_to_tokens(content_reader(model[0]).end) == "<|im_end|>"


def test_a_tokenizer_without_end_of_turn_is_refused():
    backbone, _ = build("llama")
    own = tokenizer("{%- for m in messages -%}{{ m.content }}{%- endfor -%}")
    model = build_model(backbone, processor=own, device="cpu")
    assert content_reader(copy.deepcopy(model)[0]).end == own.eos_token_id
    model.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="end-of-turn token"):
        content_reader(model[0])


@pytest.mark.parametrize("kind", [BTokLoss, CachedBTokLoss])
def test_struct_columns_with_missing_pictures_are_read(qwen, tmp_path, kind):
    """What Arrow makes of rows of which one has no picture, or no text; as if the keys were not there."""
    rows = [{"image": picture(28, 28, 1), "text": "what?"}, {"text": "a text"}, {"image": picture(56, 28, 2)}] * 4
    data = Dataset.from_list([{"query": row, "positive": f"p{i}"} for i, row in enumerate(rows)])
    data = data.cast_column("query", {"image": Image(), "text": Value("string")})
    assert data[1]["query"]["image"] is None and data[2]["query"]["text"] is None
    loss = kind(qwen)
    found, expected = (qwen.preprocess(column) for column in (data[:3]["query"], rows[:3]))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items() if isinstance(value, torch.Tensor))
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=1, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    SentenceTransformerTrainer(model=qwen, args=args, train_dataset=data, loss=loss).train()
