"""Routes: three ways to read a target against the bottleneck tokens of its source, and which one a backbone can take.

* `attention`: one joint pass over `[input][BToks][target]` under the condensation mask (`mask.py`).
* `kv`: the target is read against the cached keys and values of the K tokens. The same numbers as `attention`, without
  a mask, so flash attention can run it. It needs the cache, which gradient checkpointing switches off.
* `prefix`: the K last-layer states become the first K inputs of a sequence of their own, followed by the target. It
  needs neither mask nor cache, so hybrids and state-space models can use it, and it trains exactly what is pooled.

A route is a function from a part of a column to its `Embedded`: embeddings and the targets' negative log-likelihood
(NLL). It calls the model once, on the part's features. Everything else that it does happens in hooks on the
`Transformer` module. So a wrapper of the model (DDP, FSDP, compile) sees one ordinary call, and pooling sees the
column's own layout. The NLL is computed inside that call and returned in the model's output, because FSDP holds the
whole LM head only while the model runs, and prepares the backward pass only for what the model returns.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from PIL import Image
from sentence_transformers.base.modules.transformer import Transformer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from st_btok.limits import UNLIMITED
from st_btok.model_parts import LogitRule, attention_of, embedding_matrix, supports_sdpa, tokenizer_of
from st_btok.pooling import check_btoks
from st_btok.training.mask import BTOK, INPUT, TARGET, condensation_attention
from st_btok.training.splitting import Part
from st_btok.training.targets import JointBatch, join_targets
from st_btok.training.vocabulary_loss import SummedCrossEntropy

logger = logging.getLogger(__name__)

Route = Literal["attention", "kv", "prefix"]
_NLL = "condensation_nll"
# The key under which `AdaptiveLayerLoss` reads the states of every layer.
ALL_LAYERS = "all_layer_embeddings"
# (M, D) states, the (V, D) head, (M,) labels and the logits' `softcap` -> their summed negative log-likelihood.
Likelihood = Callable[..., Tensor]


@dataclass(frozen=True)
class Embedded:
    """What a route computes for a part of a column."""

    embedding: Tensor  # (B, D); with budgets (B, budgets, D)
    nll: Tensor  # scalar, at least float32: negative log-likelihood summed over the target tokens, in nats
    tokens: int  # the number of target tokens


@dataclass(frozen=True)
class Call:
    """How to call the model: what every route needs, besides the part.

    `head` is the (V, D) matrix of an untied LM head. None where the head is tied to the input embeddings: their matrix
    is looked up inside the call of the model, because under FSDP it is whole only there.
    """

    model: nn.Module  # wrapped (DDP, FSDP, compile) or not
    transformer: Transformer  # its first module, unwrapped
    btoks: list[int]  # ids of the bottleneck tokens that targets read
    join: Callable[[Part], JointBatch]  # builds the rows `[input][BToks][target]` of the attention route
    head: Tensor | None = None
    logits: LogitRule = LogitRule()
    likelihood: Likelihood = field(default_factory=SummedCrossEntropy)

    def nll(self, states: Tensor, labels: Tensor) -> Tensor:
        """Summed NLL of (M,) labels, predicted by (M, D) states."""
        head = embedding_matrix(self.transformer.model) if self.head is None else self.head
        states = states if self.logits.scale == 1 else states * self.logits.scale
        return self.likelihood(states, head, labels, softcap=self.logits.cap)


def plain(call: Call, part: Part) -> Embedded:
    """Embeddings alone: the part's targets are not read."""
    return _run(call, part)


def attention(call: Call, part: Part) -> Embedded:
    """One joint pass over `[input][BToks][target]` under the condensation mask."""
    joint = call.join(part)

    def restored(states: Tensor) -> Tensor:
        """(B, T + N, D) -> (B, T, D): states without the targets, padded as the column is."""
        return states.gather(1, joint.positions[..., None].expand(-1, -1, states.shape[-1]))

    def after(output: dict[str, Any]) -> dict[str, Any]:
        states = output["token_embeddings"]  # (B, T + N, D)
        rows, positions = joint.predictors.T
        nll = call.nll(states[rows, positions], joint.labels)
        if ALL_LAYERS in output:  # AdaptiveLayerLoss reads it in the column's own dict
            part.features[ALL_LAYERS] = tuple(restored(layer) for layer in output[ALL_LAYERS])
        return {**part.features, "token_embeddings": restored(states), _NLL: nll}

    with condensation_attention(call.transformer.model, joint.segments):
        # A copy, because the model writes its output into the dict that it is given.
        return _run(call, part, before=lambda features: dict(joint.features), after=after)


