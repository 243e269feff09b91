"""Shared by all tests: no network, fixed seeds, one built model per backbone family."""

from __future__ import annotations

import copy
import gc
import os
import socket

# Before torch and transformers are imported, here and in the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # the runner uses one process per core

import pytest
import torch

from st_btok import build_model
from st_btok.training.content import carry_content
from tests.backbones import BUILDERS, build

torch.set_num_threads(1)
gc.freeze()  # every training collects garbage, and the modules of torch and transformers are none


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(self, address, *args):
        host = address[0] if isinstance(address, tuple) else address
        if host not in ("127.0.0.1", "localhost", "::1") and not str(host).startswith("/"):
            raise OSError(f"a test tried to reach {address}")
        return connect(self, address, *args)

    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session", params=list(BUILDERS))
def family(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def _built() -> dict:
    return {}


@pytest.fixture(scope="session")
def btok_model(_built):
    """`btok_model(family, **options)`: a fresh model from `build_model`, built once per family and set of options."""

    def get(family: str, **options):
        key = (family, *sorted(options.items()))
        if key not in _built:
            backbone, processor = build(family)
            _built[key] = build_model(backbone, processor=processor, device="cpu", **options)
            carry_content(_built[key][0])  # so that a test may preprocess before it makes its losses
        return copy.deepcopy(_built[key])

    return get


@pytest.fixture
def model(btok_model, family):
    """A fresh BTok model of each family."""
    return btok_model(family)


@pytest.fixture
def qwen(btok_model):
    """A fresh BTok model on a tiny Qwen2-VL."""
    return btok_model("qwen2_vl")
