"""One training, from checked data to a saved model: what `recipes.train` does once its flags are read."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import DatasetDict, IterableDataset
from huggingface_hub import constants
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
)
from sentence_transformers.base.evaluation import BaseEvaluator, SequentialEvaluator

from recipes.data.blocks import distinct_rows, weighted_blocks
from recipes.data.hard_negatives import with_mined_negatives
from recipes.data.holdout import hold_out, mean_of_sources
from recipes.data.mmeb_train import load_mmeb_train
from recipes.data.streaming import open_streams
from recipes.data.training_card import describe_data, write_card, write_skipped
from recipes.data.training_pairs import Source
from recipes.data.user_data import load_user_data
from recipes.training.base import check_backbone_place, written_base
from recipes.training.config import TrainConfig, parse
from recipes.training.interrupt import SaveOnInterrupt
from recipes.training.resume import (
    check_fingerprint,
    media_changed,
    newest_complete,
    only_training_in,
    run_fingerprint,
    write_fingerprint,
)
from recipes.training.validation import SCORES, WriteScores, before_and_after
from st_btok import BTokCallback, BTokLoss, CachedBTokLoss, btok_lora_config, build_model, merge_adapters

logger = logging.getLogger(__name__)

# The settings that a resumed training must share with the interrupted one: each decides what is learned, or from which
# rows. `max_steps` and `num_train_epochs` are none of them, so that a training can be made longer; nor are those that
# only decide what fits into memory (`mini_batch_size`, gradient checkpointing).
DECIDING = (
    *("num_btoks", "readout", "template", "max_seq_length", "min_pixels", "max_pixels", "dtype"),
    *("tuning", "lora_r", "lora_alpha", "lora_dropout", "prompts"),
    *("stream", "shuffle_buffer", "data_weights", "mix", "block_size", "distinct", "seed", "data_seed", "world_size"),
    *("per_device_train_batch_size", "gradient_accumulation_steps"),
    *("scale", "condensation_weight", "condensation_steps", "target", "max_target_tokens", "route"),
    *("false_negative_margin", "gather_across_devices"),
    # Of the checkpoint's optimizer and schedule, which would go on with their own values in silence.
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "fp16"),
)


def read_sources(config: TrainConfig, recheck: bool = False) -> list[Source]:
    """All sources of the training, checked; `recheck`: also what was checked before."""
    check = {
        "on_error": config.on_error,
        "check_media": config.check_media,
        "num_proc": config.check_processes,
        "recheck": config.recheck or recheck,
    }
    sources: list[Source] = []
    # One process reads and writes the cache, then the others read it.
    with config.main_process_first(desc="check of the data"):
        if config.mmeb_root:
            options = {"offline": constants.HF_HUB_OFFLINE, "max_rows": config.max_rows, **check}
            sources += load_mmeb_train(config.mmeb_root, config.mmeb_sources, **options)
        sources += load_user_data(config.data, config.data_weights, **check)
    if not sources:
        raise ValueError("there is nothing to train on: pass --data or --mmeb_root.")
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ValueError(f"sources need different names, got {names}. Rename your data files.")
    return sources


def build(config: TrainConfig, sources: Sequence[Source]) -> SentenceTransformer:
    """The model, with adapters if it is tuned by them; their base is saved, so that checkpoints can be loaded.

    Raises:
        ValueError: If the sources hold media that the backbone does not read.
    """
    model = build_model(
        config.backbone,
        config.num_btoks,
        config.readout,
        config.template,
        max_seq_length=config.max_seq_length,
        min_pixels=config.min_pixels,
        max_pixels=config.max_pixels,
        prompts=config.model_prompts([source.name for source in sources]) or None,
        device=str(config.device),
        model_kwargs={"dtype": getattr(torch, config.dtype), "attn_implementation": config.attn_implementation},
    )
    read = set(model[0].modalities)
    for source in sources:
        if foreign := source.media() - read:
            raise ValueError(
                f"{source.name} holds {' and '.join(sorted(foreign))} inputs, but the backbone {config.backbone} "
                f"reads {', '.join(sorted(read - {'message'}))} only. Pass another backbone, or leave this source out."
            )
    if config.tuning != "full":
        lora = {"r": config.lora_r, "alpha": config.lora_alpha, "dropout": config.lora_dropout}
        # Checkpoints refer to it; one process writes both.
        with written_base(str(config.output_dir)) if config.process_index == 0 else nullcontext() as base:
            adapters = btok_lora_config(model, **lora, use_dora=config.tuning == "dora", base=base)
        model.add_adapter(adapters)
        for parameter in model.parameters():  # over a half-precision base, what trains is float32 all the same
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model


def losses(config: TrainConfig, model: SentenceTransformer, sources: Sequence[Source]) -> dict[str, torch.nn.Module]:
    """A loss for every source, shared among those with the same generated side."""
    options = {
        "scale": config.scale,
        "condensation_weight": config.condensation_weight,
        "condensation_steps": config.condensation_steps,
        "max_target_tokens": config.max_target_tokens,
        "route": config.route,
        "false_negative_margin": config.false_negative_margin,
        "gather_across_devices": config.gather_across_devices,
        "instructions": [text for source in sources for text in source.instructions],
    }
    cls = BTokLoss
    if config.mini_batch_size:
        cls, options["mini_batch_size"] = CachedBTokLoss, config.mini_batch_size
    targets = {source.name: config.target or source.target for source in sources}
    made = {target: cls(model, target=target, **options) for target in sorted(set(targets.values()))}
    return {name: made[target] for name, target in targets.items()}


def validation(config: TrainConfig, held_out: Sequence[Source]) -> BaseEvaluator | None:
    """What scores the model in training; `None` if there is nothing held out."""
    evaluators: list[BaseEvaluator] = []
    if held_out:
        prompt_of = config.prompt_of if config.prompts else None
        evaluators.append(mean_of_sources(held_out, config.per_device_eval_batch_size, prompt_of))
    if config.validation_suite:
        mini = import_module("evaluation.mini")  # needs mteb, the extra `eval`
        evaluators.append(mini.evaluator_for(config.validation_suite, batch_size=config.per_device_eval_batch_size))
    return SequentialEvaluator(evaluators) if evaluators else None


@dataclass(frozen=True)
class Data:
    """What a training reads.

    Attributes:
        rows: Inputs of sentence-transformers: by source, or streamed.
        sources: All sources as they were read; the first rows of streamed ones.
        training: Their training rows.
        held_out: Their validation rows.
        files: Names of the files of streamed sources.
    """

    rows: DatasetDict | IterableDataset
    sources: Sequence[Source]
    training: Sequence[Source]
    held_out: Sequence[Source]
    files: Mapping[str, Sequence[str]] = field(default_factory=dict)


def checked(config: TrainConfig) -> Data:
    """Sources whose every row is checked before training."""
    # 1. Data.
    sources = read_sources(config)
    if config.resume and not config.recheck and media_changed(str(config.output_dir), sources):
        logger.info("A file of the pairs is newer than the interrupted training, so all are checked again.")
        sources = read_sources(config, recheck=True)
    if config.process_index == 0:
        write_skipped(Path(config.output_dir) / "skipped_rows.jsonl", sources)
    if config.hard_negatives != "data":
        sources = [source.without_negatives() for source in sources]
    # 2. Validation rows.
    training, held_out = hold_out(sources, config.validation_size, config.seed)
    # 3. Hard negatives.
    if config.hard_negatives == "mine":
        miner = SentenceTransformer(config.miner, device=str(config.device))
        options = {"batch_size": config.per_device_eval_batch_size}
        training = [with_mined_negatives(source, miner, config.num_negatives, **options) for source in training]
    rows = DatasetDict({source.name: source.dataset() for source in training})
    return Data(rows, sources, training, held_out)


def streamed(config: TrainConfig) -> Data:
    """Sources that are read and checked while training."""
    skipped = Path(config.output_dir) / "skipped_rows.jsonl"
    found = open_streams(
        config.data,
        config.data_weights,
        held_out=config.validation_size,
        buffer=config.shuffle_buffer,
        seed=config.seed,
        skipped=skipped,
        negatives=config.hard_negatives == "data",
        on_error=config.on_error,
        check_media=config.check_media,
    )
    if config.process_index == 0 and not config.resume:
        write_skipped(skipped, found.heads)
    return Data(found.rows, found.heads, found.heads, found.held_out, found.files)


def check_against(config: TrainConfig, sources: Sequence[Source]) -> None:
    """Refuse settings that the data can't meet, before a model is loaded."""
    config.check_prompts({source.name: source.pairs.column_names for source in sources})
    size = config.per_device_train_batch_size
    short = {source.name: len(source.pairs) for source in sources if len(source.pairs) < size}
    if short and config.mix == "weighted" and not config.stream:
        raise ValueError(
            f"every data set needs at least one batch of --batch_size {size} rows to train on, but there are {short}. "
            "Pass a smaller --batch_size, or leave these data sets out."
        )


