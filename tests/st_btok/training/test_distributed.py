"""N processes equal one process with the N-fold batch (invariant 7), by DDP and FSDP on the CPU.

Starting is dear, so one run of `process_worker.py` goes through all cases of all numbers of processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from st_btok.training.distributed import across_processes, gather_columns, gather_rows, parameters_in_use, token_mean

ROOT = Path(__file__).parents[3]
LIMIT = 600  # s; a hang ends here


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Results by number of processes and case, and the output of the run."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "tests.st_btok.training.process_worker", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w") as log:
        run = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment, start_new_session=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(LIMIT)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)  # after a hang: the processes it forked, too
    found = {world: folder / f"{world}.json" for world in (2, 3)}
    results = {world: json.loads(path.read_text()) if path.exists() else {} for world, path in found.items()}
    return results, (folder / "log").read_text()[-3000:]


@pytest.mark.parametrize(
    ("world", "case"),
    [
        (2, "uneven"),
        (2, "no target on some"),
        (2, "no target at all"),
        (2, "accumulation"),
        (2, "prefix route"),
        (2, "kv route"),
        (2, "dora"),
        (2, "cached"),
        (2, "images on one"),
        (2, "images on one, unused searched"),
        (2, "fsdp"),
        (2, "fsdp, dora"),
        (3, "uneven"),
        (3, "no target on some"),
    ],
)
def test_many_processes_equal_one(ran, world, case):
    results, log = ran
    assert case in results[world], f"failed or hung here or before:\n{log}"
    found = results[world][case]
    assert found["value"] < 1e-5 and found["gradient"] < 1e-5 and found["unused"] == 0, found
    assert found["compared"] >= 20


@pytest.mark.parametrize("world", [2, 3])
def test_rows_of_any_number_and_type_are_gathered(ran, world):
    assert ran[0][world].get("gathering") == {"equal": 1.0}, ran[1]


def test_different_columns_raise_on_every_process(ran):
    assert ran[0][2].get("different columns") == {"raised": 1.0}, ran[1]


def test_the_trainer_on_two_processes(ran):
    """Two processes with half the batch leave the weights that one process leaves."""
    assert "trainer" in ran[0][2], ran[1]
    assert ran[0][2]["trainer"]["weights"] < 1e-5 < 1e-3 < ran[0][2]["trainer"]["moved"]


def test_one_process_is_left_alone():
    rows = torch.randn(3, 2, requires_grad=True)
    assert gather_rows(rows) is rows and gather_columns([rows])[0] is rows and across_processes(rows) is rows
    mean, count = token_mean(rows.sum(), 4)
    torch.testing.assert_close(mean, rows.sum() / 4)
    assert count == 4
    mean.backward()
    torch.testing.assert_close(rows.grad, torch.full((3, 2), 0.25))
    assert token_mean(torch.zeros(()), 0)[0] == 0
    layer = torch.nn.Linear(2, 2)
    with parameters_in_use(layer, layer):
        assert not layer._forward_hooks
