"""`convert`: the authors' checkpoints against golden values of their own code, and everything that is refused.

Independent truths: vectors, token ids and losses computed by the authors' release (`tests/golden`).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch.nn import functional as F

from st_btok import btok_ids, condensation_attention
from st_btok.tools import convert as convert_module
from st_btok.tools.command import main
from st_btok.tools.convert import convert
from st_btok.training.targets import join_targets

GOLDEN = Path(__file__).parents[2] / "golden"
VALUES = json.loads((GOLDEN / "golden.json").read_text())
INPUTS = {entry["id"]: entry for entry in VALUES["inputs"]}
PREFIX = "_modules_dict.backbone.model."


@pytest.fixture
def authors(tmp_path) -> Path:
    """The directories as the authors' code writes them."""
    root = tmp_path / "authors"
    for name in ("btoks_full", "btoks_reference", "btoks_peft_adapter", "tiny_qwen2vl"):
        shutil.copytree(GOLDEN / name, root / name)
        shutil.copytree(GOLDEN / "processor", root / name, dirs_exist_ok=True)
    tensors = {old_name(key): value for key, value in load_file(GOLDEN / "btoks_full" / "model.safetensors").items()}
    tensors["model.embed_tokens.weight"][VALUES["meta"]["btok_token_ids"]] = 0  # what the adapter replaces
    save_file(tensors, root / "tiny_qwen2vl" / "model.safetensors", metadata={"format": "pt"})
    return root


def old_name(key: str) -> str:
    """The name of a tensor in a checkpoint that transformers 4 saved."""
    return key.removeprefix(PREFIX + "model.").replace("language_model.", "model.", 1)


def sample(entry: dict) -> object:
    """The input as a user gives it: media beside the text that follows their line."""
    pictures = [Image.open(GOLDEN / "images" / name).convert("RGB") for name in entry["files"]]
    if not pictures:
        return entry["text"]
    text = entry["text"].split("\n", 1)[1]
    if entry["kind"] == "video" or len(pictures) > 1:
        return {"video": np.stack([np.asarray(picture) for picture in pictures]), "text": text}
    return {"image": pictures[0], "text": text}


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rewrite(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("name", ["btoks_full", "btoks_peft_adapter"])
def test_embeddings_are_the_authors(authors, tmp_path, name):
    """Text, image and text, video and text: equal token ids, vectors within 1e-5, one by one and in a batch."""
    values = VALUES["full"]["embeddings"] if name == "btoks_full" else VALUES["peft"]["embeddings_merged"]
    path = convert(authors / name, tmp_path / "dst")
    shutil.rmtree(authors)  # the result needs nothing of the source
    model = SentenceTransformer(str(path), device="cpu")
    assert [type(module).__module__.split(".")[0] for module in model] == ["sentence_transformers"] * 4
    assert model[0].tokenizer.padding_side == "left"
    for key, entry in INPUTS.items():
        row = model.preprocess([sample(entry)])["input_ids"][0].tolist()
        assert row == entry["input_ids_with_btok"]
        np.testing.assert_allclose(model.encode([sample(entry)])[0], values["single"][key], atol=1e-5)
    for batch in values["batched"].values():
        together = model.encode([sample(INPUTS[key]) for key in batch["order"]], batch_size=8)
        np.testing.assert_allclose(together, batch["embeddings"], atol=1e-5)
    single = np.array(list(values["single"].values()))
    distances = np.linalg.norm(single[:, None] - single[None], axis=-1) + np.eye(len(single))
    assert distances.min() > 1e-2, "the inputs must differ for this to mean anything"


def test_the_golden_adapter_changes_every_vector():
    before, after = VALUES["full"]["embeddings"]["single"], VALUES["peft"]["embeddings_merged"]["single"]
    assert min(np.abs(np.array(before[key]) - after[key]).max() for key in before) > 1e-2


def authors_losses(model: SentenceTransformer, losses: dict, gap: bool) -> list[torch.Tensor]:
    """NLL of each supervised token of each pair under our mask, on the authors' rows: BToks, their prefix, the target.

    With `gap` positions are the authors'; without, they continue behind the last BTok.
    """
    backbone = model[0].model
    head = backbone.get_input_embeddings().weight
    result = []
    for number, (source_key, target_key) in enumerate(losses["pairs_self_opposite"]):
        source, target = INPUTS[source_key], INPUTS[target_key]
        kept = torch.tensor(losses["opposite_attention_mask"][number]).bool()
        own = torch.tensor(source["input_ids_with_btok"])
        other = torch.tensor(losses["opposite_input_ids"][number])[kept]
        labels = torch.tensor(losses["labels"][number])[kept]
        before = torch.tensor(source["position_ids_3xL"])
        behind = torch.tensor(losses["continuation_position_ids_3xBxL"])[:, number, kept]
        if not gap:
            behind = behind - (behind[0, 0] - before.max() - 1)
        ids = torch.cat([own, other])[None]
        segments = torch.zeros_like(ids)
        segments[0, len(own) - 4 :] = 1
        segments[0, len(own) :] = 2
        images = [
            Image.open(GOLDEN / "images" / name).convert("RGB")
            for entry in (source, target)
            for name in entry["files"]
        ]
        features = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "position_ids": torch.cat([before, behind], 1)[:, None],
            "mm_token_type_ids": (ids == backbone.config.image_token_id).long(),
            **model[0].processor.image_processor(images=images, return_tensors="pt"),
        }
        with torch.no_grad(), condensation_attention(backbone, segments):
            states = backbone(**features).last_hidden_state[0, len(own) :]
        supervised = (labels != -100).nonzero().flatten()
        logits = F.linear(states[supervised - 1], head).float()
        result.append(F.cross_entropy(logits, labels[supervised], reduction="none").detach())
    return result


