"""What only a CUDA device can show; `make gpu`. Without one it is collected and skipped, and nothing is claimed.

Writes `docs/results/gpu.md` with the device's name when all of it ran.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from statistics import median

import pytest
import torch
from transformers.utils import is_flash_attn_2_available, is_flash_attn_4_available

from recipes.bench.settings import BenchmarkConfig
from recipes.bench.step import backbone as backbone_of
from recipes.bench.step import batch as batch_of
from recipes.bench.step import make_step
from st_btok import BTokLoss, CachedBTokLoss, build_model
from tests.backbones import build, picture
from tests.gpu.sharding import one_process, sharded

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


# What is timed comes first, so that it can be run alone.
def test_step_benchmark(rows):
    """Times of a step of every way in `recipes.bench step`, on the device."""
    config = BenchmarkConfig(vocab_size=19_008)
    for way in ("mnrl", "btok", "cached mnrl", "cached"):
        model = backbone_of(config, "qwen2_vl").cuda()
        batch = [
            {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in column.items()}
            for column in batch_of(config, model, "qwen2_vl")
        ]
        run, seconds = make_step(config, model, way), []
        for _ in range(6):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run([dict(column) for column in batch]).backward()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        rows.append((f"step of 16 pairs, {way}", f"{1000 * median(seconds[1:]):.1f} ms"))


def test_media_throughput(built, rows):
    pictures = [picture(56 + 28 * (i % 4), 56, i) for i in range(1024)]
    built.encode(pictures[:64], batch_size=64)
    start = time.perf_counter()
    built.encode(pictures, batch_size=64)
    rows.append(("pictures encoded a second, float32", f"{len(pictures) / (time.perf_counter() - start):.0f}"))


def test_encode_throughput(built, rows):
    texts = [f"a short text with the number {i}" for i in range(4096)]
    built.encode(texts[:256], batch_size=256)
    start = time.perf_counter()
    built.encode(texts, batch_size=256)
    rows.append(
        ("texts encoded a second, float32, batches of 256", f"{len(texts) / (time.perf_counter() - start):.0f}")
    )


def test_cached_at_a_batch_of_1024(built, rows):
    model = copy.deepcopy(built)
    loss, batch = CachedBTokLoss(model, mini_batch_size=64), columns(model, 1024)
    torch.cuda.reset_peak_memory_stats()
    for name in ("first", "second"):
        start = time.perf_counter()
        step(loss, batch, torch.bfloat16)
        torch.cuda.synchronize()
        seconds, peak = time.perf_counter() - start, torch.cuda.max_memory_allocated() / 2**30
        rows.append((f"GradCache, batch 1,024, {name} step", f"{seconds:.2f} s, {peak:.2f} GiB"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_stays_close_to_float32(built, rows, dtype):
    model = copy.deepcopy(built)
    loss, batch = BTokLoss(model), columns(model)
    exact = step(loss, batch)
    found = step(loss, batch, dtype)
    assert found == pytest.approx(exact, rel=0.05, abs=0.05)
    rows.append((f"loss under {dtype} autocast against float32", f"{found:.4f} against {exact:.4f}"))


FLASH = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_4": is_flash_attn_4_available}


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "llama"])
@pytest.mark.parametrize("attention", FLASH)
def test_flash_attention_takes_the_kv_route(rows, tmp_path, attention, family):
    """The value is that of attention under a mask, in bf16."""
    if not FLASH[attention]():
        pytest.skip(f"the package of {attention} is not installed")
    backbone, processor = build(family)
    backbone.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    values = {}
    for implementation in ("sdpa", attention):
        options = {"dtype": torch.bfloat16, "attn_implementation": implementation}
        model = build_model(tmp_path, device="cuda", model_kwargs=options)
        loss = BTokLoss(model)
        values[loss.route] = step(loss, columns(model))
    assert values["kv"] == pytest.approx(values["attention"], rel=0.05, abs=0.05)
    found = " / ".join(map("{:.4f}".format, values.values()))
    rows.append((f"{attention}, K/V route, {family}: loss under a mask / with it", found))


def test_fsdp2_on_one_device(built, rows):
    """A sharded model takes the same step."""
    model = copy.deepcopy(built)
    expected = step(BTokLoss(model), columns(model))
    with one_process("nccl"):
        model = copy.deepcopy(built)
        loss = BTokLoss(model)  # before its model is sharded, as the Trainer has it
        sharded(model)
        found = step(loss, columns(model))
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)
    rows.append(("FSDP2 on one device against plain", f"{abs(found - expected):.2g}"))


def test_compiled(built, rows):
    model = copy.deepcopy(built)
    loss, batch = BTokLoss(model), columns(model)
    exact = step(loss, batch)
    loss.model = loss.ranking.model = torch.compile(model)
    found = step(loss, batch)
    assert found == pytest.approx(exact, rel=1e-3, abs=1e-3)
    rows.append(("compiled against eager", f"{abs(found - exact):.2g}"))
