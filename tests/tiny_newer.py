"""Tiny backbones of further families, each with its own classes and processor, for the tests of `test_families.py`."""

from __future__ import annotations

from typing import Any

from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    AyaVisionProcessor,
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    DeepseekVLImageProcessor,
    DeepseekVLProcessor,
    Ernie4_5_VLMoeConfig,
    Ernie4_5_VLMoeForConditionalGeneration,
    Ernie4_5_VLMoeImageProcessor,
    Ernie4_5_VLMoeProcessor,
    Ernie4_5_VLMoeVideoProcessor,
    Gemma4AudioFeatureExtractor,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4VideoProcessor,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vImageProcessor,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
    Glm46VImageProcessor,
    Glm46VProcessor,
    Glm46VVideoProcessor,
    GotOcr2ImageProcessor,
    GraniteConfig,
    GraniteForCausalLM,
    Kimi_K25Config,
    Kimi_K25ForConditionalGeneration,
    Kimi_K25ImageProcessor,
    Kimi_K25Processor,
    Kimi_K25VideoProcessor,
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    Lfm2VlImageProcessor,
    Lfm2VlProcessor,
    Lfm3VlConfig,
    Lfm3VlForConditionalGeneration,
    Lfm3VlProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    MiniCPMV4_6Config,
    MiniCPMV4_6ForConditionalGeneration,
    MiniCPMV4_6ImageProcessor,
    MiniCPMV4_6Processor,
    MiniCPMV4_6VideoProcessor,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Molmo2Config,
    Molmo2ForConditionalGeneration,
    Molmo2ImageProcessor,
    Molmo2Processor,
    Molmo2VideoProcessor,
    Phi4MultimodalConfig,
    Phi4MultimodalFeatureExtractor,
    Phi4MultimodalForCausalLM,
    Phi4MultimodalImageProcessor,
    Phi4MultimodalProcessor,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLImageProcessor,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLVideoProcessor,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from tests.tiny_qwen import MROPE, SIZE, WITH_POSITIONS, _ids, _qwen3_processor
from tests.tiny_tokenizer import TEXT, tokenizer
from tests.tiny_vision import SIGLIP, SQUARE

Built = tuple[PreTrainedModel, ProcessorMixin]
PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
_GLM_MEDIA = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")


def _token_ids(own: PreTrainedTokenizerFast, **names: str) -> dict[str, int]:
    return {key: own.convert_tokens_to_ids(name) for key, name in names.items()}


def _with(own: PreTrainedTokenizerFast, *names: str) -> PreTrainedTokenizerFast:
    own.add_special_tokens({"additional_special_tokens": [*names]}, replace_extra_special_tokens=False)
    return own


def _glm(config: Any, model: Any, processor: Any, images: Any, videos: Any, tied: bool) -> Built:
    own = _with(tokenizer(image_token="<|image|>", video_token="<|video|>"), *_GLM_MEDIA)
    ids = _token_ids(
        own,
        image_token_id="<|image|>",
        video_token_id="<|video|>",
        image_start_token_id="<|begin_of_image|>",
        image_end_token_id="<|end_of_image|>",
        video_start_token_id="<|begin_of_video|>",
        video_end_token_id="<|end_of_video|>",
    )
    built = config(
        text_config={
            **TEXT,
            "model_type": "glm4v_text",
            "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0},
            "tie_word_embeddings": tied,
        },
        vision_config={
            "model_type": "glm4v_vision",
            "depth": 2,
            "num_heads": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "image_size": 56,
            "initializer_range": 0.2,
        },
        tie_word_embeddings=tied,
        **ids,
    )
    return model(built), processor(images(size=SIZE), own, videos(size=SIZE))


def glm4v(tied: bool = True) -> Built:
    return _glm(
        Glm4vConfig, Glm4vForConditionalGeneration, Glm4vProcessor, Glm4vImageProcessor, Glm4vVideoProcessor, tied
    )


