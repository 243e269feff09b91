"""`BTokLoss`: in-batch ranking on the embeddings plus generation of the other side through the bottleneck tokens."""

from __future__ import annotations

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
from sentence_transformers.util.distributed import get_world_size
from torch import Tensor, nn

from st_btok.budgets import budget_embeddings, check_appends_all, check_budgets
from st_btok.model_parts import find_btoks, unwrap
from st_btok.pooling import check_btoks
from st_btok.training.apart import Apart, reader_of
from st_btok.training.buckets import call_cost, in_order, is_split, split_by_length
from st_btok.training.callback import BTokCallback, Measured, read_tokens
from st_btok.training.card import CITATION, settings_of
from st_btok.training.distributed import across_processes, gather_columns, parameters_in_use, token_mean
from st_btok.training.leak import choose_route, kv_agrees
from st_btok.training.lm_head import own_head
from st_btok.training.modifiers import in_modifier
from st_btok.training.negatives import FilteredSimilarity, RowFacts, row_facts
from st_btok.training.precision import warn_of_half_precision
from st_btok.training.routes import ALL_LAYERS, NLL_KEY, ROUTES, UNMASKED, Route, condensed_forward
from st_btok.training.schedule import Schedule
from st_btok.training.targets import TARGET_SIDES, ContentReader, TargetSide, choose_targets, first_btoks
from st_btok.training.unread import Likelihood, Readers, Reading


