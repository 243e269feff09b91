"""`from st_btok import X`: names come when they are asked for, and the three lists of `__init__` say the same."""

from __future__ import annotations

import ast
import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import st_btok

SOURCE = Path(st_btok.__file__).read_text()


def imported_for_type_checkers() -> dict[str, str]:
    block = next(node for node in ast.parse(SOURCE).body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    return {alias.name: node.module for node in block.body for alias in node.names}


def test_type_checkers_and_users_get_the_same_names():
    assert imported_for_type_checkers() == st_btok._PLACES, "add a new name to both, and to __all__"
    assert set(st_btok.__all__) == {"__version__", *st_btok._PLACES}
    assert set(st_btok.__all__) <= set(dir(st_btok))


@pytest.mark.parametrize("name", [name for name in st_btok.__all__ if name != "__version__"])
def test_each_name_is_the_object_of_its_module(name):
    module = importlib.import_module(st_btok._PLACES[name])
    assert getattr(st_btok, name) is getattr(module, name)
    assert pickle.loads(pickle.dumps(getattr(st_btok, name))) is getattr(module, name)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'st_btok' has no attribute 'BTokLos'"):
        _ = st_btok.BTokLos
    with pytest.raises(ImportError, match="cannot import name 'BTokLos'"):
        exec("from st_btok import BTokLos")
    assert not hasattr(st_btok, "__wrapped__"), "what inspect and doctest ask every module"


def test_importing_the_package_is_light_and_a_star_brings_everything():
    code = "import st_btok, sys; print('torch' in sys.modules); from st_btok import *; print(BTokLoss.__name__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "BTokLoss"]
