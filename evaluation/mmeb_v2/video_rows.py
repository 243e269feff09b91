"""The 18 video rows of MMEB-V2. Videos are folders of at most 64 stored frames, of which eight are shown.

The official archive and the paper authors' unpacked copy have different frame folders; a row names both.
`k700_labels.txt` is the official label set of K700 (the 700 class names of Kinetics-700, CC BY 4.0): its 1,000
annotation rows need not show every class. The other label sets do occur in full, which is checked when they are read.
"""

from __future__ import annotations

from evaluation.dataset import MMEBDataset

_ASK = (
    "Given a video and a question, select the most accurate answer from the provided candidates. "
    "Return only the exact text of your chosen answer. Question:  {question}"  # two blanks, as upstream
)
_FOLDERS = {"EgoSchema": ("EgoSchema", "egoschema")}  # the authors' copy is lower case
_LETTERED = _ASK + "\nOptions:\n{options}"
_WATCH = "Understand the content of the provided video."
_FIND_CLIP = "Find the clip that corresponds to the described scene in the given video: {query}"
_MVBENCH_SUBSETS = tuple(
    (
        "episodic_reasoning action_sequence action_prediction action_antonym fine_grained_action unexpected_action "
        "object_existence object_interaction object_shuffle moving_direction action_localization scene_transition "
        "action_count moving_count moving_attribute state_change fine_grained_pose character_order "
        "egocentric_navigation counterfactual_inference"
    ).split()
)

# name -> (hub id, family, frame folder, annotation file, query text, queries, labels)
_CLASSIFICATION = {
    "K700": (
        "VLM2Vec/Kinetics-700", "labels", "K700", "k700", "Recognize the category of the video content.", 1000, 700,
    ),
    "SmthSmthV2": (
        "VLM2Vec/SmthSmthV2", "label_lists", "SSv2", "ssv2",
        "What actions or object interactions are being performed by the person in the video?", 1000, 174,
    ),
    "HMDB51": (
        "VLM2Vec/HMDB51", "labels", "HMDB51", "hmdb51",
        "What actions or objects interactions are the person in the video doing?", 1000, 51,
    ),
    "UCF101": (
        "VLM2Vec/UCF101", "labels", "UCF101", "ucf101",
        "What activities or sports are being performed by the person in the video?", 1000, 101,
    ),
    "Breakfast": (
        "VLM2Vec/Breakfast", "labels", "Breakfast", "breakfast",
        "Recognize the breakfast type that the person is cooking in the video. ", 433, 10,
    ),
}  # fmt: skip
# name -> (family, config, split, frame path, annotation file, query text, queries, options)
_QUESTION_ANSWERING = {
    "MVBench": ("mvbench", None, "train", "{subset}/{video}", "", _LETTERED, 4000, None),
    "Video-MME": ("videomme", None, "test", "{videoID}", "", _ASK + "\n{options}", 2700, 4),
    "NExTQA": ("nextqa", "MC", "test", "{video}", "", _LETTERED, 8564, 5),
    "EgoSchema": ("egoschema", "Subset", "test", "{video_idx}", "", _ASK + "{options}", 500, 5),
    "ActivityNetQA": (
        "activitynetqa", None, "test", "v_{video_name}", "video-tasks/data/activitynetqa.jsonl",
        _ASK + "? (A) yes; (B) no.", 1000, 2,
    ),
}  # fmt: skip
# name -> (hub id, config, split, frame path, query text, queries); corpus = the videos of all rows
_RETRIEVAL = {
    "DiDeMo": (
        "VLM2Vec/DiDeMo", None, "test", "{video_stem}",
        "Find a video that includes the following described scenes: {caption}", 1004,
    ),
    "MSR-VTT": (
        "VLM2Vec/MSR-VTT", "test_1k", "test", "{video_id}",
        "Find a video that contains the following visual content: {caption}", 1000,
    ),
    "MSVD": (
        "VLM2Vec/MSVD", None, "test", "{video_id}",
        "Find the video snippet that corresponds to the given summary: {caption[0]}", 670,
    ),
    "VATEX": (
        "VLM2Vec/VATEX", None, "test", "{videoID}",
        "Select a video that fits the description provided: {enCap[0]}", 4478,
    ),
    "YouCook2": (
        "lmms-lab/YouCook2", None, "val", "{id}",
        "Find a video that demonstrates the following action while making a recipe: {sentence}", 3179,
    ),
}  # fmt: skip
# name -> (family, frame folders, frame path, annotation file, query text, candidate text, queries)
_MOMENT_RETRIEVAL = {
    "QVHighlight": (
        "clips", ("QVHighlight",), "{video_path_stem}", "video-tasks/data/qvhighlight.jsonl", _FIND_CLIP, _WATCH, 1083,
    ),
    "Charades-STA": (
        "clips", ("Charades_STA", "Charades-STA"), "{video_path_stem}", "video-tasks/data/charades_sta.jsonl",
        _FIND_CLIP, _WATCH, 727,
    ),
    "MomentSeeker": (
        "moments", ("MomentSeeker",), "", "", "{instruction} {query}",
        "Understand the content of the provided video clip.", 1602,
    ),
}  # fmt: skip


