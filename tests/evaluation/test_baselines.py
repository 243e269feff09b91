"""open_clip behind ST's interface, poolings on one backbone, metadata, and the command line."""

from __future__ import annotations

import json

import mteb
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from evaluation import wrap
from evaluation.baselines import OpenClip, load_model, open_clip_model, pooled_model
from evaluation.embedding.fingerprint import fingerprint
from evaluation.mini import mini_benchmark
from evaluation.mmeb_v2 import MMEB_V2
from evaluation.run import main, parse, stored_name
from evaluation.scoring import build_suite
from evaluation.task import MMEBRetrieval
from evaluation.wrapping import model_meta

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 28, "layers": 1, "width": 16, "head_width": 8, "patch_size": 14},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A small open_clip model with random weights in open_clip's own local layout."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP, "preprocess_cfg": {}}))
    model = open_clip.CLIP(**CLIP)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def clip(clip_folder):
    return open_clip_model(f"local-dir:{clip_folder}")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A tiny BERT: poolings are about the tokens' states, not about the architecture."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bert")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(["<pad>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=300, **sizes, max_position_embeddings=512, pad_token_id=0)
    BertModel(config).eval().save_pretrained(folder)
    return folder


def noise(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 30, 3), np.uint8))


def unit(vector):
    return vector / np.linalg.norm(vector)


def test_open_clip_towers_are_used_as_they_are(clip):
    module = clip[0]
    assert isinstance(module, OpenClip) and clip.get_embedding_dimension() == 16
    with torch.no_grad():
        text = module.model.encode_text(module._tokenizer(["a cat"]))[0].numpy()
        image = module.model.encode_image(module._preprocess(noise(0))[None])[0].numpy()
    assert np.allclose(clip.encode("a cat"), unit(text), atol=1e-6)
    assert np.allclose(clip.encode({"image": noise(0)}), unit(image), atol=1e-6)
    assert np.allclose(clip.encode("cat", prompt="a "), unit(text), atol=1e-6)


def test_open_clip_sums_parts_and_frames(clip):
    text, image, other = clip.encode("a cat"), clip.encode({"image": noise(0)}), clip.encode({"image": noise(1)})
    both = clip.encode({"image": noise(0), "text": "a cat"})
    assert np.allclose(both, unit(text + image), atol=1e-6)
    video = clip.encode({"video": [noise(0), noise(1)]})
    assert np.allclose(video, unit(image + other), atol=1e-6)
    asked = clip.encode({"video": [noise(0), noise(1)], "text": "a cat"})
    assert np.allclose(asked, unit(unit(image + other) + text), atol=1e-6)
    batch = clip.encode([{"image": noise(0), "text": "a cat"}, "a cat", {"video": [noise(0), noise(1)]}])
    assert np.allclose(batch, [both, text, video], atol=1e-5)


def test_open_clip_without_weights_is_refused():
    with pytest.raises(ValueError, match="architecture without weights.*laion2b"):
        open_clip_model("ViT-B-32")


def test_open_clip_runs_on_every_shape_of_the_mini_benchmark(clip, tmp_path):
    results = mteb.evaluate(
        wrap(clip, "test/clip"),
        mini_benchmark("validation", groups=["I-VG", "V-CLS", "VisDoc"]),
        cache=mteb.ResultCache(tmp_path),
        co2_tracker=False,
        show_progress_bar=False,
    ).task_results
    assert len(results) == 3 and all(0 <= result.get_score() < 0.6 for result in results)


def test_poolings_follow_their_formulas(backbone):
    states = pooled_model(backbone, "mean").encode("abcd", output_value="token_embeddings").numpy()
    weights = np.arange(1, len(states) + 1)[:, None]
    expected = {
        "lasttoken": states[-1],
        "mean": states.mean(0),
        "weightedmean": (weights * states).sum(0) / weights.sum(),
    }
    found = {name: pooled_model(backbone, name).encode("abcd") for name in expected}
    for name, vector in expected.items():
        assert np.allclose(found[name], unit(vector), atol=1e-5)
    assert not np.allclose(found["mean"], found["lasttoken"], atol=1e-3)
    with pytest.raises(ValueError, match="pooling must be one of"):
        pooled_model(backbone, "max")


