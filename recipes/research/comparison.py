"""One comparison, from checked pairs to a table and a verdict: what `recipes.compare` does once its flags are read."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

import torch
from datasets import DatasetDict

from recipes.compare import CompareConfig
from recipes.data.holdout import hold_out
from recipes.data.searches import Search, searches_of
from recipes.data.training_pairs import Source
from recipes.data.user_data import load_user_data
from recipes.research.run_log import RunLog
from recipes.research.significance import Run, draw, table, verdicts
from recipes.research.variant import Variant, VariantSettings
from recipes.research.variants import quiet, train_variant
from recipes.training.resume import only_training_in, run_fingerprint

CALIBRATION = 8  # steps; the median of their times decides how many fit the baseline's time


def compare(config: CompareConfig) -> str:
    """Train and score what is not in `runs.jsonl` yet; writes table and figure, and returns table and verdicts."""
    with only_training_in(config.output_dir):
        sources = load_user_data(config.data, on_error=config.on_error, check_media=config.check_media)
        sources = [source.without_negatives() for source in sources]
        training, held_out = hold_out(sources, config.validation_size, share=config.validation_share)
        if not held_out:
            raise ValueError("nothing could be held out, so nothing can be compared; see the warnings above.")
        searches = [search for source in held_out for search in searches_of(source, config.batch_size)]
        print(
            f"{sum(len(source.pairs) for source in training)} pairs train, "
            f"{sum(len(source.pairs) for source in held_out)} are held out; {len(config.variants)} variants x "
            f"{config.seeds} seeds.",
            flush=True,
        )
        runs = run_all(config, training, held_out, searches)
        order = {variant: place for place, variant in enumerate(config.variants)}
        runs = sorted(runs, key=lambda run: (order[run.variant], run.seed))
        pairs = sum(len(source.pairs) for source in held_out)
        text = table(runs, config.baseline, {search.name: len(search.documents) for search in searches}, pairs)
        text += "\n\n" + "\n".join(verdicts(runs, config.baseline, pairs))
        output = Path(config.output_dir)
        (output / "comparison.md").write_text(text + "\n", encoding="utf-8")
        draw(runs, output / "comparison.png")
    return text


def run_all(
    config: CompareConfig, training: Sequence[Source], held_out: Sequence[Source], searches: Sequence[Search]
) -> list[Run]:
    """Every run, from `runs.jsonl` where it has one with these settings and these pairs, trained on and held out.

    Raises:
        ValueError: If a variant can't be trained or scored; the message names it, and finished runs are kept.
    """
    shared = {name: value for name, value in asdict(config).items() if name not in _FREE}
    identity = run_fingerprint(training, config.backbone, shared)
    identity["held_out"] = run_fingerprint(held_out, config.backbone, {})["data"]
    key = sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    log = RunLog(Path(config.output_dir) / "runs.jsonl")
    data = DatasetDict({source.name: source.dataset() for source in training})
    same = ("backbone", "batch_size", "mini_batch_size", "learning_rate", "tuning", "device", "bf16")
    weights = {"dtype": getattr(torch, config.dtype), "attn_implementation": config.attn_implementation}
    build = {"max_seq_length": config.max_seq_length, "model_kwargs": weights}
    pixels = {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
    build |= {name: value for name, value in pixels.items() if value is not None}
    lora = {"r": config.lora_r, "alpha": config.lora_alpha, "dropout": config.lora_dropout}
    settings = VariantSettings(
        **{name: getattr(config, name) for name in same}, steps=config.max_steps, build=build, lora=lora
    )
    steps = _steps(config, settings, data, log, key)
    runs = []
    wanted = [(seed, variant) for seed in range(config.seeds) for variant in config.variants]
    for number, (seed, variant) in enumerate(wanted, start=1):
        if found := log.find({"key": key, "seed": seed, "variant": variant}):
            runs.append(Run.from_json(found))
            continue
        own = replace(settings, steps=steps[variant])
        title = f"{variant}, seed {seed} ({number} of {len(wanted)})"
        try:
            model, run = train_variant(variant, Variant.parse(variant), own, seed, data, searches, title)
        except ValueError as error:
            raise ValueError(f"{title}: {error}") from error
        del model
        runs.append(run)
        log.add({"key": key, **run.to_json()})
        print(f"{title}: {run.summary()}", flush=True)
    return runs


# What a run does not depend on: more seeds or variants may be added to a finished comparison.
_FREE = ("data", "backbone", "output_dir", "variants", "baseline", "seeds")


def _steps(
    config: CompareConfig, settings: VariantSettings, data: DatasetDict, log: RunLog, key: str
) -> dict[str, int]:
    """Steps of each variant: the same, or as many as fit the time of the baseline's."""
    if config.equal == "steps":
        return dict.fromkeys(config.variants, config.max_steps)
    pace = {line["variant"]: line["pace"] for line in log.lines if line["key"] == key and "pace" in line}
    for variant in config.variants:
        if variant not in pace:
            short = replace(settings, steps=CALIBRATION)
            _, run = train_variant(variant, Variant.parse(variant), short, 0, data, [], f"{variant}: pace")
            pace[variant] = run.step_seconds
            log.add({"key": key, "variant": variant, "pace": run.step_seconds})
    return {
        variant: max(1, round(config.max_steps * pace[config.baseline] / pace[variant])) for variant in config.variants
    }


def main(config: CompareConfig) -> None:
    """Compare, print the table and the verdicts, and say where everything is."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    quiet()
    print("\n" + compare(config))
    output = config.output_dir
    print(f"\n{output}/comparison.md, {output}/comparison.png, {output}/runs.jsonl")
