"""The support table of `docs/support.md`: `python -m tests.support_table` measures it and writes it there.

Every cell comes from running `check` on the tiny backbone of that family; nothing is typed but the names.
"""

from __future__ import annotations

from pathlib import Path

from st_btok.tools.check import Verdict, check
from tests.backbones import BUILDERS, build

BEGIN, END = "<!-- support table -->", "<!-- /support table -->"
PAGE = Path(__file__).parent.parent / "docs" / "support.md"
NAMES = {
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "qwen3_5": "Qwen3.5",
    "qwen2_5_omni": "Qwen2.5-Omni (thinker)",
    "smolvlm": "SmolVLM",
    "idefics3": "Idefics3",
    "llava_onevision": "LLaVA-OneVision",
    "internvl": "InternVL",
    "gemma3": "Gemma 3",
    "llama": "Llama",
    "qwen3": "Qwen3",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "mistral": "Mistral",
    "mamba": "Mamba",
    "paligemma": "PaliGemma",
}
ENCODE = (
    "build", "text", "batch", "mixed modalities", "order", "padding side", "BToks at the end", "truncation",
    "plain reload", "attention implementations",
)  # fmt: skip
COLUMNS = {
    "encode": ENCODE,
    "attention route": ("attention route",),
    "prefix route": ("prefix route",),
    "K/V route": ("kv route", "kv = attention"),
    "GradCache": ("GradCache",),
    "LoRA": ("LoRA",),
    "image": ("image",),
    "several images": ("several images",),
    "video": ("video", "videos of unequal length"),
    "audio": ("audio",),
}


def verdicts_of(family: str) -> list[Verdict]:
    """What `check` finds on the tiny backbone of a family."""
    model, processor = build(family)
    template = "plain" if family == "paligemma" else "chat"  # it has no chat template
    return check(model, processor=processor, template=template, device="cpu")


def cells(verdicts: list[Verdict]) -> list[tuple[str, str]]:
    """Text and footnote of every column of one row."""
    found = {verdict.name: verdict for verdict in verdicts}
    if found["build"].status == "failed":
        return [("refused", found["build"].note)] + [("–", "")] * (len(COLUMNS) - 1)
    row = []
    for names in COLUMNS.values():
        used = [found[name] for name in names]
        failed = [f"{verdict.name}: {_why(verdict)}" for verdict in used if verdict.status == "failed"]
        if failed:
            row.append(("in part" if len(used) > len(failed) else "no", "; ".join(failed)))
        elif used[0].status == "ok":
            row.append(("yes", ""))
        else:
            row.append(("–", "") if "takes no" in used[0].note and "route" not in names[0] else ("no", used[0].note))
    return row


def _why(verdict: Verdict) -> str:
    """A failed verdict's reason: the error's message, or the number that is out of bounds."""
    return verdict.note if verdict.value is None else f"{verdict.note} differ by {verdict.value:.1g}"


def row_of(family: str, verdicts: list[Verdict], notes: list[str]) -> str:
    """One line of the table; new footnotes are appended to `notes`."""
    texts = []
    for text, note in cells(verdicts):
        if note and note not in notes:
            notes.append(note)
        texts.append(f"{text} [{notes.index(note) + 1}]" if note else text)
    return f"| {NAMES[family]} | {' | '.join(texts)} |"


def table() -> str:
    """The whole table in Markdown, footnotes below it."""
    notes: list[str] = []
    rows = [row_of(family, verdicts_of(family), notes) for family in (*BUILDERS, "paligemma")]
    head = [f"| backbone | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    return "\n".join([*head, *rows, "", *(f"[{number}] {note}  " for number, note in enumerate(notes, 1))])


def section(path: Path) -> str:
    """What stands between the markers of a file; empty where it has none."""
    return path.read_text().partition(BEGIN)[2].partition(END)[0].strip()


def write(path: Path, markdown: str) -> None:
    """Put the table between a file's markers."""
    text = path.read_text()
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{path} must hold the lines {BEGIN} and {END}; the table goes between them.")
    before, _, rest = text.partition(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{markdown}\n{END}{rest.partition(END)[2]}")


def main() -> None:
    markdown = table()
    print(markdown)
    write(PAGE, markdown)


if __name__ == "__main__":
    main()
