from __future__ import annotations

from collections import Counter

from evaluation.mmeb_v2 import GROUPS, MMEB_V2


def test_there_are_78_data_sets_with_unique_names():
    assert Counter(row.modality for row in MMEB_V2) == {"image": 36, "video": 18, "visdoc": 24}
    assert len({row.name for row in MMEB_V2}) == 78


def test_groups_have_the_published_sizes():
    sizes = [10, 10, 12, 4, 5, 5, 5, 3, 24]
    assert Counter(row.group for row in MMEB_V2) == dict(zip(GROUPS, sizes, strict=True))
    assert all(GROUPS[row.group] == row.modality for row in MMEB_V2)
    assert Counter(row.subgroup for row in MMEB_V2 if row.subgroup) == {
        "ViDoRe-V1": 10,
        "ViDoRe-V2": 4,
        "VisRAG": 6,
        "OOD": 4,
    }


def test_query_counts_add_up_to_the_published_totals():
    totals = Counter()
    for row in MMEB_V2:
        totals[row.modality] += row.num_queries
    assert totals == {"image": 36_000, "video": 34_940, "visdoc": 12_590}


def test_metric_and_candidate_scope_follow_the_protocol():
    for row in MMEB_V2:
        assert row.metric == ("ndcg_linear@5" if row.modality == "visdoc" else "hit@1")
    with_global_corpus = {row.name for row in MMEB_V2 if row.candidates == "global"}
    expected = {row.name for row in MMEB_V2 if row.modality == "visdoc" or row.group in ("V-CLS", "V-RET")}
    assert with_global_corpus == expected - {"SmthSmthV2"}


def test_texts_have_no_media_tokens_and_keep_the_typos_of_the_data():
    texts = [text for row in MMEB_V2 for text in (row.query_text, row.candidate_text)]
    assert not any("<|" in text for text in texts)
    assert any("Crop the image to to isolate" in text for text in texts)
