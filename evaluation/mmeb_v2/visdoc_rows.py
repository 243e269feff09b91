"""The 24 visual-document rows of MMEB-V2, all of the same family: queries, corpus and qrels as hub configurations.

Two of them exist in two versions. `VISDOC_DATASETS` holds the `page-fixed` ones of the leaderboard;
`BROKEN_PAGE_HUB_IDS` names the repositories of the split that circulated before 2025-11-03 (VLM2Vec issue 167).
"""

from __future__ import annotations

from evaluation.dataset import MMEBDataset

# subgroup -> rows of (name, hub id, hub split, queries, pages)
_ROWS: dict[str, tuple[tuple[str, str, str, int, int | None], ...]] = {
    "ViDoRe-V1": (
        ("ViDoRe_arxivqa", "vidore/arxivqa_test_subsampled_beir", "test", 500, 500),
        ("ViDoRe_docvqa", "vidore/docvqa_test_subsampled_beir", "test", 451, 500),
        ("ViDoRe_infovqa", "vidore/infovqa_test_subsampled_beir", "test", 494, 500),
        ("ViDoRe_tabfquad", "vidore/tabfquad_test_subsampled_beir", "test", 280, 70),
        ("ViDoRe_tatdqa", "vidore/tatdqa_test_beir", "test", 1646, 277),
        ("ViDoRe_shiftproject", "vidore/shiftproject_test_beir", "test", 100, 1000),
        *(
            (f"ViDoRe_syntheticDocQA_{topic}", f"vidore/syntheticDocQA_{topic}_test_beir", "test", 100, pages)
            for topic, pages in (
                ("artificial_intelligence", 968),
                ("energy", 977),
                ("government_reports", 972),
                ("healthcare_industry", 965),
            )
        ),
    ),
    "ViDoRe-V2": (
        ("ViDoRe_esg_reports_human_labeled_v2", "vidore/esg_reports_human_labeled_v2", "test", 52, 1538),
        ("ViDoRe_biomedical_lectures_v2_multilingual", "vidore/biomedical_lectures_v2", "test", 640, 1016),
        ("ViDoRe_economics_reports_v2_multilingual", "vidore/economics_reports_v2", "test", 232, 452),
        ("ViDoRe_esg_reports_v2_multilingual", "vidore/esg_reports_v2", "test", 228, 1538),
    ),
    "VisRAG": tuple(
        (f"VisRAG_{source}", f"openbmb/VisRAG-Ret-Test-{source}", "train", queries, pages)
        for source, queries, pages in (
            ("ArxivQA", 816, 8066),
            ("ChartQA", 63, 500),
            ("MP-DocVQA", 591, 741),
            ("SlideVQA", 556, 1284),
            ("InfoVQA", 718, 459),
            ("PlotQA", 863, 9593),
        )
    ),
    "OOD": (
        ("ViDoSeek-page", "VLM2Vec/ViDoSeek-page-fixed", "test", 1142, None),
        ("ViDoSeek-doc", "VLM2Vec/ViDoSeek", "test", 1142, 5349),
        ("MMLongBench-page", "VLM2Vec/MMLongBench-page-fixed", "test", 838, None),
        ("MMLongBench-doc", "VLM2Vec/MMLongBench-doc", "test", 838, 6492),
    ),
}

BROKEN_PAGE_HUB_IDS = {
    # as the harness' history has them (VLM2Vec a6a6d6a, src/constant/dataset_hf_path.py): the second has no "-page"
    "ViDoSeek-page": "VLM2Vec/ViDoSeek-page",
    "MMLongBench-page": "VLM2Vec/MMLongBench",
}
"""Hub repositories of the broken `page` split, by data-set name."""

VISDOC_DATASETS: tuple[MMEBDataset, ...] = tuple(
    MMEBDataset(
        name=name,
        modality="visdoc",
        group="VisDoc",
        family="beir",
        subgroup=subgroup,
        hub_id=hub_id,
        split=split,
        metric="ndcg_linear@5",
        candidates="global",
        query_text="Find a document image that matches the given query: {query}",
        candidate_text="Understand the content of the provided document image.",
        num_queries=queries,
        num_candidates=pages,
        annotation="visdoc-tasks/data/" + hub_id.split("/")[1],
        graded=name == "ViDoRe_esg_reports_human_labeled_v2",
    )
    for subgroup, rows in _ROWS.items()
    for name, hub_id, split, queries, pages in rows
)
"""The visual-document rows in the leaderboard's order, `page-fixed` split."""
