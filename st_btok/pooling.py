"""Readouts: how the K last-layer BTok states become the output.

`BTokPooling` is for people who compose modules by hand and for readouts that stock modules can't express. It finds the
BToks by token id, never by position, so padding side, prompts and whatever follows the BToks make no difference.
A saved model with this class needs `trust_remote_code=True` and `st_btok`; `stock_modules` avoids that where it can.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import torch
from sentence_transformers.base.modules.module import Module
from sentence_transformers.sentence_transformer.modules import Pooling, WordWeights
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

# A line of config.json: vLLM refuses the model where no plugin of the name that it gives is installed.
ENGINE_PLUGIN = "io_processor_plugin"
# Ids behind the tokenizer's last that a saved model of `mean` has weights (of 0) for, as tokens may be added later.
SPARE_TOKENS = 1024

Readout = Literal["mean", "last", "attention", "vectors"]


class _Vocabulary(list[str]):
    """A list that prints as one line: the module's repr goes into logs and into the model card."""

    def __repr__(self) -> str:
        return f"[{len(self)} tokens]"


class BTokPooling(Module):
    """Reads the K bottleneck-token states out of the last layer, by token id.

    With h_k the K states: `mean` = mean_k h_k (paper, section 3.1); `last` = h_K; `attention`: a = softmax_k(w·h_k /
    sqrt(D)), s = sum_k a_k h_k, LayerNorm(s + MLP(s)) (the authors' v2 release, `modules/pooling.py`); `vectors`:
    the K states themselves, for late interaction.

    Args:
        embedding_dimension: D, width of the states.
        btok_ids: The K token ids, in order.
        readout: `"mean"` (default), `"last"`, `"attention"` or `"vectors"`.
        mlp_ratio: Width of the MLP of `attention` as a multiple of D. Default 4.0 (release).
        dropout: Dropout of that MLP, 0 to 1. Default 0.1 (release).

    Raises:
        ValueError: If there are no ids, an id twice, or the readout is unknown.
    """

    config_keys = ["embedding_dimension", "btok_ids", "readout", "mlp_ratio", "dropout"]

    def __init__(
        self,
        embedding_dimension: int,
        btok_ids: list[int],
        readout: Readout = "mean",
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if not btok_ids or len(set(btok_ids)) != len(btok_ids):
            raise ValueError(f"btok_ids must hold at least one id and none twice, got {btok_ids}.")
        if readout not in ("mean", "last", "attention", "vectors"):
            raise ValueError(f'readout must be "mean", "last", "attention" or "vectors", got {readout!r}.')
        self.embedding_dimension = embedding_dimension
        self.btok_ids = list(btok_ids)
        self.readout = readout
        self.mlp_ratio = mlp_ratio
        self.dropout = dropout
        if readout == "attention":
            width = int(embedding_dimension * mlp_ratio)
            self.attention = nn.Linear(embedding_dimension, 1)
            self.mlp = nn.Sequential(
                nn.Linear(embedding_dimension, width),
                nn.GELU(),
                nn.Dropout(dropout),
                nn.Linear(width, embedding_dimension),
                nn.Dropout(dropout),
            )
            self.layer_norm = nn.LayerNorm(embedding_dimension)

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Pool the BTok states.

        Args:
            features: Holds `input_ids` (B, T), `attention_mask` (B, T) and `token_embeddings` (B, T, D).
            **kwargs: Not used.

        Returns:
            The features with `sentence_embedding` (B, D); for `vectors` with `token_embeddings` (B, K, D) and an
            all-ones `attention_mask` (B, K), which is what sentence-transformers' `MultiVectorEncoder` scores.

        Raises:
            ValueError: If a row does not hold each of the K tokens exactly once.
        """
        states = select_btoks(
            features["token_embeddings"], features["input_ids"], features["attention_mask"], self.btok_ids
        )  # (B, K, D)
        if self.readout == "vectors":
            features["token_embeddings"] = states
            features["attention_mask"] = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
            return features
        if self.readout == "mean":
            embedding = states.mean(1)
        elif self.readout == "last":
            embedding = states[:, -1]
        else:
            scores = self.attention(states) / math.sqrt(self.embedding_dimension)  # (B, K, 1)
            summary = (scores.softmax(1) * states).sum(1)  # (B, D)
            embedding = self.layer_norm(summary + self.mlp(summary))
        features["sentence_embedding"] = embedding
        return features

    def stock_modules(self, tokenizer: PreTrainedTokenizerBase, rows: int = 0) -> list[nn.Module]:
        """Modules of sentence-transformers itself that compute the same embedding.

        `mean`: `WordWeights` gives 1 to the BTok ids and 0 to every other id; `Pooling("mean")` divides by the sum of
        these weights. The weights are frozen: trained ones would let other tokens leak into the mean.
        `last`: `Pooling("lasttoken")` alone, which every engine that serves embeddings has; the template ends every
        input in the BToks, so the last token is the last BTok.

        Args:
            tokenizer: The tokenizer whose ids the weights are for.
            rows: Rows of the embedding matrix: there is room for as many ids, and for `SPARE_TOKENS` more than the
                tokenizer has, so that tokens can be added later. Default 0.

        Returns:
            `[WordWeights, Pooling]` or `[Pooling]`.

        Raises:
            ValueError: For the readouts `attention` and `vectors`, which no stock module computes.
        """
        if self.readout not in ("mean", "last"):
            raise ValueError(
                f"no stock module computes readout={self.readout!r}. Use 'mean' or 'last', or keep BTokPooling and "
                "load the saved model with trust_remote_code=True."
            )
        if self.readout == "last":
            return [Pooling(self.embedding_dimension, "lasttoken")]
        # WordWeights looks up by position in `vocab`: one entry for each id, in id order, also where ids have gaps.
        names = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
        size = max(max(names) + 1 + SPARE_TOKENS, rows)
        vocab = _Vocabulary(names.get(token_id, f"<unused {token_id}>") for token_id in range(size))
        weights = WordWeights(vocab, {vocab[token_id]: 1.0 for token_id in self.btok_ids}, unknown_word_weight=0.0)
        return [weights.requires_grad_(False), Pooling(self.embedding_dimension, "mean")]

    def get_embedding_dimension(self) -> int:
        """Width D of the output."""
        return self.embedding_dimension

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write config and, for `attention`, weights; and the line that makes vLLM refuse the model.

        vLLM does not know this module and would take the last token's state in its place, without an error.
        """
        self.save_config(output_path)
        backbone = Path(output_path).parent / "config.json"
        if backbone.exists():  # saved before this module, by sentence-transformers
            backbone.write_text(json.dumps({**json.loads(backbone.read_text()), ENGINE_PLUGIN: "st_btok"}, indent=2))
        if self.readout == "attention":
            self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any) -> BTokPooling:  # type: ignore[override]
        """Load from a folder or hub repository written by `save`."""
        hub = {key: kwargs[key] for key in ("token", "cache_folder", "revision", "local_files_only") if key in kwargs}
        module = cls(**cls.load_config(model_name_or_path, subfolder=subfolder, **hub))
        if module.readout == "attention":
            module = cls.load_torch_weights(model_name_or_path, subfolder=subfolder, model=module, **hub)
        return module


