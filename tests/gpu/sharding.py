"""FSDP2 in one process, on whatever device there is."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

from torch import distributed as dist
from torch.distributed.fsdp import fully_shard


@contextlib.contextmanager
def one_process(backend):
    """A process group of this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{Path(folder) / 'group'}", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def sharded(model):
    """FSDP2 as accelerate lays it out: every decoder layer, then the rest."""
    for layer in model[0].model.get_decoder().layers:
        fully_shard(layer)
    return fully_shard(model)
