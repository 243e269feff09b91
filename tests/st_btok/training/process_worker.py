"""Compares the loss on N processes with that on one; started by `test_distributed.py`.

`python -m tests.st_btok.training.process_worker FOLDER` builds the models once and forks 1, then 2, then 3 processes.
Rank 0 of
N writes FOLDER/N.json: for each case the error of the value, and the largest error of a gradient relative to that
gradient's size.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from st_btok import BTokLoss, build_model
from st_btok.adapters import btok_lora_config
from st_btok.training.cached_loss import CachedBTokLoss
from st_btok.training.distributed import gather_rows
from tests.backbones import build, picture, total

TEXTS = [("a", "one"), ("what?", "two kittens"), ("bb", "three"), ("c d", "four"), ("e", "five six"), ("f", "seven")]
IMAGES = [(picture(28, 28, number), word) for number, word in enumerate(("red", "blue", "green", "gold"))]
WORDLESS = [(picture(28, 28, 10 + number), picture(56, 28, 20 + number)) for number in range(3)]
BOTH_WAYS = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
PAIRS = Dataset.from_dict(dict(zip(("query", "positive"), map(list, zip(*TEXTS[:4] * 2, strict=True)), strict=True)))


def built(family):
    backbone, processor = build(family)
    return build_model(backbone, processor=processor, device="cpu")


def models() -> dict[str, torch.nn.Module]:
    """Built by every process for itself: the same weights everywhere."""
    found = {"llama": built("llama"), "qwen2_vl": built("qwen2_vl")}
    found["adapted"] = copy.deepcopy(found["qwen2_vl"])
    torch.manual_seed(1)
    config = btok_lora_config(found["adapted"], r=4, dropout=0.0, use_dora=True, init_lora_weights=False)
    found["adapted"].add_adapter(config)
    return found


def columns(model, rows):
    return [model.preprocess(list(column)) for column in zip(*rows, strict=True)]


def on_one_process(model, micro_batches, loss_class, **options):
    """The loss of the whole batch, without any wrapper."""
    model = copy.deepcopy(model)
    loss = loss_class(model, **options)
    value = 0.0
    for rows in micro_batches:
        part = total(loss(columns(model, rows))) / len(micro_batches)
        part.backward()
        value += part.item()
    return value, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def wrapped_ddp(model, find_unused=False):
    return DistributedDataParallel(model, find_unused_parameters=find_unused, broadcast_buffers=False)


def wrapped_fsdp(model):
    """FSDP2 as accelerate lays it out: every decoder layer, then the rest."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model[0].model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def compare(model, micro_batches, wrap: Callable = wrapped_ddp, loss_class=BTokLoss, **options) -> dict[str, float]:
    """`micro_batches[m][r]` are the rows of rank r."""
    whole = [[row for rows in batch for row in rows] for batch in micro_batches]
    expected, wanted = on_one_process(model, whole, loss_class, **options)
    model = copy.deepcopy(model)
    loss = loss_class(model, gather_across_devices=True, **options)
    source = copy.deepcopy(model)  # preprocesses as the model of the loss does, and is not wrapped
    wrapper = wrap(model)
    for part in list(loss.modules()):  # as the Trainer does
        if getattr(part, "model", None) is model:
            part.model = wrapper
    value = 0.0
    for number, batch in enumerate(micro_batches):
        last = number == len(micro_batches) - 1
        hold = not last and isinstance(wrapper, DistributedDataParallel)
        with wrapper.no_sync() if hold else nullcontext():
            part = total(loss(columns(source, batch[dist.get_rank()]))) / len(micro_batches)
            part.backward()
        value += part.item()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    grads = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items()}
    if missing := wanted.keys() - grads.keys():
        raise AssertionError(f"no gradient for {missing}")
    # A parameter that nobody used may get a 0, and nothing else.
    unused = max((grads[name].abs().max().item() for name in grads.keys() - wanted.keys()), default=0.0)
    errors = [((grads[n] - g).abs().max() / g.abs().max().clamp(min=0.1)).item() for n, g in wanted.items()]
    return {"value": abs(value / expected - 1), "gradient": max(errors), "unused": unused, "compared": len(wanted)}


def different_columns() -> dict[str, float]:
    """Another number of columns on another rank: an error on every rank, no hang."""
    model = copy.deepcopy(MODELS["llama"])
    loss = BTokLoss(model, gather_across_devices=True)
    rows = [("a", "b", "c")] if dist.get_rank() else [("a", "b")]
    try:
        loss(columns(model, rows))
    except ValueError as error:
        return {"raised": float("number of columns" in str(error))}
    return {"raised": 0.0}


