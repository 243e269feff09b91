"""The LM head that the condensation term reads, and an untied one that trains along: never part of the embedder.

`BTokLoss(model, train_lm_head=True)` holds the head as its own parameter, and the Trainer's optimizer updates it. The
Trainer neither saves nor averages what is not in the model, so that is done here, by a callback.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers.util.distributed import get_world_size
from torch import Tensor, nn
from torch import distributed as dist
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from st_btok.model_parts import checkpoint_head, commit_of, embedding_matrix, generation_class

FOLDER, KEY = "lm_head", "lm_head.weight"


def save_lm_head(head: Tensor, folder: str | Path) -> None:
    """Write a head where `BTokLoss(model, lm_head=folder)` reads it.

    Args:
        head: (V, D) output embedding matrix, such as `loss.lm_head`.
        folder: Folder to write; made if it does not exist.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file({KEY: head.detach().cpu().contiguous()}, Path(folder) / "model.safetensors")


class TrainedHead(TrainerCallback):
    """Saves a trained LM head beside each checkpoint, restores it on resuming, and averages it over processes.

    For `SentenceTransformerTrainer(..., callbacks=[TrainedHead(loss.lm_head)])`. The head is written to
    `checkpoint-N/lm_head`, which loading the checkpoint as an embedder ignores; delete it to leave it out.

    Args:
        head: The head of a loss made with `train_lm_head=True`.

    Raises:
        ValueError: If there is no head that trains: embeddings are tied, or `train_lm_head` is False.
    """

    def __init__(self, head: nn.Parameter | None) -> None:
        if head is None or not head.requires_grad:
            raise ValueError(
                "TrainedHead needs an LM head that trains: BTokLoss(model, train_lm_head=True) on a backbone whose "
                f"head is not tied to its embeddings, got {'no head (tied)' if head is None else 'a frozen head'}."
            )
        self.head = head

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the head of the checkpoint that training goes on from."""
        if state.global_step == 0:
            return
        path = Path(str(args.output_dir), f"checkpoint-{state.global_step}", FOLDER, "model.safetensors")
        if not path.exists():
            raise FileNotFoundError(
                f"resuming at step {state.global_step} needs the trained LM head in {path}. Resume with the "
                "output_dir that the checkpoint was written to, or copy its lm_head folder there."
            )
        with torch.no_grad():
            self.head.copy_(load_file(path)[KEY])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The mean of the gradient over all processes, also of those without a target."""
        if get_world_size() == 1:
            return
        if self.head.grad is None:
            self.head.grad = torch.zeros_like(self.head)
        dist.all_reduce(self.head.grad)
        self.head.grad /= get_world_size()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the head into the checkpoint."""
        if state.is_world_process_zero:
            save_lm_head(self.head, Path(str(args.output_dir), f"checkpoint-{state.global_step}", FOLDER))


def output_embeddings(model: PreTrainedModel, lm_head: nn.Module | Tensor | str | None = None) -> Tensor:
    """The (V, D) matrix that turns last-layer states into logits.

    A BTok model holds the backbone without its LM head. Where the head is tied to the input embeddings, their matrix
    is the head. Else (most 7B models) it is read from the checkpoint that the backbone came from, by the class that
    transformers builds for generation, and stays out of the saved embedder.

    Args:
        model: The backbone inside the `Transformer` module.
        lm_head: An LM head (module or matrix) to use, or the name or path of a checkpoint to read it from. Default:
            the head of the checkpoint in `model.config.name_or_path`, or the tied matrix.

    Returns:
        The matrix; a tied one is the live parameter, unless `lm_head` names a checkpoint.

    Raises:
        ValueError: If the head is not tied and can't be found.
    """
    if isinstance(lm_head, nn.Module):
        lm_head = lm_head.get_parameter("weight")
    if isinstance(lm_head, Tensor):
        return lm_head
    config, embeddings = model.config, embedding_matrix(model)
    source = lm_head or config.name_or_path
    tied = lm_head is None and getattr(config, "tie_word_embeddings", False)
    generating = generation_class(config)
    if tied and (generating is None or generating.__name__ not in (config.architectures or ())):
        return embeddings  # saved without a head, as `build_model` found it: nothing to ask there
    head, reason = None, f"{source!r} holds none"
    try:
        head, tied = _read_head(str(source), config) if source else (None, tied)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
    if tied and lm_head is None:
        return embeddings
    if head is None:
        raise ValueError(
            f"the backbone's LM head is not tied to its embeddings, and must be found: {reason}. "
            'Pass BTokLoss(..., lm_head="the backbone\'s name or path") or lm_head=full_model.get_output_embeddings().'
        )
    return head.to(device=embeddings.device, dtype=embeddings.dtype)


def own_head(model: PreTrainedModel, lm_head: nn.Module | Tensor | str | None, train: bool) -> nn.Parameter | None:
    """An untied LM head as a parameter of the loss.

    Args:
        model: The backbone inside the `Transformer` module.
        lm_head: As for `output_embeddings`.
        train: Whether it is trained.

    Returns:
        The head; None for a tied one, which is looked up whenever it is needed.
    """
    head = output_embeddings(model, lm_head)
    if head is embedding_matrix(model):
        return None
    return nn.Parameter(head.detach(), requires_grad=train)


def _read_head(source: str, config: PreTrainedConfig) -> tuple[Tensor | None, bool]:
    """The head of a checkpoint, or of a folder of `save_lm_head`, and whether it is tied."""
    alone = Path(source, "model.safetensors")
    if alone.exists() and not Path(source, "config.json").exists():
        return load_file(alone).get(KEY), False
    commit = commit_of(config) if source == config.name_or_path else None
    return checkpoint_head(source, config, **({"revision": commit} if commit else {}))