@pytest.mark.parametrize("name", ["btoks_full", "btoks_peft_adapter"])
def test_generative_loss_is_the_authors_where_positions_are(authors, tmp_path, name):
    losses = VALUES["full"]["losses"] if name == "btoks_full" else VALUES["peft"]["losses_merged"]
    model = SentenceTransformer(str(convert(authors / name, tmp_path / "dst")), device="cpu")
    nlls = authors_losses(model, losses, gap=True)
    assert torch.cat(nlls).mean().item() == pytest.approx(losses["compressed"]["ntp_loss"], abs=1e-5)
    assert nlls[1].mean().item() == pytest.approx(losses["compressed_subset_index1"]["ntp_loss"], abs=1e-5)
    assert abs(losses["full"]["ntp_loss"] - losses["compressed"]["ntp_loss"]) > 0.1, "what the mask is worth"


def test_what_differs_by_design_from_the_generative_loss(authors, tmp_path):
    """The numbers of the docstring: no gap behind images, and no prefix before the target."""
    losses = VALUES["full"]["losses"]
    model = SentenceTransformer(str(convert(authors / "btoks_full", tmp_path / "dst")), device="cpu")
    starts = losses["start_positions"]
    natural = [int(np.max(INPUTS[key]["position_ids_3xL"])) + 1 for key, _ in losses["pairs_self_opposite"]]
    assert [start - own for start, own in zip(starts, natural, strict=True)] == [6, 4, 0]
    gap, continued = (authors_losses(model, losses, gap=gap) for gap in (True, False))
    assert torch.equal(gap[2], continued[2]), "behind a text both definitions are one"
    means = [nll.mean().item() for nll in continued]
    assert means == pytest.approx([6.12991, 6.10063, 6.08054], abs=1e-4)
    assert torch.cat(continued).mean().item() == pytest.approx(6.10530, abs=1e-4)
    assert without_prefix(model) == pytest.approx([6.25930, 6.53239], abs=1e-4)


def without_prefix(model: SentenceTransformer) -> list[float]:
    """Our own definition on the first two pairs: the target directly behind the last BTok, closed by end of turn."""
    transformer, ids = model[0], btok_ids(model.tokenizer)
    means = []
    for source, target in (("i0", "t1"), ("i1", "t2")):
        features = transformer.preprocess([sample(INPUTS[source])])
        wanted = torch.tensor([*INPUTS[target]["input_ids_without_btok"], 400])
        batch = join_targets(features, [wanted], ids)
        with torch.no_grad(), condensation_attention(transformer.model, batch.segments):
            states = transformer(dict(batch.features))["token_embeddings"]
        rows, positions = batch.predictors.T
        head = transformer.model.get_input_embeddings().weight
        means.append(F.cross_entropy(F.linear(states[rows, positions], head), batch.labels).item())
    return means