def prefix(call: Call, part: Part) -> Embedded:
    """A second, short call of the decoder on `[pooled states][target]`."""

    def after(output: dict[str, Any]) -> dict[str, Any]:
        model, states = call.transformer.model, output["token_embeddings"]
        rows, ids, mask = _padded(part.targets or [], states.device)
        # In rows with a target, the K last-layer states take the place of input embeddings.
        states = states[rows[:, None], _btok_positions(call, part)[rows]]  # (R, K, D)
        embedded = model.get_input_embeddings()(ids[:, :-1])
        read = model.get_decoder()(
            inputs_embeds=torch.cat([states.to(embedded.dtype), embedded], 1),
            attention_mask=_behind_btoks(mask, len(call.btoks)),
            use_cache=False,
            return_dict=True,
        ).last_hidden_state  # (R, K + N - 1, D)
        # The last BTok predicts the first target token.
        predictors = read[:, len(call.btoks) - 1 :]  # (R, N, D)
        output[_NLL] = call.nll(predictors[mask], ids[mask])
        return output

    return _run(call, part, after=after)


def kv(call: Call, part: Part) -> Embedded:
    """A second, short call of the decoder on `[target]`, which finds the BToks' keys and values in its cache."""
    _check_attention_layers(call.transformer)
    model = call.transformer.model
    decoder = model.get_decoder()
    # Filled by the first call. It has no config, so that sliding-window layers keep every position too.
    filled = DynamicCache()
    first_position_ids: list[Tensor | None] = []  # position ids of the first call; empty until it has begun

    def before(features: dict[str, Any]) -> dict[str, Any]:
        """Give a text-only backbone the cache: sentence-transformers calls its `forward` directly, past any hook."""
        return features if decoder is not model else {**features, "past_key_values": filled, "use_cache": True}

    def before_decoder(arguments: dict[str, Any]) -> dict[str, Any]:
        """Give the decoder of a multimodal backbone the cache, and note the position ids that only it is told."""
        if first_position_ids:  # this is the second call
            return arguments
        first_position_ids.append(arguments.get("position_ids"))
        return {**arguments, "past_key_values": filled, "use_cache": True}

    def after(output: dict[str, Any]) -> dict[str, Any]:
        # The output holds the features that went in, so the cache and its flag are taken out again.
        output = {key: value for key, value in output.items() if value is not filled and key != "use_cache"}
        states = output["token_embeddings"]
        # 1. For the rows with a target: the state of the last BTok, which predicts the first target token, and the
        #    keys and values of all BToks.
        rows, ids, mask = _padded(part.targets or [], states.device)
        places = _btok_positions(call, part)[rows]  # (R, K)
        cache = _btok_cache(filled, rows, places, states.shape[1])
        filled.layers.clear()  # nothing else reads it, and it holds every position
        predictors = states[rows, places[:, -1]][:, None]  # (R, 1, D)
        # 2. Read all target tokens but the last. Their positions continue behind the input's, as in the joint rows.
        if ids.shape[1] > 1:
            own = part.features["attention_mask"][rows]
            last = own.shape[1] - 1 - own.flip(1).argmax(1)  # (R,): index of each row's last token
            positions = first_position_ids[0] if first_position_ids else None
            if positions is not None:  # (B, T), (1, T), or (A, B, T) for mRoPE with A axes; else they count from 0
                last = positions.expand(*positions.shape[:-2], len(states), -1)[..., rows, last]
            read = decoder(
                inputs_embeds=model.get_input_embeddings()(ids[:, :-1]),
                attention_mask=_behind_btoks(mask, len(call.btoks)),
                position_ids=last[..., None] + torch.arange(1, ids.shape[1], device=ids.device),
                past_key_values=cache,
                use_cache=True,
                return_dict=True,
            ).last_hidden_state  # (R, N - 1, D)
            predictors = torch.cat([predictors, read], 1)
        output[_NLL] = call.nll(predictors[mask], ids[mask])
        return output

    return _run(call, part, before, after, None if decoder is model else before_decoder)


