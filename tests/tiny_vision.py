"""Tiny vision-language backbones beside Qwen: tiles, crops and pooled frames, and attention that looks ahead."""

from __future__ import annotations

from transformers import (
    CLIPImageProcessor,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GotOcr2ImageProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedModel,
    ProcessorMixin,
    SiglipImageProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from tests.tiny_tokenizer import TEXT, tokenizer, typed_template

SIGLIP = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
SQUARE = {"height": 28, "width": 28}


def _tile_tokens() -> dict[str, str]:
    return {
        "fake_image_token": "<fake_token_around_image>",
        "image_token": "<image>",
        "global_image_token": "<global-img>",
        **{f"tile_{i}_{j}": f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)},
    }


def idefics3(tied: bool = True) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Tiles of 28 px beside the whole picture, one token each."""
    own = tokenizer(**_tile_tokens())
    config = Idefics3Config(
        text_config={**TEXT, "model_type": "llama", "tie_word_embeddings": tied},
        vision_config={**SIGLIP, "initializer_range": 0.2},
        image_token_id=own.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=tied,
    )
    images = Idefics3ImageProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    processor = Idefics3Processor(images, own, image_seq_len=1, chat_template=typed_template(image="<image>"))
    return Idefics3ForConditionalGeneration(config), processor


def smolvlm(tied: bool = True) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Idefics3 and videos."""
    own = tokenizer(video_token="<video>", **_tile_tokens())
    config = SmolVLMConfig(
        text_config={**TEXT, "model_type": "llama", "tie_word_embeddings": tied},
        vision_config={**SIGLIP, "initializer_range": 0.2},
        image_token_id=own.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=tied,
    )
    sizes = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(**sizes),
        own,
        SmolVLMVideoProcessor(size={"longest_edge": 28}, max_image_size={"longest_edge": 28}),
        image_seq_len=1,
        chat_template=typed_template(image="<image>", video="<video>"),
    )
    return SmolVLMForConditionalGeneration(config), processor


def llava_onevision(tied: bool = True) -> tuple[PreTrainedModel, ProcessorMixin]:
    own = tokenizer(image_token="<image>", video_token="<video>")
    grids = [[28, 28], [28, 56], [56, 28], [56, 56]]
    config = LlavaOnevisionConfig(
        text_config={**TEXT, "model_type": "qwen2", "tie_word_embeddings": tied},
        vision_config={**SIGLIP, "model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_index=own.convert_tokens_to_ids("<image>"),
        video_token_index=own.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=grids,
        tie_word_embeddings=tied,
    )
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=grids),
        own,
        LlavaOnevisionVideoProcessor(size=SQUARE),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=typed_template(image="<image>", video="<video>"),
    )
    return LlavaOnevisionForConditionalGeneration(config), processor


def internvl(tied: bool = True) -> tuple[PreTrainedModel, ProcessorMixin]:
    own = tokenizer(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    config = InternVLConfig(
        text_config={**TEXT, "model_type": "qwen2", "tie_word_embeddings": tied},
        vision_config={**SIGLIP, "initializer_range": 0.2},
        image_token_id=own.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=1,
        tie_word_embeddings=tied,
    )
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=SQUARE, min_patches=1, max_patches=4),
        own,
        InternVLVideoProcessor(size=SQUARE),
        image_seq_length=1,
        chat_template=typed_template(image="<IMG_CONTEXT>", video="<video>"),
    )
    return InternVLForConditionalGeneration(config), processor


def gemma3(tied: bool = True) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A sliding and a full layer; the tokens of one image see each other in both directions."""
    own = tokenizer(boi_token="<start_of_image>", image_token="<image_soft_token>", eoi_token="<end_of_image>")
    ids = {name: own.convert_tokens_to_ids(getattr(own, name)) for name in ("boi_token", "image_token", "eoi_token")}
    text = {**TEXT, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16, "tie_word_embeddings": tied}
    config = Gemma3Config(
        text_config={**text, "layer_types": ["sliding_attention", "full_attention"], "pad_token_id": 256},
        vision_config={**SIGLIP, "image_size": 56, "vision_use_head": False},
        mm_tokens_per_image=4,
        boi_token_index=ids["boi_token"],
        eoi_token_index=ids["eoi_token"],
        image_token_index=ids["image_token"],
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size={"height": 56, "width": 56}),
        own,
        image_seq_length=4,
        chat_template=typed_template(image="<start_of_image>"),
    )
    return Gemma3ForConditionalGeneration(config), processor


def paligemma(tied: bool = True) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Image and prompt see each other in both directions. No chat template, as in the released checkpoints."""
    own = tokenizer(image_token="<image>")
    config = PaliGemmaConfig(
        text_config={**TEXT, "head_dim": 8, "model_type": "gemma", "tie_word_embeddings": tied, "pad_token_id": 256},
        vision_config={**SIGLIP, "model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_index=own.convert_tokens_to_ids("<image>"),
        projection_dim=32,
        hidden_size=32,
        vocab_size=288,
        tie_word_embeddings=tied,
    )
    images = SiglipImageProcessor(size=SQUARE)
    images.image_seq_length = 4
    return PaliGemmaForConditionalGeneration(config), PaliGemmaProcessor(images, own)


def llava(tied: bool = True) -> tuple[PreTrainedModel, ProcessorMixin]:
    """LLaVA 1.5: one square picture, four tokens."""
    own = tokenizer(image_token="<image>")
    config = LlavaConfig(
        text_config={**TEXT, "model_type": "llama", "tie_word_embeddings": tied},
        vision_config={**SIGLIP, "model_type": "clip_vision_model", "projection_dim": 16},
        image_token_index=own.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=tied,
    )
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=SQUARE)
    processor = LlavaProcessor(
        images,
        own,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=typed_template(image="<image>"),
    )
    return LlavaForConditionalGeneration(config), processor


def fast_vlm(tied: bool = True) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A tower of convolutions with batch normalisation, as all of timm's in this family; four tokens a picture."""
    own = tokenizer(image_token="<image>")
    config = FastVlmConfig(
        text_config={**TEXT, "model_type": "qwen2", "tie_word_embeddings": tied},
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": "test_efficientnet",
            "hidden_size": 256,
            "do_pooling": False,
        },
        image_token_index=own.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
        tie_word_embeddings=tied,
    )
    images = CLIPImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False)
    processor = LlavaProcessor(
        images, own, patch_size=32, vision_feature_select_strategy="full", num_additional_image_tokens=0
    )
    return FastVlmForConditionalGeneration(config), processor
