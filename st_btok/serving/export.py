"""One graph from token ids to embeddings for ONNX Runtime or OpenVINO: `st-btok export onnx MODEL OUT`.

The whole pipeline is exported by `torch.export`: backbone, readout and normalisation, for any number of texts of any
length. The graph turns left padding into right padding first. In a left-padded row the padding has nothing to attend
to, and OpenVINO makes NaN of the whole row from that; behind a causal text nothing looks at it.

Text only: how many image tokens an input has depends on its pixels, so media stay with sentence-transformers or vLLM.
"""

from __future__ import annotations

import json
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from st_btok.model_parts import find_btoks, tokenizer_of

BOUND = 1e-5  # float32, between the exported graph and `encode`
SAMPLES = ["a", "Which of the two towns lies by the sea?", "Ein roter Drachen steht über dem Feld."]
NEEDS = {"onnx": ["onnxscript"], "openvino": ["openvino"]}


class Pipeline(nn.Module):
    """All modules of a model as one, from (B, T) token ids and their mask to (B, D) embeddings."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.parts = nn.ModuleList(list(model))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, D) embeddings of (B, T) token ids, padded on either side."""
        num_tokens = input_ids.shape[1]
        padding = attention_mask.argmax(1, keepdim=True)  # (B, 1): in front of the first token
        order = torch.arange(num_tokens, device=input_ids.device) + padding  # (B, T)
        order = torch.where(order < num_tokens, order, order - num_tokens)  # `%` by a free size has no ONNX form
        features: Any = {"input_ids": input_ids.gather(1, order), "attention_mask": attention_mask.gather(1, order)}
        for part in self.parts:
            features = part(features)
        return features["sentence_embedding"]


def trace(model: SentenceTransformer) -> torch.export.ExportedProgram:
    """The text pipeline as a graph of `input_ids` and `attention_mask`, with free batch size and length.

    A `ValueError` if its embeddings are not those of `encode` within 1e-5.
    """
    transformer, ids = find_btoks(model)
    # One more than the BToks is the shortest input; torch.export would fix a size of 1 for good.
    tokens = torch.export.Dim("tokens", min=len(ids) + 1, max=tokenizer_of(transformer).model_max_length)
    shape = {0: torch.export.Dim("batch", min=1, max=2**16), 1: tokens}
    features = model.preprocess(SAMPLES)
    inputs = (features["input_ids"], features["attention_mask"])
    program = torch.export.export(Pipeline(model).eval(), inputs, dynamic_shapes=(shape, shape))
    fewer = model.preprocess(SAMPLES[1:2])
    found = program.module()(fewer["input_ids"], fewer["attention_mask"]).detach().numpy()
    difference = float(np.abs(found - model.encode(SAMPLES[1:2])).max())
    if not difference <= BOUND:
        raise ValueError(
            f"the exported graph must give the embeddings of sentence-transformers, it is {difference:.1e} off. "
            "The backbone's code may branch on its input, which a graph can't."
        )
    return program


def export(target: Literal["onnx", "openvino"], model: str | Path | SentenceTransformer, out: str | Path) -> Path:
    """Write the graph, and what is needed to make its inputs.

    Beside the graph stand the tokenizer with its chat template, and `export.json` with the template's arguments.

    Args:
        target: `"onnx"` writes `model.onnx`, `"openvino"` writes `model.xml` and `model.bin`, both in float32.
        model: Path or hub name of a BTok model, or the model, which is copied.
        out: Directory; must not exist, or be empty.

    Returns:
        Path of the graph.

    Raises:
        FileExistsError: If `out` exists and is not empty.
        ImportError: If what writes the format is not installed.
        ValueError: If the target is unknown, the model is not a BTok model, or the graph's embeddings are other ones.
    """
    if target not in NEEDS:
        raise ValueError(f"the target must be one of {list(NEEDS)}, got {target!r}.")
    missing = [name for name in NEEDS[target] if find_spec(name) is None]
    if missing:
        raise ImportError(f"export to {target} needs {', '.join(missing)}: pip install {' '.join(missing)}.")
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty directory. Name another one, or remove it.")
    loaded = (
        deepcopy(model) if isinstance(model, SentenceTransformer) else SentenceTransformer(str(model), device="cpu")
    )
    loaded = loaded.to("cpu").float().eval()
    transformer, _ = find_btoks(loaded)
    program = trace(loaded)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer_of(transformer).save_pretrained(str(folder))
    arguments: Any = transformer.processing_kwargs.get("chat_template", {})
    (folder / "export.json").write_text(json.dumps({"chat_template_kwargs": arguments}, indent=1) + "\n")
    if target == "onnx":
        names = {"input_names": ["input_ids", "attention_mask"], "output_names": ["sentence_embedding"]}
        torch.onnx.export(program, dynamo=True, verbose=False, **names).save(folder / "model.onnx")  # type: ignore
        return folder / "model.onnx"
    import openvino

    openvino.save_model(openvino.convert_model(program), folder / "model.xml", compress_to_fp16=False)
    return folder / "model.xml"


def main(target: Literal["onnx", "openvino"], model: str, out: str) -> int:
    """The command `st-btok export`; its arguments are described in `tools/command.py`."""
    print(f"wrote {export(target, model, out)}")
    return 0
