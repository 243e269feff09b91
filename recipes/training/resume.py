"""Starting a killed training again: the newest checkpoint that is whole, the same run, and nobody else in its folder.

A kill can hit while a checkpoint is being written. The Trainer writes weights, optimizer, schedule and random states
in turn and `trainer_state.json` last; a full disk or a power cut can tear any of them. `newest_complete` takes the
newest checkpoint in which every file is whole and says which it passed over and why.

A resumed training must be the interrupted one: other data, another seed or another model would go on from an optimizer
and a place in the data that mean nothing to them. `run_fingerprint` describes a run by content, `check_fingerprint`
compares.

`only_training_in` keeps a second training out of a folder. Its lock belongs to the process, so a killed training
leaves none behind, and worker processes that outlive it don't hold it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from evaluation.atomic_write import atomic_write
from recipes.data.training_pairs import Source

try:
    import fcntl
except ImportError:  # Windows, which has no such lock: two trainings in one folder are not noticed there
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

RECORD = "training.json"
LOCK = ".training.lock"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Weights and optimizer: files, or folders of shards (FSDP: pytorch_model_fsdp_0, optimizer_0; DeepSpeed:
# global_step8).
_WEIGHTS = ("*.safetensors", "pytorch_model*", "adapter_model.bin", "global_step*")
_OPTIMIZER = ("optimizer.pt", "optimizer_*", "optimizer.bin", "global_step*")


def newest_complete(folder: str | Path) -> Path | None:
    """The newest checkpoint of an `output_dir` in which every file is whole; newer ones are logged with the reason."""
    found = [(int(match[1]), path) for path in Path(folder).glob("*") if (match := _CHECKPOINT.fullmatch(path.name))]
    for step, path in sorted(found, reverse=True):
        problem = what_is_torn(path, step)
        if not problem:
            return path
        logger.warning("%s is passed over: %s.", path.name, problem)
    return None


def what_is_torn(checkpoint: Path, step: int) -> str:
    """What makes the checkpoint of a step unusable, in words; empty if it is whole.

    Every JSON file must parse, every safetensors file must be as long as its header says, every file of `torch.save`
    must pass the checksums of its archive; weights, optimizer and the Trainer's state of that step must be there.
    """
    if problem := _missing(checkpoint):
        return problem
    checks = (("*.json", _torn_json), ("*.safetensors", _torn_safetensors))
    checks += tuple((pattern, _torn_archive) for pattern in ("*.pt", "*.pth", "*.bin"))
    for pattern, torn in checks:
        for path in sorted(checkpoint.rglob(pattern)):
            if problem := torn(path):
                return f"{path.relative_to(checkpoint)} {problem}"
    reached = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    return "" if reached == step else f"trainer_state.json is of step {reached}"


def _missing(checkpoint: Path) -> str:
    if not (checkpoint / "trainer_state.json").is_file():
        return "it has no trainer_state.json, which is written last"
    # The backbone's: of the first module, which sentence-transformers saves at the top or in a folder of its own.
    if not any(any(checkpoint.glob(place + pattern)) for pattern in _WEIGHTS for place in ("", "0_*/")):
        return "it has no weights"
    if not any(any(checkpoint.glob(pattern)) for pattern in _OPTIMIZER):
        return "it has no optimizer"
    return ""


def _torn_json(path: Path) -> str:
    """It must parse, and an index of weights must name files that are there."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return f"is no whole JSON ({path.stat().st_size} bytes)"
    for name in set(content.get("weight_map", {}).values()) if isinstance(content, dict) else ():
        if not (path.parent / name).is_file():
            return f"names {name}, which is missing"
    return ""


