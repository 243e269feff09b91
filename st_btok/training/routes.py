"""Routes: three ways to read a target against the bottleneck tokens of its source, all inside the model's own forward.

* `attention`: one joint pass over `[input][BToks][target]` under the condensation mask (the paper's mask, design D3).
* `kv`: the target is read against the cached keys and values of the K tokens. The same numbers as `attention`, without
  a mask, so flash attention can run it; it needs the cache, which gradient checkpointing switches off.
* `prefix`: the K last-layer states become the first K inputs of a sequence of their own, followed by the target. It
  needs neither mask nor cache, so hybrids and state-space models can use it, and it trains exactly what is pooled.

Hooks on the Transformer module do the work, so whatever wraps the model (DDP, FSDP) sees one ordinary call, and
pooling sees the original layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from sentence_transformers.base.modules.transformer import Transformer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from st_btok.model_parts import embedding_matrix
from st_btok.pooling import check_btoks
from st_btok.training.mask import condensation_attention
from st_btok.training.targets import join_targets
from st_btok.training.unread import Likelihood, Reading, Unread
from st_btok.training.vocabulary_loss import condensation_nll

Route = Literal["attention", "kv", "prefix", "unmasked"]
ROUTES = ("attention", "kv", "prefix")
# A control, not a way to train: the target reads its input as well, so nothing has to pass through the BToks. The
# paper's ablation without the mask, and `generation_kv_mode: full` of the authors' release.
UNMASKED = "unmasked"
NLL_KEY = "condensation_nll"
# Where `AdaptiveLayerLoss` looks for the states of every layer.
ALL_LAYERS = "all_layer_embeddings"


@dataclass(frozen=True)
class Task:
    """What every route is given: one column (or a part of it) and what its rows generate.

    Attributes:
        transformer: The model's first module, unwrapped.
        features: The features of the column; the call of the model must be on this dict.
        targets: B id tensors, empty for rows without a target; at least one is not empty.
        btoks: The token ids that targets read: all K, or the first of them.
        head: (V, D) output embedding matrix; None for the input embeddings, looked up while the model runs, because a
            sharded matrix is whole only then.
        likelihood: Turns (M, D) states, (M,) labels and the head into (M,) negative log-likelihoods.
        reading: How a call of its own on the targets is made; None for as a part of the graph.
    """

    transformer: Transformer
    features: dict[str, Any]
    targets: list[Tensor]
    btoks: list[int]
    head: Tensor | None
    likelihood: Likelihood
    reading: Reading | None = None

    def row_nll(self, states: Tensor, labels: Tensor, rows: Tensor, number: int | None = None) -> Tensor:
        """(M, D) predicting states and their (M,) labels and rows -> summed NLL of the B, or `number`, rows."""
        head = embedding_matrix(self.transformer.model) if self.head is None else self.head
        nll = self.likelihood(states, labels, head)
        return nll.new_zeros(len(self.targets) if number is None else number).index_add(0, rows, nll)

    def btok_positions(self) -> Tensor:
        """(B, K) where the bottleneck tokens that targets read stand in the column's own layout."""
        return check_btoks(self.features["input_ids"], self.features["attention_mask"], self.btoks, "the batch")


class AttentionRoute:
    """One joint pass over `[input][BToks][target]` under the condensation mask.

    Args:
        task: The column and its targets.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.joint = join_targets(task.features, task.targets, task.btoks)
        self.segments: Tensor | None = self.joint.segments  # switches the condensation mask on

    def before(self, features: dict[str, Any]) -> dict[str, Any]:
        """The joint rows in place of the column's own. A copy: the model writes its output into what it is given."""
        return dict(self.joint.features)

    def after(self, output: dict[str, Any]) -> dict[str, Any]:
        """The likelihood, and everything else in the column's own layout, which is what pooling knows."""
        states = output["token_embeddings"]  # (B, T + N, D)
        rows, positions = self.joint.predictors.T
        nll = self.task.row_nll(states[rows, positions], self.joint.labels, rows)
        if ALL_LAYERS in output:  # kept in the column's own dict, where AdaptiveLayerLoss reads it
            self.task.features[ALL_LAYERS] = tuple(self._restored(layer) for layer in output[ALL_LAYERS])
        return {**self.task.features, "token_embeddings": self._restored(states), NLL_KEY: nll}

    def _restored(self, states: Tensor) -> Tensor:
        """(B, T + N, D) -> (B, T, D): padding goes back to where the column has it."""
        return states.gather(1, self.joint.positions[..., None].expand(-1, -1, states.shape[-1]))


