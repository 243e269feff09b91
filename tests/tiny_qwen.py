"""Tiny Qwen backbones: plain and windowed vision, deepstack, hybrid linear attention, and audio beside vision."""

from __future__ import annotations

from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    WhisperFeatureExtractor,
)

from tests.tiny_tokenizer import QWEN_TEMPLATE, SPECIAL, TEXT, tokenizer, typed_template

VISION = {"depth": 2, "num_heads": 2, "initializer_range": 0.2}
# Windows of 56 px: smaller than most test images, so that windowed and full layers differ.
WINDOWED = {
    **VISION,
    "hidden_size": 16,
    "intermediate_size": 32,
    "out_hidden_size": 32,
    "patch_size": 14,
    "window_size": 56,
    "fullatt_block_indexes": [1],
}
WITH_POSITIONS = {
    **VISION,
    "hidden_size": 16,
    "intermediate_size": 32,
    "out_hidden_size": 32,
    "patch_size": 14,
    "num_position_embeddings": 64,
}
SIZE = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
OMNI = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "audio_token": "<|AUDIO|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}


def _ids(own: PreTrainedTokenizerFast) -> dict[str, int]:
    ids = dict(zip(SPECIAL, own.convert_tokens_to_ids(SPECIAL), strict=True))
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }


def _qwen3_processor(own: PreTrainedTokenizerFast) -> Qwen3VLProcessor:
    images, videos = Qwen2VLImageProcessor(size=SIZE, patch_size=14), Qwen3VLVideoProcessor(size=SIZE, patch_size=14)
    return Qwen3VLProcessor(images, own, videos, chat_template=QWEN_TEMPLATE)


def qwen2_vl(tied: bool = True, **text: object) -> tuple[PreTrainedModel, ProcessorMixin]:
    own = tokenizer()
    config = Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": MROPE, "tie_word_embeddings": tied, **text},
        vision_config={**VISION, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
        tie_word_embeddings=tied,
        **_ids(own),
    )
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(size=SIZE), own, Qwen2VLVideoProcessor(size=SIZE), chat_template=QWEN_TEMPLATE
    )
    return Qwen2VLForConditionalGeneration(config), processor


def qwen2_5_vl(tied: bool = True) -> tuple[PreTrainedModel, ProcessorMixin]:
    own = tokenizer()
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": MROPE, "tie_word_embeddings": tied},
        vision_config=WINDOWED,
        tie_word_embeddings=tied,
        **_ids(own),
    )
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=SIZE), own, Qwen2VLVideoProcessor(size=SIZE), chat_template=QWEN_TEMPLATE
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor


def qwen3_vl(tied: bool = True) -> tuple[PreTrainedModel, ProcessorMixin]:
    own = tokenizer()
    rope = {**MROPE, "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 8, "rope_parameters": rope, "tie_word_embeddings": tied},
        vision_config={**WITH_POSITIONS, "deepstack_visual_indexes": [0, 1]},
        tie_word_embeddings=tied,
        **_ids(own),
    )
    return Qwen3VLForConditionalGeneration(config), _qwen3_processor(own)


def qwen3_5(tied: bool = True) -> tuple[PreTrainedModel, ProcessorMixin]:
    """One layer of gated linear attention, one of full attention."""
    own = tokenizer()
    rope = {**MROPE, "mrope_interleaved": True, "partial_rotary_factor": 1.0}
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
    config = Qwen3_5Config(
        text_config={
            **TEXT,
            **linear,
            "linear_value_head_dim": 8,
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "rope_parameters": rope,
            "tie_word_embeddings": tied,
        },
        vision_config=WITH_POSITIONS,
        tie_word_embeddings=tied,
        **_ids(own),
    )
    return Qwen3_5ForConditionalGeneration(config), _qwen3_processor(own)


def qwen2_5_omni(tied: bool = True) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The thinker: text, images, videos and audio in, text out."""
    own = tokenizer(**OMNI)
    own.model_max_length = 8192  # its processor enlarges every video to 100,352 px
    ids = {name: own.convert_tokens_to_ids(token) for name, token in OMNI.items()}
    audio = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    config = Qwen2_5OmniThinkerConfig(
        text_config={**TEXT, "max_position_embeddings": 8192, "rope_parameters": MROPE, "tie_word_embeddings": tied},
        vision_config=WINDOWED,
        audio_config={**audio, "num_mel_bins": 16, "output_dim": 32, "n_window": 8, "initializer_range": 0.2},
        tie_word_embeddings=tied,
        image_token_index=ids["image_token"],
        video_token_index=ids["video_token"],
        audio_token_index=ids["audio_token"],
        audio_start_token_id=ids["audio_bos_token"],
        audio_end_token_id=ids["audio_eos_token"],
        vision_start_token_id=ids["vision_bos_token"],
        vision_end_token_id=ids["vision_eos_token"],
    )
    template = typed_template(
        image="<|vision_start|><|image_pad|><|vision_end|>",
        video="<|vision_start|><|video_pad|><|vision_end|>",
        audio="<|audio_bos|><|AUDIO|><|audio_eos|>",
    )
    processor = Qwen2_5OmniProcessor(
        Qwen2VLImageProcessor(size=SIZE),
        Qwen2VLVideoProcessor(size=SIZE),
        WhisperFeatureExtractor(feature_size=16, chunk_length=1),
        own,
        chat_template=template,
    )
    return Qwen2_5OmniThinkerForConditionalGeneration(config), processor