def glm46v(tied: bool = True) -> Built:
    return _glm(
        Glm46VConfig, Glm46VForConditionalGeneration, Glm46VProcessor, Glm46VImageProcessor, Glm46VVideoProcessor, tied
    )


def gemma4(tied: bool = True, text: dict[str, Any] | None = None) -> Built:
    """Embeddings of their own for each layer, and logits that are soft-capped."""
    own = tokenizer(
        boi_token="<|image>",
        image_token="<|image|>",
        eoi_token="<image|>",
        boa_token="<|audio>",
        audio_token="<|audio|>",
        eoa_token="<audio|>",
    )
    _with(own, "<|video|>")
    config = Gemma4Config(
        text_config={
            **TEXT,
            "head_dim": 8,
            "global_head_dim": 8,
            "num_key_value_heads": 2,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 4,
            "vocab_size_per_layer_input": TEXT["vocab_size"],
            "final_logit_softcapping": 3.0,
            "pad_token_id": 256,
            "tie_word_embeddings": tied,
            **(text or {}),
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "position_embedding_size": 64,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "initializer_range": 0.2,
        },
        audio_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "subsampling_conv_channels": [16, 4],
            "output_proj_dims": 16,
            "initializer_range": 0.2,
        },
        tie_word_embeddings=tied,
        **_token_ids(
            own,
            boi_token_id="<|image>",
            eoi_token_id="<image|>",
            image_token_id="<|image|>",
            video_token_id="<|video|>",
            boa_token_id="<|audio>",
            audio_token_id="<|audio|>",
        ),
        eoa_token_index=own.convert_tokens_to_ids("<audio|>"),
    )
    patches = {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70}
    processor = Gemma4Processor(
        Gemma4AudioFeatureExtractor(feature_size=16),
        Gemma4ImageProcessor(**patches),
        own,
        Gemma4VideoProcessor(**patches, num_frames=4),
    )
    return Gemma4ForConditionalGeneration(config), processor


