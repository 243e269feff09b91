"""Models that differ in how they pool, trained on the same pairs in the same order, scored on the same searches.

How a variant is named on the command line stands in `variant.py`.
"""

from __future__ import annotations

import gc
import inspect
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from datasets import DatasetDict
from peft import LoraConfig
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from tqdm.auto import tqdm
from transformers import AutoProcessor, AutoTokenizer, PrinterCallback, TrainerCallback

from recipes.data.searches import Search
from recipes.research.controls import btok_loss
from recipes.research.prompted import prompted_model
from recipes.research.significance import Run
from recipes.research.variant import Variant, VariantSettings
from st_btok import BTokCallback, BTokLoss, CachedBTokLoss, btok_lora_config, build_model, language_model_linears


def build_variant(
    variant: Variant, settings: VariantSettings, seed: int
) -> tuple[SentenceTransformer, torch.nn.Module]:
    """The untrained model and its loss; `seed` is that of the BToks' token embeddings and of the adapters."""
    torch.manual_seed(seed)
    known = set(inspect.signature(build_model).parameters)
    own = {name: value for name, value in variant.options.items() if name in known}
    rest = {name: value for name, value in variant.options.items() if name not in known | {"train_btoks", "row_lr"}}
    cached: dict[str, Any] = {"mini_batch_size": settings.mini_batch_size} if settings.mini_batch_size else {}
    if variant.pooling == "btok":
        own = {"seed": seed, "template": template_of(settings.backbone), **settings.build, **own}
        if rest.pop("opened", False):
            own["processor_kwargs"] = {"chat_template": opened_template(settings.backbone)}
        model = build_model(settings.backbone, device=settings.device, **own)
        trained = variant.options.get("train_btoks", True)
        if settings.tuning == "lora":
            rows = {} if trained else {"trainable_token_indices": None}
            model.add_adapter(btok_lora_config(model, **settings.lora, **rows))
        loss = btok_loss(model, **cached, **rest)
        if settings.tuning != "lora" and not trained:
            _freeze_btoks(loss)
        return model, loss
    if own:
        raise ValueError(f"{variant.pooling} has no bottleneck tokens, so {sorted(own)} mean nothing to it.")
    place = {name: rest.pop(name) for name in ("prompt", "opened") if name in rest}
    plain = {name: value for name, value in settings.build.items() if not name.endswith("_pixels")}
    model = prompted_model(settings.backbone, variant.pooling, device=settings.device, **plain, **place)
    if "image" in model[0].modalities:  # a BTok model says how large pictures are, so that all variants agree
        template = template_of(settings.backbone)
        other = build_model(settings.backbone, device="cpu", **{"template": template, **settings.build})
        if "image" in other[0].processing_kwargs:
            model[0].processing_kwargs = {**model[0].processing_kwargs, "image": other[0].processing_kwargs["image"]}
    if settings.tuning == "lora":
        layers = language_model_linears(model[0].model)  # those that `btok_lora_config` adapts
        lora = {"r" if name == "r" else f"lora_{name}": value for name, value in settings.lora.items()}
        model.add_adapter(LoraConfig(**lora, target_modules=layers))
    ranking = CachedMultipleNegativesRankingLoss if cached else MultipleNegativesRankingLoss
    return model, ranking(model, **{"scale": 50.0, **cached, **rest})


def template_of(backbone: str) -> str:
    """The template of the BToks' inputs, under which they read what the other poolings read, and the BToks.

    Returns:
        `chat`, or `plain` for a backbone without a chat template, whose other poolings read the text without one.
    """
    try:
        processor = AutoProcessor.from_pretrained(backbone)
    except ValueError:  # neither a processor nor a tokenizer that transformers finds by itself
        processor = AutoTokenizer.from_pretrained(backbone)
    return "chat" if processor.chat_template else "plain"


def opened_template(backbone: str) -> str:
    """The backbone's own chat template, which opens the assistant's turn behind every input."""
    return f"{{%- set add_generation_prompt = true -%}}{AutoProcessor.from_pretrained(backbone).chat_template}"


def _freeze_btoks(loss: BTokLoss | CachedBTokLoss) -> None:
    """The token embeddings of the BToks get no gradient; all others do."""
    matrix = loss.model[0].model.get_input_embeddings().weight
    kept = torch.ones(len(matrix), 1, device=matrix.device)
    kept[getattr(loss, "loss", loss).btoks] = 0
    matrix.register_hook(lambda grad: grad * kept)


