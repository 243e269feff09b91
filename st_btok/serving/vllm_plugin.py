"""The plugin that vLLM finds where `st_btok` is installed: equal vectors, or an error.

vLLM reads `Pooling` and `Normalize` of a saved model and skips `WordWeights`, so it averages all tokens where a model
with `readout="mean"` means its BToks; and a bare `"input"` skips the chat template, so there are no BToks at all. Both
give vectors of the right size and no error. A saved mean model therefore names this plugin in its `config.json`
(`io_processor_plugin`), and a vLLM without it refuses to start. With it (entry points of this package):

* `register` (group `vllm.general_plugins`, every process) puts the mean over the last K states in the place of the
  mean over all, for models whose `WordWeights` weigh nothing but BToks, and lets no prompt into the engine that does
  not end with its K BToks;
* `io_processor` (group `vllm.io_processor_plugins`) is what `io_processor_plugin` asks for. It processes nothing.

Both replace one function of vLLM 0.32 (`get_seq_pooling_method`, `PoolingIOProcessor.render`); where a release has
moved them, loading fails, and a mean model is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.entrypoints.pooling.base.io_processor import PoolingIOProcessor
from vllm.model_executor.layers.pooler.seqwise import poolers
from vllm.model_executor.layers.pooler.seqwise.methods import SequencePoolingMethod
from vllm.plugins.io_processors.interface import IOProcessor
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

from st_btok.tokens import BTOK_PATTERN, btok_ids


class BTokMeanPool(SequencePoolingMethod):
    """Mean over the states of the last K tokens of each prompt, which are its BToks: `render` let no other one in."""

    def __init__(self, num_btoks: int) -> None:
        super().__init__()
        self.num_btoks = num_btoks

    def forward(self, hidden_states: Tensor, pooling_metadata: Any) -> Tensor:
        """(B, D) in float32 of the states (T, D) of all prompts of one step, behind each other."""
        cursor = pooling_metadata.get_pooling_cursor()
        if cursor.is_partial_prefill():
            raise RuntimeError(
                "the BToks of a prompt must be computed in one step. Start vLLM without chunked prefill."
            )
        behind = torch.arange(self.num_btoks, device=hidden_states.device)
        # The prompts with which vLLM measures its memory can be shorter than K, hence the clamp.
        rows = (cursor.last_token_indices_gpu[:, None] - behind).clamp(min=0)  # (B, K)
        return hidden_states[rows].float().mean(1)


class RefusingProcessor(IOProcessor):
    """The processor that a mean model asks for: it is there, and has nothing to do."""

    def pre_process(self, prompt: Any, request_id: str | None = None, **kwargs: Any) -> Any:
        """Refuse: embeddings are asked for in the usual way."""
        raise ValueError('st_btok serves the task "embed" only. Send `messages` to /v1/embeddings.')

    def post_process(self, model_output: Sequence[Any], request_id: str | None = None, **kwargs: Any) -> Any:
        """Nothing comes here: `pre_process` lets nothing in."""
        return None


def io_processor() -> str:
    """Name the class that a mean model's `io_processor_plugin` asks for."""
    return f"{__name__}.{RefusingProcessor.__name__}"


def register() -> None:
    """Put the pooling and the check in their places; vLLM may call this more than once."""
    if getattr(poolers.get_seq_pooling_method, "knows_btoks", False):
        return
    stock_pooling, stock_render = poolers.get_seq_pooling_method, PoolingIOProcessor.render

    def get_seq_pooling_method(pooling_type: str) -> SequencePoolingMethod:
        model = get_current_vllm_config().model_config
        num_btoks = averaged_btoks(model.model, model.revision)
        return BTokMeanPool(num_btoks) if num_btoks else stock_pooling(pooling_type)

    def render(self: PoolingIOProcessor, render_params: Any) -> Any:
        rendered = stock_render(self, render_params)
        ids, tokenizer = rendered["prompts"].get("prompt_token_ids"), self.renderer.tokenizer
        check_prompt(ids, tokenizer)
        if "prompts" in render_params:  # bare text; in messages the template guards it
            check_bare(ids, tokenizer.encode(""), tokenizer.all_special_ids)
        return rendered

    get_seq_pooling_method.knows_btoks = True  # type: ignore[attr-defined]
    poolers.get_seq_pooling_method = get_seq_pooling_method
    PoolingIOProcessor.render = render


def averaged_btoks(model: str, revision: str | None) -> int:
    """K, the number of BToks that a saved model averages; 0 for a model that averages something else, or nothing.

    A `ValueError` if the model has a `BTokPooling`, for which vLLM would take the state of the last token.
    """
    modules = get_hf_file_to_dict("modules.json", model, revision) or []
    if any(module["type"].endswith(".BTokPooling") for module in modules):
        raise ValueError(
            "vLLM can't serve a model with BTokPooling, only stock modules. Save it with "
            "`pooling.stock_modules(tokenizer)` and Normalize in its place, for the readouts mean and last."
        )
    folders = [module["path"] for module in modules if module["type"].endswith(".WordWeights")]
    if len(folders) != 1:
        return 0
    config: Any = get_hf_file_to_dict(f"{folders[0]}/config.json", model, revision)
    weights = config["word_weights"]
    only_btoks = all(BTOK_PATTERN.fullmatch(name) and weight == 1 for name, weight in weights.items())
    return len(weights) if only_btoks and config["unknown_word_weight"] == 0 else 0


def check_prompt(token_ids: Sequence[int] | None, tokenizer: Any) -> None:
    """Refuse a prompt that does not end with its BToks, or has one elsewhere."""
    btoks, template = btok_ids(tokenizer), tokenizer.chat_template
    if not btoks:
        return
    # A saved template names just the BToks that it appends: after `read_budget` they are fewer than the tokenizer's.
    own = btoks[: len(BTOK_PATTERN.findall(template))] if isinstance(template, str) else btoks
    ids = list(token_ids or [])
    if ids[-len(own) :] != own or len([token for token in ids if token in set(btoks)]) != len(own):
        raise ValueError(
            f"a prompt must end with its {len(own)} bottleneck tokens {own}, this one ends with "
            f'{ids[-len(own) :]}. The chat template appends them: send `"messages": [{{"role": "user", "content": '
            '...}]` instead of `"input"`, without `add_generation_prompt` or `truncate_prompt_tokens`.'
        )


def check_bare(token_ids: Sequence[int] | None, frame: Sequence[int], special: Sequence[int]) -> None:
    """Refuse a text that quotes control tokens, where the tokenizer frames text without a template (`bare_text.py`).

    `frame` is what the tokenizer makes of an empty text; empty where it frames nothing.
    """
    control = set(special)
    own = Counter(token for token in frame if token in control)
    if own and Counter(token for token in token_ids or [] if token in control) != own:
        raise ValueError(
            'a bare "input" must not quote control tokens, which would be read as such. Send `"messages": [{"role": '
            '"user", "content": ...}]`, where the chat template takes them for words.'
        )