def lfm2_vl(tied: bool = True) -> Built:
    """Short convolutions beside attention; tiles of 56 px."""
    own = tokenizer(image_token="<image>", image_start_token="<|image_start|>", image_end_token="<|image_end|>")
    tiles = [f"<|img_row_{row}_col_{column}|>" for row in (1, 2) for column in (1, 2)]
    _with(own, "<|img_thumbnail|>", *tiles)
    config = Lfm2VlConfig(
        text_config={
            **TEXT,
            "model_type": "lfm2",
            "layer_types": ["conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
            "pad_token_id": 256,
            "tie_word_embeddings": tied,
        },
        vision_config={**SIGLIP, "model_type": "siglip2_vision_model", "num_patches": 16, "vision_use_head": False},
        image_token_id=own.convert_tokens_to_ids("<image>"),
        projector_hidden_size=32,
        tie_word_embeddings=tied,
    )
    images = Lfm2VlImageProcessor(
        encoder_patch_size=14, tile_size=56, min_tiles=2, max_tiles=4, min_image_tokens=1, max_image_tokens=4
    )
    return Lfm2VlForConditionalGeneration(config), Lfm2VlProcessor(images, own)


def lfm3_vl(tied: bool = True) -> Built:
    own = tokenizer(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
    )
    config = Lfm3VlConfig(
        text_config={
            **TEXT,
            "model_type": "lfm3",
            "head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 16,
            "pad_token_id": 256,
            "tie_word_embeddings": tied,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "patch_size": 14,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "layer_types": ["conv", "full_attention"],
            "initializer_range": 0.2,
        },
        projector_hidden_size=32,
        tie_word_embeddings=tied,
        **_ids(own),
    )
    images, videos = Qwen2VLImageProcessor(size=SIZE, patch_size=14), Qwen3VLVideoProcessor(size=SIZE, patch_size=14)
    return Lfm3VlForConditionalGeneration(config), Lfm3VlProcessor(images, own, videos)


def minicpmv4_6(tied: bool = True) -> Built:
    """One token for 56 x 56 px; gated linear attention beside full attention."""
    own = tokenizer(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        image_start_token="<image>",
        image_end_token="</image>",
        slice_start_token="<slice>",
        slice_end_token="</slice>",
        image_id_start_token="<image_id>",
        image_id_end_token="</image_id>",
    )
    config = MiniCPMV4_6Config(
        text_config={
            **TEXT,
            "model_type": "qwen3_5_text",
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "rope_parameters": {**MROPE, "mrope_interleaved": True, "partial_rotary_factor": 1.0},
            "tie_word_embeddings": tied,
        },
        vision_config={**SIGLIP, "image_size": 56},
        insert_layer_id=0,
        image_size=56,
        image_token_id=own.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=own.convert_tokens_to_ids("<|video_pad|>"),
        tie_word_embeddings=tied,
    )
    sizes = {"scale_resolution": 56, "max_slice_nums": 2}
    processor = MiniCPMV4_6Processor(MiniCPMV4_6ImageProcessor(**sizes), MiniCPMV4_6VideoProcessor(**sizes), own)
    return MiniCPMV4_6ForConditionalGeneration(config), processor


def molmo2(tied: bool = True) -> Built:
    """Crops that overlap, pooled by attention."""
    marks = ("<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<frame_start>", "<im_end>", "<frame_end>")
    own = _with(tokenizer(image_token="<|image|>", video_token="<|video|>"), *marks, "<im_low>")
    config = Molmo2Config(
        text_config={**TEXT, "head_dim": 8, "additional_vocab_size": 0, "tie_word_embeddings": tied},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "image_size": [56, 56],
            "initializer_range": 0.2,
        },
        adapter_config={
            "vision_feature_layer": [0, 1],
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 32,
            "text_hidden_size": 32,
            "initializer_range": 0.2,
        },
        tie_word_embeddings=tied,
        **_token_ids(
            own,
            image_start_token_id="<im_start>",
            low_res_image_start_token_id="<low_res_im_start>",
            image_end_token_id="<im_end>",
            image_patch_id="<im_patch>",
            frame_start_token_id="<frame_start>",
            frame_end_token_id="<frame_end>",
        ),
    )
    size = {"height": 56, "width": 56}
    processor = Molmo2Processor(
        Molmo2ImageProcessor(size=size, max_crops=2, overlap_margins=[1, 1]), Molmo2VideoProcessor(size=size), own
    )
    return Molmo2ForConditionalGeneration(config), processor


def ernie4_5_vl(tied: bool = True) -> Built:
    """Experts of their own for text and for pictures."""
    own = tokenizer(
        image_token="<|IMAGE_PLACEHOLDER|>",
        image_start_token="<|IMAGE_START|>",
        image_end_token="<|IMAGE_END|>",
        video_token="<|VIDEO_PLACEHOLDER|>",
        video_start_token="<|VIDEO_START|>",
        video_end_token="<|VIDEO_END|>",
    )
    config = Ernie4_5_VLMoeConfig(
        text_config={
            **TEXT,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": [16, 16],
            "moe_num_shared_experts": 1,
            "mlp_layer_types": ["dense", "sparse"],
            "rope_parameters": {**MROPE, "mrope_section": [1, 1, 2]},
            "tie_word_embeddings": tied,
        },
        vision_config={
            "depth": 2,
            "num_heads": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "initializer_range": 0.2,
        },
        tie_word_embeddings=tied,
        **_token_ids(
            own,
            image_token_id="<|IMAGE_PLACEHOLDER|>",
            image_start_token_id="<|IMAGE_START|>",
            image_end_token_id="<|IMAGE_END|>",
            video_token_id="<|VIDEO_PLACEHOLDER|>",
            video_start_token_id="<|VIDEO_START|>",
            video_end_token_id="<|VIDEO_END|>",
        ),
    )
    processor = Ernie4_5_VLMoeProcessor(
        Ernie4_5_VLMoeImageProcessor(size=SIZE),
        own,
        Ernie4_5_VLMoeVideoProcessor(size=SIZE, draw_on_frames=False, min_frames=2, max_frames=8),
    )
    return Ernie4_5_VLMoeForConditionalGeneration(config), processor


