"""Bottleneck tokens as vocabulary entries: their names, their ids and their token embeddings.

The names `<|btok_0|>` ... `<|btok_{K-1}|>` are those of the authors' release, so their checkpoints and ours agree.
The embeddings are always written. Many checkpoints have spare rows in their embedding matrix (Qwen2-VL: 151,936 rows
for 151,657 tokens). There adding tokens resizes nothing, and an initialisation that is part of the resize would
silently not happen.
"""

from __future__ import annotations

import logging
import re
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
BTOK_PATTERN = re.compile(r"<\|btok_(\d+)\|>")
# Vocabulary size and BTok ids of each tokenizer that was asked. Reading a vocabulary takes 26 ms at 49,152 tokens, and
# the losses ask at each pass through the model.
_KNOWN: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, list[int]]] = WeakKeyDictionary()
# The default initialisation: the beginning of a sentence whose next word says what the input is about (the idea is
# PromptEOL's, https://arxiv.org/abs/2307.16645). Four tokens of most vocabularies.
PROMPT = " The topic is the"
# Relative size of the noise that makes K equal embeddings differ, too small to change what they mean.
INIT_NOISE = 0.02


def btok_tokens(num_btoks: int) -> list[str]:
    """Names of the bottleneck tokens, in reading order.

    Args:
        num_btoks: K, the number of tokens (at least 1).

    Returns:
        `["<|btok_0|>", ..., "<|btok_{K-1}|>"]`.

    Raises:
        ValueError: If `num_btoks` is smaller than 1.
    """
    if not isinstance(num_btoks, int) or num_btoks < 1:
        raise ValueError(f"num_btoks must be a whole number, at least 1, got {num_btoks!r}. The paper uses 4.")
    return [f"<|btok_{index}|>" for index in range(num_btoks)]


