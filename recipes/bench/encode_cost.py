"""What the K bottleneck tokens cost an encode: a BTok model beside a stock embedder of the same backbone.

    python -m recipes.bench encode_cost

K more tokens of L should cost (L + K) / L. The backbone is a Qwen2 of random weights with the tokenizer of the shipped
one; the stock side is the same backbone with its own chat template, pooled at its last token. All texts of a length
have that many tokens in the stock model, so nothing is padded.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from evaluation.markdown import table
from recipes.bench.encode import texts
from recipes.bench.paired import ratios, seconds_of, spread
from recipes.bench.preprocess import own_template
from recipes.bench.settings import BACKBONE, CostConfig
from st_btok import build_model

_LIMIT = 2048
_BATCH = 16


def pair(hidden: int, layers: int, btoks: int, folder: Path) -> tuple[SentenceTransformer, SentenceTransformer, float]:
    """The stock embedder, the BTok model, and the backbone's parameters in millions."""
    # The shipped tokenizer alone, without the image processor that its own class would ask for.
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(BACKBONE / "tokenizer.json"), **special)
    tokenizer.chat_template = (BACKBONE / "chat_template.jinja").read_text()
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": layers, "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64}
    config = Qwen2Config(vocab_size=len(tokenizer) + 8, hidden_size=hidden, intermediate_size=4 * hidden, **sizes)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformer = own_template(str(folder), _LIMIT)
    pooling = Pooling(transformer.get_embedding_dimension(), "lasttoken")
    stock = SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu")
    model = build_model(str(folder), num_btoks=btoks, max_seq_length=_LIMIT, device="cpu")
    return stock.float(), model.float(), sum(p.numel() for p in stock.parameters()) / 1e6


def inputs_of(stock: SentenceTransformer, length: int, count: int) -> list[str]:
    """Texts that have so many tokens in the stock model; the tokenizer makes one of each byte."""
    frame = stock.preprocess(["a"])["input_ids"].shape[1] - 1
    long = texts(count, length, length)
    return [text[: length - frame] for text in long]


def main(config: CostConfig) -> None:
    """Run the benchmark and write its table."""
    torch.set_num_threads(1)
    rows_found = []
    for hidden in config.hidden:
        with tempfile.TemporaryDirectory() as folder:
            stock, model, millions = pair(hidden, config.layers, config.btoks, Path(folder))
        for length in config.lengths:
            rows = inputs_of(stock, length, config.rows)
            lengths = {stock.preprocess(rows)["input_ids"].shape[1], model.preprocess(rows)["input_ids"].shape[1]}
            if lengths != {length, length + config.btoks}:
                raise ValueError(f"the two models must differ by K tokens, got lengths {sorted(lengths)}.")
            sides = {"stock": stock, "btok": model}
            encodings = {name: partial(side.encode, rows, batch_size=_BATCH) for name, side in sides.items()}
            seconds = seconds_of(encodings, config.rounds, warm=1)
            took = 1000 * np.median(seconds["stock"]) / len(rows)
            ratio = spread(ratios(seconds, "btok", "stock"), 3)
            expected = (length + config.btoks) / length
            rows_found.append([f"{millions:.0f} M", str(length), f"{expected:.3f}", ratio, f"{took:.0f}"])
    head = ["parameters", "L", "(L + K) / L", "time / stock", "ms an input, stock"]
    title = f"`python -m recipes.bench encode_cost`, K = {config.btoks}, {config.rows} inputs, {config.rounds} paired "
    text = f"{title}rounds, one thread.\n\n{table(head, rows_found, numbers=True)}\n"
    Path(config.output).write_text(text)
    print(text)