class UnmaskedRoute(AttentionRoute):
    """The joint pass without the condensation mask.

    Args:
        task: The column and its targets.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.segments = None


class PrefixRoute:
    """A second, short call of the decoder on `[pooled states][target]`.

    Args:
        task: The column and its targets.
    """

    segments: Tensor | None = None

    def __init__(self, task: Task) -> None:
        self.task = task
        self.rows, self.ids, self.mask = _padded(task.targets, task.features["input_ids"].device)

    def before(self, features: dict[str, Any]) -> dict[str, Any]:
        """The column as it is."""
        return features

    def after(self, output: dict[str, Any]) -> dict[str, Any]:
        """The likelihood of the targets behind the K last-layer states, which stand in for input embeddings."""
        model, num_btoks = self.task.transformer.model, len(self.task.btoks)
        states = output["token_embeddings"]
        prefix = states[self.rows[:, None], self.task.btok_positions()[self.rows]]  # (R, K, D)
        embedded = model.get_input_embeddings()(self.ids[:, :-1])
        read = model.get_decoder()(
            inputs_embeds=torch.cat([prefix.to(embedded.dtype), embedded], 1),
            attention_mask=_behind_btoks(self.mask, num_btoks),
            use_cache=False,
            return_dict=True,
        ).last_hidden_state  # (R, K + N - 1, D)
        predictors = read[:, num_btoks - 1 :]  # (R, N, D): the last BTok predicts the first target token
        owner = self.rows[:, None].expand_as(self.ids)[self.mask]
        output[NLL_KEY] = self.task.row_nll(predictors[self.mask], self.ids[self.mask], owner)
        return output


class KVRoute:
    """A second, short call of the decoder on `[target]`, which finds the BToks' keys and values in its cache.

    Args:
        task: The column and its targets.
    """

    segments: Tensor | None = None

    def __init__(self, task: Task) -> None:
        self.task = task
        self.cache = DynamicCache()  # without a config: sliding layers too keep every position
        self.positions: Tensor | None = None
        self.reading = False  # the second call reads what the first has kept

    def before(self, features: dict[str, Any]) -> dict[str, Any]:
        """With a cache to fill, for a text-only backbone: sentence-transformers calls its `forward` past its hooks."""
        model = self.task.transformer.model
        if model.get_decoder() is not model:
            return features
        return {**features, "past_key_values": self.cache, "use_cache": True}

    def before_decoder(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """With a cache to fill, for the decoder inside a multimodal backbone, which alone knows the positions."""
        if self.reading:
            return arguments
        self.positions = arguments.get("position_ids")
        return {**arguments, "past_key_values": self.cache, "use_cache": True}

    def after(self, output: dict[str, Any]) -> dict[str, Any]:
        """The likelihood of the targets behind the keys and values of the K tokens."""
        self.reading = True
        output = {key: value for key, value in output.items() if value is not self.cache and key != "use_cache"}
        states = output["token_embeddings"]
        numbers = [row for row, target in enumerate(self.task.targets) if len(target)]
        rows = torch.tensor(numbers, device=states.device)  # (R,)
        btok_positions = self.task.btok_positions()[rows]  # (R, K)
        # The last BTok predicts the first target token: (R, D). Keys and values: (R, H, K, d).
        sources = [states[rows, btok_positions[:, -1]]]
        sources += _btok_cache(self.cache, rows, btok_positions, states.shape[1])
        self.cache.layers.clear()  # nothing else reads it, and it holds every position
        mask = self.task.features["attention_mask"][rows]
        last = _positions_of(self.positions, rows, mask.shape[1] - 1 - mask.flip(1).argmax(1), len(states))
        unread = Unread(sources, [self.task.targets[row] for row in numbers], last)
        nll = self._read(unread) if self.task.reading is None else self.task.reading(unread, self._read)
        output[NLL_KEY] = nll.new_zeros(len(states)).index_add(0, rows, nll)
        return output

    def _read(self, unread: Unread) -> Tensor:
        """The likelihoods (R,) of targets, of whichever call, which read their BToks' states, keys and values."""
        rows, ids, mask = _padded(unread.targets, unread.last.device)
        predictors = unread.sources[0][:, None]  # (R, 1, D)
        if ids.shape[1] > 1:
            model = self.task.transformer.model
            cache = DynamicCache()
            for number, (keys, values) in enumerate(zip(unread.sources[1::2], unread.sources[2::2], strict=True)):
                cache.update(keys, values, number)
            read = model.get_decoder()(
                inputs_embeds=model.get_input_embeddings()(ids[:, :-1]),
                attention_mask=_behind_btoks(mask, len(self.task.btoks)),
                # They continue on every axis, as they would in the joint sequence.
                position_ids=unread.last[..., None] + torch.arange(1, ids.shape[1], device=ids.device),
                past_key_values=cache,
                use_cache=True,
                return_dict=True,
            ).last_hidden_state  # (R, N - 1, D)
            predictors = torch.cat([predictors, read], 1)
        owner = rows[:, None].expand_as(ids)[mask]
        return self.task.row_nll(predictors[mask], ids[mask], owner, len(rows))


