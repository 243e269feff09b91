"""`BTokLoss`: in-batch ranking on the embeddings plus generation of the other side through the bottleneck tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import WordWeights
from torch import Tensor, nn

from st_btok.condensation import NLL_KEY, condensed_forward, find_leak, output_embeddings
from st_btok.model import find_btoks
from st_btok.pooling import check_btoks
from st_btok.schedule import Schedule
from st_btok.targets import TARGET_SIDES, ContentReader, JointBatch, TargetSide, choose_targets, join_targets


class LossParts(dict[str, Tensor]):
    """What one call of the loss computed. The Trainer sums `values()` into the loss and logs all `items()`.

    `values()` are the optimised parts only (ranking, weighted condensation); `items()` holds them unweighted, with the
    weight and the number of generated tokens beside them.
    """

    def __init__(self, logged: dict[str, Tensor], optimised: list[Tensor]) -> None:
        super().__init__(logged)
        self._optimised = optimised

    def values(self) -> list[Tensor]:  # type: ignore[override]
        """The parts that sum to the loss."""
        return self._optimised

    def sum(self) -> Tensor:
        """The loss."""
        return torch.stack(self._optimised).sum()


class BTokLoss(nn.Module):
    """Ranking on bottleneck-token embeddings plus masked generative condensation, in one pass per column.

    loss = MNRL(embeddings) + condensation_weight · (1/M) sum_i -log p(y_i | BToks of the source, y_<i)

    The M target tokens of a batch are the text of the other side. They see the K bottleneck tokens and each other, not
    the source's input (see `attention.py`), so what they need has to pass through the tokens that are pooled.

    Args:
        model: A BTok model: from `build_model`, or a saved one loaded with `SentenceTransformer(path)`.
        scale: Inverse temperature of the ranking part, above 0. Default 50.0 (tau = 0.02, paper and release).
        condensation_weight: Weight of the condensation part, at least 0, or a function of the optimizer step. Default
            1.0 (design trials and the quickstart's validation split). At 0 no target is built and the loss equals
            `MultipleNegativesRankingLoss`.
        target: The side that is generated: `"query"` (first column), `"positive"` (second), `"both"`, `"none"`, or
            `"auto"` (default), for each row: the side with text from the side with media; with text on both sides the
            positive from the query; without text nothing. For several datasets give each its own `BTokLoss`.
        condensation_steps: The condensation part is on for the first N optimizer steps only. Default None: always.
            The authors' preset is `condensation_weight=5.0, condensation_steps=2000` (of 5,000).
        max_target_tokens: Longest target in tokens, the closing end-of-turn token included; at least 1. Default 64.
        instructions: Prompts to leave out of targets, for `template="plain"`, where a prompt stands directly before
            the text. The model's own `prompts` always count. Under `template="chat"` prompts are a turn of their own.
        lm_head: Where the output embeddings of an untied backbone come from; see `condensation.output_embeddings`.
        **ranking: All further arguments of `MultipleNegativesRankingLoss`: `similarity_fct`, `directions`,
            `partition_mode`, `hardness_mode`, `hardness_strength`, `gather_across_devices`.

    Requirements:
        1. (query, positive) pairs, optionally with one or more negatives; text, images, videos or dicts of them.
        2. A backbone whose attention takes a mask (checked on the first batch).

    Inputs:
        +-------------------------------------------------+--------+
        | Inputs                                          | Labels |
        +=================================================+========+
        | (query, positive) pairs                         | none   |
        +-------------------------------------------------+--------+
        | (query, positive, negative) triplets            | none   |
        +-------------------------------------------------+--------+
        | (query, positive, negative_1, ..., negative_n)  | none   |
        +-------------------------------------------------+--------+

    Recommendations:
        - Use ``BatchSamplers.NO_DUPLICATES``, so that no in-batch negative equals the positive.

    Relations:
        - With ``condensation_weight=0`` this is :class:`MultipleNegativesRankingLoss`.

    Raises:
        ValueError: If the model has no bottleneck tokens, an argument is out of range, or the LM head is not found.

    References:
        - Bottleneck Tokens for Unified Multimodal Retrieval: https://arxiv.org/abs/2604.11095, section 3.

    Example:
        ::

            from datasets import Dataset
            from sentence_transformers import SentenceTransformerTrainer
            from st_btok import BTokLoss, build_model

            model = build_model("Qwen/Qwen2-VL-2B-Instruct")
            train_dataset = Dataset.from_dict({"query": [image_1, image_2], "positive": ["a red kite", "two dogs"]})
            trainer = SentenceTransformerTrainer(model=model, train_dataset=train_dataset, loss=BTokLoss(model))
            trainer.train()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float = 50.0,
        condensation_weight: float | Callable[[int], float] = 1.0,
        target: TargetSide = "auto",
        *,
        condensation_steps: int | None = None,
        max_target_tokens: int = 64,
        instructions: Sequence[str] = (),
        lm_head: nn.Module | Tensor | str | None = None,
        **ranking: Any,
    ) -> None:
        super().__init__()
        if target not in TARGET_SIDES:
            raise ValueError(f"target must be one of {TARGET_SIDES}, got {target!r}.")
        if max_target_tokens < 1:
            raise ValueError(f"max_target_tokens must be at least 1, got {max_target_tokens}.")
        self.model = model
        self.target = target
        self.max_target_tokens = max_target_tokens
        self.schedule = Schedule(condensation_weight, condensation_steps)
        self.ranking = MultipleNegativesRankingLoss(model, scale=scale, **ranking)
        transformer, self.btoks = find_btoks(model)
        # A loaded checkpoint has trainable WordWeights; trained ones would let other tokens leak into the mean.
        for module in model.modules():
            if isinstance(module, WordWeights):
                module.requires_grad_(False)
        self.reader = ContentReader(transformer, [*instructions, *filter(None, model.prompts.values())])
        tied = transformer.model.get_input_embeddings()
        head = None if target == "none" else output_embeddings(transformer.model, lm_head)
        # The tied matrix is looked up at every call: adapters and wrappers may replace the module that holds it.
        self.lm_head = (
            None if head is None or head is tied.weight else nn.Parameter(head.detach(), requires_grad=False)
        )
        self._checked = False

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> LossParts:
        """Both parts for one batch.

        Args:
            sentence_features: One dict of features per column: query, positive, negatives.
            labels: Not used.

        Returns:
            Scalars by name: `ranking`, `condensation` (nats per target token), `condensation_weight`,
            `condensation_tokens`. Their `values()` sum to the loss.

        Raises:
            ValueError: If a row lacks its bottleneck tokens, or (first batch) the mask does not cut the input off.
        """
        columns = list(sentence_features)
        for number, features in enumerate(columns):
            check_btoks(features["input_ids"], features["attention_mask"], self.btoks, f"column {number}")
        weight = self.schedule()
        if weight == 0 or self.target == "none":
            embeddings = embed_columns(self.model, columns)
            nll, tokens = embeddings[0].new_zeros(()), 0
        else:
            embeddings, nll, tokens = self._embed_and_condense(columns)
        ranking = self.ranking.compute_loss_from_embeddings(embeddings, labels=None)  # type: ignore[arg-type]
        condensation = nll.float() / max(1, tokens)
        logged = {
            "ranking": ranking,
            "condensation": condensation,
            "condensation_weight": ranking.new_tensor(weight),
            "condensation_tokens": ranking.new_tensor(float(tokens)),
        }
        return LossParts(logged, [ranking, weight * condensation])

    def _embed_and_condense(self, columns: list[dict[str, Any]]) -> tuple[list[Tensor], Tensor, int]:
        """Embeddings of all columns, summed NLL of all targets, and their number of tokens."""
        transformer, _ = find_btoks(unwrap(self.model))
        head = self.lm_head
        if head is None:
            head = transformer.model.get_input_embeddings().get_parameter("weight")
        embeddings, sums, tokens = [], [], 0
        for features, batch in zip(columns, self.joint_batches(columns), strict=True):
            if batch is None:
                embeddings.append(self.model(dict(features))["sentence_embedding"])
                continue
            if not self._checked:
                self._check_leak(batch)
            with condensed_forward(transformer, batch, head):
                output = self.model(dict(features))
            embeddings.append(output["sentence_embedding"])
            sums.append(output[NLL_KEY].sum())
            tokens += len(batch.labels)
        return embeddings, torch.stack(sums).sum() if sums else embeddings[0].new_zeros(()), tokens

    def joint_batches(self, columns: list[dict[str, Any]]) -> Iterator[JointBatch | None]:
        """The joint rows of each column; None for columns that generate nothing (negatives always)."""
        query, positive = (self.reader.read(features) for features in columns[:2])
        targets = choose_targets(query, positive, self.target, self.reader.end, self.max_target_tokens)
        for number, features in enumerate(columns):
            if number < 2 and any(map(len, targets[number])):
                yield join_targets(features, targets[number], self.btoks)
            else:
                yield None

    def _check_leak(self, batch: JointBatch) -> None:
        transformer, _ = find_btoks(unwrap(self.model))
        leak = find_leak(transformer, batch)
        if leak != 0.0:
            raise ValueError(
                "the condensation mask must cut the target off from its input, but on the first batch a gradient of "
                f"{leak:.2g} passed around it: {type(transformer.model).__name__} moves information between positions "
                "outside of masked attention (recurrent or convolutional layers?). Train this backbone with "
                "condensation_weight=0, or use one with attention layers only."
            )
        self._checked = True

    def get_config_dict(self) -> dict[str, Any]:
        """Settings for the model card."""
        weight = self.schedule.weight
        return {
            "condensation_weight": getattr(weight, "__name__", repr(weight)) if callable(weight) else weight,
            "condensation_steps": self.schedule.steps,
            "target": self.target,
            "max_target_tokens": self.max_target_tokens,
            **self.ranking.get_config_dict(),
        }

    @property
    def temperature(self) -> float:
        """1 / scale."""
        return self.ranking.temperature

    @property
    def citation(self) -> str:
        """BibTeX of the method."""
        return """
@misc{bottlenecktokens2026,
    title={Bottleneck Tokens for Unified Multimodal Retrieval},
    year={2026},
    eprint={2604.11095},
    archivePrefix={arXiv},
    primaryClass={cs.CV},
    url={https://arxiv.org/abs/2604.11095},
}
"""


def unwrap(model: Any) -> SentenceTransformer:
    """The SentenceTransformer inside what training wraps around it (DDP, compile)."""
    while not isinstance(model, SentenceTransformer):
        model = model.module if hasattr(model, "module") else model._orig_mod
    return model
