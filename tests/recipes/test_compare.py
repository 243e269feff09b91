"""The comparison end to end: the same batches for every variant, equal steps or time, going on after a kill."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from recipes.compare import CompareConfig
from recipes.data.user_data import load_user_data
from recipes.research import comparison as recipe
from recipes.research import variants
from recipes.research.comparison import compare
from recipes.research.controls import ControlLoss
from recipes.research.prompted import prompted_model
from recipes.research.significance import Run
from recipes.research.variant import Variant, options_of
from st_btok import BTokLoss, build_model
from st_btok.model_parts import find_btoks
from tests.backbones import build


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("compare")
    backbone, processor = build("llama")
    backbone.save_pretrained(path / "backbone")
    processor.save_pretrained(path / "backbone")
    rows = [{"query": f"find number {i}", "positive": f"the {i}th text"} for i in range(30)]
    (path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(folder, output, **options):
    defaults = {"max_steps": 3, "seeds": 2, "batch_size": 4, "learning_rate": 1e-2, "tuning": "full", "device": "cpu"}
    options = {"variants": ["btok", "lasttoken"], **defaults, **options}
    return CompareConfig(
        data=[str(folder / "pairs.jsonl")], backbone=str(folder / "backbone"), output_dir=str(output), **options
    )


def test_variants_see_the_same_batches_and_a_second_call_trains_nothing(folder, tmp_path, monkeypatch, capsys):
    seen, losses = {}, []

    class Watch(variants.SentenceTransformerTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            rows = [column.tolist() for name, column in inputs.items() if name.endswith("input_ids")]
            seen.setdefault(self.loss.__class__.__name__, []).append(np.array(rows[0]).shape[0])
            losses.append(self.loss)
            return super().training_step(model, inputs, *args, **kwargs)

        def get_batch_samples(self, iterator, *args, **kwargs):
            batches, count = super().get_batch_samples(iterator, *args, **kwargs)
            texts = [
                self.processing_class.batch_decode(b["query_input_ids"], skip_special_tokens=True) for b in batches
            ]
            seen.setdefault("texts", []).extend(texts)
            return batches, count

    monkeypatch.setattr(variants, "SentenceTransformerTrainer", Watch)
    options = config(folder, tmp_path / "out")
    text = compare(options)
    wording = [[line.split("number")[-1].split()[0] for line in batch] for batch in seen["texts"]]
    first, second = wording[:6], wording[6:]  # seed 0: btok, lasttoken; seed 1
    assert first[:3] == first[3:] and second[:3] == second[3:] and first != second
    assert "| pairs: query → positive | btok |" in text and "| pairs: positive → query | lasttoken |" in text
    lines = [json.loads(line) for line in (tmp_path / "out/runs.jsonl").read_text().splitlines()]
    assert [(line["variant"], line["seed"]) for line in lines] == [
        ("btok", 0), ("lasttoken", 0), ("btok", 1), ("lasttoken", 1)
    ]  # fmt: skip
    assert any(line["before"] != line["after"] for line in lines) and (tmp_path / "out/comparison.png").exists()
    printed, errors = capsys.readouterr()
    assert "widget" not in errors, "the Trainer would decode a thousand rows for examples of a model card"
    assert "24 pairs train, 6 are held out" in printed and printed.count("3 steps in") == 4 and "{" not in printed
    steps = len(losses)
    # A torn run is made again, and a pooling can be added; finished runs are not repeated.
    (tmp_path / "out/runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:3]))
    assert compare(config(folder, tmp_path / "out", variants=["btok", "lasttoken", "mean"])).count("mean") >= 2
    assert len(losses) - steps == 9, "lasttoken of seed 1 and two of mean"


def test_equal_time_gives_a_slower_variant_fewer_steps(folder, tmp_path, monkeypatch):
    pace = {"btok": 0.2, "lasttoken": 0.1}
    made = []

    def train(name, variant, settings, seed, data, searches, title=""):
        made.append((name, settings.steps))
        ranks = {search.name: np.ones(len(search.queries), int) for search in searches}
        return None, Run(name, seed, ranks, ranks, settings.steps, pace[name], 1.0, [{"step": 1, "loss": 1.0}])

    monkeypatch.setattr(recipe, "train_variant", train)
    compare(config(folder, tmp_path, equal="time", max_steps=20, seeds=1))
    assert made == [("btok", recipe.CALIBRATION), ("lasttoken", recipe.CALIBRATION), ("btok", 10), ("lasttoken", 20)]
    compare(config(folder, tmp_path, equal="time", max_steps=20, seeds=1))
    assert len(made) == 4


def test_a_run_is_made_again_when_held_out_pairs_change_and_a_variant_that_fails_is_named(
    folder, tmp_path, monkeypatch
):
    made = []

    def train(name, variant, settings, seed, data, searches, title=""):
        if len(made) == 3:
            raise ValueError("vectors must be finite")
        made.append(name)
        return None, Run(name, seed, {}, {}, settings.steps, 0.1, 1.0, [])

    (tmp_path / "a.jsonl").write_text('{"query": "one", "positive": "first"}\n')
    (tmp_path / "b.jsonl").write_text('{"query": "one", "positive": "second"}\n')
    training = load_user_data([str(folder / "pairs.jsonl")])
    first, other = ([replace(load_user_data([str(tmp_path / f"{name}.jsonl")])[0], name="x")] for name in "ab")
    monkeypatch.setattr(recipe, "train_variant", train)
    options = config(folder, tmp_path, seeds=1, variants=["btok"])
    for held_out, runs in ((first, 1), (first, 1), (other, 2), (first, 2), (other, 2)):
        recipe.run_all(options, training, held_out, [])
        assert len(made) == runs
    more = config(folder, tmp_path, seeds=1, variants=["btok", "lasttoken", "mean"])
    with pytest.raises(ValueError, match=r"mean, seed 0 \(3 of 3\): vectors must be finite"):
        recipe.run_all(more, training, first, [])
    assert made == ["btok", "btok", "lasttoken"]


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_untrained_rows_stay_as_they_start(folder, tmp_path, tuning):
    """`train_btoks=false`; the other weights train, and trained rows move."""
    data = datasets.DatasetDict(
        {"pairs": datasets.Dataset.from_json(str(folder / "pairs.jsonl"), cache_dir=str(tmp_path))}
    )
    settings = variants.VariantSettings(
        str(folder / "backbone"), 2, batch_size=4, learning_rate=1e-2, tuning=tuning, device="cpu"
    )
    rows = {}
    for text in ("btok:train_btoks=false", "btok"):
        variant = Variant.parse(text)
        start, _ = variants.build_variant(variant, settings, 0)
        model, _ = variants.train_variant(text, variant, settings, 0, data, [])
        ids = find_btoks(model)[1]
        rows[text] = [embed(m[0].model.get_input_embeddings(), ids) for m in (start, model)]
        assert not np.allclose(start.encode("x"), model.encode("x"), atol=1e-3), "nothing trained"
    assert np.array_equal(*rows["btok:train_btoks=false"]) and not np.allclose(*rows["btok"], atol=1e-4)


def test_rows_can_learn_faster(folder, tmp_path):
    """`row_lr`: with a multiple of 0 the rows stand still; a model without such parameters is refused."""
    data = datasets.DatasetDict(
        {"pairs": datasets.Dataset.from_json(str(folder / "pairs.jsonl"), cache_dir=str(tmp_path))}
    )
    settings = variants.VariantSettings(str(folder / "backbone"), 2, 4, learning_rate=1e-2, device="cpu")
    moved = {}
    for factor in (0, 1, 10):
        variant = Variant.parse(f"btok:row_lr={factor}")
        start, _ = variants.build_variant(variant, settings, 0)
        model, _ = variants.train_variant("x", variant, settings, 0, data, [])
        ids = find_btoks(model)[1]
        before, after = (embed(m[0].model.get_input_embeddings(), ids) for m in (start, model))
        moved[factor] = np.abs(after - before).max()
    assert moved[0] == 0 and moved[10] > 5 * moved[1] > 0


def embed(embeddings, ids):
    with torch.no_grad():
        return embeddings(torch.tensor(ids)).numpy()


def test_options_of_a_variant_reach_the_builder_and_the_loss(folder):
    settings = variants.VariantSettings(str(folder / "backbone"), 1, device="cpu", tuning="lora")
    model, loss = variants.build_variant(
        Variant.parse("btok:readout=last,num_btoks=1,condensation_weight=0"), settings, 0
    )
    assert loss.get_config_dict()["condensation_weight"] == 0 and len(loss.btoks) == 1 and len(model) == 3
    plain, loss = variants.build_variant(Variant.parse("lasttoken:scale=20"), settings, 0)
    assert loss.scale == 20
    adapted = [
        {name.split(".lora_A")[0] for name, _ in m.named_parameters() if "lora_A" in name} for m in (model, plain)
    ]
    assert adapted[0] == adapted[1] and adapted[0], "the same layers train"


def test_what_cannot_run_is_refused_first(folder, tmp_path):
    with pytest.raises(ValueError, match="pass --data"):
        CompareConfig()
    with pytest.raises(ValueError, match="must be one of --variants"):
        config(folder, tmp_path, variants=["btok"], baseline="lasttoken")
    with pytest.raises(ValueError, match="pooling must be one of"):
        config(folder, tmp_path, variants=["cls", "lasttoken"])
    with pytest.raises(ValueError, match="must be name=value"):
        Variant.parse("btok:readout")
    with pytest.raises(ValueError, match="a batch needs 64 pairs of one data set, but pairs trains on 24"):
        compare(config(folder, tmp_path / "a", batch_size=64))
    settings = variants.VariantSettings(str(folder / "backbone"), 1, device="cpu")
    with pytest.raises(ValueError, match="mean nothing to it"):
        variants.build_variant(Variant("lasttoken", {"num_btoks": 2}), settings, 0)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "btok:condensation_wieght=0",
            "'condensation_wieght' in .* no option of btok. Did you mean condensation_weig",
        ),
        ("btok:readout=last,num_btok=1", "Did you mean num_btoks?"),
        ("lasttoken:promt= In short:", "Did you mean prompt?"),
        ("lasttoken:num_btoks=2", "no option of lasttoken. It takes directions, .*prompt, scale"),
        ("btok:prompt=x", "no option of btok. Did you mean prompts?"),
        ("btok:device=cpu", "no option of btok"),
        ("lastoken", "Did you mean lasttoken?"),
    ],
)
def test_an_unknown_option_of_a_variant_is_refused_with_the_nearest_name(folder, tmp_path, text, told):
    with pytest.raises(ValueError, match=told):
        config(folder, tmp_path, variants=[text, "lasttoken"])


def test_options_are_those_of_the_signatures():
    """Read from the source by `options_of`; here from the imported functions."""

    def names(*functions):
        return {name for function in functions for name in inspect.signature(function).parameters}

    given = {"model", "backbone", "processor", "device"}  # what a comparison sets itself
    losses = names(BTokLoss, ControlLoss, MultipleNegativesRankingLoss) - {"ranking", "options"}
    assert options_of("btok") == (names(build_model) | losses | {"opened", "train_btoks", "row_lr"}) - given
    plain = names(MultipleNegativesRankingLoss) | (names(prompted_model) & {"prompt", "opened"})
    assert options_of("lasttoken") == options_of("mean") == plain - given


def test_comparing_does_not_wait_for_mteb():
    command = "import sys, recipes.research.comparison, recipes.study.study, recipes.training.run\n"
    command += "sys.exit('mteb' in sys.modules)"
    subprocess.run([sys.executable, "-c", command], cwd=Path(__file__).parents[2], check=True)