@contextmanager
def condensed_forward(
    transformer: Transformer,
    features: dict[str, Any],
    targets: list[Tensor],
    btoks: list[int],
    route: Route = "attention",
    head: Tensor | None = None,
    likelihood: Likelihood | None = None,
    reading: Reading | None = None,
) -> Iterator[None]:
    """Inside this block, one call of the model on `features` also yields the condensation term.

    The output features get `condensation_nll` (B,): the negative log-likelihood summed over each row's target tokens,
    in nats; everything else in them is what it would be without.

    Args:
        transformer: The model's first module, unwrapped.
        features: The features of one column (or mini-batch); the call inside must be on this dict.
        targets: B id tensors, empty for rows without a target; at least one is not empty.
        btoks: The K token ids.
        route: `"attention"` (default), `"kv"`, `"prefix"`, or the control `"unmasked"`.
        head: (V, D) output embedding matrix. Default: the input embeddings.
        likelihood: What turns states, labels and head into likelihoods. Default `condensation_nll`.
        reading: On the kv route, how the targets are read; see `apart.py`. Default: as a part of the graph.

    Yields:
        Nothing.

    Raises:
        ValueError: `attention` on a backbone without SDPA attention; `kv` on one whose layers are not all attention,
            or under gradient checkpointing.
    """
    task = Task(transformer, features, targets, btoks, head, likelihood or condensation_nll, reading)
    if route == "kv":
        _check_attention_layers(transformer)
    kinds: dict[str, type] = {
        "attention": AttentionRoute,
        "kv": KVRoute,
        "prefix": PrefixRoute,
        UNMASKED: UnmaskedRoute,
    }
    taken = kinds[route](task)
    decoder: nn.Module = transformer.model.get_decoder()
    with ExitStack() as stack:
        pre = transformer.register_forward_pre_hook(lambda module, args: (taken.before(args[0]), *args[1:]))
        stack.callback(pre.remove)
        stack.callback(transformer.register_forward_hook(lambda module, args, output: taken.after(output)).remove)
        if route == "kv" and decoder is not transformer.model:
            inner = decoder.register_forward_pre_hook(
                lambda module, args, kwargs: (args, taken.before_decoder(kwargs)), with_kwargs=True
            )
            stack.callback(inner.remove)
        if taken.segments is not None:
            stack.enter_context(condensation_attention(transformer.model, taken.segments))
        yield


def _check_attention_layers(transformer: Transformer) -> None:
    """Refuse the kv route where some layers have no keys and values to keep."""
    layers = getattr(transformer.model.config.get_text_config(decoder=True), "layer_types", None) or []
    others = {layer for layer in layers if not layer.endswith("_attention") or layer == "linear_attention"}
    if others:
        raise ValueError(
            f"the kv route needs attention layers only, but {type(transformer.model).__name__} has {sorted(others)}. "
            'Use route="prefix".'
        )


def _behind_btoks(mask: Tensor, num_btoks: int) -> Tensor:
    """(R, N) real target tokens -> (R, K + N - 1) what a target's tokens may read: all BToks and earlier targets."""
    return torch.cat([mask.new_ones(len(mask), num_btoks), mask[:, :-1]], 1).long()


def _btok_cache(cache: DynamicCache, rows: Tensor, btok_positions: Tensor, width: int) -> list[Tensor]:
    """Keys and values of every layer in turn, at the bottleneck tokens of the rows with a target: (R, H, K, d)."""
    kept = []
    for number, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.ndim != 4 or keys.shape[2] != width:
            raise ValueError(
                f"the kv route needs the keys and values of all {width} positions of every layer, but layer {number} "
                'has none: it is not an attention layer. Use route="prefix".'
            )
        # (R, K, H, d) -> (R, H, K, d)
        kept += [states[rows[:, None], :, btok_positions].transpose(1, 2) for states in (keys, values)]
    if not cache.layers:
        raise ValueError(
            "the kv route needs the keys and values of the backbone's attention layers, but none were kept: it has no "
            'such layers, or gradient checkpointing switches the cache off. Use route="attention" or "prefix".'
        )
    return kept


def _positions_of(positions: Tensor | None, rows: Tensor, places: Tensor, batch_size: int) -> Tensor:
    """The position that the backbone gives to one token of each row.

    Args:
        positions: (B, T), (1, T), or (A, B, T) for mRoPE with A axes; None where the backbone counts from 0.
        rows: (R,) rows with a target.
        places: (R,) index of the token in each of them.
        batch_size: B.

    Returns:
        (R,), or (A, R).
    """
    if positions is None:
        return places
    return positions.expand(*positions.shape[:-2], batch_size, -1)[..., rows, places]


def _padded(targets: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with a target (R,), their ids (R, N) padded on the right, and which of these are real (R, N)."""
    rows = [row for row, target in enumerate(targets) if len(target)]
    ids = pad_sequence([targets[row] for row in rows], batch_first=True).to(device)
    sizes = torch.tensor([len(targets[row]) for row in rows], device=device)
    return torch.tensor(rows, device=device), ids, torch.arange(ids.shape[1], device=device) < sizes[:, None]
