"""The support table of `docs/support.md`: `python -m tests.support_table` measures it and writes it there.

Every cell comes from running `check` on the tiny backbone of that family, with a chat template of its published shape;
nothing is typed but the names.
"""

from __future__ import annotations

import re
from pathlib import Path

from st_btok.tools.check import Verdict, check
from tests.backbones import build, published
from tests.published_templates import NEWER, PUBLISHED

BEGIN, END = "<!-- support table -->", "<!-- /support table -->"
PAGE = Path(__file__).parent.parent / "docs" / "support.md"
# Qwen's and InternVL's published shape is that of the tests' own template, as are those of Qwen3 and Mamba (ChatML).
NAMES = {
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "qwen3_vl_moe": "Qwen3-VL-MoE",
    "qwen3_5": "Qwen3.5",
    "qwen2_5_omni": "Qwen2.5-Omni (thinker)",
    "internvl": "InternVL",
    "glm4v": "GLM-4.1V",
    "glm46v": "GLM-4.6V",
    "minicpmv4_6": "MiniCPM-V 4.6",
    "molmo2": "Molmo 2",
    "kimi_k25": "Kimi-K2.5",
    "ernie4_5_vl": "Ernie 4.5 VL",
    "lfm2_vl": "LFM2-VL",
    "lfm3_vl": "LFM3-VL",
    "gemma3": "Gemma 3",
    "gemma4": "Gemma 4",
    "smolvlm": "SmolVLM",
    "idefics3": "Idefics3",
    "llava_onevision": "LLaVA-OneVision",
    "llava": "LLaVA 1.5",
    "llava_next": "LLaVA 1.6",
    "fast_vlm": "FastVLM",
    "mistral_small": "Mistral Small 3",
    "ministral3": "Ministral 3",
    "pixtral": "Pixtral",
    "aya_vision": "Aya Vision",
    "deepseek_vl": "DeepSeek-VL",
    "phi4_multimodal": "Phi-4-multimodal",
    "phi-3-vision": "Llama with Phi-3-vision's template",
    "llama3": "Llama 3",
    "qwen3": "Qwen3",
    "smollm3": "SmolLM3",
    "granite": "Granite",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "mistral, old vocabulary": "Mistral, `[INST]` as text",
    "mistral, new vocabulary": "Mistral, `[INST]` as tokens",
    "mamba": "Mamba",
    "paligemma": "PaliGemma",
}
ENCODE = (
    "build", "text", "batch", "mixed modalities", "order", "padding side", "BToks at the end", "truncation",
    "plain reload", "attention implementations",
)  # fmt: skip
COLUMNS = {
    "encode": ENCODE,
    "read back": ("text read back",),
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
    shaped = family in PUBLISHED or family in NEWER
    model, processor = published(family)[:2] if shaped else build(family)
    template = "plain" if family == "paligemma" else "chat"  # it has no chat template
    return check(model, processor=processor, template=template, device="cpu")


def cells(verdicts: list[Verdict]) -> list[tuple[str, str]]:
    """Text and footnote of every column of one row."""
    found = {verdict.name: verdict for verdict in verdicts}
    if found["build"].status == "failed":
        return [("refused", found["build"].note)] + [("–", "")] * (len(COLUMNS) - 1)
    row = []
    for column, names in COLUMNS.items():
        used = [found[name] for name in names]
        failed = [f"{verdict.name}: {_why(verdict)}" for verdict in used if verdict.status == "failed"]
        if failed:
            row.append(("in part" if len(used) > len(failed) else "no", "; ".join(failed)))
        elif column == "read back":
            kinds = re.search(r"of (\d+) kinds", used[0].note)[1]
            row.append((f"{kinds} of {kinds}", ""))
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
    rows = [row_of(family, verdicts_of(family), notes) for family in NAMES]
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
