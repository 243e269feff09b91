"""The connector of the model that sees (`seeing.py`): what it starts as and what its gates measure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache

from recipes.research.seeing_checkpoint import POSITIONS, tower_weights
from recipes.research.seeing_pictures import Captioned, topic

PROMPT = " The topic is the"
GAIN = 8.0  # of the closed form


class Reader:
    """The frozen decoder behind one system turn and the opening of the user's, which are read once.

    Args:
        model: The model; its decoder is used in `dtype`.
        tokenizer: Its tokenizer.
        dtype: Type of the decoder's weights and states.
    """

    def __init__(self, model: Any, tokenizer: Any, dtype: torch.dtype) -> None:
        self.tokenizer = tokenizer
        self.decoder = model.model.language_model.to(dtype).requires_grad_(False)
        self.head = self.decoder.get_input_embeddings().weight
        shown = tokenizer.apply_chat_template([{"role": "user", "content": "0"}], tokenize=False)
        before, closing = shown.split("0")
        whole = tokenizer.apply_chat_template(
            [{"role": "user", "content": "0"}], tokenize=False, add_generation_prompt=True
        )
        self.closed, self.opened = self.ids(closing), self.ids(whole.removeprefix(f"{before}0"))
        with torch.no_grad():
            prefix = self.decoder(input_ids=torch.tensor([self.ids(before)]), use_cache=True).past_key_values
        self.prefix = [(layer.keys, layer.values) for layer in prefix.layers]

    def ids(self, text: str) -> list[int]:
        """Token ids of a text."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def states(self, contents: Sequence[Tensor], tails: Sequence[list[int]]) -> Tensor:
        """Last-layer states of inputs.

        Args:
            contents: B contents of the user's turn, each (T, D) embeddings.
            tails: B lists of token ids behind it, from the turn's closing on.

        Returns:
            (B, L, D), L the longest tail: the states that predict the tail's tokens, and the last token's behind them.
            The last column is every row's last token; a row of a shorter tail begins with states before its tail.
        """
        rows = []
        for content, tail in zip(contents, tails, strict=True):
            rows.append(torch.cat([content.to(self.head.dtype), self.head[torch.tensor(tail)]]))
        width, past = max(map(len, rows)), self.prefix[0][0].shape[2]
        padded = torch.stack([F.pad(row, (0, 0, 0, width - len(row))) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(past + width) < past + lengths[:, None]
        cache = DynamicCache()
        for number, (keys, values) in enumerate(self.prefix):
            cache.update(keys.expand(len(rows), -1, -1, -1), values.expand(len(rows), -1, -1, -1), number)
        states = self.decoder(
            inputs_embeds=padded, attention_mask=mask.long(), past_key_values=cache, use_cache=True
        ).last_hidden_state
        longest = max(map(len, tails)) + 1
        places = (lengths[:, None] - longest + torch.arange(longest)).clamp(min=0)
        return states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))

    def losses(self, contents: Sequence[Tensor], tails: Sequence[list[int]], read: Sequence[int]) -> Tensor:
        """Nats of every generated token.

        Args:
            contents: B contents of the user's turn.
            tails: B tails.
            read: Of each tail, how many of its first tokens are given.

        Returns:
            (M,) of all tokens behind those, row by row.
        """
        states = self.states(contents, tails)
        longest = states.shape[1] - 1
        places, labels = [], []
        for row, (tail, given) in enumerate(zip(tails, read, strict=True)):
            places += [(row, longest - len(tail) + number) for number in range(given, len(tail))]
            labels += tail[given:]
        rows, columns = torch.tensor(places).T
        logits = (states[rows, columns] @ self.head.T).float()
        return F.cross_entropy(logits, torch.tensor(labels), reduction="none")

    def embed(self, contents: Sequence[Tensor]) -> Tensor:
        """(N, D) what untrained bottleneck tokens give: the mean over the states of " The topic is the"."""
        prompt = self.ids(PROMPT)
        tail = [*self.closed, *prompt]
        parts = [contents[start : start + 32] for start in range(0, len(contents), 32)]
        found = [self.states(part, [tail] * len(part))[:, -len(prompt) :].float() for part in parts]
        return F.normalize(torch.cat(found).mean(1), dim=-1)

    def words(self, texts: Sequence[str]) -> list[Tensor]:
        """Token embeddings of texts."""
        return [self.head[torch.tensor(self.ids(text))] for text in texts]


