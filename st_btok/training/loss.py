"""`BTokLoss`: in-batch ranking on the embeddings plus generation of the other side through the bottleneck tokens.

One training step as straight code stands in `reference.py`. A batch goes the same way here:

1. `targets`: what each row generates (`targets.py`).
2. `split_by_length`: each column in parts of similar length (`splitting.py`).
3. `embed`: each part through the model, on one of three routes (`routes.py`): its embeddings, and its targets' NLL.
4. `rank` and `condense`: the two parts of the loss.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from inspect import signature
from typing import Any, Literal

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.base.modules.transformer import Transformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import WordWeights
from sentence_transformers.util import cos_sim
from sentence_transformers.util.distributed import get_world_size
from torch import Tensor, nn

from st_btok.adapters import keep_magnitudes, warn_of_lost_btoks
from st_btok.batch_norm import freeze_batch_norm
from st_btok.budgets import budget_embeddings, check_appends_all, check_budgets
from st_btok.model_parts import LogitRule, find_btoks, unwrap
from st_btok.pooling import check_btoks
from st_btok.training.callback import CITATION, BTokCallback, Measured, Schedule, half_precision_warning, in_modifier
from st_btok.training.content import content_reader, read_content
from st_btok.training.distributed import across_processes, gather_columns, gather_rows, parameters_in_use, token_mean
from st_btok.training.lm_head import own_head, own_logits
from st_btok.training.negatives import FilteredSimilarity, content_fingerprints
from st_btok.training.routes import ALL_LAYERS, ROUTES, Call, Embedded, Likelihood, Route, choose_route, plain
from st_btok.training.splitting import Part, call_cost, split_by_length, unsort
from st_btok.training.targets import TARGET_SIDES, JointBatch, TargetSide, choose_targets, join_targets
from st_btok.training.vocabulary_loss import SummedCrossEntropy

logger = logging.getLogger(__name__)
_RANKING = [name for name in signature(MultipleNegativesRankingLoss).parameters if name != "model"]
# What other losses call it, and where it is here.
_ELSEWHERE = {"temperature": "scale, the inverse temperature", "mini_batch_size": "CachedBTokLoss"}


def _no_such_argument(name: str) -> str:
    """What to pass instead of an argument that the losses don't know."""
    known = [own for own in (*signature(BTokLoss).parameters, *_RANKING) if own not in ("model", "ranking")]
    near = difflib.get_close_matches(name, known, n=1)
    instead = _ELSEWHERE.get(name) or (near[0] if near else "")
    return f"BTokLoss has no argument {name!r}. " + (f"Use {instead}." if instead else f"It has {', '.join(known)}.")


