"""Shared by all tests: no network, fixed seeds, one built model per backbone family."""

from __future__ import annotations

import copy
import os
import socket

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

from st_btok import build_model
from tests.backbones import BUILDERS, build

torch.set_num_threads(1)  # the runner uses one process per core


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


def _model(built: dict, family: str):
    if family not in built:
        model, processor = build(family)
        built[family] = build_model(model, processor=processor, device="cpu")
    return copy.deepcopy(built[family])


@pytest.fixture
def model(_built, family):
    """A fresh BTok model of each family."""
    return _model(_built, family)


@pytest.fixture
def qwen(_built):
    """A fresh BTok model on a tiny Qwen2-VL."""
    return _model(_built, "qwen2_vl")
