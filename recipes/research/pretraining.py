"""The pre-training of `pretrain.py`: model, curriculum, training loop, gate, and what is written."""

from __future__ import annotations

import json
import platform
import shutil
import string
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from matplotlib import pyplot as plt
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from evaluation.atomic_write import atomic_write
from recipes.research.pretrain import PretrainConfig
from recipes.toy import scenes
from recipes.toy.muon import Muon

SPECIAL_TOKENS = "<|endoftext|> <|im_end|> <|system|> <|user|> <|assistant|>".split()
SPECIAL_TOKENS += "<|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>".split()
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{- '<|' ~ message.role ~ '|>' -}}"
    "{%- if message.content is string -%}{{- message.content -}}{%- else -%}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif part.type == 'video' -%}{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}"
    "{%- elif part.type == 'text' -%}{{- part.text -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{{- '<|im_end|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


# Rows of each kind in a step, and the weight of their loss. One forward per kind, so that no padding is wasted; every
# step has every kind: with one kind per step, reading had not begun after 1,000 steps, with this mix it had after 400.
MIX = {"word": (48, 0.4), "grid": (32, 0.25), "page": (16, 0.25), "text": (16, 0.1)}


@dataclass(frozen=True)
class Example:
    """One training row: an optional picture, the user's text, and the answer to generate."""

    image: Image.Image | None
    prompt: str
    answer: str


def build_processor() -> Qwen2VLProcessor:
    """A byte-level tokenizer (no input is out of vocabulary) with Qwen2-VL's own image and video processors."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS[2:],
        model_max_length=1024,
        padding_side="left",
    )
    pixels = {"shortest_edge": 28 * 28 * 2, "longest_edge": 28 * 28 * 64}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=pixels),
        chat_template=CHAT_TEMPLATE,
    )


def build_backbone(processor: Qwen2VLProcessor) -> Qwen2VLForConditionalGeneration:
    """The untrained model; its 288 embedding rows leave spare ones, as real Qwen checkpoints do."""
    ids = dict(zip(SPECIAL_TOKENS, processor.tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS), strict=True))
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 288,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": True,
        },
        vision_config={"depth": 2, "embed_dim": 128, "num_heads": 4, "mlp_ratio": 2, "hidden_size": 192},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    return Qwen2VLForConditionalGeneration(config)


class Curriculum:
    """Draws training rows; `level` is the longest word, raised when the recent word loss is low."""

    def __init__(self, rng: np.random.Generator, level: int = 3) -> None:
        self.rng, self.level, self.recent = rng, level, []

    def word(self) -> str:
        """Half real words of the pre-training split, half random letters, so that spelling can't be guessed."""
        length = int(self.rng.integers(min(3, self.level), self.level + 1))
        if self.rng.random() < 0.5:
            return "".join(self.rng.choice(list(string.ascii_lowercase), length))
        pool = scenes.words("pretrain")
        while len(word := pool[self.rng.integers(len(pool))]) > self.level:
            pass
        return word

    def batch(self, kind: str) -> list[Example]:
        """The rows of one kind of scene for one step."""
        return [self._example(kind) for _ in range(MIX[kind][0])]

    def _example(self, kind: str) -> Example:
        rng = self.rng
        source = str(rng.choice(["word", "page"])) if kind == "text" else kind
        scene = scenes.draw(rng, source, "pretrain", self.word)
        question, answer = scene.questions[rng.integers(len(scene.questions))]
        # Captions of grids are five times as long as their answers, and would make a step twice as slow.
        if rng.random() < {"word": 0.5, "page": 0.25, "grid": 0.0}[source]:
            question, answer = "", scene.caption
        if kind == "text":
            return Example(None, f"{scene.caption}\n{question}" if question else scene.caption, answer)
        return Example(scene.image, question, answer)

    def learned(self, loss: float) -> None:
        """Record a loss of words; three easy batches in a row raise the level."""
        self.recent = [*self.recent[-2:], loss]
        if self.level < scenes.WORD_CELLS and len(self.recent) == 3 and max(self.recent) < 0.35:
            self.level, self.recent = self.level + 1, []


