"""What holds for a backbone, measured: `st-btok check NAME_OR_PATH`, or `check(backbone)`.

Every invariant that the package promises for its tested families is measured on the given model, on a few short
inputs, in float32. Each becomes a `Verdict`: the measured number, its bound, and what the number means. Nothing is
taken from a list of known architectures.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from sentence_transformers import SentenceTransformer
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from st_btok.adapters import base_change
from st_btok.limits import video_form
from st_btok.model import build_model
from st_btok.model_parts import find_btoks
from st_btok.tools.given import near_path
from st_btok.tools.invariants import (
    KINDS,
    MEASUREMENTS,
    Measured,
    NotApplicable,
    Subject,
    encode_kind,
    first_line,
    samples_of,
)

Status = Literal["ok", "failed", "not applicable"]
# Below so many parameters one thread is used. Measured at 3.3, 57 and 180 million: two threads take three to five
# times its processor time and longer by the clock, because a product over few tokens is over before both have begun.
_SMALL = 300_000_000


@dataclass(frozen=True)
class Verdict:
    """One line of the result."""

    name: str  # what was measured
    status: Status
    value: float | None = None
    bound: float | None = None  # at most, or at least for `at_least`
    note: str = ""  # the reason where the status is not "ok", else what the number is
    at_least: bool = False

    def __str__(self) -> str:
        measured = "" if self.value is None else f"{self.value:.2g} {'>=' if self.at_least else '<='} {self.bound:g}"
        return f"{self.status:<15}{self.name:<27}{measured:<20}{self.note}".rstrip()


def check(
    backbone: str | Path | PreTrainedModel | SentenceTransformer,
    progress: Callable[[Verdict], None] | None = None,
    **options: Any,
) -> list[Verdict]:
    """Measure every invariant on one model; `progress` is called with each verdict as soon as it is there.

    `backbone` is anything that `build_model` takes, with its `options`, the checkpoint of an adapter, or a finished
    BTok model, of which a copy is measured. If the model can't be built there is one verdict, which says why.
    """
    verdicts: list[Verdict] = []

    def add(verdict: Verdict) -> None:
        verdicts.append(verdict)
        if progress is not None:
            progress(verdict)

    with _quiet(), ExitStack() as after:
        after.callback(torch.set_num_threads, torch.get_num_threads())
        owned = not isinstance(backbone, SentenceTransformer)
        try:
            # A copy, because everything is measured in float32 and in evaluation mode.
            if isinstance(backbone, SentenceTransformer):
                model = copy.deepcopy(backbone)
            elif isinstance(backbone, str | Path) and Path(backbone, "adapter_config.json").exists():
                model = SentenceTransformer(str(backbone), device=options.get("device"))
                change = base_change(model)
                add(Verdict("base of the adapter", "failed" if change else "ok", note=change or ""))
            else:
                model = build_model(backbone, **options)
            transformer, _ = find_btoks(model)
        except Exception as error:
            hint = near_path(backbone) if isinstance(error, OSError) and isinstance(backbone, str) else ""
            add(Verdict("build", "failed", note=first_line(error) + hint))
            return verdicts
        model.float().eval()
        if sum(parameter.numel() for parameter in model.parameters()) < _SMALL:
            torch.set_num_threads(1)
        found = [str(kind) for kind in ("text", "image", "video", "audio") if kind in transformer.modality_config]
        add(Verdict("build", "ok", note=f"{type(transformer.model).__name__}: {', '.join(found)}"))
        subject = Subject(model, owned, samples_of(found, video_form(transformer) if "video" in found else None))
        del model, transformer  # a reloaded model takes their place, and two of them need not fit into memory
        with _expected_unsaid():
            for kind in KINDS:
                add(_measure(kind, lambda kind=kind: encode_kind(subject, kind)))  # type: ignore[misc]
            for name, measure in MEASUREMENTS.items():
                add(_measure(name, lambda measure=measure: measure(subject)))  # type: ignore[misc]
        return verdicts


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars for weights that are loaded and written again on purpose; those of a download stay."""
    with ExitStack() as after:
        after.callback(disable_progress_bars if are_progress_bars_disabled() else enable_progress_bars)
        if transformers_logging.is_progress_bar_enabled():
            after.callback(transformers_logging.enable_progress_bar)
        downloads = not are_progress_bars_disabled()
        transformers_logging.disable_progress_bar()  # which takes those of downloads with it
        if downloads:
            enable_progress_bars()
        yield


@contextmanager
def _expected_unsaid() -> Iterator[None]:
    """No warnings about what is done on purpose: over-long texts, checkpointing, an adapter that is never saved.

    They come back for what the caller does next. Those of building the model are not touched: they are about it.
    """
    with warnings.catch_warnings(), ExitStack() as after:
        for name in ("transformers", "sentence_transformers", "st_btok"):
            logger = logging.getLogger(name)
            after.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        yield


def _measure(name: str, measure: Callable[[], Measured]) -> Verdict:
    """Run one measurement; whatever it raises is a verdict too, so that one failure does not hide the rest."""
    at_least = name in KINDS
    try:
        value, bound, note = measure()
    except NotApplicable as reason:
        return Verdict(name, "not applicable", note=str(reason))
    except Exception as error:
        return Verdict(name, "failed", note=first_line(error))
    holds = value >= bound if at_least else value <= bound  # False for NaN, as it must be
    return Verdict(name, "ok" if holds else "failed", value, bound, note, at_least)


def main(backbone: str, template: str, max_pixels: int | None, gguf_file: str | None, json: Path | None) -> int:
    """The command `st-btok check`; its arguments are described in `tools/command.py`.

    Returns 1 if a verdict is `"failed"`, else 0.
    """
    options: dict[str, Any] = {"template": template, "max_pixels": max_pixels, "device": "cpu"}
    if gguf_file:
        options["model_kwargs"] = {"gguf_file": gguf_file}
    verdicts = check(backbone, progress=lambda verdict: print(verdict, flush=True), **options)
    if json:
        json.write_text(dumps([asdict(verdict) for verdict in verdicts], indent=1) + "\n")
    failed = sum(verdict.status == "failed" for verdict in verdicts)
    print(f"{failed} of {len(verdicts)} failed" if failed else "nothing failed")
    return 1 if failed else 0
