"""The validation part shares no content with the rest, within and across sources; its scores are right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset

from recipes.data.hard_negatives import with_mined_negatives
from recipes.data.holdout import HeldOutEvaluator, hold_out, mean_of_sources
from recipes.data.training_pairs import Source, content_key


def side(text="", digest=""):
    return {"text": text, "image": "", "video": [], "column": "", "digest": digest, "row": 0}


def source(name, queries, positives):
    pairs = Dataset.from_dict({"query": queries, "positive": positives})
    return Source(name, pairs, pairs, len(pairs))


def contents(sources):
    return {
        side["digest"] or side["text"] for s in sources for row in s.pairs for side in (row["query"], row["positive"])
    }


@pytest.fixture
def pair_of_sources():
    """Two captions for each of 50 photographs, in both directions, under different file names; 40 of them shared."""
    i2t = source("i2t", [side("", f"photo {i // 2}") for i in range(100)], [side(f"caption {i}") for i in range(100)])
    t2i = source("t2i", [side(f"find {i}") for i in range(90)], [side("", f"photo {i // 2 + 5}") for i in range(90)])
    return [i2t, t2i]


def test_no_photograph_is_in_both_parts(pair_of_sources):
    training, held_out = hold_out(pair_of_sources, 8, seed=1)
    assert [len(s.pairs) for s in held_out] == [8, 8]
    assert [len(s.pairs) for s in training] == [92, 82]
    assert not contents(training) & contents(held_out)
    assert contents([held_out[0]]) & contents([held_out[1]]), "a shared photograph is held out of both sources"


def test_labels_are_in_both_parts_but_no_picture_is(caplog):
    labels = source("labels", [side("", f"p{i}") for i in range(60)], [side("YesNo"[: 3 - i % 2]) for i in range(60)])
    training, held_out = hold_out([labels], 6)
    assert len(held_out[0].pairs) == 6
    shared = contents(training) & contents(held_out)
    assert shared and all(not content.startswith("p") for content in shared)


def test_a_passage_under_several_questions_is_held_out_with_all_of_them(caplog):
    """As in SQuAD: five questions a passage, which is content and no label, though it repeats."""
    passages = [f"passage {i} " + "says a long thing and then some more " * 3 for i in range(40)]
    squad = source("squad", [side(f"q {i}") for i in range(200)], [side(passages[i // 5]) for i in range(200)])
    with caplog.at_level("INFO"):
        training, held_out = hold_out([squad], 20)
    assert len(held_out[0].pairs) == 20 and not contents(training) & contents(held_out)
    assert "labels" not in caplog.text


def test_what_is_taken_for_labels_is_said(caplog):
    rows = [side(f"q {i}") for i in range(40)]
    with caplog.at_level("INFO"):
        hold_out([source("classes", rows, [side(f"class {i % 20}") for i in range(40)])], 4)
        hold_out([source("titles", rows, [side(f"title {i % 21}") for i in range(40)])], 4)
    (said,) = [record.getMessage() for record in caplog.records if "labels" in record.getMessage()]
    assert said.startswith("classes: the 20 texts of positive (such as 'class 0') stand under 40 rows")
    assert "they occur in training and in held-out rows alike" in said


def test_a_source_in_one_piece_stays_in_training(caplog):
    chain = [side("", f"p{i}") for i in range(31)]
    one = source("chain", chain[:30], chain[1:])
    training, held_out = hold_out([one], 3)
    assert not held_out and len(training[0].pairs) == 30
    assert "chain has no validation part" in caplog.text


def test_a_lone_row_trains_unless_its_content_is_held_out_elsewhere():
    """Nineteen rows: a tenth is one, in which nothing can be searched."""
    few = source("few", [side(f"q {i}") for i in range(19)], [side(f"d {i}") for i in range(19)])
    training, held_out = hold_out([few], 10)
    assert not held_out and len(training[0].pairs) == 19
    shared = source("shared", [side(f"a {i}") for i in range(10)], [side(f"d {i}") for i in range(10)])
    more = source("more", [side(f"b {i}") for i in range(40)], [side(f"d {i}") for i in range(40)])
    for seed in range(5):
        training, held_out = hold_out([shared, more], 10, seed)
        assert not contents(training) & contents(held_out)


def test_size_zero_holds_nothing_out(pair_of_sources, caplog):
    training, held_out = hold_out(pair_of_sources, 0)
    assert not held_out and [len(s.pairs) for s in training] == [100, 90] and not caplog.text


class Known:
    """Embeds the text `x i` as the i-th unit vector, `near i j` between two."""

    similarity_fn_name = "cosine"
    device = torch.device("cpu")

    def __init__(self, model):
        self.model_card_data = model.model_card_data
        self.similarity, self.similarity_pairwise = model.similarity, model.similarity_pairwise
        self.seen = []

    def encode(self, inputs, convert_to_tensor=False, **options):
        self.seen += inputs
        vectors = torch.zeros(len(inputs), 16)
        for row, item in enumerate(inputs):
            number, *others = map(int, item["text"].split()[1:])
            vectors[row, number] = 1.0
            for other in others:
                vectors[row, other] = 0.5
        vectors = torch.nn.functional.normalize(vectors)
        return vectors if convert_to_tensor else vectors.numpy()

    encode_query = encode_document = encode


def test_scores_of_a_known_ranking(qwen):
    right = [side(f"q {i}") for i in range(10)]
    good = source("good", right, [side(f"d {i}") for i in range(10)])
    half = source("half", right, [side(f"d {i if i < 5 else 15 - i}") for i in range(10)])
    assert HeldOutEvaluator(good, 2)(Known(qwen))["good_cosine_ndcg@10"] == 1.0
    scores = mean_of_sources([good, half], 2)(Known(qwen))
    assert scores["half_cosine_accuracy@1"] == 0.5
    both = [scores["half_cosine_ndcg@10"], scores["half-backwards_cosine_ndcg@10"]]
    expected = np.mean([1.0, 1.0, *both])
    assert scores["sequential_score"] == pytest.approx(expected) and expected < 1


def test_mined_negatives_are_the_nearest_of_other_queries(qwen):
    queries = [side(f"q {i} {(i + 1) % 8}") for i in range(8)]  # right answer i, close to i + 1
    pairs = source("mine", queries, [side(f"d {i}") for i in range(8)])
    mined = with_mined_negatives(pairs, Known(qwen), 1, batch_size=2)
    assert mined.pairs.column_names == ["query", "positive", "negative_1"] and len(mined.pairs) == 8
    for row in mined.pairs:
        number = int(row["positive"]["text"].split()[1])
        assert row["query"]["text"].startswith(f"q {number} ")
        assert row["negative_1"]["text"] == f"d {(number + 1) % 8}"
    assert mined.dataset()[0]["negative_1"] == {"text": mined.pairs[0]["negative_1"]["text"]}


def test_the_miner_reads_queries_and_positives_with_its_own_prompts(qwen):
    miner = Known(qwen)
    asked: list[str] = []
    miner.encode_query = lambda inputs, **options: asked.extend(inputs) or miner.encode(inputs, **options)
    with_mined_negatives(
        source("mine", [side(f"q {i} {(i + 1) % 8}") for i in range(8)], [side(f"d {i}") for i in range(8)]), miner, 1
    )
    assert {item["text"][0] for item in asked} == {"q"} and len(asked) == 8


def test_a_second_right_answer_is_no_negative(qwen):
    queries = [side("q 1"), side("q 1"), side("q 3 2")]
    pairs = source("mine", queries, [side("d 1"), side("e 1"), side("d 3 2")])
    mined = with_mined_negatives(pairs, Known(qwen), 1, batch_size=2)
    for row in mined.pairs:
        if row["query"]["text"] == "q 1":
            assert content_key(row["negative_1"]) == " d 3 2"


def test_a_label_set_has_too_few_negatives(qwen):
    pairs = source("labels", [side(f"q {i}") for i in range(4)], [side("d 1")] * 4)
    with pytest.raises(ValueError, match="labels: no pair has 1 negatives"):
        with_mined_negatives(pairs, Known(qwen), 1)
