"""The video families of MMEB-V2: annotation rows plus folders of stored frames, eight of which are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.dataset import MMEBDataset
from evaluation.media import BrokenMediaError, choose_frames, enlarged, natural_key, stored_frames
from evaluation.mmeb_v2.protocols import clean_lines, finished
from evaluation.mmeb_v2.sources import DataRoot, read_table
from evaluation.mmeb_v2.video_rows import MOMENT_INSTRUCTIONS
from evaluation.pool import Item, LoadedDataset, SplitBuilder, sampled_rows

_NO_DOT = 'rows with an option without ". "'
_NO_ANSWER = "rows whose answer is not among their candidates"
Record = Mapping[str, Any]


def load_video(row: MMEBDataset, root: DataRoot, fraction: float = 1.0, seed: int = 0) -> LoadedDataset:
    """Load one video data set.

    Args:
        row: The data set.
        root: Where the annotation tables and the frame folders are.
        fraction: Part of the queries to keep, in (0, 1]; a global corpus stays whole.
        seed: Seed of that choice.

    Returns:
        mteb's data and the broken rows.

    Raises:
        ValueError: No usable query, or a label set of the wrong size.
    """
    table = _records(row, root)
    builder = SplitBuilder(row)
    kept = sampled_rows(len(table), fraction, seed)
    if row.family == "labels":
        for label in _labels(row, root, table):
            builder.offer(0, Item(label, label))
    if row.family == "captions":  # every row's video is a candidate, also of the rows that are not asked
        for index, record in enumerate(table):
            _offer_video(builder, row, root, index, record)
    if row.family == "mvbench" and row.candidates == "global":
        for index, record in enumerate(table):
            for item in _question(row, record).candidates:
                builder.offer(index, item)
    ask = _FAMILIES[row.family]
    for index in kept:
        try:
            ask(builder, row, root, index, table[index])
        except (BrokenMediaError, LookupError, TypeError, ValueError) as error:
            builder.skip(index, f"{type(error).__name__}: {error}")
    return builder.build()


def _records(row: MMEBDataset, root: DataRoot) -> Sequence[Record]:
    """The annotation rows; several configurations one after another, each row with its `subset`."""
    if row.subsets:
        return [{**record, "subset": name} for name in row.subsets for record in read_table(row, root, name)]
    table = read_table(row, root)
    # the official configuration of this one takes the first num_queries rows
    return [table[i] for i in range(min(len(table), row.num_queries))] if row.family == "label_lists" else table


def _labels(row: MMEBDataset, root: DataRoot, table: Sequence[Record]) -> list[str]:
    """The label set: `labels/<name>.txt` below the data root, else ours, else the labels that occur in the table.

    Under `btoks` it is those that occur.
    """
    occurring = sorted({record["pos_text"] for record in table if record["pos_text"]})
    if row.protocol == "btoks":
        return occurring
    given = root.path / "labels" / f"{row.name}.txt"
    ours = Path(__file__).with_name(f"{row.name.lower()}_labels.txt")
    file = ours if ours.is_file() and not given.is_file() else given
    if file.is_file():
        labels = [line for line in file.read_text(encoding="utf-8").split("\n") if line]
    else:
        labels = occurring
    if len(set(labels)) != row.num_candidates:
        source = file if file.is_file() else "the annotation table"
        raise ValueError(
            f"{row.name} ranks against {row.num_candidates} labels, but {source} gives {len(set(labels))}. "
            f"Write the official label list, one per line, to {given}."
        )
    return labels


def _video(row: MMEBDataset, root: DataRoot, record: Record) -> tuple[str, ...]:
    """The shown frames of the row's own video."""
    fields = {k: str(v) for k, v in record.items()}
    fields |= {f"{name}_stem": Path(fields[name]).stem for name in ("video", "video_path") if name in fields}
    return _chosen(row, stored_frames(root.media(row, row.media_path.format_map(fields))))


def _chosen(row: MMEBDataset, frames: Sequence[Path]) -> tuple[str, ...]:
    return choose_frames(frames, row.inputs.num_frames)


def _query(
    row: MMEBDataset,
    text: str,
    image: str | bytes | None = None,
    video: tuple[str, ...] = (),
    instruction: str | None = None,
) -> Item:
    """The query; its instruction is what its template holds before the row's own words."""
    start = row.query_text.split("{")[0] if instruction is None else f"{instruction} "
    body = text[len(start) :].strip()
    told = start.strip().removesuffix("Question:").rstrip()
    shown = finished(row, body) if body else ""
    # a question's own parts are cleaned before they are put together (`_question`)
    asked = f"{text}\n" if row.group == "V-QA" and row.protocol == "btoks" else finished(row, text)
    return Item("query", asked, image=image, video=video, instruction=told, body=shown)


def _watched(row: MMEBDataset, key: str, video: tuple[str, ...]) -> Item:
    """A video as a candidate: an instruction and no words of its own."""
    return Item(key, row.candidate_text, video=video, instruction=row.candidate_text.strip())