ROUTES: dict[str, Callable[[Call, Part], Embedded]] = {"attention": attention, "kv": kv, "prefix": prefix}


def _run(
    call: Call,
    part: Part,
    before: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    after: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    before_decoder: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Embedded:
    """Call the model on a part, with these functions around its first module and its decoder."""
    transformer = call.transformer
    with ExitStack() as stack:
        if before is not None:
            pre = transformer.register_forward_pre_hook(lambda module, args: (before(args[0]), *args[1:]))
            stack.callback(pre.remove)
        if after is not None:
            stack.callback(transformer.register_forward_hook(lambda module, args, output: after(output)).remove)
        if before_decoder is not None:
            inner = transformer.model.get_decoder().register_forward_pre_hook(
                lambda module, args, kwargs: (args, before_decoder(kwargs)), with_kwargs=True
            )
            stack.callback(inner.remove)
        output = call.model(part.features)
    # `pop`, because MatryoshkaLoss reuses this output for every dimension, and the condensation loss counts once.
    nll = output.pop(_NLL, None)
    embedding = output["sentence_embedding"]
    if nll is None:
        return Embedded(embedding, embedding.new_zeros((), dtype=torch.float32), 0)
    return Embedded(embedding, nll, sum(map(len, part.targets or [])))


def _padded(targets: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with a target (R,), their ids (R, N) padded on the right, and which of these are real (R, N)."""
    rows = [row for row, target in enumerate(targets) if len(target)]
    ids = pad_sequence([targets[row] for row in rows], batch_first=True).to(device)
    sizes = torch.tensor([len(targets[row]) for row in rows], device=device)
    return torch.tensor(rows, device=device), ids, torch.arange(ids.shape[1], device=device) < sizes[:, None]


def _btok_positions(call: Call, part: Part) -> Tensor:
    """(B, K): positions, in the column's own layout, of the bottleneck tokens that targets read."""
    return check_btoks(part.features["input_ids"], part.features["attention_mask"], call.btoks, "the batch")


def _behind_btoks(mask: Tensor, num_btoks: int) -> Tensor:
    """The attention mask (R, K + N - 1) of BToks and targets, from the mask (R, N) of real target tokens."""
    return torch.cat([mask.new_ones(len(mask), num_btoks), mask[:, :-1]], 1).long()


def _check_attention_layers(transformer: Transformer) -> None:
    """Refuse the kv route where some layers have no keys and values to keep."""
    layers = getattr(transformer.model.config.get_text_config(decoder=True), "layer_types", None) or []
    others = {layer for layer in layers if not layer.endswith("_attention") or layer == "linear_attention"}
    if others:
        raise ValueError(
            f"the kv route needs attention layers only, but {type(transformer.model).__name__} has {sorted(others)}. "
            'Use route="prefix".'
        )


def _btok_cache(filled: DynamicCache, rows: Tensor, places: Tensor, width: int) -> DynamicCache:
    """A cache that holds, of some rows (R,), only the positions (R, K) of their bottleneck tokens."""
    cache = DynamicCache()
    for number, layer in enumerate(filled.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)  # (B, H, T, d)
        if keys is None or values is None or keys.ndim != 4 or keys.shape[2] != width:
            raise ValueError(
                f"the kv route needs the keys and values of all {width} positions of every layer, but layer {number} "
                'has none: it is not an attention layer. Use route="prefix".'
            )
        # (R, K, H, d) -> (R, H, K, d)
        kept = [states[rows[:, None], :, places].transpose(1, 2) for states in (keys, values)]
        cache.update(*kept, number)
    if not filled.layers:
        raise ValueError(
            "the kv route needs the keys and values of the backbone's attention layers, but none were kept: it has no "
            'such layers, or gradient checkpointing switches the cache off. Use route="attention" or "prefix".'
        )
    return cache


# --- which route a backbone can take ----------------------------------------------------------------


def choose_route(call: Call, end: int, route: Route | Literal["auto"]) -> tuple[Route, float | None]:
    """Choose the route of a loss, and log the choice; also the leak, None where nothing was measured.

    Whether a mask can cut a target off from its input depends on the backbone's code. So it is measured, on one row,
    when the loss is made. `"auto"` takes the first route that is right: `attention`, or `kv` under flash attention,
    which takes no mask; else `prefix`. A `ValueError` if the route that was asked for can't be had on this backbone.
    """
    transformer = call.transformer
    features, target = probe_row(transformer, end)
    if route in ("kv", "prefix"):  # no input is read by construction; this shows whether the backbone can run it
        with torch.no_grad():
            ROUTES[route](call, Part(features, [target]))
        return route, None
    backbone = type(transformer.model).__name__
    leak, reason = None, "it has no SDPA attention"
    if supports_sdpa(transformer.model):
        leak = find_leak(transformer, join_targets(features, [target], call.btoks))
        reason = f"a gradient of {leak:.2g} passed around the mask, which must be 0"
    if route == "attention" and leak != 0.0:
        raise ValueError(
            f"the condensation mask must cut the target off from its input, but for {backbone} {reason}: "
            'recurrent or convolutional layers, or an attention that takes no mask? Use route="auto" or "prefix".'
        )
    chosen: Route = "attention"
    checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in transformer.model.modules())
    flash = "flash" in attention_of(transformer.model.config.get_text_config(decoder=True))
    if leak != 0.0:
        chosen = "prefix"
    elif route == "auto" and flash and not checkpointing:  # checkpointing leaves no cache to read
        chosen, reason = "kv", "flash attention takes no mask"
    else:
        reason = "the leak probe is 0"
    logger.info("BTokLoss uses route=%r on %s: %s.", chosen, backbone, reason)
    return chosen, leak


def probe_row(transformer: Transformer, end: int) -> tuple[dict[str, Any], Tensor]:
    """One row to measure a backbone with, an image in it where it takes images; and the ids of a short target."""
    sample: Any = {"text": "1 2 3 4"}
    if "image" in transformer.modality_config:
        sample["image"] = Image.new("RGB", (56, 56), "red")
    features = transformer.preprocess([sample], processing_kwargs=UNLIMITED)
    device = transformer.model.device
    features = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in features.items()}
    text = tokenizer_of(transformer)("5 6 7", add_special_tokens=False)["input_ids"]
    return features, torch.tensor([*text, end])


