"""Looking inside an embedding: the text that its bottleneck tokens can generate, and what they attended to.

`decode_btoks` asks the LM head to write a text that sees the K bottleneck tokens and nothing of the input: what the
condensation loss trains, used as a generator. `btok_attention` returns how much each bottleneck token attended to each
token of the input, with the grid of patches behind every image and video; `explain_figure` draws it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.transformer import Transformer
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from st_btok.model_parts import attention_set, find_btoks, tokenizer_of
from st_btok.pooling import check_btoks
from st_btok.training.content import closing_token
from st_btok.training.lm_head import output_embeddings, own_logits
from st_btok.training.mask import condensation_attention
from st_btok.training.routes import find_leak
from st_btok.training.targets import join_targets


@dataclass(frozen=True)
class Decoded:
    """A text generated from bottleneck tokens alone.

    Attributes:
        text: The text, without special tokens.
        ids: (N,) generated token ids, the closing EOS token included where it was reached.
        scores: (N,) log-likelihood of each token, in nats; their sum is minus the NLL of the condensation loss.
    """

    text: str
    ids: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Medium:
    """Where an image or a video stands in an input.

    `grid`: (frames, rows, columns) of its tokens, frames being what the backbone merges into one step in time. None
    where the tokens form no grid that the processor tells (tiles of different sizes, separators).
    """

    kind: str
    positions: Tensor  # (n,) its tokens
    grid: tuple[int, int, int] | None


@dataclass(frozen=True)
class BTokAttention:
    """How the bottleneck tokens of one input attended to it.

    Attributes:
        weights: (K, T) attention of each BTok to each position, the mean over heads and chosen layers. A row sums to
            1 over the input, the earlier BToks and the BTok itself.
        tokens: T token texts; "" for placeholders of media.
        media: The images and videos in their order.
    """

    weights: Tensor
    tokens: list[str]
    media: list[Medium]

    def media_weights(self, number: int) -> Tensor:
        """(K, frames, rows, columns) attention to one medium; (K, 1, 1, n) where it has no grid."""
        medium = self.media[number]
        return self.weights[:, medium.positions].unflatten(1, medium.grid or (1, 1, len(medium.positions)))


@torch.no_grad()
def decode_btoks(
    model: SentenceTransformer,
    inputs: Sequence[Any],
    max_new_tokens: int = 32,
    num_beams: int = 1,
    *,
    route: Literal["attention", "prefix"] = "attention",
    prompt: str | None = None,
    lm_head: nn.Module | Tensor | str | None = None,
) -> list[Decoded]:
    """The most likely text given only the bottleneck tokens of an input.

    y = argmax sum_i log p(y_i | BToks, y_<i), by greedy or beam search, until the EOS token. Meaningful for
    models trained with condensation, through the route they were trained with. Each step reads the whole sequence
    again, so the cost is that of `max_new_tokens` encoder calls per input and beam.

    Args:
        model: A BTok model.
        inputs: Whatever the model encodes: texts, images, dicts, ...
        max_new_tokens: Longest text in tokens, at least 1. Default 32.
        num_beams: Hypotheses kept, at least 1. Default 1, greedy.
        route: How the text reaches the BToks: `"attention"` (default; the condensation mask) or `"prefix"` (their
            last-layer states as a soft prompt); see `BTokLoss`.
        prompt: Instruction of the inputs, as in `encode`.
        lm_head: Where the LM head of an untied backbone comes from, as in `BTokLoss`.

    Returns:
        One `Decoded` per input.

    Raises:
        ValueError: If a number is out of range, the route is unknown, the LM head is not found, or the backbone lets
            the input pass around the mask (recurrent layers): then use `route="prefix"`.
    """
    if max_new_tokens < 1 or num_beams < 1:
        raise ValueError(f"max_new_tokens and num_beams must be at least 1, got {max_new_tokens} and {num_beams}.")
    if route not in ("attention", "prefix"):
        raise ValueError(f'route must be "attention" or "prefix", got {route!r}.')
    transformer, btoks = find_btoks(model)
    head, rule = output_embeddings(transformer.model, lm_head), own_logits(transformer.model)

    def logits(states: Tensor) -> Tensor:
        return rule(F.linear(states, head.to(states.dtype)).float())

    end = closing_token(transformer)
    training = model.training
    model.eval()
    try:
        results = []
        for number, sample in enumerate(inputs):
            if route == "prefix":
                step = _prefix_step(transformer, _features(transformer, [sample], prompt), btoks, logits)
            else:
                copies = cache(lambda n, sample=sample: _features(transformer, [sample] * n, prompt))
                if number == 0:
                    _refuse_leak(transformer, copies(1), btoks, end)
                step = _attention_step(transformer, copies, btoks, logits)
            ids, scores = _search(step, end, max_new_tokens, num_beams)
            text = tokenizer_of(transformer).decode(ids.tolist(), skip_special_tokens=True)
            results.append(Decoded(str(text), ids, scores))
        return results
    finally:
        model.train(training)


def _features(transformer: Transformer, samples: list[Any], prompt: str | None) -> dict[str, Any]:
    return batch_to_device(dict(transformer.preprocess(samples, prompt=prompt)), transformer.model.device)


def _refuse_leak(transformer: Transformer, features: dict[str, Any], btoks: list[int], end: int) -> None:
    target = torch.tensor([end], device=features["input_ids"].device)
    leak = find_leak(transformer, join_targets(features, [target], btoks))
    if leak != 0.0:
        raise ValueError(
            f"the text must depend on the bottleneck tokens alone, but in {type(transformer.model).__name__} "
            f'a gradient of {leak:.2g} passes around the mask. Use route="prefix".'
        )


# From token ids so far, (n, N), to logits of the next token, (n, V); from states, (n, D), to the same.
_Step = Callable[[Tensor], Tensor]
_Logits = Callable[[Tensor], Tensor]


def _attention_step(
    transformer: Transformer, copies: Callable[[int], dict[str, Any]], btoks: list[int], logits: _Logits
) -> _Step:
    def step(ids: Tensor) -> Tensor:
        batch = join_targets(copies(len(ids)), list(ids), btoks)
        with condensation_attention(transformer.model, batch.segments):
            states = transformer(dict(batch.features))["token_embeddings"]
        last = batch.features["attention_mask"].sum(1) - 1  # joint rows are padded on the right
        return logits(states[torch.arange(len(ids)), last])

    return step


def _prefix_step(transformer: Transformer, features: dict[str, Any], btoks: list[int], logits: _Logits) -> _Step:
    positions = check_btoks(features["input_ids"], features["attention_mask"], btoks, "the input")
    prefix = transformer(dict(features))["token_embeddings"][:, positions[0]]  # (1, K, D)
    decoder: nn.Module = transformer.model.get_decoder()

    def step(ids: Tensor) -> Tensor:
        embedded = transformer.model.get_input_embeddings()(ids)
        joint = torch.cat([prefix.to(embedded.dtype).expand(len(ids), -1, -1), embedded], 1)
        mask = torch.ones(joint.shape[:2], dtype=torch.long, device=joint.device)
        states = decoder(inputs_embeds=joint, attention_mask=mask, use_cache=False, return_dict=True).last_hidden_state
        return logits(states[:, -1])

    return step


def _search(step: _Step, end: int, max_new_tokens: int, num_beams: int) -> tuple[Tensor, Tensor]:
    """Beam search by total log-likelihood, without length bonus; one beam is greedy search.

    Totals only fall, so the search is over once a finished text beats every open one.
    """
    ids, scores = torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 0)  # (n, N)
    best: tuple[Tensor, Tensor] | None = None
    for _ in range(max_new_tokens):
        log_likelihood = step(ids).log_softmax(-1).cpu()  # (n, V)
        totals = (scores.sum(1, keepdim=True) + log_likelihood).flatten()
        ranked = totals.topk(min(2 * num_beams, len(totals))).indices
        rows, tokens = ranked // log_likelihood.shape[1], ranked % log_likelihood.shape[1]
        ids = torch.cat([ids[rows], tokens[:, None]], 1)
        scores = torch.cat([scores[rows], log_likelihood[rows, tokens, None]], 1)
        closed = tokens == end
        for row in closed[:num_beams].nonzero().flatten().tolist():
            if best is None or scores[row].sum() > best[1].sum():
                best = ids[row], scores[row]
        ids, scores = ids[~closed][:num_beams], scores[~closed][:num_beams]
        if best is not None and (not len(ids) or best[1].sum() >= scores[0].sum()):
            break
    return best or (ids[0], scores[0])


@torch.no_grad()
def btok_attention(
    model: SentenceTransformer, sample: Any, layers: Sequence[int] | None = None, *, prompt: str | None = None
) -> BTokAttention:
    """Attention of each bottleneck token over one input, the mean over heads and layers.

    Attention shows where a layer reads, not what an embedding means: deep layers read positions that have already
    gathered others, and the first token often serves as a place to look at nothing.

    Args:
        model: A BTok model on a backbone with attention layers.
        sample: One input, whatever the model encodes.
        layers: Layers to average over; negative numbers count from the last. Default: all.
        prompt: Instruction of the input, as in `encode`.

    Returns:
        The weights with the tokens and media they belong to.

    Raises:
        ValueError: If a layer does not exist, or the backbone gives no attention weights (recurrent layers only).
    """
    transformer, btoks = find_btoks(model)
    features = _features(transformer, [sample], prompt)
    training = model.training
    model.eval()
    try:
        # Eager attention in every part of the model: the only kind that returns its weights.
        parts = [part for part in transformer.model.modules() if isinstance(part, PreTrainedModel)]
        with attention_set("eager", *{id(part.config): part.config for part in parts}.values()):
            inputs = {}
            for key, value in features.items():
                # sentence-transformers adds counts of its own (`..._per_sample`), which no backbone takes.
                if isinstance(value, Tensor) and not key.endswith("_per_sample"):
                    inputs[key] = value
            output = transformer.model(**inputs, output_attentions=True, return_dict=True)
    finally:
        model.train(training)
    found = [layer for layer in getattr(output, "attentions", None) or () if layer is not None]
    if not found:
        raise ValueError(f"{type(transformer.model).__name__} gives no attention weights: it has no attention layers.")
    chosen = range(len(found)) if layers is None else layers
    if not chosen or any(not -len(found) <= layer < len(found) for layer in chosen):
        raise ValueError(f"layers must be numbers from {-len(found)} to {len(found) - 1}, got {list(chosen)}.")
    ids = features["input_ids"]
    positions = check_btoks(ids, features["attention_mask"], btoks, "the input")[0]
    weights = torch.stack([found[layer][0, :, positions].float().mean(0) for layer in chosen]).mean(0)
    media = find_media(transformer, features)
    tokenizer = tokenizer_of(transformer)
    texts = [str(tokenizer.decode([token])) for token in ids[0].tolist()]
    for medium in media:
        for position in medium.positions.tolist():
            texts[position] = ""  # a placeholder says nothing: its picture is drawn instead
    return BTokAttention(weights.cpu(), texts, media)


def find_media(transformer: Transformer, features: dict[str, Any]) -> list[Medium]:
    """The images and then the videos of one input, each kind in its order, and the grids of their tokens.

    Qwen-VL's `image_grid_thw` / `video_grid_thw` (divided by the merge size) tell the grid. Elsewhere each unbroken
    run of image tokens counts as one medium (a tiled image gives one per tile); it has a grid if the processor's
    number of tokens per tile, or its patch size (LLaVA, FastVLM), says so.
    """
    ids = features["input_ids"][0].cpu()
    media = []
    for kind in ("image", "video"):
        token = getattr(transformer.config, f"{kind}_token_id", None)
        positions = (ids == token).nonzero().flatten() if token is not None else ids[:0]
        grids = features.get(f"{kind}_grid_thw")
        if grids is None:
            media += [Medium(kind, run, grid) for run, grid in _tiles(transformer, positions, features)]
            continue
        merge = transformer.processor.image_processor.merge_size
        sizes = [(int(t), int(h) // merge, int(w) // merge) for t, h, w in grids]
        runs = positions.split([math.prod(size) for size in sizes])
        media += [Medium(kind, run, size) for run, size in zip(runs, sizes, strict=True)]
    return media


def _tiles(
    transformer: Transformer, positions: Tensor, features: dict[str, Any]
) -> Iterator[tuple[Tensor, tuple[int, int, int] | None]]:
    """Unbroken runs of placeholder tokens, cut into tiles where the processor says how many tokens a tile has."""
    if not len(positions):
        return
    # Something else stands between two media (a marker, a line), so a gap in the positions is where one ends.
    breaks = (positions.diff() != 1).nonzero().flatten() + 1
    names = ("image_seq_length", "image_seq_len")
    size = next((getattr(transformer.processor, name) for name in names if hasattr(transformer.processor, name)), 0)
    side = math.isqrt(size)
    patch, pixels = getattr(transformer.processor, "patch_size", None), features.get("pixel_values")
    cropped = getattr(getattr(transformer.processor, "image_processor", None), "do_center_crop", False)
    # A grid is laid over the whole picture, so there is none where the tower sees a part of it.
    patches = [] if not patch or pixels is None or cropped else [length // patch for length in pixels.shape[-2:]]
    for run in positions.tensor_split(breaks):
        if size and len(run) % size == 0 and side * side == size:
            yield from ((tile, (1, side, side)) for tile in run.split(size))
        elif patches and math.prod(patches) == len(run):
            yield run, (1, patches[0], patches[1])
        else:
            yield run, None