def _ask_label(builder: SplitBuilder, row: MMEBDataset, root: DataRoot, index: int, record: Record) -> None:
    query = _query(row, row.query_text, video=_video(row, root, record))
    own = None if row.family == "labels" else [Item(label, label) for label in record["neg_text"]]
    builder.ask(index, query, {record["pos_text"]: 1}, own)


def _ask_question(builder: SplitBuilder, row: MMEBDataset, root: DataRoot, index: int, record: Record) -> None:
    if not (record["question"] or "").strip():
        raise ValueError("column question is empty")
    question = _question(row, record)
    query = _query(row, question.text, video=_video(row, root, record))
    cut = [option for option in question.candidates if option.text != option.key]
    if any(". " not in option.key for option in cut):
        builder.remark(_NO_DOT)
    answerable = question.right in {option.key for option in question.candidates}
    if not answerable:
        if row.protocol == "btoks":
            raise ValueError("column answer is not among the candidates")
        builder.remark(_NO_ANSWER)
    own = None if row.candidates == "global" else question.candidates
    builder.ask(index, query, {question.right: 1}, own, answerable=answerable)


@dataclass(frozen=True)
class _Question:
    """A question with its options: the query's text, the candidates, and the key of the right one."""

    text: str
    candidates: list[Item]
    right: str


def _question(row: MMEBDataset, record: Record) -> _Question:
    if row.protocol == "btoks":
        record = _released_record(row, record)
    shown, candidates, right = _OPTIONS[row.family](record)
    text = row.query_text.format_map({**record, "options": shown})
    if row.family in ("mvbench", "nextqa"):
        text = text.rstrip()  # the harness does so after it has written the options
    if row.protocol == "btoks":  # options keep their letters; MVBench's lose the blanks at their ends
        candidates = [Item(item.key, item.key) for item in candidates]
        options = list(record["candidates"]) if row.family == "mvbench" else []
        if record["answer"] in options:  # the release takes the first of equal options, the harness the last
            right = candidates[options.index(record["answer"])].key
    return _Question(text, candidates, right)


def _released_record(row: MMEBDataset, record: Record) -> Record:
    """The row with its question, and the options of MVBench and NExTQA, cleaned as the release's parsers do it."""
    cleaned = {**record, "question": clean_lines(record["question"] or "").rstrip("\n")}
    if row.family == "mvbench":
        places = [place for place, option in enumerate(record["candidates"]) if option == record["answer"]]
        cleaned["candidates"] = [clean_lines(option).rstrip("\n") for option in record["candidates"]]
        cleaned["answer"] = cleaned["candidates"][places[0]] if places else record["answer"]
    if row.family == "nextqa":
        cleaned |= {f"a{i}": clean_lines(str(record[f"a{i}"])).rstrip("\n") for i in range(5)}
    return cleaned


def _lettered(options: Sequence[str]) -> list[str]:
    return [f"({chr(ord('A') + number)}) {option}" for number, option in enumerate(options)]


def _after_letter(option: str) -> str:
    """The option after its first ". ", without dots and blanks around it; without one its last character.

    The latter looks like a slip (`find` answers -1), but it is what the benchmark's harness shows and scores.
    """
    return option[option.find(". ") :].strip(". ")


def _mvbench(record: Record) -> tuple[str, list[Item], str]:
    """The right one is the last option that equals the answer; a missing answer is `(@)`, which no option is."""
    lettered = _lettered(record["candidates"])
    places = [place for place, option in enumerate(record["candidates"]) if option == record["answer"]]
    right = lettered[places[-1]] if places else f"(@) {record['answer']}"
    return "\n".join(lettered), [Item(option, option) for option in lettered], right


def _nextqa(record: Record) -> tuple[str, list[Item], str]:
    options = [str(record[f"a{i}"]) for i in range(5)]
    candidates = [Item(option, option) for option in options]
    return "\n".join(_lettered(options)), candidates, options[_position(record["answer"], 5)]


def _videomme(record: Record) -> tuple[str, list[Item], str]:
    options = list(record["options"])
    candidates = [Item(option, _after_letter(option)) for option in options]
    return "\n".join(options), candidates, options["ABCD".index(record["answer"])]


def _egoschema(record: Record) -> tuple[str, list[Item], str]:
    options = list(record["option"])
    candidates = [Item(option, _after_letter(option)) for option in options]
    return " ".join(options), candidates, options[_position(record["answer"], len(options))]


def _activitynetqa(record: Record) -> tuple[str, list[Item], str]:
    if record["answer"] not in ("yes", "no"):
        raise ValueError(f"column answer is {record['answer']!r}, expected yes or no")
    return "", [Item("yes", "yes"), Item("no", "no")], record["answer"]