def test_prompts_and_bare_inputs_follow_the_authors_layout(authors, tmp_path):
    """Their texts for MMEB-V2: queries and media end in one newline, bare text candidates in none."""
    model = SentenceTransformer(str(convert(authors / "btoks_full", tmp_path / "dst")), device="cpu")

    def rendered(value, prompt=None):
        row = model.preprocess([value], prompt=prompt)["input_ids"][0].tolist()
        assert row[-4:] == VALUES["meta"]["btok_token_ids"]
        return model.tokenizer.decode(row[:-4])

    image = sample(INPUTS["i2"])["image"]
    shown = "<|vision_start|>" + "<|image_pad|>" * 8 + "<|vision_end|>\n"
    assert rendered("the fox") == "the fox"
    assert rendered("the fox\n") == "the fox\n"
    assert rendered("the fox", "Find the given query: ") == "Find the given query: the fox\n"
    assert rendered({"image": image, "text": "Represent the given image."}) == shown + "Represent the given image.\n"
    assert rendered(image) == shown
    assert rendered("") == " "


def attention_pooling(states: np.ndarray, weights: dict) -> np.ndarray:
    """The learned pooling of the v2 preset, in numpy, from the description of their `modules/pooling.py`."""
    w = {key: value.numpy().astype(np.float64) for key, value in weights.items()}
    scores = (states @ w["attention.weight"][0] + w["attention.bias"]) / np.sqrt(states.shape[1])
    share = np.exp(scores) / np.exp(scores).sum()
    summary = share @ states
    hidden = w["mlp.0.weight"] @ summary + w["mlp.0.bias"]
    erf = torch.erf(torch.tensor(hidden) / np.sqrt(2)).numpy()
    value = summary + w["mlp.3.weight"] @ (0.5 * hidden * (1 + erf)) + w["mlp.3.bias"]
    value = (value - value.mean()) / np.sqrt(value.var() + 1e-5) * w["layer_norm.weight"] + w["layer_norm.bias"]
    return value / np.linalg.norm(value)


def pooling_weights(seed: int, width: int = 64, ratio: int = 4) -> dict[str, torch.Tensor]:
    shapes = {
        "attention.weight": (1, width),
        "attention.bias": (1,),
        "mlp.0.weight": (ratio * width, width),
        "mlp.0.bias": (ratio * width,),
        "mlp.3.weight": (width, ratio * width),
        "mlp.3.bias": (width,),
        "layer_norm.weight": (width,),
        "layer_norm.bias": (width,),
    }
    generator = torch.Generator().manual_seed(seed)
    return {key: 0.3 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}


V2 = {"type": "BToksAttentionPooling", "hidden_dim": 64, "mlp_ratio": 4.0, "dropout": 0.1, "attention_scale": True}


@pytest.mark.parametrize("name", ["btoks_full", "btoks_peft_adapter"])
def test_the_learned_pooling_of_the_v2_preset(authors, tmp_path, name):
    """No golden checkpoint has it, so the truth is its formula on the states of the checkpoint without it."""
    plain = SentenceTransformer(str(convert(authors / name, tmp_path / "plain")), device="cpu")
    weights = pooling_weights(0)
    base = authors / ("btoks_full" if name == "btoks_full" else "btoks_reference")
    edit(base / "config.json", lambda config: config["modules"].update(pooling=V2))
    named = {f"_modules_dict.pooling.{key}": value for key, value in weights.items()}
    rewrite(base / "model.safetensors", lambda tensors: tensors.update(named))
    if name == "btoks_peft_adapter":  # the adapter's trained copies replace those of its base
        weights = pooling_weights(1)
        saved = [f"_modules_dict.pooling.{part}" for part in ("attention", "mlp", "layer_norm")]
        edit(authors / name / "adapter_config.json", lambda config: config.update(modules_to_save=saved))
        named = {f"base_model.model._modules_dict.pooling.{key}": value for key, value in weights.items()}
        rewrite(authors / name / "adapter_model.safetensors", lambda tensors: tensors.update(named))
    path = convert(authors / name, tmp_path / "dst")
    model = SentenceTransformer(str(path), device="cpu", trust_remote_code=True)
    for text in ("the quick brown fox", "A red square"):
        states = plain[0](plain.preprocess([text]))["token_embeddings"][0, -4:].detach().double().numpy()
        np.testing.assert_allclose(model.encode([text])[0], attention_pooling(states, weights), atol=1e-5)


