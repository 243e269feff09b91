"""Imports point one way: no cycles, nothing upward, nothing hidden inside a function, no drawer called utils."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Which of our packages each package may import besides itself.
ALLOWED = {"st_btok": set(), "evaluation": set(), "recipes": {"st_btok", "evaluation"}}
# Which rooms of its own package each room may import besides itself; "" is the top. Each room's `__init__` says why.
ROOMS = {
    "st_btok": {
        "": set(),
        "training": {""},
        "inputs": {""},
        "serving": {"", "inputs"},
        "tools": {"", "training", "inputs", "serving"},
    },
    "evaluation": {
        "": {"mmeb_v2", "mini", "embedding", "reporting"},
        "mmeb_v2": {""},
        "mini": {"", "embedding"},
        "embedding": {""},
        "reporting": {"", "mmeb_v2"},  # the names of the 78 data sets, which an average must be complete over
    },
    # What users run stands at the top, each with a room for what it rests on; maintainers' rooms import them. `study`
    # is research too, and stays beside that room: `python -m recipes.study` is the command that the findings name.
    "recipes": {
        "": {"data", "toy", "training", "research"},  # settings and a `main` each; the work is done in the rooms
        "data": {""},
        "toy": {"", "data", "research"},
        "training": {"", "data"},
        "search": {"", "toy", "data"},
        "research": {"", "data", "toy", "training"},
        "study": {"", "data", "training", "research"},
        "bench": {"", "data", "toy"},
        "examples": set(),
    },
}
FILES = [path for package in ALLOWED for path in sorted((ROOT / package).rglob("*.py"))]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what is imported"
            found = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in found if (ROOT / name.replace(".", "/")).with_suffix(".py").exists()}
            names |= found
            if found != modules:  # `from package import module` asks nothing of the package itself
                names.add(node.module)
    return names


def ours() -> dict[str, set[str]]:
    known = {module_name(path) for path in FILES}
    return {module_name(path): imports(ast.parse(path.read_text())) & known - {module_name(path)} for path in FILES}


def test_packages_import_downwards_only():
    for module, imported in ours().items():
        package = module.split(".")[0]
        upward = {name for name in imported if name.split(".")[0] not in {package, *ALLOWED[package]}}
        assert not upward, f"{module} must not import {upward}"


def room_of(module: str) -> tuple[str, str]:
    package, *inner = module.split(".")
    return package, inner[0] if inner and (ROOT / package / inner[0]).is_dir() else ""


def test_every_folder_is_a_room_with_a_rule():
    for package, rooms in ROOMS.items():
        folders = {path.parent.name for path in (ROOT / package).glob("*/*.py")}
        assert folders == rooms.keys() - {""}
        for folder in folders:
            assert ast.get_docstring(ast.parse((ROOT / package / folder / "__init__.py").read_text()))


def test_rooms_import_what_the_plan_allows():
    for module, imported in ours().items():
        package, room = room_of(module)
        if module == "st_btok":  # hands out the public names of all rooms
            continue
        for name in imported:
            other_package, other = room_of(name)
            if other_package == package and other != room:
                assert other in ROOMS[package][room], f"{module} must not import {name}"


def test_recipes_use_public_names_only():
    for path in sorted((ROOT / "recipes").rglob("*.py")):
        inner = {name for name in imports(ast.parse(path.read_text())) if name.startswith("st_btok.")}
        modules = {module_name(p) for p in FILES}
        assert not inner & modules, f"{path.name} imports the inside of st_btok: {inner & modules}"


def test_no_cycles():
    graph = {module: set(names) for module, names in ours().items()}
    while graph:
        free = [module for module, names in graph.items() if not names & graph.keys()]
        assert free, f"import cycle among {sorted(graph)}"
        for module in free:
            del graph[module]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_one_idea_per_file(path):
    tree = ast.parse(path.read_text())
    assert path.stem not in {"utils", "util", "common", "helpers", "misc"}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            hidden = [n for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom)]
            own = [n for n in hidden if any(name.split(".")[0] in ALLOWED for name in imports(n))]
            assert not own, f"{node.name} hides an import"


def test_importing_the_package_has_no_effects():
    for path in sorted((ROOT / "st_btok").rglob("*.py")):
        calls = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Expr)]
        assert all(isinstance(node.value, ast.Constant) for node in calls), f"{path.name} runs code on import"