def _position(answer: str | int, count: int) -> int:
    position = int(answer)
    if not 0 <= position < count:  # a negative one would silently count from the end
        raise ValueError(f"column answer is {answer!r}, expected 0 to {count - 1}")
    return position


def _caption_key(row: MMEBDataset, record: Record) -> str:
    fields = {k: str(v) for k, v in record.items()}
    return row.media_path.format_map(fields | {"video_stem": Path(fields.get("video", "")).stem})


def _offer_video(builder: SplitBuilder, row: MMEBDataset, root: DataRoot, index: int, record: Record) -> None:
    try:
        builder.offer(index, _watched(row, _caption_key(row, record), _video(row, root, record)))
    except (BrokenMediaError, LookupError) as error:
        builder.report(index, f"video left out: {error}")


def _ask_caption(builder: SplitBuilder, row: MMEBDataset, root: DataRoot, index: int, record: Record) -> None:
    text = row.query_text.format_map(record)
    if text.strip() == row.query_text.split("{")[0].strip():
        raise ValueError("the caption is empty")
    builder.ask(index, _query(row, text), {_caption_key(row, record): 1})


def _ask_clip(builder: SplitBuilder, row: MMEBDataset, root: DataRoot, index: int, record: Record) -> None:
    """QVHighlight and Charades-STA: `query/` is the whole video, every other folder one clip of it."""
    folder = root.media(row, Path(record["video_path"]).stem)
    if not folder.is_dir():
        raise BrokenMediaError(f"clip folder {str(folder)!r} does not exist")
    clips = [clip for clip in folder.iterdir() if clip.is_dir() and clip.name != "query"]
    clips.sort(key=lambda clip: natural_key(clip.name))
    if row.num_candidates and len(clips) < row.num_candidates:
        builder.report(index, f"{len(clips)} of {row.num_candidates} clips are there")
    gold = {f"{folder.name}/{clip.name}": 1 for clip in clips if clip.name.startswith("positive")}
    query = _query(row, row.query_text.format_map(record), video=_chosen(row, stored_frames(folder / "query")))
    own = [item for clip in clips for item in _clip(builder, row, index, f"{folder.name}/{clip.name}", clip)]
    builder.ask(index, query, gold, own)


def _ask_moment(builder: SplitBuilder, row: MMEBDataset, root: DataRoot, index: int, record: Record) -> None:
    """MomentSeeker: a query may come with an image or a clip; there can be several right clips."""
    shown = record["input_frames"] or ""
    kind = "video" if shown.endswith(".mp4") else "image" if shown else "text"
    if not (record["query"] or "").strip():
        raise ValueError("column query is empty")
    text = row.query_text.format(instruction=MOMENT_INSTRUCTIONS[kind], query=record["query"])
    image: str | bytes | None = None
    video: tuple[str, ...] = ()
    if kind == "image":
        places = [root.media(row, f"query_{shown}"), root.media(row, "query_images", Path(shown).name)]
        image = enlarged(str(next((place for place in places if place.is_file()), places[0])))
        if isinstance(image, bytes):
            builder.remark("images enlarged to 56 x 56")
    if kind == "video":
        video = tuple(map(str, stored_frames(_moment_folder(row, root, shown))))
    right, wrong = ([entry["output_path"] for entry in record[f"{side}_frames"]] for side in ("positive", "negative"))
    folders = [(path, _moment_folder(row, root, path)) for path in (*right, *wrong)]
    own = [item for path, folder in folders for item in _clip(builder, row, index, path, folder, all_frames=True)]
    query = _query(row, text, image, video, MOMENT_INSTRUCTIONS[kind])
    builder.ask(index, query, dict.fromkeys(right, 1), own)


def _moment_folder(row: MMEBDataset, root: DataRoot, path: str) -> Path:
    return root.media(row, "video_frames", path.replace("/", "_").split(".mp4")[0])


def _clip(
    builder: SplitBuilder, row: MMEBDataset, index: int, key: str, folder: Path, *, all_frames: bool = False
) -> Iterator[Item]:
    """The clip as a candidate, or nothing (reported) when its frames are missing."""
    try:
        frames = stored_frames(folder)
    except BrokenMediaError as error:
        builder.report(index, f"candidate {key!r} left out: {error}")
        return
    yield _watched(row, key, tuple(map(str, frames)) if all_frames else _chosen(row, frames))


_OPTIONS: dict[str, Callable[[Record], tuple[str, list[Item], str]]] = {
    "mvbench": _mvbench,
    "nextqa": _nextqa,
    "videomme": _videomme,
    "egoschema": _egoschema,
    "activitynetqa": _activitynetqa,
}
_FAMILIES: dict[str, Callable[[SplitBuilder, MMEBDataset, DataRoot, int, Record], None]] = {
    "labels": _ask_label,
    "label_lists": _ask_label,
    "captions": _ask_caption,
    "clips": _ask_clip,
    "moments": _ask_moment,
    **dict.fromkeys(_OPTIONS, _ask_question),
}