def test_sharded_numbered_and_resized_checkpoints(authors, tmp_path):
    """Shards with an index, legacy module lists, and a stored vocabulary size that is stale."""
    expected = SentenceTransformer(str(convert(authors / "btoks_full", tmp_path / "a")), device="cpu").encode(["fox"])
    folder = authors / "btoks_full"
    tensors = {key.replace("_modules_dict.backbone", "_modules_list.1"): value for key, value in load(folder).items()}
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[:20], "model-2.safetensors": names[20:]}
    for file, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, folder / file)
    weight_map = {key: file for file, keys in parts.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    def legacy(config):
        config["modules"] = [config["modules"][name] for name in config.pop("_module_order")]
        config["modules"][1]["backbone_config"]["text_config"]["vocab_size"] = 414

    edit(folder / "config.json", legacy)
    model = SentenceTransformer(str(convert(folder, tmp_path / "b")), device="cpu")
    np.testing.assert_allclose(model.encode(["fox"]), expected, atol=1e-7)


def load(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_half_precision_stays_half_precision(authors, tmp_path):
    rewrite(authors / "btoks_full" / "model.safetensors", lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    saved = load(convert(authors / "btoks_full", tmp_path / "dst"))
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}


@pytest.mark.parametrize("given", ["base model", "backbone"])
def test_moved_parts_are_named_by_base(authors, tmp_path, given):
    expected = VALUES["peft"]["embeddings_merged"]["single"]["t2"]
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    if given == "base model":
        shutil.move(authors / "btoks_reference", moved / "one")
        shutil.move(authors / "tiny_qwen2vl", moved / "tiny_qwen2vl")
        base = moved / "one"
        message = "base model 'btoks_reference' must be a directory"
    else:
        base = moved / "two"
        shutil.move(authors / "tiny_qwen2vl", base)
        message = "the backbone 'tiny_qwen2vl'.*can't be loaded"
    with pytest.raises(FileNotFoundError, match=message):
        convert(authors / "btoks_peft_adapter", tmp_path / "dst")
    model = SentenceTransformer(str(convert(authors / "btoks_peft_adapter", tmp_path / "dst", base)), device="cpu")
    np.testing.assert_allclose(model.encode([INPUTS["t2"]["text"]])[0], expected, atol=1e-5)


BROKEN = {
    "no config": (lambda r: (r / "btoks_full/config.json").unlink(), "must hold config.json"),
    "no weights": (lambda r: (r / "btoks_full/model.safetensors").unlink(), "must hold model.safetensors"),
    "no tokenizer": (lambda r: (r / "btoks_full/tokenizer_config.json").unlink(), "processor files"),
    "a plain backbone": (lambda r: shutil.copy(r / "tiny_qwen2vl/config.json", r / "btoks_full"), "use build_model"),
    "unknown pooling": (
        lambda r: edit(r / "btoks_full/config.json", lambda c: c["modules"].update(pooling={"type": "MaxPooling"})),
        "it is BToksTokenInjector -> Qwen2VLBackbone -> MaxPooling -> Normalize",
    ),
    "unknown order": (
        lambda r: edit(r / "btoks_full/config.json", lambda c: c["_module_order"].reverse()),
        "must be BToksTokenInjector -> Qwen2VLBackbone or",
    ),
    "no BToks": (
        lambda r: edit(r / "btoks_full/config.json", lambda c: c["modules"]["injector"].update(num_tokens=0)),
        "a model without BToks",
    ),
    "another K": (
        lambda r: edit(r / "btoks_full/config.json", lambda c: c["modules"]["injector"].update(num_tokens=8)),
        "must hold 8 BToks .*it has 4",
    ),
    "a tensor too few": (
        lambda r: rewrite(
            r / "btoks_full/model.safetensors", lambda t: t.pop(PREFIX + "model.visual.merger.ln_q.bias")
        ),
        "missing: model.visual.merger.ln_q.bias",
    ),
    "a tensor too many": (
        lambda r: rewrite(r / "btoks_full/model.safetensors", lambda t: t.update(extra=torch.ones(1))),
        "tensors of unknown modules: extra",
    ),
    "a tensor of another shape": (
        lambda r: rewrite(
            r / "btoks_full/model.safetensors",
            lambda t: t.update({PREFIX + "model.language_model.norm.weight": torch.ones(7)}),
        ),
        "of another shape: model.language_model.norm.weight",
    ),
    "a damaged config": (lambda r: (r / "btoks_full/config.json").write_text("{"), "config.json is damaged, it is no"),
    "a list as config": (
        lambda r: (r / "btoks_full/config.json").write_text("[]"),
        "config.json must hold a JSON obj",
    ),
    "damaged weights": (
        lambda r: (r / "btoks_full/model.safetensors").write_bytes(b"x" * 99),
        "btoks_full/model.safetensors is damaged",
    ),
    "shards elsewhere": (
        lambda r: (r / "btoks_full/model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret"}}'),
        "index.json must give each tensor the name of a file beside it",
    ),
    "a finished model": (
        lambda r: (r / "btoks_full/modules.json").write_text("[]"),
        "load it with SentenceTransformer",
    ),
    "names of older transformers": (
        lambda r: rewrite(
            r / "btoks_full/model.safetensors",
            lambda t: [t.update({PREFIX + old_name(key): t.pop(key)}) for key in list(t)],
        ),
        "transformers before 4.52",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_are_refused_and_nothing_is_written(authors, tmp_path, case):
    damage, message = BROKEN[case]
    damage(authors)
    target = tmp_path / "out" / "dst"
    target.parent.mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        convert(authors / "btoks_full", target)
    assert list(target.parent.iterdir()) == []


BROKEN_ADAPTERS = {
    "not LoRA": (lambda c: c.update(peft_type="LOHA"), "peft_type 'LOHA'"),
    "fewer targets": (lambda c: c.update(target_modules=["q_proj"]), "does not fit its base model: .*down_proj"),
    "no DoRA": (lambda c: c.update(use_dora=False), "does not fit its base model: .*lora_magnitude_vector"),
}


@pytest.mark.parametrize("case", BROKEN_ADAPTERS)
def test_adapters_that_do_not_fit_are_refused(authors, tmp_path, case):
    change, message = BROKEN_ADAPTERS[case]
    edit(authors / "btoks_peft_adapter" / "adapter_config.json", change)
    with pytest.raises(ValueError, match=message):
        convert(authors / "btoks_peft_adapter", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


CODE = """
from pathlib import Path
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin
(Path(__file__).parent / "ran").touch()
class Config(PreTrainedConfig):
    model_type = "mystery"
class Model(PreTrainedModel):
    config_class = Config
class Processor(ProcessorMixin):
    pass
"""


@pytest.mark.parametrize("place", ["the base's model", "the weights' model", "the processor"])
def test_code_in_a_checkpoint_never_runs_and_is_never_offered(authors, tmp_path, monkeypatch, place):
    """transformers would ask on a terminal whether to run it; here it is refused, or the stock class is taken."""
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    for name in ("btoks_full", "tiny_qwen2vl", "btoks_peft_adapter"):
        (authors / name / "code.py").write_text(CODE)
    custom = {"AutoConfig": "code.Config", "AutoModelForImageTextToText": "code.Model"}
    source = authors / "btoks_full"
    if place == "the base's model":
        source = authors / "btoks_peft_adapter"
        edit(authors / "tiny_qwen2vl/config.json", lambda c: c.update(model_type="mystery", auto_map=custom))
    elif place == "the weights' model":
        change = {"model_type": "mystery", "auto_map": custom}
        edit(source / "config.json", lambda c: c["modules"]["backbone"]["backbone_config"].update(change))
    else:
        for name in ("processor_config.json", "tokenizer_config.json"):
            if (source / name).exists():
                own = {"AutoProcessor": "code.Processor", "AutoTokenizer": ["code.Processor", None]}
                edit(source / name, lambda c, own=own: c.update(auto_map=own))
    try:
        convert(source, tmp_path / "dst")
    except (ValueError, OSError) as error:
        assert "mystery" in str(error) or "execute" in str(error)
        assert place != "the processor" and not (tmp_path / "dst").exists()
    else:
        assert place == "the processor", "the class that transformers knows is there"
    assert not list(tmp_path.rglob("ran"))


def test_a_reference_directory_alone_has_nothing_to_convert(authors, tmp_path):
    with pytest.raises(ValueError, match="reference-mode directory.*Convert the adapter"):
        convert(authors / "btoks_reference", tmp_path / "dst")


def test_a_failed_write_leaves_nothing_behind(authors, tmp_path, monkeypatch):
    def fail(self, path, *args, **kwargs):
        Path(path).mkdir()
        (Path(path) / "half.safetensors").write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(convert_module.SentenceTransformer, "save_pretrained", fail)
    target = tmp_path / "out" / "dst"
    with pytest.raises(OSError, match="disk full"):
        convert(authors / "btoks_full", target)
    assert list(target.parent.iterdir()) == []


def test_a_filled_target_is_not_touched(authors, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty directory"):
        convert(authors / "btoks_full", tmp_path)
    with pytest.raises(FileNotFoundError, match="SRC must be a directory"):
        convert(tmp_path / "nowhere", tmp_path / "dst")


def test_command_line(authors, tmp_path):
    empty = tmp_path / "dst"
    empty.mkdir()
    command = ["convert", str(authors / "btoks_peft_adapter"), str(empty), "--base", str(authors / "btoks_reference")]
    assert main(command) == 0
    assert (empty / "modules.json").exists() and oct(empty.stat().st_mode)[-3:] != "700"
