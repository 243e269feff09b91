"""The wheel alone: built from the sources, installed where no checkout is in sight, it builds a model and encodes."""

from __future__ import annotations

import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from st_btok import __version__
from tests.backbones import build
from tests.pages import ROOT

# Run by the clean environment: where the package comes from, what it must not bring, and that it works.
ALONE = """
import importlib.util, sys
import st_btok
from st_btok import build_model
assert st_btok.__file__.startswith(sys.prefix), st_btok.__file__
assert not importlib.util.find_spec("evaluation") and not importlib.util.find_spec("recipes")
for name in st_btok.__all__:
    getattr(st_btok, name)
model = build_model(sys.argv[1], num_btoks=2, device="cpu")
model.save_pretrained("model")
print(model.encode(["a text"]).shape)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path_factory.mktemp("source")  # a copy, because setuptools leaves build/ beside what it builds
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "st_btok", source / "st_btok", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(source / "dist"), str(source)], check=True)
    return next((source / "dist").glob("*.whl"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = [path for path in (ROOT / "st_btok").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert held == {str(path.relative_to(ROOT)) for path in files}
    assert "st_btok/py.typed" in held and "st_btok/training/reference.py" in held


@pytest.mark.slow
def test_the_wheel_works_alone(wheel, tmp_path):
    backbone, processor = build("llama")
    backbone.save_pretrained(tmp_path / "tiny")
    processor.save_pretrained(tmp_path / "tiny")
    venv.create(tmp_path / "env", symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    packages = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    # The dependencies of this environment, but not its editable install: .pth files are not followed twice.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--ignore-installed", str(wheel)], check=True)
    run = {"cwd": tmp_path, "capture_output": True, "text": True}
    alone = subprocess.run([str(python), "-c", ALONE, "tiny"], **run)
    assert alone.returncode == 0, alone.stderr
    assert "(1, " in alone.stdout and (tmp_path / "model" / "modules.json").exists()
    command = subprocess.run([str(python.parent / "st-btok"), "--version"], **run)
    assert command.stdout.strip() == f"st_btok {__version__}"


def test_the_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__ and citation["license"] == "Apache-2.0"
