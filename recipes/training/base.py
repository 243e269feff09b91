"""The folder `base` of a training: the untrained model that checkpoints of adapters refer to.

Nothing that a user keeps is deleted. What is removed is a base whose writing was cut off: it holds `UNFINISHED`, which
is written first and removed last. A whole base stays, as adapters may stand on it that were moved away since;
`btok_lora_config` compares it with the new one and refuses another model's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".unfinished"


def check_backbone_place(backbone: str, output_dir: str) -> None:
    """Refuse a backbone that lies where the training writes.

    Raises:
        ValueError: It lies in `base` or `model` of the folder.
    """
    for name in ("base", "model"):
        place = Path(output_dir, name).resolve()
        if Path(backbone).resolve().is_relative_to(place):
            raise ValueError(
                f"the backbone must lie outside of what a training writes, but {backbone!r} lies in {place}, which is "
                "overwritten. Pass another --output_dir, or move the backbone."
            )


@contextmanager
def written_base(output_dir: str) -> Iterator[Path]:
    """The folder to save a base to, inside this block; one whose writing was cut off is written again.

    Raises:
        ValueError: It holds something else than a base.
    """
    base = Path(output_dir) / "base"
    if (base / UNFINISHED).exists():
        shutil.rmtree(base)
    elif _is_cut(base / "config.json"):  # by a version that left no mark; nothing else of the folder is deleted
        (base / "config.json").unlink()
    elif base.exists() and not all((base / name).is_file() for name in ("config.json", "modules.json")):
        names = sorted(path.name for path in base.iterdir()) if base.is_dir() else ["a file"]
        if names:
            raise ValueError(
                f"{base} is where the untrained model is saved, but it holds something else ({', '.join(names[:3])}). "
                "Move it away, or pass another --output_dir."
            )
    base.mkdir(parents=True, exist_ok=True)
    mark = base / UNFINISHED
    if not (base / "config.json").is_file():  # there is none yet, so it is going to be written
        mark.touch()
    yield base
    mark.unlink(missing_ok=True)


def _is_cut(config: Path) -> bool:
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except OSError:
        return False
    except ValueError:
        return True
    return False
