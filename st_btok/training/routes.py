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
from typing import Any, Literal

import torch
from sentence_transformers.base.modules.transformer import Transformer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from st_btok.anatomy import embedding_matrix
from st_btok.pooling import check_btoks
from st_btok.training.attention import condensation_attention
from st_btok.training.likelihood import condensation_nll
from st_btok.training.targets import join_targets

Route = Literal["attention", "kv", "prefix"]
ROUTES = ("attention", "kv", "prefix")
NLL_KEY = "condensation_nll"
# Where `AdaptiveLayerLoss` looks for the states of every layer.
ALL_LAYERS = "all_layer_embeddings"


@contextmanager
def condensed_forward(
    transformer: Transformer,
    features: dict[str, Any],
    targets: list[Tensor],
    btoks: list[int],
    route: Route = "attention",
    head: Tensor | None = None,
) -> Iterator[None]:
    """Inside this block, one call of the model on `features` also yields the condensation term.

    The output features get `condensation_nll` (B,): the negative log-likelihood summed over each row's target tokens,
    in nats; everything else in them is what it would be without.

    Args:
        transformer: The model's first module, unwrapped.
        features: The features of one column (or mini-batch); the call inside must be on this dict.
        targets: B id tensors, empty for rows without a target; at least one is not empty.
        btoks: The K token ids.
        route: `"attention"` (default), `"kv"` or `"prefix"`.
        head: (V, D) output embedding matrix. Default: the input embeddings, looked up while the model runs, because a
            sharded matrix is whole only then.

    Yields:
        Nothing.

    Raises:
        ValueError: `attention` on a backbone without SDPA attention; `kv` on one whose layers are not all attention,
            or under gradient checkpointing.
    """
    layers = getattr(transformer.model.config.get_text_config(decoder=True), "layer_types", None) or []
    if route == "kv" and (
        others := sorted(
            {layer for layer in layers if not layer.endswith("_attention")} | ({"linear_attention"} & set(layers))
        )
    ):
        raise ValueError(
            f"the kv route needs attention layers only, but {type(transformer.model).__name__} has {others}. "
            'Use route="prefix".'
        )
    routes = {"attention": _attention_route, "kv": _kv_route, "prefix": _prefix_route}
    with routes[route](transformer, features, targets, btoks, head):
        yield