class BTokLoss(nn.Module):
    """Ranking on bottleneck-token embeddings plus masked generative condensation, in one pass per column.

    loss = MNRL(embeddings) + condensation_weight · (1/M) sum_i -log p(y_i | BToks of the source, y_<i)

    The M target tokens of a batch are the text of the other side. They see the K bottleneck tokens and each other, not
    the source's input (see `mask.py`), so what they need has to pass through the tokens that are pooled.

    Args:
        model: A BTok model: from `build_model`, or a saved one loaded with `SentenceTransformer(path)`.
        scale: Inverse temperature of the ranking part, above 0. Default 50.0 (tau = 0.02, paper and release).
        condensation_weight: Weight of the condensation part, at least 0, or a function of the optimizer step. Default
            0.2: of 0, 0.2, 1 and 5 the best on the quickstart's validation words; on real pairs of texts the term has
            not paid so far (docs/findings.md). At 0 no target is built and the loss equals
            `MultipleNegativesRankingLoss`.
        target: The side that is generated: `"query"` (first column), `"positive"` (second), `"both"`, `"none"`, or
            `"auto"` (default), for each row: the side with text from the side with media; with text on both sides the
            positive from the query; without text nothing. `"self"`: every text from its own BToks, as autoencoders
            learn from documents without queries. For several datasets give each its own `BTokLoss`.
        route: How the target reads the bottleneck tokens; see `routes.py`. `"auto"` (default) measures: `"attention"`
            (mask) where the leak probe is exactly 0, `"prefix"` where it is not (hybrids, state-space models);
            `"kv"` with flash attention, which takes no mask. The choice is logged. `"unmasked"` is a control: the
            target reads its input too (the paper's ablation without the mask).
        condensation_steps: The condensation part is on for the first N optimizer steps only. Default None: always.
            The authors' preset is `condensation_weight=5.0, condensation_steps=2000` (of 5,000). A weight that depends
            on the step needs to be told it: `callbacks=[BTokCallback()]` for the Trainer.
        condensation_warmup: The condensation part is trained alone for the first N optimizer steps, as decoders are
            taught to reconstruct before they embed (SimLM, https://arxiv.org/abs/2207.02578). Default 0.
        condensation_btoks: Targets read only the first so many bottleneck tokens, at least 1; with `readout="last"`
            a further token then embeds and takes no part in the term, which separates the two tasks. Default None:
            all K, as in the paper.
        max_target_tokens: Longest target in tokens, the closing end-of-turn token included; at least 1. Default 64.
        instructions: Prompts to leave out of targets, for `template="plain"`, where a prompt stands directly before
            the text. The model's own `prompts` always count. Under `template="chat"` prompts are a turn of their own.
        lm_head: Where the output embeddings of an untied backbone come from; see `lm_head.output_embeddings`.
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

    Attributes:
        measured: What the last call found out beside the loss, the term in nats among it; see `callback.Measured`.
        schedule: The weight over the steps; a loop of one's own sets `schedule.step`, if the weight depends on it.

    Relations:
        - With ``condensation_weight=0`` this is :class:`MultipleNegativesRankingLoss`.
        - :class:`CachedBTokLoss` is equal to this loss for any batch size at the memory of a mini-batch.
        - :class:`MatryoshkaLoss`, :class:`Matryoshka2dLoss` and :class:`AdaptiveLayerLoss` around it modify the
          ranking part; the condensation term counts once, in the first call, with that call's weight.

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
        condensation_warmup: int = 0,
        condensation_btoks: int | None = None,
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
        if route not in ("auto", *ROUTES, UNMASKED):
            raise ValueError(f"route must be one of {('auto', *ROUTES, UNMASKED)}, got {route!r}.")
        if max_target_tokens < 1:
            raise ValueError(f"max_target_tokens must be at least 1, got {max_target_tokens}.")
        self.model = model
        self.target = target
        self.max_target_tokens = max_target_tokens
        self.gather_across_devices = gather_across_devices
        self.schedule = Schedule(condensation_weight, condensation_steps, condensation_warmup)
        self.filter = None
        if false_negative_margin is not None or same_modality_negatives:
            self.filter = FilteredSimilarity(similarity_fct, false_negative_margin, same_modality_negatives)
        # Gathering is done here (see `distributed.py`), so the ranking loss always sees one whole batch.
        self.ranking = MultipleNegativesRankingLoss(
            model, scale=scale, similarity_fct=self.filter or similarity_fct, **ranking
        )
        transformer, self.btoks = find_btoks(model)
        check_appends_all(model)
        self.condensed = first_btoks(self.btoks, condensation_btoks)
        self.budgets = None if btok_budgets is None else check_budgets(model, btok_budgets)
        # A loaded checkpoint has trainable WordWeights; trained ones would let other tokens leak into the mean.
        for module in model.modules():
            if isinstance(module, WordWeights):
                module.requires_grad_(False)
        self.reader = ContentReader(transformer, [*instructions, *filter(None, model.prompts.values())])
        self.lm_head = None if target == "none" else own_head(transformer.model, lm_head, train_lm_head)
        self.route: Route | None = None
        self.leak: float | None = None
        if target != "none" and condensation_weight != 0:
            self.route, self.leak = choose_route(transformer, self.condensed, self.reader.end, route, self.lm_head)
        # Otherwise the same numbers as on the kv route, whose calls can be differentiated on the spot.
        agrees = self.route == "attention" and kv_agrees(transformer, self.condensed, self.reader.end, self.lm_head)
        self.reads_apart = agrees or self.route == "kv"
        self.measured: Measured | None = None
        self._checked_precision = False

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
            ValueError: If a row lacks its bottleneck tokens, or the weight depends on a step that never arrived.
        """
        columns = list(sentence_features)
        facts = self.facts(columns)
        weight, targets = self.targets(columns)
        embeddings, sums, tokens = self._embed_columns(columns, targets, weight)
        ranking = self.rank(embeddings, facts)
        nll, tokens_seen = self.condense(sums, tokens, weight)
        if tokens or not any(targets):  # a loss modifier's repeated calls find no new likelihood: nothing to report
            self.report(columns, targets, nll, tokens_seen, weight)
        parts = {"ranking": ranking, "condensation": weight * nll}
        return torch.stack(list(parts.values())).sum() if in_modifier(self.model) else parts

    def facts(self, columns: list[dict[str, Any]]) -> list[RowFacts]:
        """Check every row for its BToks; if negatives are filtered, facts of the rows of all processes."""
        if len(columns) < 2:
            raise ValueError(
                f"the loss needs at least two columns of inputs, query and positive, got {len(columns)}. Does the "
                "data set have both, in this order, and is neither named label or score?"
            )
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
        callback = BTokCallback.of(self.model)
        if callback is not None:
            self.schedule.step = callback.step
        weight = self.schedule()
        if weight == 0 or self.target == "none":
            return weight, [None] * len(columns)
        query, positive = (self.reader.read(features) for features in columns[:2])
        chosen = choose_targets(query, positive, self.target, self.reader.end, self.max_target_tokens)
        return weight, [
            chosen[number] if number < 2 and any(map(len, chosen[number])) else None for number in range(len(columns))
        ]

    def _embed_columns(
        self, columns: list[dict[str, Any]], targets: list[list[Tensor] | None], weight: float
    ) -> tuple[list[Tensor], Tensor, int]:
        """Every column's embeddings, the NLL summed over all of them, and the number of tokens it is summed over."""
        # FSDP gathers weights in every call: all processes must make the same calls, whatever their rows hold.
        single, numbers = get_world_size() == 1, range(len(columns))
        equal = not single and weight != 0 and self.target != "none"
        cost = call_cost(self._transformer.model) if single else 0  # several processes split nothing
        split = [single and not self._by_layer() and is_split(column, cost) for column in columns]
        alone = [number for number in numbers if equal or targets[number] is not None or split[number]]
        together = [number for number in numbers if number not in alone]
        apart = self.apart(targets)
        readers = (None, apart.later if apart else None)
        embeddings: dict[int, Tensor] = {}
        sums, tokens = [torch.zeros((), device=columns[0]["input_ids"].device)], 0
        for number in alone:
            column = columns[number], targets[number]
            embeddings[number], nll = self.embed_in_buckets(*column, apart is not None, lambda part: readers)
            if len(nll):
                sums.append(nll.sum())
                tokens += sum(map(len, targets[number] or []))
        total = torch.stack(sums).sum() + (apart.read() if apart else 0)
        if together:
            with self._passes():  # as in MNRL: a query column by itself, the candidates merged into one call
                merged = embed_columns(self.model, [columns[n] for n in together], separate_first=0 in together)
            embeddings.update(zip(together, merged, strict=True))
        return [embeddings[number] for number in numbers], total, tokens

    def apart(self, targets: list[list[Tensor] | None], most: int | None = None) -> Apart | None:
        """What reads a batch's targets apart from the graph, so many positions at a time; None where nothing does."""
        if not self.reads_apart or self._by_layer():
            return None
        tokens = sum(len(target) for column in targets if column for target in column)
        return reader_of(self.model, self._transformer.model, self.lm_head, tokens, most)

    @property
    def _transformer(self) -> Transformer:
        """The model's first module, whatever wraps the model."""
        return find_btoks(unwrap(self.model))[0]

    def _by_layer(self) -> bool:
        """Whether `AdaptiveLayerLoss` keeps the states of all layers in a column's own dict."""
        return "forward" in vars(self._transformer)

    def embed_in_buckets(
        self, features: dict[str, Any], targets: list[Tensor] | None, apart: bool, readers: Callable[[int], Readers]
    ) -> tuple[Tensor, Tensor]:
        """`embed` by parts of similar length; `readers` gives the last two arguments of each."""
        if self._by_layer() or get_world_size() > 1:  # the column has to stay whole
            return self.embed(features, targets, *readers(0))
        generated = targets or [torch.zeros(0, dtype=torch.long)] * len(features["input_ids"])
        cost = call_cost(self._transformer.model)
        parts = split_by_length(features, generated, self.reader.media_tokens, cost, apart)
        return in_order(parts, lambda number, part: self.embed(part.features, part.generated, *readers(number)))

    def embed(
        self,
        features: dict[str, Any],
        targets: list[Tensor] | None,
        likelihood: Likelihood | None = None,
        reading: Reading | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One pass through the model.

        Args:
            features: Features of B rows.
            targets: What they generate; None for nothing.
            likelihood: As for `condensed_forward`.
            reading: As for `condensed_forward`; given, the kv route is taken.

        Returns:
            (B, D) embeddings, with budgets (B, budgets, D), and the (B,) summed NLL; (0,) without one.
        """
        with self._passes() as stack:
            if targets is not None and ALL_LAYERS not in features:
                route = "kv" if reading else self.route or "attention"
                options = (self.lm_head, likelihood, reading)
                stack.enter_context(
                    condensed_forward(self._transformer, features, targets, self.condensed, route, *options)
                )
            output = self.model(features)
        # Taken out: MatryoshkaLoss hands the same output to one call per dimension, and the term counts once.
        nll = output.pop(NLL_KEY, None)
        embedding = output["sentence_embedding"]
        return embedding, embedding.new_zeros(0, dtype=torch.float32) if nll is None else nll

    def _passes(self) -> ExitStack:
        """What every pass through the model needs around it."""
        stack = ExitStack()
        stack.enter_context(parameters_in_use(self.model, self._transformer))
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
        loss = torch.stack(losses).mean() * self.schedule.ranking()
        return across_processes(loss) if self.gather_across_devices else loss

    def condense(self, nll: Tensor, tokens: int, weight: float) -> tuple[Tensor, Tensor]:
        """The condensation part, nats per target token, and the number of tokens it is the mean over."""
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
        nll: Tensor,
        tokens: Tensor,
        weight: float,
    ) -> None:
        """Keep what this call measured in `measured`, and give it to the Trainer's `BTokCallback`, if it has one."""
        self.measured = Measured(nll.detach(), tokens, weight, read_tokens(columns, targets), self.leak)
        callback = BTokCallback.of(self.model)
        if callback is not None:
            callback.record(self.measured, unwrap(self.model).training)

    def get_config_dict(self) -> dict[str, Any]:
        """Settings for the model card."""
        return settings_of(self)

    @property
    def temperature(self) -> float:
        """1 / scale."""
        return self.ranking.temperature

    @property
    def citation(self) -> str:
        """BibTeX of the method."""
        return CITATION