def encode(processor: Qwen2VLProcessor, examples: list[Example], with_answer: bool = True) -> dict[str, torch.Tensor]:
    """Model inputs of some rows; labels are -100 up to and including the assistant token."""
    media = "<|vision_start|><|image_pad|><|vision_end|>"
    texts = [
        f"<|user|>{media if e.image else ''}{e.prompt}<|im_end|><|assistant|>"
        + (f"{e.answer}<|im_end|>" if with_answer else "")
        for e in examples
    ]
    images = [e.image for e in examples if e.image] or None
    features = processor(text=texts, images=images, padding=True, return_tensors="pt")
    if with_answer:
        ids = features["input_ids"]
        assistant = processor.tokenizer.convert_tokens_to_ids("<|assistant|>")
        after = (ids == assistant).cumsum(1) - (ids == assistant).long()
        features["labels"] = torch.where(after > 0, ids, -100)
    return features


def learning_rate(step: int, config: PretrainConfig) -> float:
    """Linear warm-up, then cosine to a tenth."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * (0.1 + 0.45 * (1 + np.cos(np.pi * progress)))


@torch.no_grad()
def exact_match(model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor, rows: list[Example]) -> float:
    """Share of rows whose greedy answer equals the expected one to the letter."""
    model.eval()
    right = 0
    for start in range(0, len(rows), 64):
        chunk = rows[start : start + 64]
        features = encode(processor, chunk, with_answer=False)
        out = model.generate(**features, max_new_tokens=80, do_sample=False)
        answers = processor.batch_decode(out[:, features["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(a == e.answer for a, e in zip(answers, chunk, strict=True))
    model.train()
    return right / len(rows)


def gate(
    model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor, split: str, size: int
) -> dict[str, float]:
    """Exact-match rates on words and layouts of `split`, `size` rows per measure."""
    rng = np.random.default_rng(1)
    pool = scenes.words(split)

    def rows(kind: str, wanted: str) -> list[Example]:
        found: list[Example] = []
        while len(found) < size:
            scene = scenes.draw(rng, kind, split, lambda: pool[rng.integers(len(pool))])
            options = [(q, a) for q, a in scene.questions if q.startswith(wanted)]
            question, answer = options[rng.integers(len(options))]
            found.append(Example(scene.image, question, answer))
        return found

    return {
        "words": exact_match(model, processor, rows("word", "what word")),
        "word colours": exact_match(model, processor, rows("word", "what colour")),
        "colour at a place": exact_match(model, processor, rows("grid", "what colour")),
        "place of a colour": exact_match(model, processor, rows("grid", "where")),
        "icon at a place": exact_match(model, processor, rows("grid", "what is")),
        "counts": exact_match(model, processor, rows("grid", "how many")),
        "page values": exact_match(model, processor, rows("page", "what ")),
    }


def passes(scores: dict[str, float]) -> bool:
    """The gate of `pretrain.py`."""
    questions = ("word colours", "colour at a place", "place of a colour")
    return scores["words"] >= 0.80 and all(scores[question] >= 0.95 for question in questions)


def build_optimizers(model: Qwen2VLForConditionalGeneration, config: PretrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the weight matrices, AdamW for the rest.

    With AdamW alone, words of three letters were unread after 400 steps where Muon read 41 % of all words exactly.
    """
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed_tokens" not in name else rest).append(parameter)
    decay = config.weight_decay
    return [
        Muon(matrices, weight_decay=decay),
        torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=decay),
    ]


def train_step(
    model: Qwen2VLForConditionalGeneration,
    processor: Qwen2VLProcessor,
    curriculum: Curriculum,
    optimizers: list[torch.optim.Optimizer],
    rate: float,
) -> dict[str, float]:
    """One update over every kind of scene; returns the loss of each, in nats per byte of the answer."""
    losses = {}
    for kind, (_, weight) in MIX.items():
        features = encode(processor, curriculum.batch(kind))
        labels = features.pop("labels")[:, 1:]
        logits = model(**features).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        (weight * loss).backward()
        losses[kind] = loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    curriculum.learned(losses["word"])
    return losses