class _Watch(TrainerCallback):
    """A progress bar with the parts of the loss, and the time of every step."""

    def __init__(self, title: str) -> None:
        self.title, self.bar = title, None
        self.times: list[float] = []
        self.cpu_times: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._take()
        self.bar = tqdm(total=state.max_steps, desc=self.title, unit="step", leave=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._take()
        self.bar.update()

    def _take(self) -> None:
        self.times.append(time.perf_counter())
        self.cpu_times.append(time.process_time())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        parts = {name: f"{logs[name]:.2f}" for name in ("loss", "ranking", "condensation_nll") if name in logs}
        self.bar.set_postfix(parts)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


def train_variant(
    name: str,
    variant: Variant,
    settings: VariantSettings,
    seed: int,
    data: DatasetDict,
    searches: Sequence[Search],
    title: str = "",
    callbacks: Callable[[SentenceTransformer], list[TrainerCallback]] = lambda model: [],
) -> tuple[SentenceTransformer, Run]:
    """Score, train, score again.

    Args:
        name: What the variant is called in tables.
        variant: The model.
        settings: What it shares with the others.
        seed: Of model, order of the pairs, dropout: every variant of a seed sees the same batches.
        data: Data sets of pairs by name.
        searches: What it is scored on.
        title: Label of the progress bar.
        callbacks: Further callbacks of the Trainer, for the model that it trains.

    Returns:
        The trained model and what was measured.

    Raises:
        ValueError: A data set has fewer pairs than a batch.
    """
    for source, table in data.items():
        if len(table) < settings.batch_size:
            raise ValueError(
                f"a batch needs {settings.batch_size} pairs of one data set, but {source} trains on {len(table)}. "
                "Lower --batch_size."
            )
    model, loss = build_variant(variant, settings, seed)
    before = {search.name: search.ranks(model) for search in searches}
    training = fit_variant(model, loss, variant, settings, seed, data, title or name, callbacks)
    del loss
    after = {search.name: search.ranks(model) for search in searches}
    seconds = float(np.median(np.diff(training.times)))
    run = Run(name, seed, before, after, settings.steps, seconds, training.times[-1] - training.times[0], training.log)
    return model, run


@dataclass(frozen=True)
class Training:
    """What a training took and logged.

    Args:
        times: Clock at the start and after each step, in seconds.
        cpu_times: Processor time of this process at the same moments, which other processes don't lengthen.
        log: Loss and its parts by step.
    """

    times: Sequence[float]
    cpu_times: Sequence[float]
    log: Sequence[Mapping[str, float]]


def fit_variant(
    model: SentenceTransformer,
    loss: torch.nn.Module,
    variant: Variant,
    settings: VariantSettings,
    seed: int,
    data: DatasetDict,
    title: str = "",
    callbacks: Callable[[SentenceTransformer], list[TrainerCallback]] = lambda model: [],
) -> Training:
    """Train a model and a loss that `build_variant` made; the other arguments are those of `train_variant`."""
    card = model.model_card_data
    card.widget = [{}]  # or the Trainer would decode a thousand rows for examples of a card that nobody reads
    rates = {}
    if "row_lr" in variant.options:
        rates = {r"trainable_tokens_delta": variant.options["row_lr"] * settings.learning_rate}
    folder = tempfile.TemporaryDirectory()
    arguments = SentenceTransformerTrainingArguments(
        output_dir=folder.name,
        per_device_train_batch_size=settings.batch_size,
        dataloader_drop_last=True,  # a short batch has fewer negatives
        max_steps=settings.steps,
        learning_rate=settings.learning_rate,
        learning_rate_mapping=rates,
        lr_scheduler_type="cosine",
        warmup_steps=min(100, settings.steps // 10) if settings.warmup_steps is None else settings.warmup_steps,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        seed=seed,
        bf16=settings.bf16,
        use_cpu=settings.device == "cpu" or not torch.accelerator.is_available(),
        disable_tqdm=True,
    )
    watch = _Watch(title)
    # In this order: the bar shows what the first one logs.
    followers = [BTokCallback(), watch, *callbacks(model)]
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=data, loss=loss, callbacks=followers
    )
    card.widget = []
    trainer.remove_callback(PrinterCallback)  # which prints a dictionary for every step
    trainer.train()
    folder.cleanup()
    kept = ("step", "loss", "ranking", "condensation_nll")
    log = [{key: row[key] for key in kept if key in row} for row in trainer.state.log_history if "loss" in row]
    del trainer
    gc.collect()  # the Trainer refers to itself: the next model would stand beside this one
    return Training(watch.times, watch.cpu_times, log)


def quiet() -> None:
    """Silence what says nothing in a comparison: each is repeated for every model that is built."""
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("sentence_transformers", "st_btok.adapters"):  # "N words without a weighting value"; no checkpoints
        logging.getLogger(name).setLevel(logging.ERROR)
