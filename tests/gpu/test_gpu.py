"""What only a CUDA device can show; `make gpu`. Without one it is collected and skipped, and nothing is claimed.

Writes `docs/results/gpu.md` with the device's name when all of it ran.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path

import pytest
import torch

from st_btok import BTokLoss, CachedBTokLoss, build_model

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.fixture(scope="module")
def rows():
    """(what, measured) pairs; written as a page at the end."""
    found: list[tuple[str, str]] = []
    yield found
    if found:
        page = ROOT / "docs" / "results" / "gpu.md"
        page.parent.mkdir(exist_ok=True)
        table = "".join(f"| {what} | {value} |\n" for what, value in found)
        device = torch.cuda.get_device_name()
        page.write_text(
            f"# {device}\n\n`make gpu`, torch {torch.__version__}\n\n| what | measured |\n|---|---|\n{table}"
        )


@pytest.fixture(scope="module")
def built():
    return build_model(ROOT / "recipes" / "backbone", device="cuda")


def columns(model, size=8):
    batch = [
        model.preprocess([f"question number {i}" for i in range(size)]),
        model.preprocess([f"the answer is {i}" for i in range(size)]),
    ]
    return [{k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in column.items()} for column in batch]


def step(loss, batch, dtype=None):
    """Value of the loss and largest gradient, after a backward pass."""
    loss.zero_grad()
    with torch.autocast("cuda", dtype, enabled=dtype is not None):
        parts = loss([dict(column) for column in batch])
        value = parts if isinstance(parts, torch.Tensor) else torch.stack(list(parts.values())).sum()
    value.backward()
    grads = [p.grad.float().abs().max() for p in loss.parameters() if p.grad is not None]
    assert torch.isfinite(torch.stack(grads)).all()
    return value.item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_stays_close_to_float32(built, rows, dtype):
    model = copy.deepcopy(built)
    loss, batch = BTokLoss(model), columns(model)
    exact = step(loss, batch)
    found = step(loss, batch, dtype)
    assert found == pytest.approx(exact, rel=0.05, abs=0.05)
    rows.append((f"loss under {dtype} autocast against float32", f"{found:.4f} against {exact:.4f}"))


def test_cached_at_a_batch_of_1024(built, rows):
    model = copy.deepcopy(built)
    loss, batch = CachedBTokLoss(model, mini_batch_size=64), columns(model, 1024)
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    step(loss, batch, torch.bfloat16)
    torch.cuda.synchronize()
    seconds, peak = time.perf_counter() - start, torch.cuda.max_memory_allocated() / 2**30
    rows.append(("GradCache, batch 1,024, first step", f"{seconds:.2f} s, {peak:.2f} GiB"))


def test_compiled(built, rows):
    model = copy.deepcopy(built)
    loss, batch = BTokLoss(model), columns(model)
    exact = step(loss, batch)
    loss.model = loss.ranking.model = torch.compile(model)
    found = step(loss, batch)
    assert found == pytest.approx(exact, rel=1e-3, abs=1e-3)
    rows.append(("compiled against eager", f"{abs(found - exact):.2g}"))


def test_flash_attention_takes_the_kv_route(rows):
    pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    options = {"dtype": torch.bfloat16, "attn_implementation": "flash_attention_2"}
    model = build_model(ROOT / "recipes" / "backbone", device="cuda", model_kwargs=options)
    loss = BTokLoss(model)
    assert loss.route == "kv"
    rows.append(("flash attention, K/V route, loss", f"{step(loss, columns(model)):.4f}"))


def test_encode_throughput(built, rows):
    texts = [f"a short text with the number {i}" for i in range(4096)]
    built.encode(texts[:256], batch_size=256)
    start = time.perf_counter()
    built.encode(texts, batch_size=256)
    rows.append(
        ("texts encoded a second, float32, batches of 256", f"{len(texts) / (time.perf_counter() - start):.0f}")
    )
