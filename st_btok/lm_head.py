"""An untied LM head that trains along: part of the loss, never of the embedder.

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
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

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