def _row(name: str, group: str, **values: object) -> MMEBDataset:
    return MMEBDataset(name=name, modality="video", group=group, metric="hit@1", **values)  # type: ignore[arg-type]


VIDEO_DATASETS: tuple[MMEBDataset, ...] = (
    *(
        _row(
            name, "V-CLS", hub_id=hub_id, family=family, query_text=text, candidate_text="{label}",
            candidates="global" if family == "labels" else "local", num_queries=queries, num_candidates=labels,
            media_roots=(f"video-tasks/frames/video_cls/{folder}", f"video-tasks/frames/{folder}"),
            media_path="{video_id}", annotation=f"video-tasks/data/{file}.jsonl",
        )
        for name, (hub_id, family, folder, file, text, queries, labels) in _CLASSIFICATION.items()
    ),
    *(
        _row(
            name, "V-QA", hub_id=f"VLM2Vec/{name}", family=family, config=config, split=split, query_text=text,
            candidate_text="{option}", candidates="local", num_queries=queries, num_candidates=options,
            media_roots=tuple(
                f"video-tasks/frames/{place}/{folder}"
                # the archive holds a folder video_qa of its own: unpacked into one, it stands below it
                for place in ("video_qa", "video_qa/video_qa")
                for folder in _FOLDERS.get(name, (name,))
            ),
            media_path=path, annotation=file, subsets=_MVBENCH_SUBSETS if family == "mvbench" else (),
        )
        for name, (family, config, split, path, file, text, queries, options) in _QUESTION_ANSWERING.items()
    ),
    *(
        _row(
            name, "V-RET", hub_id=hub_id, family="captions", config=config, split=split, query_text=text,
            candidate_text=_WATCH, candidates="global", num_queries=queries,
            media_roots=(
                f"video-tasks/frames/video_ret/{name}",
                # the official script unpacks video_ret.tar.gz into video_ret, and the archive holds data/ziyan/...
                f"video-tasks/frames/video_ret/data/ziyan/video_retrieval/{name}/frames",
                f"video-tasks/frames/data/ziyan/video_retrieval/{name}/frames",
            ),
            media_path=path,
        )
        for name, (hub_id, config, split, path, text, queries) in _RETRIEVAL.items()
    ),
    *(
        _row(
            name, "V-MRET", hub_id=f"VLM2Vec/{name}", family=family, query_text=text, candidate_text=candidate,
            candidates="local", num_queries=queries, num_candidates=10,
            media_roots=tuple(f"video-tasks/frames/video_mret/{folder}" for folder in folders),
            media_path=path, annotation=file,
        )
        for name, (family, folders, path, file, text, candidate, queries) in _MOMENT_RETRIEVAL.items()
    ),
)  # fmt: skip
"""The video rows in the leaderboard's order."""

MOMENT_INSTRUCTIONS = {
    "text": "Find the clip that corresponds to the given text:",
    "image": "Select the video clip that aligns with the given text and image:",
    "video": "Find the clip that corresponds to the given sentence and video segment:",
}
"""MomentSeeker's instruction by the kind of media that comes with a query (`text`: none)."""