def test_metadata_names_the_checkpoint_and_its_modalities(clip, backbone):
    meta = model_meta(clip, "clip")
    assert meta.name == "local/clip" and meta.revision == fingerprint(clip)
    assert meta.modalities == ["text", "image", "video"] and meta.embed_dim == 16
    model = pooled_model(backbone, "mean")
    model.prompts = {"query": "find: ", "document": ""}
    meta = model_meta(model, "owner/model")
    assert (meta.name, meta.modalities, meta.use_instructions) == ("owner/model", ["text"], True)
    assert meta.n_parameters == sum(p.numel() for p in model.parameters())


def test_mock_run_accepts_a_wrapped_model(backbone):
    report = mteb.mock_run(wrap(pooled_model(backbone, "mean"), "test/bert"))
    assert report.all_passed and any(status is not None for _, status in report.items())


def test_any_saved_sentence_transformer_is_loaded_by_name(backbone, tmp_path):
    pooled_model(backbone, "weightedmean").save_pretrained(str(tmp_path / "saved"))
    loaded = load_model(str(tmp_path / "saved"), device="cpu")
    assert isinstance(loaded, SentenceTransformer)
    assert np.allclose(
        loaded.encode("abcd"), load_model(str(backbone), "weightedmean", "cpu").encode("abcd"), atol=1e-6
    )


def test_the_command_line_scores_resumes_and_reports(clip_folder, tmp_path, capsys):
    words = ["--model", f"open_clip:local-dir:{clip_folder}", "--name", "test/clip", "--suite", "mini"]
    words += ["--subset", "I-VG", "V-CLS", "--split", "validation", "--output_dir", str(tmp_path), "--device", "cpu"]
    main([*words, "--report", "--sheets"])
    shown, _, report = capsys.readouterr().out.partition("report: ")
    assert report.strip() == str(tmp_path / "report/report.md")
    assert "mini-1.I-VG.validation: split mini-1/validation, 100 queries, chance 12.5, data " in shown
    assert "standard error" in shown and "plain mean of these 2 data sets" in shown
    runs = json.loads((tmp_path / "run.json").read_text())
    assert runs[0]["command"].startswith("python -m evaluation.run --model open_clip") and runs[0]["versions"]["mteb"]
    assert "mini-1/validation" in (tmp_path / "report/report.md").read_text()
    assert len(list(tmp_path.glob("sheets/*/mini-1.V-CLS.validation*.png"))) == 1
    stored = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("mini-1.*.json")}
    main(words)
    assert capsys.readouterr().out == shown
    assert all(path.stat().st_mtime_ns == time for path, time in stored.items())
    assert len(json.loads((tmp_path / "run.json").read_text())) == 2


def test_a_sweep_over_embedding_sizes_encodes_once_and_draws_a_curve(clip_folder, tmp_path, capsys, monkeypatch):
    encoded = []
    preprocess = OpenClip.preprocess

    def count(self, inputs, *args, **kwargs):
        encoded.append(len(inputs))
        return preprocess(self, inputs, *args, **kwargs)

    monkeypatch.setattr(OpenClip, "preprocess", count)
    words = ["--model", f"open_clip:local-dir:{clip_folder}", "--name", "test/clip", "--subset", "VisDoc"]
    words += ["--split", "validation", "--output_dir", str(tmp_path), "--device", "cpu"]
    main([*words, "--truncate_dims", "4,16", "--report"])
    shown = capsys.readouterr().out
    assert "first 4 numbers of the embedding:" in shown and "first 16 numbers" in shown
    assert sum(encoded) == 200, "100 queries and 100 pages, once for both sizes"
    small, whole = (float(line.split()[0]) for line in shown.splitlines() if "plain mean" in line)
    main([*words, "--output_dir", str(tmp_path / "whole")])
    assert float(capsys.readouterr().out.splitlines()[-1].split()[0]) == whole != small
    text = (tmp_path / "report/report.md").read_text()
    assert "## Embedding size" in text and f"| 4 | {small} (1 of 9) ±" in text and f"| 16 | {whole} (1 of 9) ±" in text
    assert "|  | test/clip |" in text, "a truncation is no model of its own in the other tables"
    assert Image.open(tmp_path / "report/sizes.png").width > 300
    stored = {path.parent for path in tmp_path.rglob("mini-1.*.json")} - {tmp_path / "whole"}
    assert any(path.parts[-2:] == ("experiments", "truncate_dim_4") for path in stored)
    with pytest.raises(SystemExit, match="asks for 17 numbers, but the embeddings have 16"):
        main([*words, "--truncate_dims", "4,17"])
    for wrong in ("0", "4,x", ""):
        with pytest.raises(SystemExit):
            parse([*words, "--truncate_dims", wrong])
    with pytest.raises(SystemExit):
        parse([*words, "--revision", "CIRR"])