def find_leak(transformer: Transformer, batch: JointBatch) -> float:
    """Largest influence of the input on the target's states once the BToks are cut off as well; must be exactly 0.

    The gradient of the target's last-layer states with respect to every input embedding and every pixel is taken with
    the target barred from input and BToks alike. Softmax gives a masked position the weight 0 exactly, so anything but
    0 is a path that the mask does not cut: recurrent or convolutional layers, or an attention that ignores masks. The
    model's first module is given unwrapped, the joint rows with at least one target token.
    """
    segments = torch.where(batch.segments == BTOK, INPUT, batch.segments)
    features = {
        key: value.detach().clone().requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for key, value in batch.features.items()
    }
    embedded: list[Tensor] = []

    def watch(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        # Detached, so that weights stay out of it; input positions only, the target may depend on itself.
        leaf = output.detach().requires_grad_()
        embedded.append(leaf)
        return leaf

    training = transformer.training
    transformer.eval()
    handle = transformer.model.get_input_embeddings().register_forward_hook(watch)
    try:
        with torch.enable_grad(), condensation_attention(transformer.model, segments):
            states = transformer(features)["token_embeddings"]
            leaves = [*embedded, *(v for v in features.values() if isinstance(v, Tensor) and v.requires_grad)]
            leaves = [leaf for leaf in leaves if leaf is not states and leaf.is_leaf]
            grads = torch.autograd.grad(states[segments == TARGET].float().square().sum(), leaves, allow_unused=True)
    finally:
        handle.remove()
        transformer.train(training)
    leak = 0.0
    for leaf, grad in zip(leaves, grads, strict=True):
        if grad is None:
            continue
        if leaf.shape[:2] == segments.shape:  # token embeddings: look at input positions only
            grad = grad[segments == INPUT]
        if grad.numel():
            leak = max(leak, grad.abs().max().item())
    return leak
