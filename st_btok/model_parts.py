"""Questions asked of a model: its transformer and BToks, tokenizer, embedding matrix, LM head, media tokens.

They are asked from every room, so they stand below all of them, next to the tokens' names. Nothing here changes a
model for good. Private names of other packages stand in this file alone, each with the version it was read in:
`tests/st_btok/test_private_names.py` says what breaks when one of them goes.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import transformer as transformer_module
from sentence_transformers.base.modules.transformer import Transformer
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)
from transformers.utils import cached_file, logging

from st_btok.tokens import btok_ids

# The attribute under which a module keeps the function that checkpoints it. Read in transformers 5.23.
CHECKPOINTING = "_gradient_checkpointing_func"
# Where transformers looks for the class that generates. Text comes last: some configs with a vision tower stand there
# too, for a class that reads the language model alone (Qwen3.5).
GENERATING = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)
# Features that carry the content of rows to the losses; see `training/content.py`. No model reads them.
CONTENT_KEYS = ("content_ids", "content_media")


def find_btoks(model: SentenceTransformer) -> tuple[Transformer, list[int]]:
    """The Transformer module of a BTok model and its K token ids; a `ValueError` if it is none."""
    transformer = model[0]
    if not isinstance(transformer, Transformer):
        raise ValueError(f"the first module must be a Transformer, got {type(transformer).__name__}.")
    ids = btok_ids(tokenizer_of(transformer))
    if not ids:
        raise ValueError(
            "the model's tokenizer has no bottleneck tokens. Build the model with st_btok.build_model(backbone)."
        )
    return transformer, ids


def unwrap(model: Any) -> SentenceTransformer:
    """The SentenceTransformer inside what training wraps around it (DDP, compile)."""
    while not isinstance(model, SentenceTransformer):
        model = model.module if hasattr(model, "module") else model._orig_mod
    return model


def tokenizer_of(transformer: Transformer) -> PreTrainedTokenizerBase:
    """The tokenizer of a Transformer module; a `ValueError` if it has none, as for a pure vision or audio model."""
    if transformer.tokenizer is None:
        raise ValueError(
            f"the backbone must be a language model with a tokenizer; {type(transformer.model).__name__} has none."
        )
    return transformer.tokenizer


def embedding_matrix(model: PreTrainedModel) -> Tensor:
    """The live (V, D) input embedding matrix, also under adapters; under FSDP it is whole while the model runs.

    Under `trainable_token_indices` this is the base matrix, with the untrained embeddings of the BToks. That is right
    for an LM head, as BToks are never generated.
    """
    module: Any = bare_module(model.get_input_embeddings())
    return module.weight


def graph_is_kept() -> bool:
    """Whether the backward pass that runs now keeps its graph (`retain_graph`), as torch's engine says.

    True where a release of torch does not say (its private name was read in 2.14): then nothing may be reused.
    """
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if asked is None else bool(asked())


def generation_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that transformers builds from a backbone's config in order to generate, LM head included.

    The one that the config itself names if that has a head, else the one of `GENERATING`; None where there is none.
    """
    for name in config.architectures or ():
        named = getattr(transformers, name, None)
        if isinstance(named, type) and issubclass(named, PreTrainedModel) and named.can_generate():
            if named.config_class is type(config):
                return named
    found: Any = next((mapping[type(config)] for mapping in GENERATING if type(config) in mapping), None)
    return found


def logit_rule(config: PreTrainedConfig) -> LogitRule:
    """How the class that generates turns the product of states and head into logits: some scale it, some cap it.

    That class' own `forward` is run, in which nothing but the product is left: a stand-in for the decoder gives a
    state of one number, and the head's matrix holds the products to ask for. A `ValueError` if the class can't be
    asked.
    """
    generating = generation_class(config)
    if generating is None:
        raise ValueError(f"transformers has no class with an LM head for {type(config).__name__}.")
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"  # nothing attends here, and others may not be installed
    config.tie_word_embeddings = False
    products = torch.tensor([1e-3, 1.0, -3.0, 10.0, 1e6])
    try:
        # Random numbers that are drawn here are not missing from training.
        with torch.random.fork_rng(devices=[]):
            head = nn.Linear(1, len(products), bias=False)
            with torch.device("meta"):
                model: Any = generating(config)
        head.weight = nn.Parameter(products[:, None], requires_grad=False)
        _replace_all_but(model, model.get_output_embeddings(), head)
        with torch.no_grad():
            found = model(input_ids=torch.zeros(1, 1, dtype=torch.long)).logits.flatten()
    except Exception as error:  # classes raise what they like
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{generating.__name__} does not say how it makes logits of states: {reason}") from error
    scale, cap = float(found[0] / products[0]), float(found[-1])
    linear = abs(cap) > 0.5 * abs(scale) * float(products[-1])
    rule = LogitRule(scale, None if linear else cap)
    if not torch.allclose(rule(products), found, rtol=1e-3, atol=1e-5):
        raise ValueError(f"{generating.__name__} makes logits that are neither scaled nor capped: {found.tolist()}.")
    return rule