def train(config: PretrainConfig) -> dict[str, float]:
    """Pre-train (or resume), check the gate, write the backbone; returns the test scores."""
    torch.manual_seed(config.seed)
    processor = build_processor()
    model = build_backbone(processor).train()
    optimizers = build_optimizers(model, config)
    curriculum = Curriculum(np.random.default_rng(config.seed))
    history: list[dict] = []
    resumed: list[int] = []  # steps at which a call went on from a checkpoint
    first, seconds = 0, 0.0
    partial = Path(f"{config.output}.partial")
    if (partial / "state.pt").exists():
        state = torch.load(partial / "state.pt", weights_only=False)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        curriculum.rng.bit_generator.state, curriculum.level = state["rng"], state["level"]
        curriculum.recent, history, first, seconds = state["recent"], state["history"], state["step"], state["seconds"]
        resumed = [*state["resumed"], first]
    started = time.perf_counter() - seconds
    bar = tqdm(range(first, config.steps), initial=first, total=config.steps, desc="pre-training")
    for step in bar:
        losses = train_step(model, processor, curriculum, optimizers, learning_rate(step, config))
        seconds = time.perf_counter() - started
        history.append({"step": step, **losses, "level": curriculum.level, "seconds": seconds})
        bar.set_postfix({k: f"{v:.2f}" for k, v in losses.items()} | {"letters": curriculum.level})
        if (step + 1) % config.save_steps == 0:
            partial.mkdir(parents=True, exist_ok=True)
            state = {
                "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "history": history,
                "rng": curriculum.rng.bit_generator.state, "level": curriculum.level, "recent": curriculum.recent,
                "step": step + 1, "seconds": seconds, "resumed": resumed,
            }  # fmt: skip
            atomic_write(partial / "state.pt", lambda path, state=state: torch.save(state, path))
            scores = gate(model, processor, "validation", 64)
            print(step + 1, f"{seconds / 60:.1f} min", {k: round(v, 3) for k, v in scores.items()}, flush=True)
        if seconds > 60 * config.max_minutes:
            break
    return finish(config, model, processor, history, resumed, partial)


def finish(
    config: PretrainConfig,
    model: Qwen2VLForConditionalGeneration,
    processor: Qwen2VLProcessor,
    history: list[dict],
    resumed: list[int],
    partial: Path,
) -> dict[str, float]:
    """Check the gate on the test split, then write weights, processor, record and learning curve."""
    scores = gate(model, processor, "test", 512)
    print("test:", {k: round(v, 3) for k, v in scores.items()})
    if not passes(scores):
        raise RuntimeError(
            f"the backbone fails its gate (words >= 0.80, colour and position questions >= 0.95): {scores}. "
            f"Nothing was written; raise --steps and call again to go on from {partial}"
        )
    output = Path(config.output)
    model.half().save_pretrained(output)  # half the size to ship
    # The config decides what `from_pretrained` makes of the file: training in float16 is NaN at the second step.
    model.config.dtype = torch.float32
    model.config.save_pretrained(output)
    processor.save_pretrained(output)
    record = {
        "command": " ".join(["python", "-m", "recipes.research.pretrain", *sys.argv[1:]]),
        "seed": config.seed,
        "steps": len(history),
        "resumed at steps": resumed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "minutes": round(history[-1]["seconds"] / 60, 1),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        },
        "test (greedy answer equal to the letter, 512 rows each)": {k: round(v, 4) for k, v in scores.items()},
    }  # fmt: skip
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    draw_curve(history, output / "training.png")
    shutil.rmtree(partial, ignore_errors=True)
    return scores


def draw_curve(history: list[dict], path: Path) -> None:
    """Loss of each kind of batch (mean of 25) over the steps, with the steps where the words grew longer."""
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for kind in MIX:
        losses = np.array([row[kind] for row in history])
        axes.plot(np.arange(24, len(losses)), np.convolve(losses, np.ones(25) / 25, mode="valid"), label=kind)
    for before, after in zip(history, history[1:], strict=False):
        if after["level"] > before["level"]:
            axes.axvline(after["step"], color="0.8", linewidth=1, zorder=0)
    axes.set(yscale="log", xlabel="step", ylabel="cross entropy per byte of the answer")
    axes.legend(title="scene (grey: words grow by a letter)")
    figure.savefig(path, dpi=120)
    plt.close(figure)