def kimi_k25(tied: bool = True) -> Built:
    """Latent attention and experts, as in DeepSeek-V3."""
    own = tokenizer(image_token="<|media_pad|>", video_token="<|kimi_k25_video_placeholder|>")
    _with(own, "<|media_begin|>", "<|media_content|>", "<|media_end|>")
    config = Kimi_K25Config(
        text_config={
            **TEXT,
            "model_type": "deepseek_v3",
            "num_key_value_heads": 4,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "tie_word_embeddings": tied,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "pos_emb_height": 8,
            "pos_emb_width": 8,
        },
        projection_hidden_size=16,
        tie_word_embeddings=tied,
        **_token_ids(
            own,
            image_token_id="<|media_pad|>",
            video_token_id="<|kimi_k25_video_placeholder|>",
            vision_start_token_id="<|media_begin|>",
            vision_end_token_id="<|media_end|>",
        ),
    )
    size = {"max_height": 112, "max_width": 112}
    processor = Kimi_K25Processor(
        Kimi_K25ImageProcessor(size=size, max_patches=64), own, Kimi_K25VideoProcessor(size=size, max_patches=64)
    )
    return Kimi_K25ForConditionalGeneration(config), processor


def _pixtral_processor(own: PreTrainedTokenizerFast, merge: int) -> PixtralProcessor:
    images = PixtralImageProcessor(size={"longest_edge": 56}, patch_size={"height": 14, "width": 14})
    return PixtralProcessor(images, own, patch_size=14, spatial_merge_size=merge)


def _mistral3(tied: bool, **text: Any) -> Built:
    own = _with(tokenizer(image_token="[IMG]"), "[IMG_BREAK]", "[IMG_END]")
    config = Mistral3Config(
        text_config={**TEXT, "head_dim": 8, "tie_word_embeddings": tied, **text},
        vision_config=PIXTRAL,
        image_token_index=own.convert_tokens_to_ids("[IMG]"),
        tie_word_embeddings=tied,
    )
    return Mistral3ForConditionalGeneration(config), _pixtral_processor(own, 2)


def mistral_small(tied: bool = True) -> Built:
    return _mistral3(tied, model_type="mistral")


def ministral3(tied: bool = True) -> Built:
    """Scores that are scaled by the position."""
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 2048}
    rope |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
    return _mistral3(
        tied, model_type="ministral3", pad_token_id=256, max_position_embeddings=4096, rope_parameters=rope
    )


def pixtral(tied: bool = True) -> Built:
    own = _with(tokenizer(image_token="[IMG]"), "[IMG_BREAK]", "[IMG_END]")
    config = LlavaConfig(
        text_config={**TEXT, "model_type": "mistral", "head_dim": 8, "tie_word_embeddings": tied},
        vision_config=PIXTRAL,
        image_token_index=own.convert_tokens_to_ids("[IMG]"),
        image_seq_length=1,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=tied,
    )
    return LlavaForConditionalGeneration(config), _pixtral_processor(own, 1)


