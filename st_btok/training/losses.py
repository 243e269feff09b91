"""`BTokLoss`: in-batch ranking on the embeddings plus generation of the other side through the bottleneck tokens."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.base.modules.transformer import Transformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import WordWeights
from sentence_transformers.util import cos_sim
from torch import Tensor, nn

from st_btok.anatomy import embedding_matrix, find_btoks, unwrap
from st_btok.budgets import budget_embeddings, check_budgets
from st_btok.pooling import check_btoks
from st_btok.training.leak import find_leak, probe_batch
from st_btok.training.lm_head import output_embeddings
from st_btok.training.loss_parts import LossParts
from st_btok.training.negatives import FilteredSimilarity, RowFacts, row_facts
from st_btok.training.precision import warn_of_half_precision
from st_btok.training.processes import across_processes, gather_columns, parameters_in_use, token_mean
from st_btok.training.routes import ALL_LAYERS, NLL_KEY, ROUTES, Route, condensed_forward
from st_btok.training.schedule import Schedule
from st_btok.training.targets import TARGET_SIDES, ContentReader, TargetSide, choose_targets

logger = logging.getLogger(__name__)


class BTokLoss(nn.Module):
    """Ranking on bottleneck-token embeddings plus masked generative condensation, in one pass per column.

    loss = MNRL(embeddings) + condensation_weight · (1/M) sum_i -log p(y_i | BToks of the source, y_<i)

    The M target tokens of a batch are the text of the other side. They see the K bottleneck tokens and each other, not
    the source's input (see `attention.py`), so what they need has to pass through the tokens that are pooled.

    Args:
        model: A BTok model: from `build_model`, or a saved one loaded with `SentenceTransformer(path)`.
        scale: Inverse temperature of the ranking part, above 0. Default 50.0 (tau = 0.02, paper and release).
        condensation_weight: Weight of the condensation part, at least 0, or a function of the optimizer step. Default
            0.2: of 0, 0.2, 1 and 5 (for 40 % of the steps) the best mean over the quickstart's tasks on its validation
            split (`recipes/ablation.py`, 3 seeds). At 0 no target is built and the loss equals
            `MultipleNegativesRankingLoss`.
        target: The side that is generated: `"query"` (first column), `"positive"` (second), `"both"`, `"none"`, or
            `"auto"` (default), for each row: the side with text from the side with media; with text on both sides the
            positive from the query; without text nothing. For several datasets give each its own `BTokLoss`.
        route: How the target reads the bottleneck tokens; see `routes.py`. `"auto"` (default) measures: `"attention"`
            (mask) where the leak probe is exactly 0, `"prefix"` where it is not (hybrids, state-space models);
            `"kv"` with flash attention, which takes no mask. The choice is logged.
        condensation_steps: The condensation part is on for the first N optimizer steps only. Default None: always.
            The authors' preset is `condensation_weight=5.0, condensation_steps=2000` (of 5,000).
        max_target_tokens: Longest target in tokens, the closing end-of-turn token included; at least 1. Default 64.
        instructions: Prompts to leave out of targets, for `template="plain"`, where a prompt stands directly before
            the text. The model's own `prompts` always count. Under `template="chat"` prompts are a turn of their own.
        lm_head: Where the output embeddings of an untied backbone come from; see `condensation.output_embeddings`.
        train_lm_head: Whether an untied head is trained, as the loss' own parameter; it is never part of the saved
            embedder. Default False. Give the Trainer `callbacks=[TrainedHead(loss.lm_head)]`, which saves, restores
            and averages it over processes.
        btok_budgets: Train prefixes of the bottleneck tokens, such as `(1, 2, 4)`: the ranking part is the mean over
            embeddings from that many first tokens; see `read_budget`. Default None: all K.
        false_negative_margin: Drop in-batch negatives that are duplicates of the positive, or that score above it by
            more than this, in units of the similarity, at least 0; see `negatives.py`. Default None: off.
        same_modality_negatives: Keep only negatives of the positive's modality. Default False.
        gather_across_devices: Compute both parts over the rows of all processes. Default False.
        similarity_fct: As in `MultipleNegativesRankingLoss`. Default cosine similarity.
        **ranking: All further arguments of `MultipleNegativesRankingLoss`: `directions`, `partition_mode`,
            `hardness_mode`, `hardness_strength`.

    Requirements:
        1. (query, positive) pairs, optionally with one or more negatives; text, images, videos or dicts of them.
        2. For `route="attention"`, a backbone that moves information between positions by masked attention only; this
           is measured when the loss is made.

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
        - :class:`CachedBTokLoss` is equal to this loss for any batch size at the memory of a mini-batch.
        - :class:`MatryoshkaLoss`, :class:`Matryoshka2dLoss` and :class:`AdaptiveLayerLoss` around it modify the
          ranking part; the condensation term counts once.

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
        condensation_weight: float | Callable[[int], float] = 0.2,
        target: TargetSide = "auto",
        *,
        route: Route | Literal["auto"] = "auto",
        condensation_steps: int | None = None,
        max_target_tokens: int = 64,
        instructions: Sequence[str] = (),
        lm_head: nn.Module | Tensor | str | None = None,
        train_lm_head: bool = False,
        btok_budgets: Sequence[int] | None = None,
        false_negative_margin: float | None = None,
        same_modality_negatives: bool = False,
        gather_across_devices: bool = False,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        **ranking: Any,
    ) -> None:
        super().__init__()
        if target not in TARGET_SIDES:
            raise ValueError(f"target must be one of {TARGET_SIDES}, got {target!r}.")
        if route not in ("auto", *ROUTES):
            raise ValueError(f"route must be one of {('auto', *ROUTES)}, got {route!r}.")
        if max_target_tokens < 1:
            raise ValueError(f"max_target_tokens must be at least 1, got {max_target_tokens}.")
        self.model = model
        self.target = target
        self.max_target_tokens = max_target_tokens
        self.gather_across_devices = gather_across_devices
        self.schedule = Schedule(condensation_weight, condensation_steps)
        self.filter = None
        if false_negative_margin is not None or same_modality_negatives:
            self.filter = FilteredSimilarity(similarity_fct, false_negative_margin, same_modality_negatives)
        # Gathering is done here (see `processes.py`), so the ranking loss always sees one whole batch.
        self.ranking = MultipleNegativesRankingLoss(
            model, scale=scale, similarity_fct=self.filter or similarity_fct, **ranking
        )
        transformer, self.btoks = find_btoks(model)
        self.budgets = None if btok_budgets is None else check_budgets(model, btok_budgets)
        # A loaded checkpoint has trainable WordWeights; trained ones would let other tokens leak into the mean.
        for module in model.modules():
            if isinstance(module, WordWeights):
                module.requires_grad_(False)
        self.reader = ContentReader(transformer, [*instructions, *filter(None, model.prompts.values())])
        self.lm_head = None if target == "none" else _own_head(transformer, lm_head, train_lm_head)
        self.route: Route | None = None
        self.leak: float | None = None
        if target != "none" and condensation_weight != 0:
            self._choose_route(transformer, route)
        self._last_call: float | None = None
        self._checked_precision = False

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> LossParts:
        """Both parts for one batch.

        Args:
            sentence_features: One dict of features per column: query, positive, negatives.
            labels: Not used.

        Returns:
            Scalars by name, `ranking` and `condensation` (nats per target token) first; their `values()` sum to the
            loss.

        Raises:
            ValueError: If a row lacks its bottleneck tokens.
        """
        columns = list(sentence_features)
        facts = self.facts(columns)
        weight, targets = self.targets(columns)
        # Every process makes the same calls of the model, also one whose rows have no target.
        together = self.gather_across_devices and weight != 0 and self.target != "none"
        if together or any(target is not None for target in targets):
            embedded = [self.embed(features, target) for features, target in zip(columns, targets, strict=True)]
            embeddings = [embedding for embedding, _ in embedded]
            nll = torch.stack([sums.sum() for _, sums in embedded]).sum()
            # A loss modifier's repeated calls find no new likelihood, so their tokens do not count again.
            tokens = sum(
                len(target)
                for (_, sums), column in zip(embedded, targets, strict=True)
                if column and len(sums)
                for target in column
            )
        else:
            with self._passes():
                embeddings = embed_columns(self.model, columns)
            nll, tokens = embeddings[0].new_zeros((), dtype=torch.float32), 0
        ranking = self.rank(embeddings, facts)
        condensation, total = self.condense(nll, tokens, weight)
        logged = self.logged(columns, ranking, condensation, weight, total)
        return LossParts(logged, ranking, weight * condensation)

    def facts(self, columns: list[dict[str, Any]]) -> list[RowFacts]:
        """Check every row for its BToks; if negatives are filtered, facts of the rows of all processes."""
        if torch.is_grad_enabled() and not self._checked_precision:
            self._checked_precision = True
            warn_of_half_precision(self.model)
        for number, features in enumerate(columns):
            check_btoks(features["input_ids"], features["attention_mask"], self.btoks, f"column {number}")
        if self.filter is None:
            return []
        facts = [row_facts(features, self.reader) for features in columns]
        return [fact.gathered() for fact in facts] if self.gather_across_devices else facts

    def targets(self, columns: list[dict[str, Any]]) -> tuple[float, list[list[Tensor] | None]]:
        """The term's weight now, and each column's targets: B id tensors, None for columns that generate nothing."""
        weight = self.schedule()
        if weight == 0 or self.target == "none":
            return weight, [None] * len(columns)
        query, positive = (self.reader.read(features) for features in columns[:2])
        chosen = choose_targets(query, positive, self.target, self.reader.end, self.max_target_tokens)
        return weight, [
            chosen[number] if number < 2 and any(map(len, chosen[number])) else None for number in range(len(columns))
        ]

    def embed(self, features: dict[str, Any], targets: list[Tensor] | None) -> tuple[Tensor, Tensor]:
        """One pass: (B, D) embeddings, with budgets (B, budgets, D), and the (B,) summed NLL; (0,) without targets."""
        transformer, _ = find_btoks(unwrap(self.model))
        with self._passes() as stack:
            if targets is not None and ALL_LAYERS not in features:
                route = self.route or "attention"
                stack.enter_context(condensed_forward(transformer, features, targets, self.btoks, route, self.lm_head))
            output = self.model(features)
        # Taken out: MatryoshkaLoss hands the same output to one call per dimension, and the term counts once.
        nll = output.pop(NLL_KEY, None)
        embedding = output["sentence_embedding"]
        return embedding, embedding.new_zeros(0, dtype=torch.float32) if nll is None else nll

    def _passes(self) -> ExitStack:
        """What every pass through the model needs around it."""
        stack = ExitStack()
        stack.enter_context(parameters_in_use(self.model, find_btoks(unwrap(self.model))[0]))
        if self.budgets is not None:
            stack.enter_context(budget_embeddings(unwrap(self.model), self.btoks, self.budgets))
        return stack

    def rank(self, embeddings: list[Tensor], facts: list[RowFacts]) -> Tensor:
        """The ranking part over the whole batch, from the own rows' embeddings of every column."""
        if self.gather_across_devices:
            embeddings = gather_columns(embeddings)
        budgets = [embeddings] if self.budgets is None else zip(*(e.unbind(1) for e in embeddings), strict=True)
        losses = []
        for columns in budgets:
            if self.filter is not None:
                self.filter.begin(facts, self.ranking.directions)
            losses.append(self.ranking.compute_loss_from_embeddings(list(columns), labels=None))  # type: ignore[arg-type]
        loss = torch.stack(losses).mean()
        return across_processes(loss) if self.gather_across_devices else loss

    def condense(self, nll: Tensor, tokens: int, weight: float) -> tuple[Tensor, Tensor]:
        """The condensation part, nats per target token, and the number of tokens it is the mean over."""
        if not self.gather_across_devices or weight == 0 or self.target == "none":
            nll = nll.float()
            return nll / max(1, tokens), nll.new_tensor(float(tokens))
        # A collective call: every process makes it, also one whose rows have no target.
        mean, total = token_mean(nll, tokens)
        return across_processes(mean), total

    def logged(
        self, columns: list[dict[str, Any]], ranking: Tensor, condensation: Tensor, weight: float, tokens: Tensor
    ) -> dict[str, Tensor]:
        """What the Trainer logs: both parts, weight and size of the term, the leak probe, and the pace."""
        values = {
            "ranking": ranking,
            "condensation": condensation,
            "condensation_weight": ranking.new_tensor(weight),
            "condensation_tokens": tokens,
        }
        if self.leak is not None:
            values["condensation_leak"] = ranking.new_tensor(self.leak)
        now, before = time.perf_counter(), self._last_call
        self._last_call = now
        if before is not None:  # from call to call, so backward pass and update are part of it
            seen = sum(int(features["attention_mask"].sum()) for features in columns) + int(tokens)
            values["tokens_per_second"] = ranking.new_tensor(seen / (now - before))
        return values

    def _choose_route(self, transformer: Transformer, route: Route | Literal["auto"]) -> None:
        """Measure whether the mask cuts the target off, and settle the route."""
        backbone = type(transformer.model).__name__
        if route in ("kv", "prefix"):  # both read nothing but the BToks by construction
            self.route = route
            probe = probe_batch(transformer, self.btoks, self.reader.end)
            with torch.no_grad():  # whether the backbone can run it shows here, not after the first batch
                self.embed(dict(probe.original), [probe.labels.cpu()])
            return
        reason = "it has no SDPA attention"
        if getattr(transformer.model, "_supports_sdpa", True):
            self.leak = find_leak(transformer, probe_batch(transformer, self.btoks, self.reader.end))
            reason = f"a gradient of {self.leak:.2g} passed around the mask, which must be 0"
        cut_off = self.leak == 0.0
        if route == "attention" and not cut_off:
            raise ValueError(
                f"the condensation mask must cut the target off from its input, but for {backbone} {reason}: "
                'recurrent or convolutional layers, or an attention that takes no mask? Use route="auto" or "prefix".'
            )
        flash = "flash" in (transformer.model.config.get_text_config(decoder=True)._attn_implementation or "")
        checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in transformer.model.modules())
        if not cut_off:
            self.route = "prefix"
        elif route == "auto" and flash and not checkpointing:
            self.route, reason = "kv", "flash attention takes no mask"
        else:
            self.route, reason = "attention", "the leak probe is 0"
        logger.info("BTokLoss uses route=%r on %s: %s.", self.route, backbone, reason)

    def get_config_dict(self) -> dict[str, Any]:
        """Settings for the model card."""
        weight = self.schedule.weight
        return {
            "condensation_weight": getattr(weight, "__name__", repr(weight)) if callable(weight) else weight,
            "condensation_steps": self.schedule.steps,
            "target": self.target,
            "route": self.route,
            "max_target_tokens": self.max_target_tokens,
            "btok_budgets": self.budgets,
            "false_negative_margin": self.filter.margin if self.filter else None,
            "same_modality_negatives": self.filter.same_modality if self.filter else False,
            **self.ranking.get_config_dict(),
            "gather_across_devices": self.gather_across_devices,
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


def _own_head(transformer: Transformer, lm_head: nn.Module | Tensor | str | None, train: bool) -> nn.Parameter | None:
    """An untied LM head as a parameter of the loss; None for a tied one, which is looked up whenever it is needed."""
    head = output_embeddings(transformer.model, lm_head)
    if head is embedding_matrix(transformer.model):
        return None
    return nn.Parameter(head.detach(), requires_grad=train)
