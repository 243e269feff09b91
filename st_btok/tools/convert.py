"""Convert a checkpoint of the authors' release into a plain sentence-transformers checkpoint.

    st-btok convert SRC DST [--base BASE]

SRC is a directory that the release (siyryuson/BottleneckTokens) wrote: a full checkpoint, or a PEFT adapter (LoRA or
DoRA with trained token rows) whose base model is a reference-mode directory. DST gets stock modules, so it loads with
`SentenceTransformer(DST)`. The chat template is the authors' layout (`plain_template`). The weights are those of SRC,
an adapter merged in.

Embeddings of the golden files (`tests/golden`; text, image, video, adapter) agree with the release within 2e-7.

The generative loss of the release is a second pass behind the BToks' keys and values: it puts an empty assistant turn
before the target and counts positions from the number of input *tokens*. M-RoPE counts slower than tokens inside an
image, so the release leaves a gap: 6 positions behind 9 image tokens, 4 behind 8, none behind a text. On its rows and
its positions the condensation mask of this package gives its values: 6.08762 nats per token, within 1e-6. What differs
by design, in nats per token of the golden pairs (random weights, `tests/st_btok/tools/test_convert.py`):

| source -> target | release | positions continue | and no prefix: `BTokLoss` |
|---|---|---|---|
| image and text (gap 6) -> text | 6.13220 | 6.12991 | 6.25930 |
| image and text (gap 4) -> text | 6.01119 | 6.10063 | 6.53239 |
| text (no gap) -> image and text | 6.08054 | 6.08054 | targets hold text only |
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights
from safetensors import SafetensorError
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from st_btok.model import build_model
from st_btok.pooling import BTokPooling
from st_btok.tokens import btok_ids

INJECTOR, NORMALIZE = "BToksTokenInjector", "Normalize"
BACKBONES = ("Qwen2VLBackbone", "Qwen2_5VLBackbone", "Qwen3VLBackbone")
MEAN, ATTENTION = "BToksPooling", "BToksAttentionPooling"
# Media in place, as the release wraps them; `build_model` reads the placeholders off it.
_MEDIA_TEMPLATE = (
    "{%- for message in messages -%}{%- if message.content is string -%}{{- message.content -}}{%- else -%}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'text' -%}{{- part.text -}}"
    "{%- else -%}{{- '<|vision_start|><|' ~ part.type ~ '_pad|><|vision_end|>' -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{%- endfor -%}"
)


@dataclass(frozen=True)
class Pipeline:
    """What the `config.json` of a folder of the release says."""

    folder: Path
    names: tuple[str, ...]  # of its modules in order: injector, backbone, pooling, normalize
    backbone: dict[str, Any]  # settings of the backbone module
    pooling: dict[str, Any]  # settings of the pooling module
    num_btoks: int  # K


def convert(src: str | Path, dst: str | Path, base: str | Path | None = None) -> Path:
    """Read a checkpoint of the authors' release and write a plain sentence-transformers checkpoint to `dst`.

    Everything is checked and written beside `dst` first, so `dst` is complete or absent; it must not exist, or be
    empty. An adapter is merged in float32 and stored in the dtype of its base model. An untied LM head (7B) is no part
    of an embedder; for further training with condensation name it: `BTokLoss(model,
    lm_head="Qwen/Qwen2-VL-7B-Instruct")`. The learned pooling of their v2 preset becomes `BTokPooling("attention")`,
    which loads with `trust_remote_code=True` and this package.

    `base`, for adapters: the base model directory, or the backbone (path or hub name), where the paths that SRC names
    are no longer valid. Default: those paths, as written and relative to the directory that names them. Raises
    `FileNotFoundError` if a file or the base model is missing, `FileExistsError` if `dst` is not empty, and
    `ValueError` if SRC is not such a checkpoint, or holds something this converter does not know.
    """
    source, target = Path(src), Path(dst)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not an empty directory. Name another one, or remove it.")
    if not source.is_dir():
        raise FileNotFoundError(f"SRC must be a directory, {source} is none.")
    if (source / "modules.json").exists():
        raise ValueError(
            f"{source} is a sentence-transformers model already (it has modules.json): load it with "
            "SentenceTransformer(path)."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    # Before the work, which takes minutes for a large model: a place that can't be written to is found now.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        backbone, pooling, pipeline = (
            _read_adapter(source, base) if (source / "adapter_config.json").exists() else _read_full(source)
        )
        processor = _read_processor([source, pipeline.folder], pipeline.num_btoks)
        model = _assemble(backbone, processor, pooling, pipeline)
        written = Path(folder) / "checkpoint"
        model.save_pretrained(str(written))
        if target.exists():
            target.rmdir()
        written.rename(target)
    return target


def _read_full(folder: Path) -> tuple[PreTrainedModel, dict[str, Tensor], Pipeline]:
    """The backbone and the pooling weights of a full checkpoint."""
    pipeline = _read_pipeline(folder)
    backbone, pooling = _read_weights(pipeline)
    if not backbone:
        raise ValueError(
            f"{folder} holds no backbone weights: it is a reference-mode directory, the base model of an adapter. "
            "Convert the adapter (a checkpoint-N directory); it finds this one by itself or through base=."
        )
    return _load_backbone(backbone, pipeline), pooling, pipeline


def _read_adapter(folder: Path, base: str | Path | None) -> tuple[PreTrainedModel, dict[str, Tensor], Pipeline]:
    """The backbone and the pooling weights with the adapter merged in."""
    config = PeftConfig.from_pretrained(str(folder))
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        raise ValueError(f"the adapter must be LoRA or DoRA, {folder / 'adapter_config.json'} has peft_type {kind!r}.")
    _need(folder, "adapter_model.safetensors")
    given = base if base is not None and _is_pipeline(Path(base)) else config.base_model_name_or_path or ""
    located = _locate(given, folder)
    if located is None or not _is_pipeline(located):
        raise FileNotFoundError(
            f"the adapter's base model {str(given)!r} must be a directory that the release wrote (base_model/ of the "
            "training run), but none is there. Pass its place as base= (--base)."
        )
    pipeline = _read_pipeline(located)
    tensors, pooling = _read_weights(pipeline)
    name = pipeline.backbone.get("model_name_or_path", "") if base is None or given == base else base
    backbone = _load_backbone(tensors, pipeline) if tensors else _fetch_backbone(name, located)
    dtype, (_, backbone_name, pooling_name, _) = backbone.dtype, pipeline.names
    head = _pooling_module(backbone, pipeline, pooling)
    parts = {backbone_name: nn.ModuleDict({"model": backbone.float()}), pooling_name: head}
    adapted = PeftModel.from_pretrained(nn.ModuleDict({"_modules_dict": nn.ModuleDict(parts)}), str(folder))
    _check_adapter(adapted, folder)
    merged: Any = adapted.merge_and_unload()
    modules = merged["_modules_dict"]
    return modules[backbone_name]["model"].to(dtype), dict(modules[pooling_name].state_dict()), pipeline


def _check_adapter(adapted: PeftModel, folder: Path) -> None:
    """Every tensor of the file must have arrived: peft only warns about those that do not."""
    stored = load_peft_weights(str(folder), device="cpu")
    arrived = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    lost = {
        key
        for key in stored.keys() | arrived.keys()
        if key not in stored or key not in arrived or not torch.equal(stored[key], arrived[key].to(stored[key]))
    }
    if lost:
        raise ValueError(f"the adapter in {folder} does not fit its base model: {_some(lost)}.")


def _fetch_backbone(name: str | Path, beside: Path) -> PreTrainedModel:
    place = _locate(name, beside) or name
    try:
        return AutoModelForImageTextToText.from_pretrained(str(place), dtype="auto", trust_remote_code=False)
    except OSError as error:
        raise FileNotFoundError(
            f"the backbone {str(place)!r}, named by {beside / 'config.json'}, can't be loaded ({error}). Pass its "
            "path or hub name as base= (--base)."
        ) from error


def _locate(name: str | Path, folder: Path) -> Path | None:
    """A path that `folder` names: relative to it or its parent, beside it under the same last name, or as written."""
    if not str(name):
        return None
    places = [folder / name, folder.parent / name, folder.parent / Path(name).name, Path(name)]
    return next((place for place in places if (place / "config.json").exists()), None)


def _is_pipeline(folder: Path) -> bool:
    path = folder / "config.json"
    return path.exists() and "modules" in _read_json(path)


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; errors name the file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged, it is no JSON: {error}. Copy it again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, it holds a {type(found).__name__}. Copy it again.")
    return found


def _need(folder: Path, name: str) -> Path:
    if not (folder / name).exists():
        raise FileNotFoundError(f"{folder} must hold {name}, it has {sorted(path.name for path in folder.iterdir())}.")
    return folder / name


def _read_pipeline(folder: Path) -> Pipeline:
    """Check that the modules are the ones whose meaning is known, in the known order."""
    path = _need(folder, "config.json")
    config = _read_json(path)
    kind, modules = config.get("model_type"), config.get("modules")
    if kind not in ("btoks", "vlm2emb") or not modules:
        raise ValueError(
            f"{path} must be a config of the authors' release (model_type btoks or vlm2emb, with modules), it has "
            f"model_type {kind!r}. A plain backbone needs no conversion: use build_model."
        )
    if isinstance(modules, list):  # older checkpoints
        modules = {str(index): module for index, module in enumerate(modules)}
    if not isinstance(modules, dict) or not all(isinstance(module, dict) for module in modules.values()):
        raise ValueError(f"modules in {path} must be objects by name, got {type(modules).__name__}. Copy it again.")
    names = tuple(config.get("_module_order") or modules)
    types = [modules.get(name, {}).get("type") for name in names]
    known = ((INJECTOR,), BACKBONES, (MEAN, ATTENTION), (NORMALIZE,))
    if len(types) != len(known) or any(kind not in allowed for kind, allowed in zip(types, known, strict=True)):
        raise ValueError(
            f"the pipeline in {path} must be {' -> '.join(' or '.join(allowed) for allowed in known)}, "
            f"it is {' -> '.join(map(str, types))}. This converter knows no other modules."
        )
    num_btoks = modules[names[0]].get("num_tokens", 4)
    if not isinstance(num_btoks, int) or num_btoks < 1:
        raise ValueError(f"num_tokens in {path} must be at least 1, it is {num_btoks!r}: a model without BToks.")
    return Pipeline(folder, names, modules[names[1]], modules[names[2]], num_btoks)


def _read_weights(pipeline: Pipeline) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of the backbone (none in reference mode) and of the pooling, from one file or from shards."""
    index = pipeline.folder / "model.safetensors.index.json"
    weight_map = _read_json(index).get("weight_map") if index.exists() else {}
    if not isinstance(weight_map, dict) or any(Path(str(file)).name != file for file in weight_map.values()):
        raise ValueError(f"weight_map in {index} must give each tensor the name of a file beside it. Copy it again.")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(weight_map.values())) or ["model.safetensors"]:
        path = _need(pipeline.folder, file)
        try:
            tensors.update(load_file(path))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}. Copy it again.") from error
    for number, name in enumerate(pipeline.names):  # older checkpoints number their modules
        old, new = f"_modules_list.{number}.", f"_modules_dict.{name}."
        tensors = {new + key.removeprefix(old) if key.startswith(old) else key: v for key, v in tensors.items()}
    backbone = _take(tensors, f"_modules_dict.{pipeline.names[1]}.model.")
    pooling = _take(tensors, f"_modules_dict.{pipeline.names[2]}.")
    if tensors:
        raise ValueError(f"{pipeline.folder} holds tensors of unknown modules: {_some(tensors)}.")
    return backbone, pooling


