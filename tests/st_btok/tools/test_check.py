"""`check`: what it finds on every family, and that each of its verdicts can fail."""

from __future__ import annotations

import json
import re

import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from transformers import AttentionInterface, BertConfig, BertLMHeadModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import logging

from st_btok.tools.check import Verdict, check
from st_btok.tools.command import main
from st_btok.tools.invariants import MEASUREMENTS
from tests.backbones import BUILDERS, NEWER_BUILDERS, build, takes, tokenizer
from tests.published_templates import NEWER, PUBLISHED
from tests.support_table import NAMES, PAGE, cells, section, table, verdicts_of, write

# What transformers' processors can't do. SmolVLM's gives images and videos one name, and tells every video of a batch
# the number of frames of the longest; the others stack the videos of a batch.
FAILURES = {
    "smolvlm": {"mixed modalities", "videos of unequal length"},
    "llava_onevision": {"videos of unequal length"},
    "internvl": {"videos of unequal length"},
}
MASKLESS = {"qwen3_5", "gemma2", "mamba"}  # families whose attention route can't be
# Rows that are measured again. `test_families.py` has tests of the others.
MEASURED = [
    name for name in NAMES if name not in NEWER and name not in ("phi-3-vision", "mistral, old vocabulary")
]  # fmt: skip


def status(verdicts: list[Verdict]) -> dict[str, str]:
    return {verdict.name: verdict.status for verdict in verdicts}


@pytest.mark.parametrize("family", MEASURED)
def test_every_family_and_its_line_in_the_table(family):
    verdicts = verdicts_of(family)
    found = status(verdicts)
    row = next(line for line in section(PAGE).splitlines() if line.startswith(f"| {NAMES[family]} |"))
    # Cells only: the wording of a footnote, and the number in it, may differ until the table is made again.
    assert re.sub(r" \[\d+\]", "", row) == f"| {NAMES[family]} | {' | '.join(text for text, _ in cells(verdicts))} |"
    if family == "paligemma":
        assert found == {"build": "failed"} and "must be causal" in verdicts[0].note
        return
    failed = {name for name, value in found.items() if value == "failed"}
    assert failed == FAILURES.get(family, set())
    for modality in ("image", "video", "audio"):
        built = PUBLISHED[family][0] if family in PUBLISHED else family
        assert found[modality] == ("ok" if takes(built, modality) else "not applicable")
    assert found["attention route"] == ("not applicable" if family in MASKLESS else "ok")
    assert found["kv route"] == ("not applicable" if family in ("qwen3_5", "mamba") else "ok")
    for name in ("prefix route", "GradCache", "LoRA", "weight 0 = MNRL", "gradient checkpointing", "plain reload"):
        assert found[name] == "ok", name


def test_the_table_has_a_line_for_every_family_and_all_rows_come_back():
    lines = {line.split(" | ")[0].removeprefix("| "): line.split(" | ") for line in section(PAGE).splitlines()}
    assert set(NAMES.values()) < lines.keys() and set(BUILDERS) | set(NEWER_BUILDERS) <= NAMES.keys() | {
        "llama",
        "mistral",
    }
    for name in NAMES.values():
        read = lines[name][2]
        assert read == "–" if name == "PaliGemma" else re.fullmatch(r"(\d+) of \1", read), name


def test_text_that_does_not_come_back_is_counted_and_named(qwen, monkeypatch):
    monkeypatch.setattr("st_btok.tools.invariants.read_back", lambda module: {"text": "", "image": "'user' instead."})
    verdict = next(verdict for verdict in check(qwen) if verdict.name == "text read back")
    assert (verdict.status, verdict.value) == ("failed", 1)
    assert verdict.note == "of 2 kinds of rows whose own text does not come back; image: 'user' instead."


def test_writing_replaces_the_marked_section_only(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.support_table.NAMES", {"llama3": "Llama", "paligemma": "PaliGemma"})
    path = tmp_path / "page.md"
    path.write_text("above\n<!-- support table -->\nold\n<!-- /support table -->\nbelow\n")
    write(path, table())
    text = path.read_text()
    assert text.startswith("above\n") and text.endswith("\nbelow\n") and "old" not in text
    assert "| Llama | yes | 8 of 8 | yes |" in section(path)
    assert "| PaliGemma | refused [1] |" in section(path) and "[1] the backbone must be causal" in section(path)
    path.write_text("no markers")
    with pytest.raises(SystemExit, match="must hold the lines"):
        write(path, "")


def test_a_model_that_is_never_the_same_fails_everything(qwen):
    """Noise on the token embeddings: nothing that compares two passes may hold."""
    embeddings = qwen[0].model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, args, output: output + 0.05 * torch.randn_like(output))
    found = status(check(qwen))
    held = {name for name in MEASUREMENTS if found[name] != "failed"}
    assert held == {"BToks at the end", "text read back", "truncation", "LoRA"}, "no numbers there, or not measured"
    assert found["LoRA"] == "not applicable", "a finished model is left as it is"