def _torn_safetensors(path: Path) -> str:
    """Compare the file's length with what its header promises, without reading the weights."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            return f"is cut in its header ({size} bytes)"
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return "has a damaged header"
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    expected = 8 + length + max(ends, default=0)
    return "" if size == expected else f"has {size} of {expected} bytes"


def _torn_archive(path: Path) -> str:
    """A file of `torch.save` is a zip archive: its directory stands at the end, its parts have checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError):
        return f"is cut or damaged ({path.stat().st_size} bytes)"
    return f"is damaged in {damaged}" if damaged else ""


def run_fingerprint(sources: Sequence[Source], backbone: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a resumed training must share with the interrupted one.

    Args:
        sources: The pairs that train. They count by content, so moving their files changes nothing.
        backbone: Name of the backbone, or its folder, which counts by config and samples of its weights.
        settings: Further values by name: seed, parts of the model, what decides the order of the rows.

    Returns:
        Values that JSON can hold.
    """
    data = {source.name: f"{len(source.pairs)} pairs, {_content(source)}" for source in sources}
    return {"data": data, "backbone": _backbone(backbone), **settings}


def _content(source: Source) -> str:
    digest = sha256()
    for record in source.pairs:
        for name, side in record.items():
            digest.update(f"{name}\0{side['text']}\0{side['digest']}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def _backbone(name: str) -> str:
    """A hub name as it is; a folder by what is in it: 64 KiB at 16 places of every weight file, not all of 15 GB."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    digest = sha256()
    config = folder / "config.json"
    digest.update(config.read_bytes() if config.is_file() else b"")
    for path in sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern) if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for part in range(16):
                file.seek(size * part // 16)
                digest.update(file.read(2**16))
    return f"a folder with content {digest.hexdigest()[:16]}"


def media_changed(folder: str | Path, sources: Sequence[Source]) -> bool:
    """Whether a file of the pairs was written, moved or replaced since the folder's record: its digest may be old."""
    record = Path(folder) / RECORD
    if not record.is_file():
        return False  # nothing to compare with
    since = record.stat().st_mtime
    for source in sources:
        for sides in source.pairs:
            for path in {path for side in sides.values() for path in (side["image"], *side["video"]) if path}:
                facts = os.stat(path) if os.path.exists(path) else None
                if facts is None or max(facts.st_mtime, facts.st_ctime) > since:
                    return True
    return False


def write_fingerprint(folder: str | Path, identity: Mapping[str, Any]) -> None:
    """Keep the identity in the folder, whole or not at all."""
    path = Path(folder) / RECORD
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(identity, indent=1) + "\n")


def check_fingerprint(folder: str | Path, identity: Mapping[str, Any]) -> None:
    """Refuse to resume another training than the interrupted one in a folder.

    Compared is what the folder's record holds: one of an older version lacks what that version did not ask for.

    Raises:
        ValueError: A value differs; the message names each with both values.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        logger.warning("%s is missing, so whether data, seed and model are still the same can't be checked.", path)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(dict(identity)))  # as the file holds it: lists for tuples
    changed = [
        f"  {name}: {before.get(name)!r} before, {now.get(name)!r} now"
        for name in before
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"a resumed training must be the interrupted one, but this differs from {path}:\n"
            + "\n".join(changed)
            + ".\nRestore it, use another --output_dir, or go on all the same with --allow_changes."
        )


@contextmanager
def only_training_in(folder: str | Path) -> Iterator[None]:
    """Hold the lock of an `output_dir`, which is made if it does not exist, inside this block.

    A POSIX record lock: it is released when the process ends, however it ends, and forked workers don't inherit it.

    Raises:
        RuntimeError: Another process trains in this folder.
        ValueError: It can't be written.
    """
    path = Path(folder) / LOCK
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"output_dir must be a folder that can be written, but {str(folder)!r} can't: {error.strerror}. Pass "
            "another."
        ) from error
    with file:
        if fcntl is not None:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                raise RuntimeError(
                    f"another training runs in {folder} (process {file.read().strip() or 'unknown'}). Two would "
                    "overwrite each other's checkpoints: wait for it, stop it, or pass another --output_dir."
                ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
