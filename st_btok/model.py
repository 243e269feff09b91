"""From a decoder-only backbone to an ordinary `SentenceTransformer` that embeds through bottleneck tokens.

The modules are stock ones from the start, so every `save_pretrained` and every Trainer checkpoint loads with a plain
`SentenceTransformer(path)`: `Transformer` (the chat template appends the BToks), `WordWeights` (1 on the BTok ids, 0
on every other id), `Pooling("mean")` (divides by the sum of the weights, hence a mean over the BToks), `Normalize`.
With `readout="last"` it is `Transformer`, `Pooling("lasttoken")`, `Normalize`. One readout has no stock module: with
`"attention"` it is `Transformer`, `BTokPooling`, `Normalize`. This file is the only one that knows their order.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.transformer import ModalityParams, Transformer
from sentence_transformers.sentence_transformer.modules import Normalize
from sentence_transformers.util.distributed import get_world_size
from transformers import (
    AutoConfig,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.image_utils import SizeDict
from transformers.utils import quantization_config

from st_btok.backbone_checks import (
    check_causal,
    check_config,
    check_pad_token,
    check_weights,
    switch_of_positions,
    warn_of_neighbours,
)
from st_btok.bare_text import frame_bare_text
from st_btok.batch_norm import freeze_batch_norm
from st_btok.chat_template import DATE, Lack, append_btoks, pin_date, plain_template
from st_btok.limits import set_max_seq_length, tokens_of_an_image
from st_btok.model_parts import GENERATING, checkpoint_head, commit_of, hub_arguments, remember_commit, tokenizer_of
from st_btok.pooling import ENGINE_PLUGIN, BTokPooling
from st_btok.tokens import BTOK_PATTERN, add_btoks, btok_tokens, control_tokens

logger = logging.getLogger(__name__)

# The authors' training and evaluation limits (release: data/processors/qwen2_vl.py).
MIN_PIXELS, MAX_PIXELS = 56 * 56, 1280 * 28 * 28


def build_model(
    backbone: str | Path | PreTrainedModel,
    num_btoks: int = 4,
    readout: Literal["mean", "last", "attention"] = "mean",
    template: Literal["chat", "plain"] = "chat",
    init: str = "prompt",
    *,
    processor: ProcessorMixin | PreTrainedTokenizerBase | None = None,
    max_seq_length: int | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    prompts: dict[str, str] | None = None,
    device: str | None = None,
    seed: int = 0,
    model_kwargs: dict[str, Any] | None = None,
    processor_kwargs: dict[str, Any] | None = None,
    config_kwargs: dict[str, Any] | None = None,
) -> SentenceTransformer:
    """Build a bottleneck-token embedder from a decoder-only (multimodal) language model.

    With h_k the last-layer state of the k-th BTok, the embedding is `normalize(mean_k h_k)` (paper, section 3.1).

    Args:
        backbone: Hub name, local path, or a loaded transformers model. A loaded model is copied, not changed.
        num_btoks: K, at least 1. Default 4 (paper).
        readout: `"mean"` over the K states (default, paper), `"last"`, the state of the last BTok, or `"attention"`,
            weights and an MLP that are trained (release, v2). What the third saves loads only where this package is
            installed, with `SentenceTransformer(path, trust_remote_code=True)`, and no engine serves it.
        template: `"chat"`, the backbone's own chat template with the BToks behind it (default), or `"plain"`, the
            authors' layout: each medium on its own line, text, newline, BToks.
        init: What the K embedding rows start from; see `add_btoks`. Default `"prompt"`.
        processor: Processor or tokenizer of a loaded model; must be left out for a name or path.
        max_seq_length: Limit of an input in tokens. Longer inputs lose text at the end, never media or BToks; exact
            for text, an upper bound with media. Default: what tokenizer and backbone allow; with LongRoPE (Phi-3.5,
            Phi-4-mini) what the backbone was first trained on, 4,096.
        min_pixels: Smallest image area in pixels, for processors with such limits. Default 3,136 (or the backbone's).
        max_pixels: Largest image area in pixels. Default 1,003,520, or the backbone's own limit if that is smaller;
            lowered, with a warning, where `max_seq_length` has no room for it.
        prompts: Instructions by name, such as `{"query": "...", "document": "..."}`, used by `encode_query`,
            `encode_document` and `prompt_name`.
        device: Device of the result. Default: what sentence-transformers picks, or what `device_map` in
            `model_kwargs` says, which has priority.
        seed: Seed of the noise in the new rows, and of the weights of `attention`.
        model_kwargs: For `from_pretrained` of the model, such as `{"dtype": "bfloat16"}` or, for a file of that format
            inside `backbone`, `{"gguf_file": "name.gguf"}`; its weights are unpacked while they load.
        processor_kwargs: For `from_pretrained` of the processor.
        config_kwargs: For `from_pretrained` of the config.

    Returns:
        A `SentenceTransformer` of stock modules, but for `readout="attention"`.

    Raises:
        ValueError: If the backbone is not decoder-only and causal, already has another number of BToks, has no chat
            template (for `template="chat"`), or its template drops the BToks; if `num_btoks` < 1, or an option has an
            unknown value.
    """
    if readout not in ("mean", "last", "attention"):
        raise ValueError(f'readout must be "mean", "last" or "attention", got {readout!r}. BTokPooling has one more.')
    if template not in ("chat", "plain"):
        raise ValueError(f'template must be "chat" or "plain", got {template!r}.')
    btok_tokens(num_btoks)  # refuses what is no number of tokens
    if prompts is not None and not isinstance(prompts, dict):
        raise ValueError(f'prompts must be instructions by name, such as {{"query": "Find: "}}, got {prompts!r}.')
    if not isinstance(backbone, str | Path | PreTrainedModel):
        raise ValueError(
            f"backbone must be a name, a path or a transformers model, got {type(backbone).__name__}. Of a "
            "SentenceTransformer pass the parts: build_model(model[0].model, processor=model[0].processor)."
        )
    model_kwargs, processor_kwargs, config_kwargs = _gguf(model_kwargs, processor_kwargs, config_kwargs)
    named = "" if isinstance(backbone, PreTrainedModel) else str(backbone)
    if named and processor is None and "gguf_file" not in model_kwargs:
        backbone, processor = _thinker(str(backbone), model_kwargs, processor_kwargs, config_kwargs)
    with _as_path(backbone, processor) as path:
        check_config(_config_of(path, config_kwargs), str(path))
        transformer = Transformer(
            path,
            model_kwargs=model_kwargs,
            processor_kwargs=processor_kwargs,
            config_kwargs=config_kwargs,
            unpad_inputs=False,  # WordWeights reads the attention mask, which flattened batches lack
        )
        check_weights(transformer.model, path, model_kwargs)
        _settle_tying(transformer.model.config, path, model_kwargs)
        # So that an untied LM head is read from the same commit later, whatever the name stands for by then.
        remember_commit(transformer.model.config, commit_of(path, **hub_arguments(model_kwargs)))
    if named and isinstance(backbone, PreTrainedModel):  # a part: where the whole lies, its LM head is found again
        transformer.model.name_or_path = transformer.model.config.name_or_path = named
    warn_of_neighbours(transformer.model.config, max_seq_length)
    tokenizer = tokenizer_of(transformer)
    check_pad_token(tokenizer)
    ids = add_btoks(transformer.model, tokenizer, num_btoks, init, seed)
    _set_template(transformer, template, num_btoks, processor_kwargs.get("chat_template"))
    _set_processing(transformer, max_seq_length, min_pixels, max_pixels)
    _check_rows(transformer, ids)
    frame_bare_text(transformer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pooling = BTokPooling(transformer.get_embedding_dimension(), ids, readout).to(transformer.model.dtype)
    own = readout == "attention"
    matrix_rows = len(transformer.model.get_input_embeddings().get_parameter("weight"))
    if model_kwargs.get("device_map") is not None:
        device = str(transformer.model.device)  # else a model that was sent to cuda:1 would be moved to cuda:0
    modules = [transformer, *([pooling] if own else pooling.stock_modules(tokenizer, matrix_rows)), Normalize()]
    if readout != "last":
        # vLLM reads `Pooling` and skips `WordWeights`: without this it serves the mean over all tokens, in silence.
        setattr(transformer.model.config, ENGINE_PLUGIN, "st_btok")
    model = SentenceTransformer(
        modules=modules,
        prompts=prompts,
        device=device,
        trust_remote_code=own,  # the Trainer resumes with what the model says
        similarity_fn_name="cosine",
    )
    check_causal(transformer)  # on its device: flash attention runs on no other
    _settle_padding(transformer)
    freeze_batch_norm(model)
    return model


@contextmanager
def _as_path(
    backbone: str | Path | PreTrainedModel, processor: ProcessorMixin | PreTrainedTokenizerBase | None
) -> Iterator[str]:
    """The place the backbone loads from; loaded objects are saved to a temporary folder, so they stay untouched."""
    if not isinstance(backbone, PreTrainedModel):
        if processor is not None:
            raise ValueError("processor goes with a loaded model; for a name or path use processor_kwargs.")
        yield str(backbone)
        return
    if get_world_size() > 1:
        raise ValueError(
            "several processes need a name or path to build from: transformers saves loaded objects on rank 0 only. "
            "Save model and processor to a folder first and pass that."
        )
    if processor is None:
        raise ValueError("a loaded model needs its processor (or tokenizer): build_model(model, processor=...).")
    with tempfile.TemporaryDirectory() as folder:
        backbone.save_pretrained(folder)
        processor.save_pretrained(folder)
        yield folder


def _config_of(path: str, config_kwargs: dict[str, Any]) -> PreTrainedConfig:
    """The config in a folder or of a name; an `OSError` for a name that is neither says so first."""
    try:
        return AutoConfig.from_pretrained(path, **config_kwargs)
    except OSError as error:
        if Path(path).exists():
            raise
        reason = str(error).strip().partition("\n")[0]
        raise OSError(f"there is no folder {path!r} here, and no model of that name was found: {reason}") from error


def _gguf(model_kwargs: dict[str, Any] | None, *others: dict[str, Any] | None) -> tuple[dict[str, Any], ...]:
    """Name a GGUF file once for all three loaders, and unpack it: packed weights can be neither trained nor saved."""
    kwargs = [dict(given or {}) for given in (model_kwargs, *others)]
    if "gguf_file" in kwargs[0]:
        for other in kwargs[1:]:
            other.setdefault("gguf_file", kwargs[0]["gguf_file"])
        if hasattr(quantization_config, "GgufConfig"):  # older transformers always unpack
            kwargs[0].setdefault("quantization_config", quantization_config.GgufConfig(dequantize=True))
    return tuple(kwargs)


def _thinker(path: str, *kwargs: dict[str, Any]) -> tuple[str | PreTrainedModel, ProcessorMixin | None]:
    """The part of an any-to-any model that reads: of a Qwen2.5-Omni its thinker, with the processor; else the path."""
    model_kwargs, processor_kwargs, config_kwargs = kwargs
    config = _config_of(path, config_kwargs)
    part: Any = getattr(config, "thinker_config", None)
    kind: Any = type(part)
    cls: Any = next((mapping[kind] for mapping in GENERATING if kind in mapping), None)
    if cls is None:
        return path, None
    model = cls.from_pretrained(path, config=part, **model_kwargs)
    return model, AutoProcessor.from_pretrained(path, **processor_kwargs)


def _settle_tying(config: PreTrainedConfig, path: str, model_kwargs: dict[str, Any]) -> None:
    """Have the config say whether the LM head is the embedding matrix: what is saved holds no head to ask."""
    if "gguf_file" in model_kwargs:
        return  # its config is made from the weights it holds
    try:
        head, tied = checkpoint_head(path, config, **hub_arguments(model_kwargs))
    except Exception as error:
        logger.warning(
            "Whether the backbone's LM head is tied to its embeddings can't be found out (%s). Its config says %s; if "
            "that is wrong, name the head: BTokLoss(..., lm_head=...).",
            str(error).strip().split("\n")[0],
            getattr(config, "tie_word_embeddings", False),
        )
        return
    if head is None:
        return  # a checkpoint of the embedder's class
    for part in (config, config.get_text_config(decoder=True)):
        part.tie_word_embeddings = tied


def _set_template(transformer: Transformer, template: str, num_btoks: int, given: str | None) -> None:
    """Put the BTok template on processor and tokenizer, and make every input a chat message that goes through it."""
    tokenizer = tokenizer_of(transformer)
    # A GGUF file's own template comes before the one that was asked for.
    own = given or getattr(transformer.processor, "chat_template", None) or tokenizer.chat_template
    if isinstance(own, dict):
        own = own["default"]
    if template == "chat" and own is None:
        raise ValueError(
            'template="chat" needs a backbone with a chat template, this one has none (a base model?). '
            'Pass template="plain".'
        )
    lacks: list[Lack] = []
    if template == "plain":
        own = plain_template(*(_placeholder(transformer, own, kind) for kind in ("image", "video", "audio")))
        transformer.input_formatter.message_format = "structured"
    else:
        lacks = _lacks(transformer, own)
        if pin_date(own):
            logger.warning(
                "The chat template writes today's date, so vectors would change with the day. The model keeps %s. To "
                "write another, pass the template with it: processor_kwargs={'chat_template': ...}.",
                f"{DATE:%d %B %Y}",
            )
    text = append_btoks(own, num_btoks, control_tokens(tokenizer, own), lacks)
    transformer.processor.chat_template = text
    tokenizer.chat_template = text
    if _replaces_template(transformer):
        transformer.processing_kwargs = {"chat_template": {"chat_template": text}}
    message = ModalityParams(method="forward", method_output_name="last_hidden_state")
    message["format"] = transformer.input_formatter.message_format
    # "message" must be saved with its format: read off the template it would be taken for structured in every case.
    transformer.modality_config["message"] = message
    transformer.input_formatter.supported_modalities = list(transformer.modality_config)


def _replaces_template(transformer: Transformer) -> bool:
    """Whether the processor renders through another template: SmolVLM's some media; Phi-4's, once saved, has none."""
    if isinstance(transformer.processor, ProcessorMixin):
        if "chat_template" not in signature(type(transformer.processor).__init__).parameters:
            return True
    for modality in ("image", "video", "audio"):
        if modality in transformer.modality_config:
            message = {"role": "user", "content": [{"type": modality}, {"type": "text", "text": "a"}]}
            if not BTOK_PATTERN.search(transformer.processor.apply_chat_template([message], tokenize=False)):
                return True
    return False


def _lacks(transformer: Transformer, own: str) -> list[Lack]:
    """What the backbone's own template can't take: it raises, or leaves it out in silence."""
    structured = transformer.input_formatter.message_format == "structured"

    def render(*turns: tuple[str, str], parts: bool = structured) -> str:
        return _render(
            transformer,
            own,
            [{"role": role, "content": [{"type": "text", "text": text}] if parts else text} for role, text in turns],
        )

    user = ("user", "KITE")
    lacks: list[Lack] = []
    if "BOATS" not in render(("system", "BOATS"), user):
        lacks.append("system")
    if render(user, parts=not structured) != render(user):
        lacks.append("strings" if structured else "parts")
    return lacks


def _render(transformer: Transformer, own: str | None, turns: list[Any]) -> str:
    """A conversation in the backbone's own template; empty where it raises."""
    try:
        return str(transformer.processor.apply_chat_template(turns, chat_template=own, tokenize=False))
    except Exception:  # a template raises what it likes
        return ""


def _placeholder(transformer: Transformer, own: str | None, modality: str) -> str:
    """What stands for one medium in the backbone's own chat template; empty where it has no such modality."""
    if modality not in transformer.modality_config:
        return ""
    if own is None:
        return _token_placeholder(transformer, modality)
    text = {"type": "text", "text": "AFTER"}
    without, with_one = (
        _render(transformer, own, [{"role": "user", "content": content}])
        for content in ([text], [{"type": modality}, text])
    )
    start = len(os.path.commonprefix([without, with_one]))
    rest = with_one[start:]
    end = len(os.path.commonprefix([without[start:][::-1], rest[::-1]]))
    return rest[: len(rest) - end].strip()


def _token_placeholder(transformer: Transformer, modality: str) -> str:
    """The processor's own token for one medium, between the start and end tokens that the config names."""
    token = getattr(transformer.processor, f"{modality}_token", None)
    if not isinstance(token, str):
        raise ValueError(
            f'template="plain" must know what stands for one {modality}, but the backbone has no chat template and '
            f"its {type(transformer.processor).__name__} no {modality}_token. Pass a template that writes it: "
            'build_model(..., processor_kwargs={"chat_template": "..."}).'
        )
    family, config = "audio" if modality == "audio" else "vision", transformer.config
    start, end = (getattr(config, f"{family}_{side}_token_id", None) for side in ("start", "end"))
    if start is None or end is None:
        return token
    name = tokenizer_of(transformer).convert_ids_to_tokens
    return f"{name(start)}{token}{name(end)}"


def _set_processing(
    transformer: Transformer, max_seq_length: int | None, min_pixels: int | None, max_pixels: int | None
) -> None:
    """Save what bounds an input: pixel limits (always both: a lone one is ignored) and the limit in tokens."""
    text = transformer.config.get_text_config()
    positions = switch_of_positions(text) or getattr(text, "max_position_embeddings", None) or 32768
    limit = max_seq_length or min(tokenizer_of(transformer).model_max_length, positions)
    # sentence-transformers cuts texts by tokens, at `max_seq_length`, and keeps the template's tail. Without the None,
    # a processor takes the length of the tokenizer's last call, saved with it: a limit set later would do nothing.
    kwargs: Any = {**transformer.processing_kwargs, "text": {"max_length": None}}
    image_processor = getattr(transformer.processor, "image_processor", None)
    for name in ("min_pixels", "max_pixels"):
        # `AutoProcessor.from_pretrained(..., max_pixels=...)` leaves them here too, where they override every `size`.
        tokenizer_of(transformer).init_kwargs.pop(name, None)
    size = dict(getattr(image_processor, "size", None) or {})
    if image_processor and {"shortest_edge", "longest_edge"} <= set(size) and hasattr(image_processor, "merge_size"):
        lower = min_pixels or size["shortest_edge"]
        upper = max_pixels or _pixels_that_fit(transformer, min(size["longest_edge"], MAX_PIXELS), lower, limit)
        if not 0 < lower <= upper:
            raise ValueError(f"0 < min_pixels <= max_pixels must hold, got {lower} and {upper}.")
        kwargs["image"] = {"size": {"shortest_edge": lower, "longest_edge": upper}}
        # On the processor as well, so that bare transformers reads the saved checkpoint with the same limits.
        image_processor.size = SizeDict(shortest_edge=lower, longest_edge=upper)
    elif min_pixels or max_pixels:
        raise ValueError(
            f"{type(image_processor).__name__} has no pixel limits. Leave min_pixels and max_pixels out, and set its "
            "size through processor_kwargs."
        )
    transformer.processing_kwargs = kwargs
    # Whether a video's frames share one budget of pixels: transformers 5.22 warns that the default will change. True
    # is what later versions do whatever is asked, and what the backbones' authors do (qwen-vl-utils). It makes no
    # difference up to about 300 frames of Qwen2-VL's largest size.
    video_processor: Any = getattr(transformer.processor, "video_processor", None)
    if getattr(video_processor, "cap_pixels_per_frame", False) is None:
        video_processor.cap_pixels_per_frame = True
    set_max_seq_length(transformer, limit)


def _pixels_that_fit(transformer: Transformer, pixels: int, lower: int, limit: int) -> int:
    """The largest area of an image, lowered where such images would never fit into `limit` tokens beside a text."""
    image_processor: Any = getattr(transformer.processor, "image_processor", None)
    pixels_per_token = (image_processor.patch_size * image_processor.merge_size) ** 2
    fitting = max(tokens_of_an_image(transformer, limit) * pixels_per_token, lower)
    if fitting >= pixels:
        return pixels
    logger.warning(
        "max_seq_length=%d has no room for images of %d tokens beside their text: max_pixels is lowered from %d to %d "
        "(%d tokens). Pass max_pixels to choose another.",
        limit, pixels // pixels_per_token, pixels, fitting, fitting // pixels_per_token,
    )  # fmt: skip
    return fitting


def _check_rows(transformer: Transformer, ids: list[int]) -> None:
    """Every kind of input must end in the K BToks, in order, once."""
    quoted = "".join(btok_tokens(len(ids)))  # a text that quotes the tokens' names must not forge them
    probes: list[Any] = [
        {"text": "a"},
        {"text": quoted},
        [{"role": "system", "content": quoted}, {"role": "user", "content": "c"}],
    ]
    for probe in probes:
        row = transformer.preprocess([probe])["input_ids"][0].tolist()
        if [token for token in row if token in ids] != ids or row[-len(ids) :] != ids:
            raise ValueError(
                f"the chat template must put the {len(ids)} bottleneck tokens at the end of every input, but {probe} "
                f'ends in {tokenizer_of(transformer).decode(row[-8:])!r}. Fix the template, or pass template="plain".'
            )


@torch.no_grad()
def _settle_padding(transformer: Transformer) -> None:
    """Pad on the right where a row's positions count its padding too, as absolute ones do (GPT-2)."""
    rows: Any = [{"text": "one"}, {"text": "one two three four five six"}]
    features = dict(transformer.preprocess(rows))
    if features["attention_mask"][:, 0].all():
        return
    model = transformer.model.eval()

    def last_state(features: dict[str, Any]) -> torch.Tensor:
        kwargs = {key: features[key].to(model.device) for key in ("input_ids", "attention_mask")}
        return model(**kwargs, return_dict=True).last_hidden_state[0, -1]

    alone, padded = last_state(dict(transformer.preprocess(rows[:1]))), last_state(features)
    if (alone - padded).abs().max() > 1e-2 * alone.abs().max():
        tokenizer_of(transformer).padding_side = "right"
        kwargs: Any = dict(transformer.processing_kwargs)
        transformer.processing_kwargs = {**kwargs, "text": {**kwargs["text"], "padding_side": "right"}}
