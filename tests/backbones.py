"""Every tiny backbone by name: real transformers classes with random weights and real processors, made in code.

Weights are drawn wide (0.2), so that states depend strongly on their inputs: with the usual 0.02 every comparison
would pass on near-constant outputs.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

from st_btok import build_model
from tests.published_templates import NEWER, PUBLISHED
from tests.tiny_newer import (
    aya_vision,
    deepseek_vl,
    ernie4_5_vl,
    gemma4,
    glm4v,
    glm46v,
    granite,
    kimi_k25,
    lfm2_vl,
    lfm3_vl,
    llava_next,
    minicpmv4_6,
    ministral3,
    mistral_small,
    molmo2,
    phi4_multimodal,
    pixtral,
    qwen3_vl_moe,
    smollm3,
)
from tests.tiny_qwen import qwen2_5_omni, qwen2_5_vl, qwen2_vl, qwen3_5, qwen3_vl
from tests.tiny_text import gemma, gemma2, llama, mamba, mistral, qwen3
from tests.tiny_tokenizer import LLAMA_TEMPLATE, QWEN_TEMPLATE, SPECIAL, TEXT, tokenizer
from tests.tiny_vision import fast_vlm, gemma3, idefics3, internvl, llava, llava_onevision, paligemma, smolvlm

__all__ = [
    "BUILDERS", "LLAMA_TEMPLATE", "MODALITIES", "QWEN_TEMPLATE", "SPECIAL", "TEXT", "build", "clip", "inputs",
    "llama", "paligemma", "picture", "published", "published_btok", "qwen2_vl", "qwen3_vl", "sound", "takes",
    "tokenizer", "total", "videos",
]  # fmt: skip

BUILDERS = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_5": qwen3_5,
    "qwen2_5_omni": qwen2_5_omni,
    "smolvlm": smolvlm,
    "idefics3": idefics3,
    "llava_onevision": llava_onevision,
    "internvl": internvl,
    "gemma3": gemma3,
    "llama": llama,
    "qwen3": qwen3,
    "gemma": gemma,
    "gemma2": gemma2,
    "mistral": mistral,
    "mamba": mamba,
}
# Further families, each with a template of its published shape; `test_families.py` has their tests.
NEWER_BUILDERS = {
    "qwen3_vl_moe": qwen3_vl_moe,
    "glm4v": glm4v,
    "glm46v": glm46v,
    "gemma4": gemma4,
    "lfm2_vl": lfm2_vl,
    "lfm3_vl": lfm3_vl,
    "minicpmv4_6": minicpmv4_6,
    "molmo2": molmo2,
    "ernie4_5_vl": ernie4_5_vl,
    "kimi_k25": kimi_k25,
    "mistral_small": mistral_small,
    "ministral3": ministral3,
    "pixtral": pixtral,
    "llava": llava,
    "llava_next": llava_next,
    "fast_vlm": fast_vlm,
    "aya_vision": aya_vision,
    "deepseek_vl": deepseek_vl,
    "phi4_multimodal": phi4_multimodal,
    "smollm3": smollm3,
    "granite": granite,
}
# What each family takes beside text.
MODALITIES = {
    **dict.fromkeys((*BUILDERS, *NEWER_BUILDERS), ()),
    **dict.fromkeys(
        (
            "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "smolvlm", "llava_onevision", "internvl",
            "qwen3_vl_moe", "glm4v", "glm46v", "lfm3_vl", "minicpmv4_6", "molmo2", "ernie4_5_vl", "kimi_k25",
        ),
        ("image", "video"),
    ),
    **dict.fromkeys(("qwen2_5_omni", "gemma4"), ("image", "video", "audio")),
    **dict.fromkeys(
        (
            "idefics3", "gemma3", "lfm2_vl", "mistral_small", "ministral3", "pixtral", "llava", "llava_next",
            "fast_vlm", "aya_vision", "deepseek_vl", "phi4_multimodal",
        ),
        ("image",),
    ),
}  # fmt: skip


def build(name: str, **options: object) -> tuple[torch.nn.Module, object]:
    """Model in eval mode and processor of one family, the same weights at every call."""
    torch.manual_seed(0)
    builder = {**BUILDERS, **NEWER_BUILDERS, "paligemma": paligemma}[name]  # PaliGemma is the one that is refused
    model, processor = builder(**options)
    with torch.no_grad():
        for parameter in model.parameters():  # vision towers that ignore initializer_range
            if parameter.dim() > 1 and parameter.std() < 0.1:
                parameter.normal_(0, 0.2)
    return model.eval(), processor


def published(name: str) -> tuple[torch.nn.Module, object, str]:
    """Model and processor of one family with a template of its published shape, and the token that closes a reply."""
    family, template, control, end = {**PUBLISHED, **NEWER}[name]
    model, processor = build(family)
    own = getattr(processor, "tokenizer", processor)
    own.add_special_tokens({"additional_special_tokens": [*control]}, replace_extra_special_tokens=False)
    own.bos_token = "<|im_start|>"
    processor.chat_template = template
    return model, processor, end


def published_btok(name: str) -> tuple[SentenceTransformer, str]:
    """A BTok model of one family on its published template, built in a fraction of the time, and the closing token."""
    backbone, processor, end = published(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("st_btok.limits._LARGE", 150)  # smaller pictures to measure: no limit is tested on it
        patch.setattr("st_btok.limits._THIN", (20, 150))
        return build_model(backbone, processor=processor, device="cpu"), end


def takes(name: str, modality: str) -> bool:
    """Whether a family takes images, videos or audio."""
    return modality in MODALITIES[name]


def picture(width: int = 56, height: int = 28, seed: int = 0) -> Image.Image:
    """A picture of coloured noise in 14 px blocks."""
    blocks = np.random.default_rng(seed).integers(0, 255, (height // 14, width // 14, 3), dtype=np.uint8)
    return Image.fromarray(blocks.repeat(14, 0).repeat(14, 1))


def clip(frames: int = 4, seed: int = 0) -> np.ndarray:
    """A video as an array (frames, 56, 56, 3) uint8."""
    return np.stack([np.asarray(picture(56, 56, seed + i)) for i in range(frames)])


def sound(seconds: float = 0.5, seed: int = 0) -> np.ndarray:
    """Noise at 16 kHz, as a float32 array."""
    return np.random.default_rng(seed).standard_normal(int(16000 * seconds)).astype(np.float32)


def videos(name: str) -> list:
    """Inputs with a video; nothing for families that take none."""
    return [{"video": clip(), "text": "what happens?"}] if takes(name, "video") else []


def inputs(name: str) -> list:
    """Inputs of every modality that a family takes, of different lengths; the last one is a chat conversation.

    SmolVLM gets no video here: its processor (transformers 5.23) keeps the pixels of images and videos under the same
    name, so a batch with both is an error.
    """
    samples = ["a", "What is the city?", "red kitten " * 5]
    if not takes(name, "image"):
        return [*samples, [{"role": "user", "content": "chat"}]]
    samples += [
        picture(56, 28, 1),
        {"image": picture(28, 84, 2), "text": "what colour?"},
        {"text": "text first", "image": [picture(28, 28, 3), picture(56, 56, 4)]},
    ]
    if takes(name, "video") and name != "smolvlm":
        samples += videos(name)
    if takes(name, "audio"):
        samples += [{"audio": sound(), "text": "who speaks?"}, {"audio": sound(0.3), "image": picture(28, 28, 6)}]
    turn = [{"type": "text", "text": "chat"}, {"type": "image", "image": picture(28, 28, 5)}]
    return [*samples, [{"role": "user", "content": turn}]]


def total(parts: dict[str, torch.Tensor] | torch.Tensor) -> torch.Tensor:
    """The loss that a loss returned: the sum of its parts, as the Trainer takes it."""
    return torch.stack(list(parts.values())).sum() if isinstance(parts, dict) else parts