@contextmanager
def _attention_route(
    transformer: Transformer, features: dict[str, Any], targets: list[Tensor], btoks: list[int], head: Tensor | None
) -> Iterator[None]:
    batch = join_targets(features, targets, btoks)

    def swap_in(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (dict(batch.features), *args[1:])

    def restore(states: Tensor) -> Tensor:
        """(B, T + N, D) -> (B, T, D), in the column's own layout."""
        return states.gather(1, batch.positions[..., None].expand(-1, -1, states.shape[-1]))

    def swap_out(module: nn.Module, args: tuple[Any, ...], output: dict[str, Any]) -> dict[str, Any]:
        states = output["token_embeddings"]  # (B, T + N, D)
        rows, positions = batch.predictors.T
        nll = _row_nll(transformer, states[rows, positions], batch.labels, rows, len(states), head)
        if ALL_LAYERS in output:  # kept in the column's own dict, where AdaptiveLayerLoss reads it
            features[ALL_LAYERS] = tuple(restore(layer) for layer in output[ALL_LAYERS])
        return {**features, "token_embeddings": restore(states), NLL_KEY: nll}

    with ExitStack() as stack:
        stack.callback(transformer.register_forward_pre_hook(swap_in).remove)
        stack.callback(transformer.register_forward_hook(swap_out).remove)
        stack.enter_context(condensation_attention(transformer.model, batch.segments))
        yield


@contextmanager
def _prefix_route(
    transformer: Transformer, features: dict[str, Any], targets: list[Tensor], btoks: list[int], head: Tensor | None
) -> Iterator[None]:
    rows, ids, mask = _padded(targets, features["input_ids"].device)
    decoder: nn.Module = transformer.model.get_decoder()

    def read_target(module: nn.Module, args: tuple[Any, ...], output: dict[str, Any]) -> dict[str, Any]:
        btok_positions = check_btoks(features["input_ids"], features["attention_mask"], btoks, "the batch")
        states = output["token_embeddings"]
        prefix = states[rows[:, None], btok_positions[rows]]  # (R, K, D)
        embedded = transformer.model.get_input_embeddings()(ids[:, :-1])
        read = decoder(
            inputs_embeds=torch.cat([prefix.to(embedded.dtype), embedded], 1),
            attention_mask=torch.cat([mask.new_ones(len(rows), len(btoks)), mask[:, :-1]], 1).long(),
            use_cache=False,
            return_dict=True,
        ).last_hidden_state  # (R, K + N - 1, D)
        predictors = read[:, len(btoks) - 1 :]  # (R, N, D): the last BTok predicts the first target token
        owner = rows[:, None].expand_as(ids)[mask]
        output[NLL_KEY] = _row_nll(transformer, predictors[mask], ids[mask], owner, len(states), head)
        return output

    with ExitStack() as stack:
        stack.callback(transformer.register_forward_hook(read_target).remove)
        yield


@contextmanager
def _kv_route(
    transformer: Transformer, features: dict[str, Any], targets: list[Tensor], btoks: list[int], head: Tensor | None
) -> Iterator[None]:
    rows, ids, mask = _padded(targets, features["input_ids"].device)
    decoder: nn.Module = transformer.model.get_decoder()
    cache = DynamicCache()  # without a config: sliding layers too keep every position
    given: dict[str, Any] = {}

    def pass_cache(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return ({**args[0], "past_key_values": cache, "use_cache": True}, *args[1:])

    def keep_cache(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given["position_ids"] = kwargs.get("position_ids")
        return args, {**kwargs, "past_key_values": cache, "use_cache": True}

    def read_target(module: nn.Module, args: tuple[Any, ...], output: dict[str, Any]) -> dict[str, Any]:
        keeping.remove()
        output = {key: value for key, value in output.items() if value is not cache and key != "use_cache"}
        states = output["token_embeddings"]
        btok_positions = check_btoks(features["input_ids"], features["attention_mask"], btoks, "the batch")[rows]
        last = btok_positions[:, -1]
        predictors = states[rows, last][:, None]  # (R, 1, D): the last BTok predicts the first target token
        if ids.shape[1] > 1:
            read = decoder(
                inputs_embeds=transformer.model.get_input_embeddings()(ids[:, :-1]),
                attention_mask=torch.cat([mask.new_ones(len(rows), len(btoks)), mask[:, :-1]], 1).long(),
                position_ids=_next_positions(given.get("position_ids"), rows, last, ids.shape[1] - 1, len(states)),
                past_key_values=_btok_cache(cache, rows, btok_positions, states.shape[1]),
                use_cache=True,
                return_dict=True,
            ).last_hidden_state  # (R, N - 1, D)
            predictors = torch.cat([predictors, read], 1)
        owner = rows[:, None].expand_as(ids)[mask]
        output[NLL_KEY] = _row_nll(transformer, predictors[mask], ids[mask], owner, len(states), head)
        return output

    with ExitStack() as stack:
        # sentence-transformers calls the backbone's `forward` itself, past its hooks: a text-only backbone, which is
        # its own decoder, gets the cache as a feature. Inside a multimodal one the decoder is called as a module.
        if decoder is transformer.model:
            keeping = transformer.register_forward_pre_hook(pass_cache)
        else:
            keeping = decoder.register_forward_pre_hook(keep_cache, with_kwargs=True)
        stack.callback(keeping.remove)
        stack.callback(transformer.register_forward_hook(read_target).remove)
        yield


def _btok_cache(cache: DynamicCache, rows: Tensor, btok_positions: Tensor, width: int) -> DynamicCache:
    """The K entries of every layer's cache that belong to the bottleneck tokens, for the rows with a target."""
    kept = DynamicCache()
    for number, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.ndim != 4 or keys.shape[2] != width:
            raise ValueError(
                f"the kv route needs the keys and values of all {width} positions of every layer, but layer {number} "
                'has none: it is not an attention layer. Use route="prefix".'
            )
        # (R, K, H, d) -> (R, H, K, d)
        chosen = [states[rows[:, None], :, btok_positions].transpose(1, 2) for states in (keys, values)]
        kept.update(chosen[0], chosen[1], number)
    if not cache.layers:
        raise ValueError(
            "the kv route needs the keys and values of the backbone's attention layers, but none were kept: it has no "
            'such layers, or gradient checkpointing switches the cache off. Use route="attention" or "prefix".'
        )
    return kept


def _next_positions(positions: Tensor | None, rows: Tensor, last: Tensor, length: int, batch_size: int) -> Tensor:
    """Positions that continue behind the last BTok on every axis, as they would in the joint sequence.

    Args:
        positions: (B, T), (1, T), or (A, B, T) for mRoPE with A axes; None where the backbone counts from 0.
        rows: (R,) rows with a target.
        last: (R,) index of the last BTok of these rows.
        length: How many positions to return.
        batch_size: B.

    Returns:
        (R, length), or (A, R, length).
    """
    steps = torch.arange(1, length + 1, device=last.device)
    if positions is None:
        return last[:, None] + steps
    positions = positions.expand(*positions.shape[:-2], batch_size, -1)
    return positions[..., rows, last][..., None] + steps


def _padded(targets: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with a target (R,), their ids (R, N) padded on the right, and which of these are real (R, N)."""
    rows = [row for row, target in enumerate(targets) if len(target)]
    ids = pad_sequence([targets[row] for row in rows], batch_first=True).to(device)
    sizes = torch.tensor([len(targets[row]) for row in rows], device=device)
    return torch.tensor(rows, device=device), ids, torch.arange(ids.shape[1], device=device) < sizes[:, None]


def _row_nll(
    transformer: Transformer, states: Tensor, labels: Tensor, rows: Tensor, batch_size: int, head: Tensor | None
) -> Tensor:
    """(M, D) predicting states and their (M,) labels and rows -> (B,) summed NLL."""
    matrix = embedding_matrix(transformer.model) if head is None else head
    nll = condensation_nll(states, labels, matrix)
    return nll.new_zeros(batch_size).index_add(0, rows, nll)