@dataclass(frozen=True)
class LogitRule:
    """From the products of states and LM head to logits: times `scale`, then squeezed into -cap to cap by a tanh."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, products: Tensor) -> Tensor:
        """The logits; the given tensor itself where there is nothing to do."""
        logits = products if self.scale == 1 else products * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def _replace_all_but(module: nn.Module, own: nn.Module, head: nn.Module) -> None:
    """Put `head` in the place of `own`, and a stand-in in the place of every module beside the way to it."""
    for name, child in list(module.named_children()):
        if child is own:
            setattr(module, name, head)
        elif own in set(child.modules()):
            _replace_all_but(child, own, head)
        else:
            setattr(module, name, _OneState(child))


class _OneState(nn.Module):
    """Stands for a decoder and for what it returns: one state, a single number, whatever it is asked."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.__dict__["own"] = own
        self.last_hidden_state = torch.ones(1, 1, 1)

    def forward(self, *args: Any, **kwargs: Any) -> _OneState:
        return self

    def __getitem__(self, index: int) -> Tensor:
        return self.last_hidden_state

    def __getattr__(self, name: str) -> Any:
        """A number as the decoder has it, its parts as stand-ins too; no caches or attentions."""
        value = getattr(self.__dict__["own"], name, None)
        if isinstance(value, nn.Module):
            return _OneState(value)
        return self.forward if callable(value) else value


def checkpoint_head(source: str, config: PreTrainedConfig, **hub: Any) -> tuple[Tensor | None, bool]:
    """The (V, D) LM head of a checkpoint, as transformers loads it, and whether it is the embedding matrix too.

    The generating class is loaded without any part but its two matrices, so that names of keys, their conversions and
    the question whether both are tied are answered by transformers itself: a head that the checkpoint holds wins over
    a config that says tied, if it differs from the embeddings. On the CPU, in the checkpoint's own type; None where it
    is neither tied nor in the checkpoint. `hub`: where the checkpoint lies, such as `revision`. Raises `OSError` if it
    is not there, `ValueError` if no class generates from such a config.
    """
    generating = generation_class(config)
    if generating is None:
        raise ValueError(f"transformers has no class with an LM head for {type(config).__name__}.")
    stored = type(config).from_pretrained(source, **hub)
    if hasattr(stored, "quantization_config"):
        del stored.quantization_config  # the two matrices are not among what is packed

    def matrices(model: PreTrainedModel) -> set[nn.Module]:
        found = {model.get_input_embeddings(), model.get_output_embeddings()}
        if None in found:
            raise ValueError(f"{type(model).__name__} has no LM head of its own.")
        return found

    model, found = _load_part(generating, matrices, source, config=stored, **hub)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    names = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is head.weight}
    tied = head.weight is embeddings.weight
    return (None if names & found["missing_keys"] else head.weight.detach()), tied


def checkpoint_tensors(
    own: type[PreTrainedModel], source: str, max_numbers: int = 2**29
) -> Iterator[tuple[str, Tensor]]:
    """Every weight and saved buffer of a checkpoint, on the CPU, under the names of a class, as that class loads it.

    Part by part: `max_numbers` in memory at a time, but a single module is never split.
    """
    configured: Any = own.config_class
    config = configured.from_pretrained(source)
    with torch.device("meta"):
        outline = own(config)
    owners = [
        (name, sum(tensor.numel() for tensor in module.state_dict().values()))
        for name, module in outline.named_modules()
        if not any(True for _ in module.children())
    ]
    parts: list[list[str]] = [[]]
    size = 0
    for name, numbers in owners:
        if parts[-1] and size + numbers > max_numbers:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += numbers
    seen: set[str] = set()
    for part in parts:

        def picked(model: PreTrainedModel, part: list[str] = part) -> set[nn.Module]:
            return {model.get_submodule(name) for name in part}

        model, found = _load_part(own, picked, source)
        for name, tensor in model.state_dict().items():
            if name not in seen and name not in found["missing_keys"]:
                seen.add(name)
                yield name, tensor