def begin(config: TrainConfig, training: Sequence[Source], files: Mapping[str, Sequence[str]]) -> Path | None:
    """The checkpoint to go on from, if any, once it is sure to belong to the same training."""
    settings = {name: getattr(config, name) for name in DECIDING}
    settings |= {f"files of {name}": "; ".join(names) for name, names in files.items()}
    # JSON objects that differ in order are equal, and the order of the sources decides that of the rows.
    settings["order of data"] = [source.name for source in training]
    settings["instructions"] = [text for source in training for text in source.instructions]
    identity = run_fingerprint(training, config.backbone, settings)
    last = newest_complete(config.output_dir) if config.resume else None
    if last and not config.allow_changes:
        check_fingerprint(config.output_dir, identity)
    if config.resume:
        logger.info("Training goes on from %s.", last.name if last else "the start: there is no whole checkpoint")
    if config.process_index == 0:
        write_fingerprint(config.output_dir, identity)
    return last


def train(config: TrainConfig) -> Path:
    """Run the whole training; returns the folder of the trained model.

    Raises:
        ValueError: No data or no backbone, broken data with `on_error="raise"`, a used `output_dir`, or resuming
            another training than the one that was interrupted.
        RuntimeError: Another process trains in `output_dir`.
    """
    if not config.backbone:
        raise ValueError("pass --backbone or --preset.")
    check_backbone_place(config.backbone, str(config.output_dir))
    if config.process_index:  # the first process holds the folder for all of them
        return _train(config)
    with only_training_in(config.output_dir):
        return _train(config)