def _take(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Remove the tensors under a prefix and return them without it."""
    return {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}


def _load_backbone(tensors: dict[str, Tensor], pipeline: Pipeline) -> PreTrainedModel:
    """The backbone with these weights, once their names and shapes are known to be those of its class."""
    if "backbone_config" not in pipeline.backbone:
        raise ValueError(f"{pipeline.folder / 'config.json'} must hold the backbone_config of its backbone module.")
    with tempfile.TemporaryDirectory() as folder:
        # A full dump of transformers 4 says is_decoder=False of every decoder-only model; BERT's would say it too.
        stored = {key: value for key, value in pipeline.backbone["backbone_config"].items() if key != "is_decoder"}
        (Path(folder) / "config.json").write_text(json.dumps(stored))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    rows = next((value for key, value in tensors.items() if key.endswith("embed_tokens.weight")), torch.zeros(0))
    config.get_text_config().vocab_size = len(rows)  # the stored number is stale where BToks made the matrix grow
    head = tensors.get("lm_head.weight")
    if head is not None and not torch.equal(head, rows):
        config.tie_word_embeddings = False  # trained apart, whatever the config says
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=rows.dtype, trust_remote_code=False)
    expected = model.state_dict()
    missing = expected.keys() - tensors.keys() - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    unknown = tensors.keys() - expected.keys()
    shapes = {key for key in expected.keys() & tensors.keys() if expected[key].shape != tensors[key].shape}
    if missing or unknown or shapes:
        raise ValueError(
            f"the weights in {pipeline.folder} must be those of {config.model_type}; missing: {_some(missing)}; "
            f"unknown: {_some(unknown)}; of another shape: {_some(shapes)}. Was it written with transformers before "
            "4.52, which named them differently?"
        )
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    return model


def _some(keys: Any) -> str:
    """Up to three names, and how many more."""
    names = sorted(keys)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"


def _read_processor(folders: list[Path], num_btoks: int) -> ProcessorMixin:
    """The processor with the BTok tokens, from the first folder that has one."""
    folder = next((f for f in folders if (f / "tokenizer_config.json").exists()), None)
    if folder is None:
        raise FileNotFoundError(
            f"the processor files (tokenizer_config.json and so on) must be in {' or '.join(map(str, folders))}: the "
            "ids of the BToks are read from them. The release writes them only where the processor is saved too."
        )
    with tempfile.TemporaryDirectory() as copy:  # without config.json, whose model_type is unknown to transformers
        for path in folder.iterdir():
            if path.suffix in (".json", ".txt", ".jinja") and path.name not in ("config.json", "adapter_config.json"):
                shutil.copy(path, copy)
        processor = AutoProcessor.from_pretrained(copy, trust_remote_code=False)
    ids = btok_ids(processor.tokenizer)
    if len(ids) != num_btoks:
        raise ValueError(f"the tokenizer in {folder} must hold {num_btoks} BToks (num_tokens), it has {len(ids)}.")
    processor.video_processor.cap_pixels_per_frame = False  # later versions of transformers would cap, theirs did not
    processor.chat_template = _MEDIA_TEMPLATE
    return processor


def _pooling_module(backbone: PreTrainedModel, pipeline: Pipeline, weights: dict[str, Tensor]) -> nn.Module:
    """`BTokPooling` with the learned pooling of the v2 preset; an empty module for the mean."""
    if pipeline.pooling["type"] == MEAN:
        if weights:
            raise ValueError(f"{MEAN} has no weights, {pipeline.folder} holds {_some(weights)}.")
        return nn.Module()
    settings = pipeline.pooling
    if settings.get("attention_scale", True) is not True:
        raise ValueError(f"{ATTENTION} must have attention_scale true, got {settings['attention_scale']!r}.")
    width = backbone.config.get_text_config().hidden_size
    pooling = BTokPooling(
        width,
        list(range(pipeline.num_btoks)),  # replaced by the ids once the tokenizer is read
        "attention",
        mlp_ratio=settings.get("mlp_ratio", 4.0),
        dropout=settings.get("dropout", 0.1),
    )
    expected = {key: value.shape for key, value in pooling.state_dict().items()}
    found = {key: value.shape for key, value in weights.items()}
    if expected != found:
        raise ValueError(f"the pooling weights must have the shapes {expected}, {pipeline.folder} holds {found}.")
    pooling.load_state_dict(weights)
    return pooling


def _assemble(
    backbone: PreTrainedModel, processor: ProcessorMixin, pooling: dict[str, Tensor], pipeline: Pipeline
) -> SentenceTransformer:
    model = build_model(backbone, pipeline.num_btoks, template="plain", processor=processor, device="cpu")
    if pipeline.pooling["type"] == MEAN:
        return model
    head = _pooling_module(backbone, pipeline, pooling)
    head.btok_ids = btok_ids(processor.tokenizer)  # type: ignore[assignment]
    return SentenceTransformer(modules=[model[0], head, Normalize()], device="cpu", similarity_fn_name="cosine")


def main(src: str, dst: str, base: str | None) -> int:
    """The command `st-btok convert`; its arguments are described in `tools/command.py`."""
    written = convert(src, dst, base)
    sys.stdout.write(f"written: {written}; load it with SentenceTransformer({str(written)!r})\n")
    return 0