def check_btoks(input_ids: Tensor, attention_mask: Tensor, btok_ids: list[int], where: str) -> Tensor:
    """(B, K) positions of each row's bottleneck tokens, in the order of `btok_ids`; `where` names the batch in errors.

    A `ValueError` if a row does not hold each of the K tokens exactly once; the first such row is named.
    """
    wanted = torch.tensor(btok_ids, device=input_ids.device)
    hits = (input_ids[:, None, :] == wanted[None, :, None]) & attention_mask[:, None, :].bool()  # (B, K, T)
    counts = hits.sum(-1)
    wrong = (counts != 1).any(1).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"every row must hold each of its {len(btok_ids)} bottleneck tokens exactly once, but row {row} of "
            f"{where} holds them {counts[row].tolist()} times (ids {btok_ids}). Were they truncated away, is the chat "
            "template another one than build_model's, or does the text itself contain their names?"
        )
    return hits.to(torch.int8).argmax(-1)


def select_btoks(states: Tensor, input_ids: Tensor, attention_mask: Tensor, btok_ids: list[int]) -> Tensor:
    """(B, K, D): the (B, T, D) states at the bottleneck tokens of each row, in their order; see `check_btoks`."""
    positions = check_btoks(input_ids, attention_mask, btok_ids, "the batch")
    return states.gather(1, positions[..., None].expand(-1, -1, states.shape[-1]))
