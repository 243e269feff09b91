"""Memory and time of a training step on a GPU, computed, not measured: `python -m recipes.bench memory`.

Parameters are counted on the real classes of transformers, built without storage. The rest is arithmetic:

    weights      2 bytes a parameter under LoRA (bfloat16), 4 when all weights train (float32 under autocast)
    training     gradient (4) and the two states of AdamW (8) for each parameter that trains
    activations  with gradient checkpointing: the input of every layer, 2 bytes, plus one layer computed again
                 (about 17 widths and 3 MLP widths a token), plus the logits of one chunk of targets
    time         forward, recomputation and backward of the decoder (8 operations for each parameter and token, 6 where
                 weights are frozen) and of the vision tower (the same, 2 where it is frozen), and GradCache's first
                 pass (2), over 40 % of the peak of the device; attention's own products are left out

It prints a table between the marks `<!-- memory -->` of docs/choosing.md with `--write docs/choosing.md`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from evaluation import markdown
from recipes.bench.settings import MemoryConfig

_PEAK = 989e12  # multiply-adds count twice: bfloat16 operations a second of an H100, dense
_UTILISATION = 0.4
_CHUNK = 2**26  # logits that the condensation loss holds at a time, float32

# The published sizes of Qwen2-VL; the vision tower of both is the same.
_VISION = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4}
BACKBONES = {
    "Qwen2-VL-2B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "vocab_size": 151936},
    "Qwen2-VL-7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064},
}
_HEADS = {"Qwen2-VL-2B": (12, 2, True), "Qwen2-VL-7B": (28, 4, False)}
_PATCHES = 4  # of the vision tower for each token of a picture
# Tokens of a query, of a document, and of the target that is generated; whether the document is a picture.
INPUTS = {
    "texts (64 -> 256 tokens)": (64, 256, 64, False),
    "pages (64 -> 1,280 tokens)": (64, 1280, 64, True),
}


@dataclass(frozen=True)
class Step:
    """One row of the table, in bytes and seconds."""

    weights: float
    training: float
    activations: float
    seconds: float


def parameters(name: str) -> tuple[int, int, int]:
    """All parameters of a backbone, those of its decoder's layers, and those of its vision tower."""
    heads, key_heads, tied = _HEADS[name]
    text = {**BACKBONES[name], "num_attention_heads": heads, "num_key_value_heads": key_heads}
    vision = {**_VISION, "hidden_size": text["hidden_size"]}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(config)
    model.tie_weights()
    parts = (model, model.model.language_model.layers, model.model.visual)
    total, layers, vision = (sum(p.numel() for p in part.parameters()) for part in parts)
    return total, layers, vision


def lora_parameters(name: str, rank: int) -> int:
    """Parameters of LoRA on the seven linear layers of every decoder layer."""
    size, (heads, key_heads, _) = BACKBONES[name], _HEADS[name]
    width, mlp, keys = size["hidden_size"], size["intermediate_size"], size["hidden_size"] // heads * key_heads
    shapes = [(width, width)] * 2 + [(width, keys)] * 2 + [(width, mlp)] * 3
    return rank * size["num_hidden_layers"] * sum(a + b for a, b in shapes)


def step(name: str, tuning: str, inputs: str, config: MemoryConfig) -> Step:
    """Memory and time of a step of `CachedBTokLoss` with checkpointing; `tuning` is `"LoRA"` or `"all weights"`."""
    size, (query, document, target, is_picture) = BACKBONES[name], INPUTS[inputs]
    total, layers, vision = parameters(name)
    lora = tuning == "LoRA"
    trained = lora_parameters(name, config.rank) if lora else total
    longest = config.mini_batch_size * (document + target)  # tokens of the largest mini-batch
    width, mlp = size["hidden_size"], size["intermediate_size"]
    kept = 2 * longest * width * size["num_hidden_layers"]
    recomputed = 2 * longest * (17 * width + 3 * mlp)
    patches = _PATCHES * document if is_picture else 0
    if not lora:  # the vision tower trains too
        kept += 2 * config.mini_batch_size * patches * _VISION["embed_dim"] * _VISION["depth"]
    # GradCache embeds once more without gradients: 2 operations a parameter and token.
    tokens = config.batch_size * (query + document + target)
    operations = tokens * layers * ((6 if lora else 8) + 2)
    operations += config.batch_size * patches * vision * ((2 if lora else 8) + 2)
    return Step(
        weights=total * (2 if lora else 4),
        training=trained * 12,
        activations=kept + recomputed + 4 * _CHUNK,
        seconds=operations / (_PEAK * _UTILISATION),
    )


def table(config: MemoryConfig) -> str:
    """The table in Markdown."""
    gib = 2**30
    title = (
        f"Computed, not measured: `CachedBTokLoss(mini_batch_size={config.mini_batch_size})`, {config.batch_size} "
        f"pairs, gradient checkpointing, targets of 64 tokens, LoRA of rank {config.rank} "
        f"over a bfloat16 base (`--dtype bfloat16`), all weights in float32; memory in GiB; seconds on "
        f"one H100, assuming {_UTILISATION:.0%} utilisation and no wait for data. Inputs: query -> target side."
    )
    head = ["backbone", "tuning", "inputs", "weights", "gradients, AdamW", "activations", "sum", "seconds a step"]
    rows = []
    for name in BACKBONES:
        for tuning in ("LoRA", "all weights"):
            for inputs in INPUTS:
                one = step(name, tuning, inputs, config)
                sizes = [one.weights / gib, one.training / gib, one.activations / gib]
                cells = [f"{value:.1f}" for value in [*sizes, sum(sizes)]]
                rows.append([name, tuning, inputs, *cells, f"{one.seconds:.1f}"])
    return f"{title}\n\n{markdown.table(head, rows, numbers=True)}"


def main(config: MemoryConfig) -> None:
    """Print the table, and put it into a page where asked to."""
    text = table(config)
    print(text)
    if config.write:
        page = Path(config.write)
        marked = re.compile(r"(<!-- memory -->\n).*?(<!-- /memory -->)", re.DOTALL)
        page.write_text(marked.sub(lambda match: f"{match[1]}{text}\n{match[2]}", page.read_text()))