def _load_part(
    own: type[PreTrainedModel], pick: Callable[[Any], set[nn.Module]], source: str, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """A model of a class with some of its modules only, from a checkpoint, and what loading reports.

    transformers itself finds the keys, converts and ties. Read in 5.23: what is tied is listed by the constructor.
    """

    def construct(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        own.__init__(self, config, *args, **kwargs)
        kept = pick(self)
        for module in list(self.modules()):
            for name, child in list(module.named_children()):
                if module not in kept and not kept & set(child.modules()):
                    delattr(module, name)
        left = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        self.all_tied_weights_keys = {a: b for a, b in self.all_tied_weights_keys.items() if {a, b} <= left}

    members = {
        "__init__": construct,
        "__module__": own.__module__,  # key conversions go by the names of class and module
        "_keys_to_ignore_on_load_unexpected": [".*"],
        "_initialize_missing_keys": lambda self, is_quantized: None,  # it would look for what was taken out
    }
    part: Any = type(own.__name__, (own,), members)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return part.from_pretrained(source, output_loading_info=True, **options)
    finally:
        if bars:
            logging.enable_progress_bar()


def without_adapter(model: nn.Module, name: str) -> Tensor:
    """A weight itself, not a copy, by its name in the state dict of the model without adapters."""
    *path, leaf = name.split(".")
    for part in path:
        model = bare_module(getattr(model, part))
    return getattr(model, leaf)


def bare_module(module: nn.Module) -> nn.Module:
    """The module that peft's adapters stand around; the module itself where there are none. Read in peft 0.21."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    return module


def hub_arguments(model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of `from_pretrained`'s arguments that say where a checkpoint lies."""
    names = ("revision", "token", "cache_dir", "subfolder")
    return {name: model_kwargs[name] for name in names if name in model_kwargs}


def commit_of(source: str, **hub: Any) -> str | None:
    """The commit that a name on the hub stands for, by its config's place in the cache; None for a local folder."""
    try:
        file = None if Path(source).is_dir() else cached_file(source, "config.json", **hub)
    except OSError:  # a repository of GGUF files has none
        file = None
    found = re.search(r"/snapshots/([0-9a-f]{40})/", Path(file).as_posix()) if file else None
    return found[1] if found else None


def remember_commit(config: PreTrainedConfig, commit: str | None) -> None:
    """Note in a config which commit it was loaded from, as transformers did until 5.22. It is not saved."""
    config._commit_hash = commit


def remembered_commit(config: PreTrainedConfig) -> str | None:
    """The commit that a config was loaded from on the hub, if it was noted."""
    return getattr(config, "_commit_hash", None)


def supports_sdpa(model: PreTrainedModel) -> bool:
    """Whether a backbone has SDPA attention, which masks of one's own are built on. Read in transformers 5.23."""
    return getattr(model, "_supports_sdpa", True)


def attention_of(config: PreTrainedConfig) -> str:
    """The attention implementation that a config names; empty for none. Read in transformers 5.23."""
    return config._attn_implementation or ""


@contextmanager
def attention_set(name: str, *configs: PreTrainedConfig) -> Iterator[None]:
    """Have configs name an attention implementation for a while, without any check. Read in transformers 5.23.

    Outer configs come before those inside them: setting one sets those inside it.
    """
    previous = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config, before in zip(configs, previous, strict=True):
            config._attn_implementation = before


def forget_adapters(model: PreTrainedModel) -> None:
    """Have a model save as one that never had an adapter, once its adapters are merged. Read in transformers 5.23."""
    del model.peft_config
    model._hf_peft_config_loaded = False


def media_tokens(transformer: Transformer) -> dict[str, int]:
    """Ids of the backbone's placeholder tokens by kind, `"image"`, `"video"`, `"audio"`, as far as it has them."""
    found: dict[str, int] = {}
    for source in (transformer.config, transformer.processor):  # Phi-4's config has them in its parts only
        named = {kind: getattr(source, f"{kind}_token_id", None) for kind in ("image", "video", "audio")}
        found = found or {kind: token for kind, token in named.items() if token is not None}
    return found


def ignore_in_forward(*keys: str) -> None:
    """Keep features from the forward of backbones that take any argument, as sentence-transformers does with its own.

    Private name: `_NON_MODEL_FEATURE_KEYS` of `base/modules/transformer.py` (read in 6.1 and 6.2).
    """
    module: Any = transformer_module
    module._NON_MODEL_FEATURE_KEYS = module._NON_MODEL_FEATURE_KEYS | {*keys}
