"""CLIP as sentence-transformers loads it: it refuses a picture with a text, and runs on every suite all the same."""

from __future__ import annotations

import mteb
import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from evaluation import wrap
from evaluation.embedding.fingerprint import fingerprint
from evaluation.mini import mini_benchmark
from evaluation.sum_of_parts import joined
from tests.tiny_tokenizer import tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny CLIP of the real class, in the layout of the hub's."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("clip")
    words = tokenizer()
    words.model_max_length = 32  # as 77 stands in the hub's files
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(words), "max_position_embeddings": 32, "eos_token_id": words.eos_token_id}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(place)
    pictures = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    CLIPProcessor(image_processor=pictures, tokenizer=words).save_pretrained(place)
    return place


@pytest.fixture
def clip(folder):
    return SentenceTransformer(str(folder), device="cpu")


def noise(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 30, 3), np.uint8))


def unit(vector):
    return vector / np.linalg.norm(vector, axis=-1, keepdims=True)


def test_parts_are_the_models_own_and_are_added(clip):
    with pytest.raises(ValueError, match="image"):
        clip.encode([{"image": noise(0), "text": "a cat"}])
    text, first, second = unit(clip.encode("a cat")), unit(clip.encode(noise(0))), unit(clip.encode(noise(1)))
    model = joined(clip)
    assert np.allclose(model.encode("a cat"), text, atol=1e-6)
    assert np.allclose(model.encode({"image": noise(0)}), first, atol=1e-6)
    both = model.encode([{"image": noise(0), "text": "a cat"}, "a cat", {"video": [noise(0), noise(1)]}])
    assert np.allclose(both, [unit(first + text), text, unit(first + second)], atol=1e-5)
    assert joined(model) is model and joined(clip).get_embedding_dimension() == 12


def test_prompts_truncation_and_identity_are_the_models_own(clip, folder):
    clip.prompts = {"query": "a photo of "}
    clip.truncate_dim = 4
    model = joined(clip)
    assert np.allclose(unit(model.encode_query(["a cat"])), unit(clip.encode(["a photo of a cat"])), atol=1e-5)
    again = joined(SentenceTransformer(str(folder), device="cpu", prompts={"query": "a photo of "}, truncate_dim=4))
    assert fingerprint(model) == fingerprint(again)
    again.prompts = {}
    assert fingerprint(model) != fingerprint(again)


def test_clip_runs_on_every_shape_of_the_mini_benchmark_wrapped_or_not(clip):
    groups = ["I-VG", "V-QA", "VisDoc"]
    found = []
    for model in (wrap(clip, "test/clip"), clip):
        options = {"cache": None, "co2_tracker": False, "show_progress_bar": False}
        results = mteb.evaluate(model, mini_benchmark("validation", groups=groups), **options).task_results
        found.append([result.get_score() for result in results])
    assert len(found[0]) == 3 and found[0] == found[1]


def test_clip_runs_on_mtebs_own_picture_tasks(clip):
    tasks = [task for task in mteb.mocks.ALL_MOCK_TASK_TEST_GRID if {"image", "text"} == set(task.metadata.modalities)]
    chosen = {task.metadata.type: task for task in tasks}
    for task in chosen.values():
        assert mteb.evaluate(wrap(clip, "test/clip"), task, cache=None, co2_tracker=False).task_results
    assert len(chosen) >= 3
