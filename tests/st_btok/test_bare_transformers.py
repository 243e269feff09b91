"""A saved BTok model outside of sentence-transformers: bare transformers, and what serving engines need.

The lines of `BARE` are the README's. They run in a process that can import neither `st_btok` nor
`sentence_transformers`; the truth they are compared with is `SentenceTransformer.encode`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from st_btok import btok_ids, build_model
from tests.backbones import build, picture

BARE = """
import torch
from transformers import AutoModel, AutoProcessor

model, processor = AutoModel.from_pretrained(path), AutoProcessor.from_pretrained(path)
inputs = processor.apply_chat_template(
    conversations, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
)
with torch.no_grad():
    states = model(**inputs).last_hidden_state
btoks = torch.tensor([processor.tokenizer.convert_tokens_to_ids(f"<|btok_{k}|>") for k in range(4)])
pooled = states[torch.isin(inputs["input_ids"], btoks)].view(len(states), 4, -1).mean(1)
embeddings = torch.nn.functional.normalize(pooled, dim=-1)
"""
LAST = """
import torch
from transformers import AutoModel, AutoProcessor

model, processor = AutoModel.from_pretrained(path), AutoProcessor.from_pretrained(path)
processor.tokenizer.padding_side = "left"
inputs = processor.apply_chat_template(
    conversations, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
)
with torch.no_grad():
    embeddings = torch.nn.functional.normalize(model(**inputs).last_hidden_state[:, -1], dim=-1)
"""
ALONE = """
import sys, json
sys.modules["st_btok"] = sys.modules["sentence_transformers"] = None  # makes every import of them fail
path = sys.argv[1]
parts = json.loads(sys.argv[2])
conversations = [[{"role": "user", "content": content}] for content in parts]
"""


def run_alone(lines: str, path, parts: list) -> np.ndarray:
    code = f"{textwrap.dedent(ALONE)}{lines}\nprint('EMBEDDINGS', json.dumps(embeddings.tolist()))"
    command = [sys.executable, "-c", code, str(path), json.dumps(parts)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=path)
    assert run.returncode == 0, run.stderr
    line = next(line for line in run.stdout.splitlines() if line.startswith("EMBEDDINGS"))
    return np.array(json.loads(line.split(" ", 1)[1]))


@pytest.mark.parametrize("readout", ["mean", "last"])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_bare_transformers_gives_the_same_vectors(name, readout, tmp_path):
    """Text, image, image and text: alone and in one batch, with a pixel limit that the pictures exceed."""
    backbone, processor = build(name)
    limits = {"max_pixels": 28 * 28 * 6}
    model = build_model(backbone, readout=readout, processor=processor, device="cpu", **limits)
    model.save_pretrained(str(tmp_path))
    picture(280, 280, 1).save(tmp_path / "a.png")
    picture(84, 168, 2).save(tmp_path / "b.png")
    a, b = str(tmp_path / "a.png"), str(tmp_path / "b.png")
    samples = ["hello", {"image": a}, {"image": b, "text": "what colour?"}, {"image": [a, b], "text": "both"}]
    parts = [
        [{"type": "text", "text": "hello"}],
        [{"type": "image", "path": a}],
        [{"type": "image", "path": b}, {"type": "text", "text": "what colour?"}],
        [{"type": "image", "path": a}, {"type": "image", "path": b}, {"type": "text", "text": "both"}],
    ]
    expected = model.encode(samples)
    found = run_alone(BARE if readout == "mean" else LAST, tmp_path, parts)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(expected[1:] - expected[:-1]).max(1).min() > 1e-2, "the inputs must differ"


def test_a_text_backbone_in_bare_transformers(tmp_path):
    backbone, tokenizer = build("llama")
    model = build_model(backbone, processor=tokenizer, device="cpu")
    model.save_pretrained(str(tmp_path))
    lines = BARE.replace("AutoProcessor", "AutoTokenizer").replace("processor.tokenizer.", "processor.")
    lines = lines.replace('processor_kwargs={"padding": True}', "padding=True")
    found = run_alone(lines, tmp_path, ["hello", "a longer text"])
    np.testing.assert_allclose(found, model.encode(["hello", "a longer text"]), atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2_vl", "llama"])
def test_readout_last_is_last_token_pooling_and_nothing_else(name, tmp_path):
    """What an engine reads: three module entries, `lasttoken`, and ids from rendering and tokenizing a text."""
    backbone, processor = build(name)
    model = build_model(backbone, readout="last", processor=processor, device="cpu", prompts={"query": "Find: "})
    model.save_pretrained(str(tmp_path))
    modules = json.loads((tmp_path / "modules.json").read_text())
    assert [module["type"].rsplit(".", 1)[-1] for module in modules] == ["Transformer", "Pooling", "Normalize"]
    pooling = json.loads((tmp_path / modules[1]["path"] / "config.json").read_text())
    assert pooling["pooling_mode"] == "lasttoken"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    turns = [{"role": "system", "content": "Find: "}, {"role": "user", "content": "hello"}]
    ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"]
    assert ids[-4:] == btok_ids(tokenizer)
    with torch.no_grad():
        states = AutoModel.from_pretrained(tmp_path)(input_ids=torch.tensor([ids])).last_hidden_state
    vector = torch.nn.functional.normalize(states[0, -1], dim=-1).numpy()
    np.testing.assert_allclose(vector, model.encode_query(["hello"])[0], atol=1e-6)
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_allclose(loaded.encode_query(["hello"])[0], vector, atol=1e-6)
    mean = build_model(*build(name)[:1], processor=processor, device="cpu", prompts={"query": "Find: "})
    assert np.abs(mean.encode_query(["hello"])[0] - vector).max() > 1e-3, "the readouts must differ"


def test_pixel_limits_in_the_tokenizer_do_not_override_ours():
    """`AutoProcessor.from_pretrained(..., max_pixels=...)` writes them there, and they would win over every `size`."""
    backbone, processor = build("qwen2_vl")
    processor.tokenizer.init_kwargs["max_pixels"] = 28 * 28 * 16
    model = build_model(backbone, processor=processor, max_pixels=28 * 28 * 4, device="cpu")
    grid = model.preprocess([picture(280, 280)])["image_grid_thw"]
    assert int(grid.prod()) * 14 * 14 <= 28 * 28 * 4


def test_weights_that_would_be_random_are_refused(tmp_path):
    """transformers 5.23: names of the newer class layout load into the full class, but not into `AutoModel`."""
    backbone, processor = build("qwen2_vl")
    backbone.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    weights = {key: value.clone() for key, value in backbone.state_dict().items() if key != "lm_head.weight"}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="31 are missing .*would be random.*visual"):
        build_model(tmp_path, device="cpu")
    loaded = type(backbone).from_pretrained(tmp_path)
    copied = type(backbone)(loaded.config)
    copied.load_state_dict(loaded.state_dict())
    expected = build_model(backbone, processor=processor, device="cpu").encode([picture()])
    np.testing.assert_array_equal(build_model(copied, processor=processor, device="cpu").encode([picture()]), expected)
