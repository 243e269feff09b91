"""The exported pipeline in ONNX Runtime and OpenVINO: `python -m tests.engines.export_job`.

Runs in an environment with both beside what this package needs (`make engines`). Rows padded on either side, a single
row, and sizes that the graph was not traced with.
"""

from __future__ import annotations

import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import torch

from st_btok import build_model
from st_btok.serving.export import BOUND, export
from tests.engines.table import ROOT, Row, add

BATCHES = [["b", "a much longer text " * 8, "c d e"] * 2, ["one"], ["東京の夜", "a"]]


def largest(model, run) -> tuple[float, float]:
    """Largest difference to `encode` with left and with right padding."""
    found = []
    for side in ("left", "right"):
        model.tokenizer.padding_side = side
        differences = []
        for texts in BATCHES:
            features = model.preprocess(texts)
            vectors = run(features["input_ids"].numpy(), features["attention_mask"].numpy())
            differences.append(float(np.abs(vectors - model.encode(texts)).max()))
        found.append(max(differences) if np.isfinite(differences).all() else float("nan"))
    return found[0], found[1]


def run_onnx(session, ids, mask):
    return session.run(None, {"input_ids": ids, "attention_mask": mask})[0]


def run_openvino(graph, ids, mask):
    return graph({"input_ids": ids, "attention_mask": mask})[0]


def main() -> None:
    """Both readouts in both engines."""
    failed = False
    for readout in ("mean", "last"):
        backbone = str(ROOT / "recipes" / "backbone")
        model = build_model(backbone, readout=readout, model_kwargs={"dtype": torch.float32}, device="cpu")
        with tempfile.TemporaryDirectory() as temporary:
            session = onnxruntime.InferenceSession(str(export("onnx", model, Path(temporary) / "onnx")))
            graph = openvino.Core().compile_model(
                str(export("openvino", model, Path(temporary) / "openvino")),
                "CPU",
                {"INFERENCE_PRECISION_HINT": "f32"},
            )
            engines = {
                "ONNX Runtime": ("onnxruntime", partial(run_onnx, session)),
                "OpenVINO": ("openvino", partial(run_openvino, graph)),
            }
            for name, (package, run) in engines.items():
                left, right = largest(model, run)
                failed |= not max(left, right) <= BOUND
                form = f"`st-btok export {name.split()[0].lower()}`, texts"
                result = f"{left:.1e} padded left, {right:.1e} padded right"
                add([Row("engines", name, version(package), readout, form, result)])
                print(name, readout, result, flush=True)
    if failed:
        raise SystemExit("an exported graph gives other vectors")


if __name__ == "__main__":
    main()