def how_to_go_on(config: TrainConfig) -> str:
    """One line for who stopped a training."""
    last = newest_complete(config.output_dir)
    if last is None:
        return "stopped before the first checkpoint. Start it again with the same command."
    return f"stopped; everything up to {last} is saved. The same command with --resume goes on from there."


def score_nothing(arguments: TrainConfig) -> None:
    """No evaluation: there is no held-out row, perhaps because no data set has enough rows to hold some out."""
    if arguments.load_best_model_at_end:
        raise ValueError("--load_best_model_at_end needs held-out rows, but no data set has enough. Leave it out.")
    arguments.eval_on_start, arguments.eval_strategy = False, "no"


def is_scored(trainer: SentenceTransformerTrainer) -> bool:
    """Whether the log holds the scores of the model as it is: after the last step, or of the best checkpoint."""
    state = trainer.state
    of_best = trainer.args.load_best_model_at_end and state.best_global_step
    shown = state.best_global_step if of_best else state.global_step
    return any("eval_runtime" in entry and entry["step"] == shown for entry in state.log_history)


def training_arguments(config: TrainConfig, training: Sequence[Source]) -> TrainConfig:
    """The Trainer's arguments: which source each batch is from, and which rows."""
    arguments = copy.copy(config)
    if config.stream:
        # accelerate would cut every tensor of a batch at as many rows as it has pairs, pictures' patches too.
        arguments.accelerator_config = replace(arguments.accelerator_config, dispatch_batches=False)
    elif config.mix == "weighted":
        weights = {source.name: source.weight for source in training}
        arguments.multi_dataset_batch_sampler = weighted_blocks(weights, config.block_size)
        arguments.dataloader_drop_last = True
    else:
        arguments.multi_dataset_batch_sampler = config.mix
    if config.distinct:
        arguments.batch_sampler = distinct_rows
    return arguments


def _train(config: TrainConfig) -> Path:
    started = sorted(Path(config.output_dir).glob("checkpoint-*"))
    if started and not config.resume:
        raise ValueError(f"{config.output_dir} holds {started[-1].name}. Pass --resume, or another --output_dir.")
    transformers.set_seed(config.seed)
    data = streamed(config) if config.stream else checked(config)
    check_against(config, data.training)
    # 4. Training.
    last = begin(config, data.training, data.files)
    if last is None and config.process_index == 0:
        (Path(config.output_dir) / SCORES).unlink(missing_ok=True)  # of an earlier training
    model = build(config, data.training)
    describe_data(model, data.training)
    arguments = training_arguments(config, data.training)
    loss: Any = losses(config, model, data.training)
    if config.stream:
        loss = next(iter(loss.values()))
    evaluator = validation(config, data.held_out)
    if evaluator is None:
        score_nothing(arguments)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=data.rows,
        loss=loss,
        evaluator=evaluator,
        callbacks=[BTokCallback(), WriteScores(Path(config.output_dir) / SCORES), interrupt := SaveOnInterrupt()],
    )
    try:
        with interrupt:
            trainer.train(resume_from_checkpoint=str(last) if last else None)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(how_to_go_on(config)) from None
    if interrupt.stopped:
        raise KeyboardInterrupt(how_to_go_on(config))
    if trainer.state.global_step == 0:
        raise ValueError(
            "no step was trained, as no row was left: all are broken, held out, or share content with a held-out row. "
            f"See {config.output_dir}/skipped_rows.jsonl, or pass a smaller --validation_size."
        )
    if trainer.evaluator is not None and not is_scored(trainer):
        trainer.evaluate()
    # 5. Model, card, skipped rows.
    path = Path(config.output_dir) / "model"
    if trainer.is_world_process_zero():
        merge_adapters(model).save_pretrained(str(path))
        write_card(path, data.sources, data.held_out, config.target)
    return path


def main() -> None:
    """Train with the settings of the command line."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    # What says nothing: a warning for every word without a weight, one bar inside another, every request to the hub.
    logging.getLogger("sentence_transformers.sentence_transformer.modules.word_weights").setLevel(logging.ERROR)
    for name in ("httpx", "sentence_transformers.sentence_transformer.evaluation"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers.logging.disable_progress_bar()  # of loading weights; the Trainer's own stays
    config = parse()
    path = train(config)
    trust = ", trust_remote_code=True" if config.readout == "attention" else ""
    scores = Path(config.output_dir) / SCORES
    if scores.is_file():
        print(f"\n{before_and_after(scores)}\nScores of every evaluated step are in {scores}.")
    print(f"The model is in {path}: SentenceTransformer({str(path)!r}{trust})")


if __name__ == "__main__":
    main()
