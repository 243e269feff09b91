"""The interface of the package flash-attn in plain torch, so that what stands around its kernels runs without a GPU.

transformers' own code then removes the padding, counts sequences and calls these two functions, as it would on a GPU:
everything but the kernel itself is the real thing, in any dtype.
"""

from __future__ import annotations

import pytest
import torch
import transformers.modeling_flash_attention_utils as utils
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

WINDOW = (-1, -1)  # tokens to the left and to the right that a query sees; -1: all


def one_sequence(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, window: tuple[int, int], softcap: float
) -> Tensor:
    """(n, H, d) queries over (m, H', d) keys. The last query stands at the last key, also where n < m."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    ahead = torch.arange(k.shape[1]) - torch.arange(q.shape[1])[:, None] - (k.shape[1] - q.shape[1])  # (n, m)
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if causal:
        seen &= ahead <= 0
    if window[0] >= 0:
        seen &= ahead >= -window[0]
    if window[1] >= 0 and not causal:
        seen &= ahead <= window[1]
    return (F.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ v).transpose(0, 1)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = WINDOW,
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """(B, n, H, d), no padding."""
    options = (softmax_scale, causal, window_size, softcap)
    return torch.stack([one_sequence(*row, *options) for row in zip(q, k, v, strict=True)])


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = WINDOW,
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """(sum of n, H, d): sequences one behind the other."""
    sizes = [cu.diff().tolist() for cu in (cu_seqlens_q, cu_seqlens_k)]
    rows = zip(q.split(sizes[0]), k.split(sizes[1]), v.split(sizes[1]), strict=True)
    return torch.cat([one_sequence(*row, softmax_scale, causal, window_size, softcap) for row in rows])


def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let models take `attn_implementation="flash_attention_2"`.

    Returns:
        The names of the functions that were called, as they are called.
    """
    called: list[str] = []

    def watched(function):
        # transformers looks at the signature to see what the package can do
        def call(*args, **kwargs):
            called.append(function.__name__)
            return function(*args, **kwargs)

        call.__wrapped__ = function
        return call

    functions = watched(flash_attn_func), watched(flash_attn_varlen_func), None, utils._pad_input, utils._unpad_input
    monkeypatch.setattr(utils, "_lazy_imports", lambda *args, **kwargs: functions)
    monkeypatch.setattr(utils, "_loaded_implementation", None)
    check = PreTrainedModel._check_and_adjust_attn_implementation

    def accept(self, name, *args, **kwargs):
        return name if name == "flash_attention_2" else check(self, name, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", accept)
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda self, *args, **kwargs: True)
    return called