class BTokLoss(nn.Module):
    """Ranking on bottleneck-token embeddings plus masked generative condensation, in one pass per column.

    loss = MNRL(embeddings) + condensation_weight · (1/M) sum_i -log p(y_i | BToks of the source, y_<i)

    The M target tokens of a batch are the text of the other side. They see the K bottleneck tokens and each other, not
    the source's input (see `mask.py`), so what they need has to pass through the tokens that are pooled.

    Args:
        model: A BTok model: from `build_model`, or a saved one loaded with `SentenceTransformer(path)`.
        scale: Inverse temperature of the ranking part, above 0. Default 50.0 (tau = 0.02, paper and release).
        condensation_weight: Weight of the condensation loss, at least 0, or a function of the optimizer step. Default
            0.2: of 0, 0.2, 1 and 5 the best on the quickstart's validation words; on real pairs of texts it has not
            paid so far (docs/findings.md). At 0 no target is built and the loss equals
            `MultipleNegativesRankingLoss`.
        target: The side that is generated: `"query"` (first column), `"positive"` (second), `"both"`, `"none"`, or
            `"auto"` (default), for each row: the side with text from the side with media; with text on both sides the
            positive from the query; without text nothing. For several datasets give each its own `BTokLoss`.
        route: How the target reads the bottleneck tokens; see `routes.py`. `"auto"` (default) measures: `"attention"`
            (mask) where the leak probe is exactly 0, `"prefix"` where it is not (hybrids, state-space models);
            `"kv"` with flash attention, which takes no mask. The choice is logged.
        condensation_steps: The condensation loss is on for the first N optimizer steps only. Default None: always.
            The authors' preset is `condensation_weight=5.0, condensation_steps=2000` (of 5,000). A weight that depends
            on the step needs to be told it: `callbacks=[BTokCallback()]` for the Trainer.
        max_target_tokens: Longest target in tokens, the closing EOS token included; at least 1. Default 64.
        instructions: Texts with which the data's own texts begin and which are not generated, as in MMEB-train.
            Prompts are never generated: they are no part of a row.
        lm_head: Where the output embeddings of an untied backbone come from; see `lm_head.output_embeddings`.
        btok_budgets: Train prefixes of the bottleneck tokens, such as `(1, 2, 4)`: the ranking part is the mean over
            embeddings from that many first tokens; see `read_budget`. Default None: all K.
        false_negative_margin: Drop in-batch negatives that are duplicates of the positive, or that score above it by
            more than this, in units of the similarity, at least 0; see `negatives.py`. Default None: off.
        gather_across_devices: Compute both parts over the rows of all processes. Default False.
        **ranking: All further arguments of `MultipleNegativesRankingLoss`: `similarity_fct`, `directions`,
            `partition_mode`, `hardness_mode`, `hardness_strength`.

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

    Attributes:
        read_btoks: Ids of the bottleneck tokens that targets read: all K. An experiment may set fewer, or override
            `targets` (what is generated), `join` (who reads what, on the attention route) or `rank`.
        measured: What the last call measured besides its value, such as the condensation loss in nats; see
            `callback.Measured`.
        schedule: The weight over the steps; a loop of one's own sets `schedule.step`, if the weight depends on it.

    Relations:
        - With ``condensation_weight=0`` this is :class:`MultipleNegativesRankingLoss`.
        - :class:`CachedBTokLoss` is equal to this loss for any batch size at the memory of a mini-batch.
        - :class:`MatryoshkaLoss`, :class:`Matryoshka2dLoss` and :class:`AdaptiveLayerLoss` around it modify the
          ranking part; the condensation loss counts once, in the first call, times that call's weight.

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

        In a training loop of one's own the loss is the sum of the parts::

            sum(loss([model.preprocess(queries), model.preprocess(positives)]).values()).backward()
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
        btok_budgets: Sequence[int] | None = None,
        false_negative_margin: float | None = None,
        gather_across_devices: bool = False,
        **ranking: Any,
    ) -> None:
        super().__init__()
        if target not in TARGET_SIDES:
            raise ValueError(f"target must be one of {TARGET_SIDES}, got {target!r}.")
        if route not in ("auto", *ROUTES):
            raise ValueError(f"route must be one of {('auto', *ROUTES)}, got {route!r}.")
        if max_target_tokens < 1:
            raise ValueError(f"max_target_tokens must be at least 1, got {max_target_tokens}.")
        if unknown := set(ranking) - set(_RANKING):
            raise ValueError(_no_such_argument(sorted(unknown)[0]))
        if scale <= 1:
            logger.warning("scale is the inverse temperature: for a temperature of 0.02 it is 50, got %s.", scale)
        self.model = model
        self.target = target
        self.max_target_tokens = max_target_tokens
        self.gather_across_devices = gather_across_devices
        self.schedule = Schedule(condensation_weight, condensation_steps)
        self.filter = None
        if false_negative_margin is not None:
            self.filter = FilteredSimilarity(ranking.get("similarity_fct", cos_sim), false_negative_margin)
            ranking = {**ranking, "similarity_fct": self.filter}
        # Gathering is done here (see `distributed.py`), so the ranking loss always sees one whole batch.
        self.ranking = MultipleNegativesRankingLoss(model, scale=scale, **ranking)
        transformer, self.btoks = find_btoks(model)
        self.read_btoks = self.btoks
        check_appends_all(model)
        self.budgets = None if btok_budgets is None else check_budgets(model, btok_budgets)
        # A loaded model has lost what `build_model` and `btok_lora_config` set.
        freeze_batch_norm(model)
        keep_magnitudes(transformer.model)
        warn_of_lost_btoks(model)
        # A loaded checkpoint has trainable WordWeights; trained ones would let other tokens leak into the mean.
        self._weights = [weight for m in model.modules() if isinstance(m, WordWeights) for weight in m.parameters()]
        for weight in self._weights:
            weight.requires_grad_(False)
        self.reader = content_reader(transformer, max_target_tokens, instructions)
        self.lm_head = None if target == "none" else own_head(transformer.model, lm_head)
        self.logits = LogitRule() if target == "none" else own_logits(transformer.model)
        self.route: Route | None = None
        self.leak: float | None = None
        if target != "none" and condensation_weight != 0:
            self.route, self.leak = choose_route(self._call(), self.reader.end, route)
        self.measured: Measured | None = None
        self._checked_training = False

    def forward(
        self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None
    ) -> dict[str, Tensor] | Tensor:
        """Both parts for one batch.

        Args:
            sentence_features: One dict of features per column: query, positive, negatives.
            labels: Not used.

        Returns:
            The weighted parts, `ranking` and `condensation`, whose values sum to the loss; inside a loss modifier,
            which multiplies and adds what it is given, that sum.

        Raises:
            ValueError: If a row lacks its bottleneck tokens, nothing trains, or the weight depends on a step that
                never arrived.
        """
        columns = list(sentence_features)
        self.check(columns)
        weight = self.weight()
        targets: list[list[Tensor] | None] = self.targets(columns) if weight else [None] * len(columns)
        embeddings, nll, tokens = self._embed_columns(columns, targets, weight)
        ranking = self.rank(embeddings, self.fingerprints(columns))
        nll, all_tokens = self.condense(nll, tokens, weight)
        if tokens or not any(targets):  # a loss modifier's repeated calls read no target: nothing new to report
            self.report(columns, targets, ranking, nll, all_tokens, weight)
        parts = {"ranking": ranking, "condensation": weight * nll}
        return torch.stack(list(parts.values())).sum() if in_modifier(self.model) else parts

    def check(self, columns: list[dict[str, Any]]) -> None:
        """Refuse a batch that can't be trained on, before the model is called."""
        if len(columns) < 2:
            raise ValueError(
                f"the loss needs at least two columns of inputs, query and positive, got {len(columns)}. Does the "
                "data set have both, in this order, and is neither named label or score?"
            )
        if torch.is_grad_enabled() and not self._checked_training:
            if not any(parameter.requires_grad for parameter in self.model.parameters()):
                raise ValueError(
                    "no parameter of the model requires a gradient, so nothing would be trained. A loaded adapter is "
                    "frozen: call requires_grad_() on what is to train, such as every parameter whose name holds "
                    '"lora_" or "trainable_tokens", or merge the adapter and add a new one.'
                )
            if message := half_precision_warning(self.model):
                logger.warning("%s", message)
            self._checked_training = True
        if any(weight.requires_grad for weight in self._weights):
            raise ValueError(
                "the weights of the pooling (WordWeights) must stay as they are, or other tokens than the BToks would "
                "be averaged, but they require a gradient: was requires_grad set after the loss was made? Leave out "
                "the parameters whose name holds 'emb_layer', or make the loss last."
            )
        for number, features in enumerate(columns):
            check_btoks(features["input_ids"], features["attention_mask"], self.btoks, f"column {number}")

    def weight(self) -> float:
        """The weight of the condensation loss at the current step."""
        callback = BTokCallback.of(self.model)
        if callback is not None:
            self.schedule.step = callback.step
        return self.schedule()

    def targets(self, columns: list[dict[str, Any]]) -> list[list[Tensor] | None]:
        """What every row generates.

        Args:
            columns: One dict of features per column.

        Returns:
            For each column B id tensors, empty for rows that generate nothing; None if no row does.
        """
        if self.target == "none":
            return [None] * len(columns)
        query, positive = map(read_content, columns[:2])
        chosen = choose_targets(query, positive, self.target, self.reader.end, self.max_target_tokens)
        return [*(targets if any(map(len, targets)) else None for targets in chosen), *[None] * (len(columns) - 2)]

    def join(self, part: Part) -> JointBatch:
        """The rows `[input][BToks][target]` of the attention route, and who reads what in them.

        Args:
            part: Rows of a column with their targets.

        Returns:
            Joint rows; a target reads every position whose segment is not `INPUT`.
        """
        return join_targets(part.features, part.targets or [], self.read_btoks)

    def _embed_columns(
        self, columns: list[dict[str, Any]], targets: list[list[Tensor] | None], weight: float
    ) -> tuple[list[Tensor], Tensor, int]:
        """The embeddings of every column, the NLL summed over the batch, and the number of its target tokens."""
        # 1. Split each column into parts of similar length.
        split = [self.split(Part(features, target)) for features, target in zip(columns, targets, strict=True)]
        # 2. Columns that have targets, or several parts, run alone. FSDP gathers weights in every call, so all
        #    processes must make the same calls: a column runs alone even if only another process has targets for it.
        equal = get_world_size() > 1 and weight != 0 and self.target != "none"
        alone = [n for n in range(len(columns)) if equal or targets[n] is not None or len(split[n]) > 1]
        embeddings: dict[int, Tensor] = {}
        sums, tokens = [torch.zeros((), device=columns[0]["input_ids"].device)], 0
        likelihood = SummedCrossEntropy()
        for number in alone:
            found = [self.embed(part, likelihood) for part in split[number]]
            embeddings[number] = unsort(split[number], [embedded.embedding for embedded in found])
            sums += [embedded.nll for embedded in found]
            tokens += sum(embedded.tokens for embedded in found)
        # 3. All other columns run as in MultipleNegativesRankingLoss: queries in one call, candidates in another.
        together = [n for n in range(len(columns)) if n not in alone]
        if together:
            with self._passes():
                merged = embed_columns(self.model, [columns[n] for n in together], separate_first=0 in together)
            embeddings.update(zip(together, merged, strict=True))
        return [embeddings[number] for number in range(len(columns))], torch.stack(sums).sum(), tokens

    def split(self, column: Part) -> list[Part]:
        """Split a column into the parts that run in one call each.

        Args:
            column: All of its rows.

        Returns:
            Parts of similar length. One part, the whole column, where several processes must make equal calls whatever
            their rows hold, and under `AdaptiveLayerLoss`, which reads all layers' states in the column's own dict.
        """
        if get_world_size() > 1 or "forward" in vars(self._transformer):
            return [column]
        return split_by_length(column, self.reader.media_tokens, call_cost(self._transformer.model))

    def embed(self, part: Part, likelihood: Likelihood | None = None) -> Embedded:
        """One pass through the model.

        Args:
            part: Rows of a column with their targets.
            likelihood: What sums the NLL of the target tokens. Default: `SummedCrossEntropy`.

        Returns:
            Embeddings, with budgets (B, budgets, D), the summed NLL and the number of target tokens.
        """
        condensed = part.targets is not None and ALL_LAYERS not in part.features
        route = ROUTES[self.route or "attention"] if condensed else plain
        with self._passes():
            return route(self._call(likelihood), part)

    def _call(self, likelihood: Likelihood | None = None) -> Call:
        likelihood = likelihood or SummedCrossEntropy()
        return Call(self.model, self._transformer, self.read_btoks, self.join, self.lm_head, self.logits, likelihood)

    @property
    def _transformer(self) -> Transformer:
        """The model's first module, whatever wraps the model."""
        return find_btoks(unwrap(self.model))[0]

    def _passes(self) -> ExitStack:
        """What every pass through the model needs around it."""
        stack = ExitStack()
        stack.enter_context(parameters_in_use(self.model, self._transformer))
        if self.budgets is not None:
            stack.enter_context(budget_embeddings(unwrap(self.model), self.btoks, self.budgets))
        return stack

    def fingerprints(self, columns: list[dict[str, Any]]) -> list[Tensor]:
        """Numbers that are equal for rows of equal content, for each column; none if negatives are not filtered."""
        if self.filter is None:
            return []
        found = [content_fingerprints(features, self.reader.media_tokens) for features in columns]
        return [gather_rows(rows) for rows in found] if self.gather_across_devices else found

    def rank(self, embeddings: list[Tensor], fingerprints: list[Tensor]) -> Tensor:
        """The ranking part over the whole batch.

        Args:
            embeddings: For every column those of this process' rows, (B, D) or (B, budgets, D).
            fingerprints: What `fingerprints` returned.

        Returns:
            A scalar.
        """
        if self.gather_across_devices:
            embeddings = gather_columns(embeddings)
        budgets = [embeddings] if self.budgets is None else zip(*(e.unbind(1) for e in embeddings), strict=True)
        losses = []
        for columns in budgets:
            if self.filter is not None:
                self.filter.begin(fingerprints, self.ranking.directions)
            losses.append(self.ranking.compute_loss_from_embeddings(list(columns), labels=None))  # type: ignore[arg-type]
        loss = torch.stack(losses).mean()
        return across_processes(loss) if self.gather_across_devices else loss

    def condense(self, nll: Tensor, tokens: int, weight: float) -> tuple[Tensor, Tensor]:
        """The condensation loss without its weight.

        Args:
            nll: Summed over the target tokens of this process' rows.
            tokens: The number of these tokens.
            weight: The weight of the condensation loss.

        Returns:
            Nats per target token, and the number of tokens that this is the mean over.
        """
        if not self.gather_across_devices or weight == 0 or self.target == "none":
            nll = nll.float()
            return nll / max(1, tokens), nll.new_tensor(float(tokens))
        # A collective call: every process makes it, also one whose rows have no target.
        mean, total = token_mean(nll, tokens)
        return across_processes(mean), total

    def report(
        self,
        columns: list[dict[str, Any]],
        targets: list[list[Tensor] | None],
        ranking: Tensor,
        nll: Tensor,
        tokens: Tensor,
        weight: float,
    ) -> None:
        """Keep what this call measured in `measured`, and give it to the `BTokCallback` of the Trainer, if any."""
        read = torch.stack([features["attention_mask"].sum() for features in columns]).sum()
        read = read + sum(len(target) for column in targets if column for target in column)
        self.measured = Measured(ranking.detach(), nll.detach(), tokens, weight, read, self.leak)
        callback = BTokCallback.of(self.model)
        if callback is not None:
            callback.record(self.measured, unwrap(self.model).training)

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
        return CITATION