def gathering() -> dict[str, float]:
    """Rows of different number, of none, and of every type that is sent."""
    rank = dist.get_rank()
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        rows = torch.full((rank, 2), rank, dtype=dtype)
        expected = torch.cat([torch.full((r, 2), r, dtype=dtype) for r in range(dist.get_world_size())])
        if not torch.equal(gather_rows(rows), expected):
            return {"equal": 0.0}
    return {"equal": 1.0}


def trained(folder: Path, batch_size: int) -> dict[str, torch.Tensor]:
    """Weights after two updates with the Trainer; each process takes its part of the data."""
    torch.manual_seed(0)
    model = copy.deepcopy(MODELS["llama"])
    args = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        max_steps=2,
        learning_rate=1e-3,
        optim="sgd",
        max_grad_norm=1e9,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    gather = {"gather_across_devices": dist.is_initialized()}
    loss = BTokLoss(model, **gather)
    SentenceTransformerTrainer(model=model, args=args, train_dataset=PAIRS, loss=loss).train()
    return model.state_dict()


def with_the_trainer(folder: Path) -> dict[str, float]:
    """The Trainer on N processes against weights that one process left in `folder`."""
    expected = torch.load(folder / "one.pt")
    found = trained(folder / "many", 4 // dist.get_world_size())
    moved = max((found[name] - MODELS["llama"].state_dict()[name]).abs().max().item() for name in found)
    return {"weights": max((found[n] - expected[n]).abs().max().item() for n in expected), "moved": moved}


def cases(world: int, folder: Path) -> dict[str, Callable[[], dict[str, float]]]:
    """What runs on that many processes."""
    llama, qwen, adapted = MODELS["llama"], MODELS["qwen2_vl"], MODELS["adapted"]
    uneven = [[TEXTS[:3], TEXTS[3:4], TEXTS[4:6]][:world]]
    part_wordless = [[IMAGES[:3], WORDLESS[:2], WORDLESS[2:]][:world]]
    two_steps = [*part_wordless, [IMAGES[1:2], IMAGES[2:4], WORDLESS[:1]][:world]]
    mixed = [[IMAGES[:3], TEXTS[:2], TEXTS[2:3]][:world]]
    found = {
        "gathering": gathering,
        "uneven": lambda: compare(llama, uneven, **BOTH_WAYS),
        "no target on some": lambda: compare(qwen, part_wordless),
    }
    if world > 2:
        return found
    return {
        **found,
        "no target at all": lambda: compare(qwen, [[WORDLESS[:1], WORDLESS[1:]]]),
        "accumulation": lambda: compare(qwen, two_steps),
        "prefix route": lambda: compare(adapted, part_wordless, route="prefix"),
        "kv route": lambda: compare(adapted, part_wordless, route="kv"),
        "dora": lambda: compare(adapted, mixed),
        "cached": lambda: compare(qwen, two_steps, loss_class=CachedBTokLoss, mini_batch_size=1),
        "images on one": lambda: compare(qwen, mixed),
        "images on one, unused searched": lambda: compare(qwen, mixed, lambda model: wrapped_ddp(model, True)),
        "fsdp": lambda: compare(qwen, two_steps, wrapped_fsdp),
        "fsdp, dora": lambda: compare(adapted, mixed, wrapped_fsdp),
        "different columns": different_columns,
        "trainer": lambda: with_the_trainer(folder),
    }


def work(rank: int, world: int, port: int, folder: Path) -> None:
    """All cases in one process of a group."""
    if world == 1:
        torch.save(trained(folder, 4), folder / "one.pt")
        return
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo")
    results = {}
    for case, run in cases(world, folder).items():
        torch.manual_seed(0)
        results[case] = run()
        dist.barrier()
        if rank == 0:
            (folder / f"{world}.json").write_text(json.dumps(results))  # at once: shows where a hang began
    dist.destroy_process_group()


def start(world: int, folder: Path) -> None:
    """Fork the processes of one group; when one fails, end the others, which would wait for it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    group = [fork.Process(target=work, args=(rank, world, port, folder)) for rank in range(world)]
    for process in group:
        process.start()
    while any(process.exitcode is None for process in group) and not any(process.exitcode for process in group):
        time.sleep(0.1)
    for process in group:
        process.kill()
        process.join()


if __name__ == "__main__":
    torch.set_num_threads(1)
    MODELS = models()
    for number in (1, 2, 3):
        start(number, Path(sys.argv[1]))
