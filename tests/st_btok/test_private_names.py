"""Private names of other packages: they stand in one file, and each is told about in a sentence when it goes."""

from __future__ import annotations

import ast
import copy
import re
from pathlib import Path

import peft
import sentence_transformers
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from sentence_transformers.base.modules.transformer import Transformer
from torch import nn

import st_btok
from st_btok.adapters import btok_lora_config
from st_btok.model_parts import (
    CHECKPOINTING,
    attention_of,
    attention_set,
    bare_module,
    graph_is_kept,
    remember_commit,
    remembered_commit,
    unwrap,
)
from tests.backbones import build

ROOT = Path(st_btok.__file__).parent
PRIVATE = re.compile(r"_[a-z]\w*")
# Own attributes of our own classes, read from outside them.
OWN_OBJECTS = {"self", "cls"}


def private_names(path: Path) -> list[str]:
    """Attributes of other objects, by a dot or by `getattr`, and imports, that look private and are not the file's."""
    tree = ast.parse(path.read_text())
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_own(node)}
    found = [
        (node.lineno, node.attr) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and not is_own(node)
    ]
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") in ("getattr", "hasattr", "setattr"):
            found += [(call.lineno, str(part.value)) for part in call.args[1:2] if isinstance(part, ast.Constant)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("st_btok"):
            found += [(node.lineno, name) for part in node.names for name in (part.name, *node.module.split("."))]
    return [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for line, name in found
        if PRIVATE.fullmatch(name) and name not in own
    ]


def is_own(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in OWN_OBJECTS


def test_they_stand_in_one_file():
    found = [name for path in ROOT.rglob("*.py") if path.name != "model_parts.py" for name in private_names(path)]
    assert not found, "private names of other packages belong into model_parts.py, with a test in this file"


def test_transformers():
    model, _ = build("llama")
    version = f"transformers {transformers.__version__}"
    assert hasattr(model, "_supports_sdpa"), f"{version}: every backbone now counts as one with SDPA attention"
    assert attention_of(model.config) in ("sdpa", "eager"), f"{version}: a config names its attention elsewhere now"
    with attention_set("eager", model.config):
        assert model.config._attn_implementation == "eager", f"{version}: the condensation mask is never switched on"
    assert attention_of(model.config) == "sdpa"
    model.gradient_checkpointing_enable()
    assert any(CHECKPOINTING in vars(module) for module in model.modules()), (
        f"{version}: under gradient checkpointing the condensation mask is off when layers are computed again"
    )
    remember_commit(model.config, "a" * 40)
    assert hasattr(model.config, "name_or_path") and remembered_commit(copy.deepcopy(model.config)) == "a" * 40
    assert "_commit_hash" not in model.config.to_dict(), f"{version}: a commit is saved with a model of one's own"
    assert model._hf_peft_config_loaded is False, f"{version}: a merged model still saves as an adapter"
    assert isinstance(model.all_tied_weights_keys, dict), f"{version}: parts of a checkpoint can't be loaded alone"
    assert hasattr(model, "_initialize_missing_keys"), f"{version}: parts of a checkpoint can't be loaded alone"
    assert hasattr(type(model), "_keys_to_ignore_on_load_unexpected"), (
        f"{version}: reading a part of a checkpoint now warns of every other key"
    )


def test_torch():
    compiled = torch.compile(nn.Linear(1, 1))
    assert hasattr(compiled, "_orig_mod"), f"torch {torch.__version__}: the model inside a compiled one isn't found"
    assert unwrap.__doc__
    kept, parameter = [], torch.ones(1, requires_grad=True)
    value = parameter * 2
    value.register_hook(lambda grad: kept.append(graph_is_kept()))
    value.backward(retain_graph=True)
    value.backward()
    assert kept == [True, False], f"torch {torch.__version__}: a backward pass does not say if its graph is kept"


def test_peft(qwen):
    version = f"peft {peft.__version__}"
    qwen.add_adapter(btok_lora_config(qwen, r=2))
    backbone = qwen[0].model
    embeddings = backbone.get_input_embeddings()
    assert isinstance(embeddings, AuxiliaryTrainingWrapper), f"{version}: the trained rows are wrapped otherwise"
    assert type(bare_module(embeddings)) is nn.Embedding, f"{version}: the base matrix under trained rows isn't found"
    layers = [module for module in backbone.modules() if isinstance(module, BaseTunerLayer) and hasattr(module, "r")]
    assert layers and type(bare_module(layers[0])) is nn.Linear, f"{version}: an adapted layer's own isn't found"


def test_sentence_transformers():
    version = f"sentence-transformers {sentence_transformers.__version__}"
    for name in ("preprocess", "processing_kwargs", "modality_config", "input_formatter"):
        assert name in Path(sentence_transformers.base.modules.transformer.__file__).read_text(), (
            f"{version}: Transformer has no {name} any more"
        )
    assert hasattr(Transformer, "_restore_chat_template_suffix"), (
        f"{version}: texts that are cut may lose their bottleneck tokens"
    )