def class_names() -> tuple[list[str], list[str]]:
    """Names of ImageNet's thousand classes, the first of each, and their definitions, from timm."""
    from timm.data import ImageNetInfo

    detailed = ImageNetInfo().label_descriptions(detailed=True)
    return [text.split(":")[0].split(",")[0].lower() for text in detailed], [
        text.partition(": ")[2] for text in detailed
    ]


class ClosedForm:
    """What a position of a picture says in token embeddings, without any training of the decoder.

    g ((x - m) B + 1/2 (sum_c p_c e_c - its mean)) + the mean topic: B is the ridge regression of the mean token
    embedding of a caption's topic on the picture's mean feature, p_c are the class probabilities, e_c the mean token
    embedding of a class's name, and g = 8 makes up for what means over tokens lose in length.

    Args:
        features: (N, 49, 1280) of the training pictures.
        captions: Their captions.
        reader: Whose token embeddings are used.
    """

    def __init__(self, features: Tensor, captions: Sequence[str], reader: Reader) -> None:
        weights = tower_weights()
        self.head, self.bias = weights["classifier.weight"], weights["classifier.bias"]
        self.names, topics = (
            torch.stack([words.float().mean(0) for words in reader.words([f" {text}" for text in texts])])
            for texts in (class_names()[0], [topic(caption) for caption in captions])
        )
        pooled = features.float().mean(1)
        self.mean, self.offset = pooled.mean(0), topics.mean(0)
        self.ridge = ridge(pooled, topics, 1.0)
        self.usual = self.classes(features[::5].flatten(0, 1).float()).mean(0)

    def classes(self, inputs: Tensor) -> Tensor:
        """(N, D) sum_c p_c e_c of (N, 1280)."""
        return F.linear(inputs, self.head, self.bias).softmax(-1) @ self.names

    def __call__(self, inputs: Tensor) -> Tensor:
        """(N, D) of (N, 1280)."""
        found = (inputs - self.mean) @ self.ridge + (self.classes(inputs) - self.usual) / 2
        return GAIN * found + self.offset