def btok_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the bottleneck tokens a tokenizer holds, in the order of their numbers.

    Args:
        tokenizer: Any transformers tokenizer.

    Returns:
        K ids; an empty list for a tokenizer without bottleneck tokens.

    Raises:
        ValueError: If the numbers have a gap, so that no K describes them.
    """
    size, ids = _KNOWN.get(tokenizer, (0, []))
    if size == len(tokenizer):
        return list(ids)
    found = {}
    for token, token_id in tokenizer.get_vocab().items():
        if match := BTOK_PATTERN.fullmatch(token):
            found[int(match.group(1))] = token_id
    if sorted(found) != list(range(len(found))):
        raise ValueError(
            f"the tokenizer's bottleneck tokens must be numbered 0 to K-1 without a gap, found {sorted(found)}. "
            "Start from the backbone's own tokenizer."
        )
    ids = [found[index] for index in range(len(found))]
    _KNOWN[tokenizer] = len(tokenizer), ids
    return list(ids)


def control_tokens(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> list[str]:
    """Names that must not become tokens when they stand in a user's text.

    All special tokens, and the added tokens whose name the backbone's template holds (such as media placeholders that
    are not marked special). Single characters and blanks are left out: Gemma's newline is an added token.
    """
    names = set(tokenizer.all_special_tokens)
    for token in tokenizer.added_tokens_decoder.values():
        if token.special or token.content in chat_template:
            names.add(token.content)
    return sorted(name for name in names if len(name) > 1 and not re.search(r"\s", name))


def add_btoks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_btoks: int = 4, init: str = "prompt", seed: int = 0
) -> list[int]:
    """Add K bottleneck tokens to a tokenizer and write their token embeddings into the model, in place.

    Each embedding is `base + 0.02 * rms(base) * noise` with standard normal noise. The embedding matrix grows only if
    it has too few rows. An untied output matrix gets rows that are made in the same way from its own. Tokens that are
    there already keep their (perhaps trained) embeddings.

    Args:
        model: A transformers model with input embeddings, with or without an LM head.
        tokenizer: Its tokenizer.
        num_btoks: K, at least 1. Default 4 (paper).
        init: The base of each embedding. `"prompt"` (default, the best of the study, docs/findings.md): the tokens of
            " The topic is the", one each; its last tokens if K is below four, newline tokens before it if K is above,
            and `"newline"` where the vocabulary lacks these words. `"newline"`: the newline token, or `"eos"` for a
            tokenizer without one. `"eos"`: the EOS token. `"mean"`: the mean of all token embeddings. `"random"`: only
            noise of the matrix' own scale. Any other text of K tokens: its tokens, one each; of another length, their
            mean for all.
        seed: Seed of the noise.

    Returns:
        The K token ids.

    Raises:
        ValueError: If the tokenizer holds another number of bottleneck tokens, `num_btoks` is smaller than 1, `init`
            is empty, the tokenizer has no EOS token where one is needed, or the embedding matrix is not in
            memory.
    """
    names = btok_tokens(num_btoks)
    present = btok_ids(tokenizer)
    if present and len(present) != num_btoks:
        raise ValueError(
            f"the tokenizer already has {len(present)} bottleneck tokens, but num_btoks={num_btoks} was asked for. "
            f"Pass num_btoks={len(present)}, or start from the backbone's own tokenizer."
        )
    if present:
        return present
    if model.get_input_embeddings().get_parameter("weight").is_meta:
        raise ValueError(
            "the rows of the bottleneck tokens are written into an embedding matrix in memory, but this model's is "
            "offloaded (device_map). Build without device_map, save, and load what was saved with it: "
            'SentenceTransformer(path, model_kwargs={"device_map": ...}).'
        )
    source_ids = _source_ids(tokenizer, init, num_btoks)
    num_tokens = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": names}, replace_extra_special_tokens=False)
    ids = btok_ids(tokenizer)
    if len(model.get_input_embeddings().get_parameter("weight")) <= max(ids):
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    matrices = [model.get_input_embeddings().get_parameter("weight")]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not matrices[0]:
        matrices.append(head.get_parameter("weight"))
    # What a decoder looks up by token beside its embedding matrix: one for its layers (Gemma 3n, Gemma 4).
    tables = [part.get_parameter("weight") for part in model.get_decoder().modules() if isinstance(part, nn.Embedding)]
    matrices += [table for table in tables if table is not matrices[0] and len(table) == len(matrices[0])]
    # Always written: many matrices have spare rows, so that a resize does nothing and the rows would stay untrained.
    for matrix in matrices:
        _write_rows(matrix, ids, source_ids, num_tokens, seed)
    return ids


def _source_ids(tokenizer: PreTrainedTokenizerBase, init: str, num_btoks: int) -> list[int] | None:
    """Ids of the tokens whose embeddings are the base; an empty list for all tokens, None for pure noise."""
    if init == "random":
        return None
    if init == "mean":
        return []
    if init == "prompt":
        return _prompt_ids(tokenizer, num_btoks) or [_newline_or_eos(tokenizer, "newline")]
    if init in ("newline", "eos"):
        return [_newline_or_eos(tokenizer, init)]
    ids = tokenizer(init, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(
            f"init={init!r} has no tokens. Pass 'prompt', 'newline', 'eos', 'mean', 'random' or a text to start from."
        )
    if len(ids) not in (1, num_btoks):
        logger.warning(
            "init=%r has %d tokens, and there are %d bottleneck tokens: all of their rows start from the mean of the "
            "text's rows. For one row from each token, pass a text of %d tokens.",
            init, len(ids), num_btoks, num_btoks,
        )  # fmt: skip
    return ids


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, num_btoks: int) -> list[int]:
    """Ids of the last K tokens of the prompt, behind newlines if it has fewer; none if its words are unknown."""
    for text in (PROMPT, PROMPT.lstrip()):  # some write the blank themselves
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) == len(PROMPT.split()) and str(tokenizer.decode(ids)).strip() == PROMPT.strip():
            missing = num_btoks - len(ids)
            return [_newline_or_eos(tokenizer, "newline")] * missing + ids if missing > 0 else ids[-num_btoks:]
    return []


def _newline_or_eos(tokenizer: PreTrainedTokenizerBase, init: str) -> int:
    """Id of the newline token, for `"newline"` and where there is one, else of the EOS token."""
    if init == "newline":
        ids = tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]  # some write a blank before it
        if "\n" in str(tokenizer.decode(ids)):
            return ids[0]
    if tokenizer.eos_token_id is None:
        needed = "an eos_token" if init == "eos" else "a newline token or an eos_token"
        raise ValueError(
            f"init={init!r} needs a tokenizer with {needed}, this one has none. "
            "Set tokenizer.eos_token, or pass init='mean'."
        )
    return int(tokenizer.eos_token_id)


@torch.no_grad()
def _write_rows(matrix: Tensor, ids: list[int], source_ids: list[int] | None, num_tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(ids), matrix.shape[1], generator=generator).to(matrix.device)  # (K, D)
    tokens = matrix[:num_tokens].float()  # without spare rows, which hold anything
    if source_ids is None:
        rows = noise * tokens.std()
    else:
        base = tokens[source_ids] if source_ids else tokens
        if len(source_ids) != len(ids):
            base = base.mean(0, keepdim=True)
        rows = base + INIT_NOISE * base.square().mean(1, keepdim=True).sqrt() * noise
    matrix[ids] = rows.to(matrix.dtype)