def test_a_finished_model_stays_as_it_was(qwen):
    qwen.bfloat16().train()
    before = {name: value.clone() for name, value in qwen.state_dict().items()}
    check(qwen)
    assert all(module.training for module in qwen.modules())
    assert {parameter.dtype for parameter in qwen.parameters()} == {torch.bfloat16}
    assert all(parameter.grad is None for parameter in qwen.parameters())
    assert all(torch.equal(value, before[name]) for name, value in qwen.state_dict().items())


def _ignores_padding(module, query, key, value, attention_mask, **options):
    return sdpa_attention_forward(module, query, key, value, None, **{**options, "is_causal": True})


def test_an_attention_that_ignores_the_padding_mask_fails(btok_model):
    model = btok_model("llama")
    AttentionInterface.register("ignores_padding", _ignores_padding)
    model.tokenizer.padding_side = "left"
    model[0].model.set_attn_implementation("ignores_padding")
    found = {verdict.name: verdict for verdict in check(model)}
    assert found["batch"].status == found["order"].status == "failed"
    assert found["batch"].value > found["batch"].bound
    assert found["text"].status == found["BToks at the end"].status == "ok"


def test_pixels_that_do_not_arrive_fail(qwen):
    visual = qwen[0].model.visual
    visual.register_forward_hook(lambda *hooked: _zeroed(hooked[-1]))
    found = {verdict.name: verdict for verdict in check(qwen)}
    for kind in ("image", "several images", "video"):
        assert found[kind].status == "failed" and found[kind].value < found[kind].bound
    assert found["text"].status == "ok"


def _zeroed(output):
    for key in output:
        if isinstance(output[key], torch.Tensor):
            output[key] = torch.zeros_like(output[key])
    return output


def test_a_template_that_writes_behind_the_btoks_fails(qwen):
    qwen[0].processor.chat_template += "{{- 'behind' -}}"
    found = status(check(qwen))
    assert found["BToks at the end"] == found["truncation"] == "failed"
    assert found["batch"] == "ok"


def test_backbones_that_look_ahead_fail_to_build():
    backbone, processor = build("llama")
    backbone.config.is_causal = False
    seen: list[Verdict] = []
    verdicts = check(backbone, seen.append, processor=processor)
    assert verdicts == seen and status(verdicts) == {"build": "failed"}
    assert "must be causal" in verdicts[0].note


def test_what_is_expected_is_not_said_and_settings_come_back(tmp_path, capfd, caplog, recwarn):
    """Over-long texts, checkpointing, a save, a reload and an adapter that is never saved: all on purpose."""
    backbone, processor = build("llama")
    backbone.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    threads = torch.get_num_threads()
    bars, levels = logging.is_progress_bar_enabled(), logging.get_verbosity()
    torch.set_num_threads(2)
    logging.enable_progress_bar()
    capfd.readouterr()
    caplog.clear()
    recwarn.clear()
    seen = []
    try:
        verdicts = check(str(tmp_path / "model"), lambda verdict: seen.append(torch.get_num_threads()), device="cpu")
        assert torch.get_num_threads() == 2 and logging.is_progress_bar_enabled()
        assert not are_progress_bars_disabled() and logging.get_verbosity() == levels
    finally:
        torch.set_num_threads(threads)
        if not bars:
            logging.disable_progress_bar()
    assert set(status(verdicts).values()) == {"ok", "not applicable"}
    assert set(seen[1:]) == {1}, "small products are slower on several threads"
    printed = capfd.readouterr()
    assert printed.out == printed.err == "" and not caplog.records and not recwarn.list


def test_a_failed_build_names_the_folder_that_was_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "small").mkdir(parents=True)

    def not_found(*args, **options):
        raise OSError("models/smal is not on the hub\nand so on")

    monkeypatch.setattr("st_btok.tools.check.build_model", not_found)
    (verdict,) = check("models/smal")
    assert verdict.note == "models/smal is not on the hub (did you mean models/small?)"


def test_the_command_line(tmp_path, capsys):
    backbone, processor = build("llama")
    backbone.save_pretrained(tmp_path / "good")
    processor.save_pretrained(tmp_path / "good")
    assert main(["check", str(tmp_path / "good"), "--json", str(tmp_path / "verdicts.json")]) == 0
    printed = capsys.readouterr().out
    verdicts = json.loads((tmp_path / "verdicts.json").read_text())
    assert re.match(r"Checking on the CPU: roughly [12]0 seconds for 0\.\d million parameters\.\n", printed)
    assert "nothing failed" in printed and all(verdict["name"] in printed for verdict in verdicts)
    assert re.search(r"^ok +plain reload +0 <= 1e-06 ", printed, re.MULTILINE)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertLMHeadModel(BertConfig(vocab_size=288, **sizes)).save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    assert main(["check", str(tmp_path / "bert")]) == 1
    assert "is an encoder" in capsys.readouterr().out