def fit_closed_form(connector: nn.Module, form: ClosedForm, features: Tensor, steps: int, seed: int) -> list[float]:
    """Fit the two layers to the closed form at every position.

    Args:
        connector: The connector, trained in place.
        form: The closed form.
        features: (N, 49, 1280) of real pictures; mixtures of them are further ones.
        steps: Steps of Adam.
        seed: Seed of the batches.

    Returns:
        The error after each step, as a share of the target's variance.
    """
    rng = torch.Generator().manual_seed(seed)
    every = features.flatten(0, 1)
    some = every[torch.randint(len(every), (8192,), generator=rng)].float()
    start_linear(connector, some, form(some))
    optimizer = torch.optim.Adam(connector.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    log = []
    for _ in range(steps):
        one, two = (every[torch.randint(len(every), (1024,), generator=rng)].float() for _ in range(2))
        share = torch.rand(1024, 1, generator=rng).clamp(min=0.5)
        batch = share * one + (1 - share) * two
        target = form(batch)
        loss = (connector(batch) - target).square().mean() / target.var(0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        log.append(loss.item())
    return log


def ridge(inputs: Tensor, targets: Tensor, strength: float) -> Tensor:
    """(I, D) least squares of the centred targets (N, D) on the centred inputs (N, I).

    Args:
        inputs: (N, I).
        targets: (N, D).
        strength: Of the penalty, as a multiple of the mean square of an input over all rows.

    Returns:
        The matrix.
    """
    centred = inputs - inputs.mean(0)
    products = centred.T @ centred
    penalty = strength * products.diagonal().mean() * torch.eye(len(products))
    return torch.linalg.solve(products + penalty, centred.T @ (targets - targets.mean(0)))


@torch.no_grad()
def start_linear(connector: Any, inputs: Tensor, targets: Tensor) -> None:
    """The best linear map of half the connector's width: GELU(z) - GELU(-z) = z.

    Args:
        connector: Two linear layers with GELU between them, changed in place.
        inputs: (N, 1280).
        targets: (N, D).
    """
    mean, offset = inputs.mean(0), targets.mean(0)
    left, scales, right = torch.linalg.svd(ridge(inputs, targets, 0.01))
    half = connector.linear_1.out_features // 2
    down, up = left[:, :half] * scales[:half].sqrt(), right[:half] * scales[:half].sqrt()[:, None]
    sign = torch.cat([torch.ones(half), -torch.ones(half)])[:, None]
    connector.linear_1.weight.copy_(sign * down.T.repeat(2, 1))
    connector.linear_1.bias.copy_(-connector.linear_1.weight @ mean)
    connector.linear_2.weight.copy_((sign * up.repeat(2, 1)).T)
    connector.linear_2.bias.copy_(offset)


def class_pictures(features: Tensor, seed: int = 0) -> Captioned:
    """ImageNet's classes as pictures that need no pixels: features that the classifier takes for the class.

    Args:
        features: (N, 49, 1280) of real pictures, for the scale.
        seed: Seed of the noise between positions.

    Returns:
        A thousand, with their names as captions and, further behind, their definitions.
    """
    weights = tower_weights()["classifier.weight"]
    mean, std = features.float().mean((0, 1)), features.float().std((0, 1))
    rng = torch.Generator().manual_seed(seed)
    shape = len(weights), POSITIONS, 1
    shift = F.normalize(weights, dim=1) * weights.shape[1] ** 0.5 * std
    made = mean + (1 + 0.3 * torch.randn(shape, generator=rng)) * shift[:, None]
    names, meanings = class_names()
    captions = [f"{name}: {meaning}" for name, meaning in zip(names, meanings, strict=True)]
    return Captioned(made.clamp(min=0).half(), captions, np.zeros(0, np.uint64))


@torch.no_grad()
def measure(connector: nn.Module, reader: Reader, held_out: Captioned) -> dict[str, float]:
    """Two of the gates.

    Args:
        connector: The connector.
        reader: The decoder.
        held_out: Pictures that were not trained on.

    Returns:
        `right` and `wrong`: nats a caption's token behind its picture and behind the next one's; `to text` and
        `to picture`: MRR in % of search by untrained bottleneck tokens, among all of them.
    """
    contents = list(connector(held_out.features.float()))
    end, given = reader.ids("<|im_end|>"), len(reader.opened)
    tails = [[*reader.opened, *reader.ids(caption)[:32], *end] for caption in held_out.captions]
    found = {}
    for name, shift in (("right", 0), ("wrong", 1)):
        shown = contents[shift:] + contents[:shift]
        parts = [slice(start, start + 32) for start in range(0, len(shown), 32)]
        losses = [reader.losses(shown[part], tails[part], [given] * len(tails[part])) for part in parts]
        found[name] = torch.cat(losses).mean().item()
    scores = reader.embed(contents) @ reader.embed(reader.words(held_out.captions)).T
    for name, table in (("to text", scores), ("to picture", scores.T)):
        found[name] = reciprocal_ranks(table)
    return found


def reciprocal_ranks(scores: Tensor) -> float:
    """MRR in % of (N, N) scores whose right candidates are on the diagonal."""
    return (100 / (scores >= scores.diag()[:, None]).sum(1)).mean().item()


def save_connector(connector: nn.Module, to: Path) -> None:
    """Write the connector's weights in float16."""
    to.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.detach().half() for name, tensor in connector.state_dict().items()}, to / "connector.safetensors"
    )