@pytest.mark.slow
def test_a_pool_of_processes_gives_the_same_embeddings(backbone):
    model = pooled_model(backbone, "mean", "cpu")
    texts = [f"text number {i}" for i in range(20)]
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        pooled = model.encode_query(texts, pool=pool)
    finally:
        model.stop_multi_process_pool(pool)
    assert np.allclose(pooled, model.encode_query(texts), atol=1e-6)


def test_a_text_model_is_refused_by_a_task_with_pictures(backbone, tmp_path, capsys):
    words = ["--model", str(backbone), "--pooling", "mean", "--subset", "VisDoc", "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit, match="1 data sets have no score: mini-VisDoc"):
        main([*words, "--device", "cpu"])
    assert "mini-VisDoc: the model does not support ['image']: it takes ['text']" in capsys.readouterr().out
    assert not list(tmp_path.rglob("mini-1*.json"))


def test_wrong_commands_fail_before_a_model_is_loaded(tmp_path):
    base = ["--model", "does/not-exist"]
    with pytest.raises(SystemExit, match="unknown suite 'all'"):
        main([*base, "--suite", "all"])
    with pytest.raises(SystemExit, match="needs --data"):
        main([*base, "--suite", "mmeb-v2", "--data", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="fraction"):
        main([*base, "--suite", "mmeb-v2", "--data", str(tmp_path), "--fraction", "2", "--subset", "CIRR"])


def test_suites_by_name():
    base = ["--model", "x", "--suite"]
    assert build_suite(parse([*base, "mini"])).name == "mini-1(test)"
    assert (
        build_suite(parse([*base, "mini", "--split", "validation", "--subset", "I-QA"])).tasks[0].row.group == "I-QA"
    )
    stock = build_suite(parse([*base, "mteb:MIEB(lite)"]))
    assert len(stock.tasks) > 40 and not any(isinstance(task, MMEBRetrieval) for task in stock.tasks)


def test_results_are_stored_under_a_name_not_a_path(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert stored_name(parse(["--model", str(folder)])) == "local/my-model"
    assert stored_name(parse(["--model", str(folder), "--pooling", "mean"])) == "local/my-model-mean"
    assert stored_name(parse(["--model", "owner/model"])) == "owner/model"
    assert stored_name(parse(["--model", "open_clip:ViT-B-32/x"])) == "open_clip/ViT-B-32/x"


def test_mmeb_v2_from_the_command_line_ends_in_a_leaderboard_file_that_says_it_is_incomplete(
    clip_folder, write, tmp_path, capsys
):
    rows = {row.name: row for row in MMEB_V2}
    for name in ("CIRR", "MSVD", "ViDoSeek-page"):
        data = write(rows[name]).root
    words = ["--model", f"open_clip:local-dir:{clip_folder}", "--name", "test/clip", "--suite", "mmeb-v2", "--offline"]
    words += ["--data", str(data), "--subset", "CIRR", "MSVD", "ViDoSeek-page", "--device", "cpu", "--report"]
    main([*words, "--output_dir", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert "MMEB-V2.vlm2vec.CIRR: protocol vlm2vec, split page-fixed, 5 queries, 4 broken rows left out" in shown
    text = (tmp_path / "out/report/report.md").read_text()
    assert "(3 of 78)" in text and "| CIRR | I-RET | hit@1 | 5 of 1000 |" in text
    entry = json.loads(next((tmp_path / "out/report").glob("test__clip.json")).read_text())
    missing = [name for group in entry["metrics"].values() for name, found in group.items() if found == "FILE_N/A"]
    assert len(missing) == 75
    assert entry["metrics"]["visdoc"]["ViDoSeek-page-fixed"]["num_data"] == 1142
    assert {"hit@1", "ndcg_linear@5", "mrr@10", "num_pred"} <= entry["metrics"]["image"]["CIRR"].keys()