def llava_next(tied: bool = True) -> Built:
    own = tokenizer(image_token="<image>")
    grids = [[28, 56], [56, 28], [56, 56]]
    config = LlavaNextConfig(
        text_config={**TEXT, "model_type": "mistral", "tie_word_embeddings": tied},
        vision_config={**SIGLIP, "model_type": "clip_vision_model", "projection_dim": 16},
        image_token_index=own.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=grids,
        vision_feature_layer=-1,
        image_seq_length=4,
        tie_word_embeddings=tied,
    )
    images = LlavaNextImageProcessor(size={"shortest_edge": 28}, crop_size=SQUARE, image_grid_pinpoints=grids)
    processor = LlavaNextProcessor(
        images, own, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return LlavaNextForConditionalGeneration(config), processor


def aya_vision(tied: bool = True) -> Built:
    """Logits that are scaled."""
    own = tokenizer(image_token="<image>")
    _with(own, "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL")
    config = AyaVisionConfig(
        text_config={
            **TEXT,
            "model_type": "cohere2",
            "head_dim": 8,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "logit_scale": 0.25,
            "pad_token_id": 256,
            "tie_word_embeddings": tied,
        },
        vision_config={**SIGLIP, "model_type": "siglip_vision_model", "image_size": 56, "vision_use_head": False},
        image_token_index=own.convert_tokens_to_ids("<|IMG_PATCH|>"),
        tie_word_embeddings=tied,
    )
    images = GotOcr2ImageProcessor(size={"height": 56, "width": 56}, min_patches=1, max_patches=4)
    processor = AyaVisionProcessor(images, own, patch_size=14, img_size=56, downsample_factor=2)
    return AyaVisionForConditionalGeneration(config), processor


def deepseek_vl(tied: bool = True) -> Built:
    own = tokenizer(image_token="<image_placeholder>")
    config = DeepseekVLConfig(
        text_config={**TEXT, "model_type": "llama", "tie_word_embeddings": tied},
        vision_config={**SIGLIP, "model_type": "siglip_vision_model", "image_size": 56, "vision_use_head": False},
        image_token_id=own.convert_tokens_to_ids("<image_placeholder>"),
        tie_word_embeddings=tied,
    )
    images = DeepseekVLImageProcessor(size={"height": 56, "width": 56})
    return DeepseekVLForConditionalGeneration(config), DeepseekVLProcessor(images, own, num_image_tokens=16)


def phi4_multimodal(tied: bool = True) -> Built:
    """Its processor knows pictures of 448 px only, 273 tokens at least."""
    own = tokenizer(image_token="<|image|>", audio_token="<|audio|>")
    own.model_max_length = 8192
    audio = {"hidden_size": 16, "intermediate_size": 32, "num_blocks": 2, "num_attention_heads": 2}
    audio |= {"ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16, "nemo_conv_channels": 16}
    config = Phi4MultimodalConfig(
        **{**TEXT, "max_position_embeddings": 8192, "pad_token_id": 256},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_token_id": own.convert_tokens_to_ids("<|image|>"),
        },
        audio_config={**audio, "audio_token_id": own.convert_tokens_to_ids("<|audio|>"), "initializer_range": 0.2},
        tie_word_embeddings=tied,
    )
    images = Phi4MultimodalImageProcessor(dynamic_hd=1)
    processor = Phi4MultimodalProcessor(images, Phi4MultimodalFeatureExtractor(), own)
    return Phi4MultimodalForCausalLM(config), processor


def qwen3_vl_moe(tied: bool = True) -> Built:
    own = tokenizer()
    config = Qwen3VLMoeConfig(
        text_config={
            **TEXT,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "rope_parameters": {**MROPE, "mrope_interleaved": True},
            "tie_word_embeddings": tied,
        },
        vision_config={**WITH_POSITIONS, "deepstack_visual_indexes": [0, 1]},
        tie_word_embeddings=tied,
        **_ids(own),
    )
    return Qwen3VLMoeForConditionalGeneration(config), _qwen3_processor(own)


def smollm3(tied: bool = True) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The second layer has no positions."""
    config = SmolLM3Config(**TEXT, no_rope_layers=[1, 0], pad_token_id=256, tie_word_embeddings=tied)
    return SmolLM3ForCausalLM(config), tokenizer()


def granite(tied: bool = True) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Embeddings, residuals and logits that are scaled."""
    scales = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1}
    config = GraniteConfig(**TEXT, **scales, logits_scaling=8.0, pad_token_id=256, tie_word_embeddings=tied)
    return GraniteForCausalLM(config), tokenizer()
