"""The shape and density of the code, counted: `python docs/shape.py [COMMIT ...]`.

Without a commit it counts the files as they are.

Modules exclude `__init__`. A code line holds something besides a comment, a docstring or nothing.
"""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tarfile
import tokenize
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
PACKAGES = ("st_btok", "recipes", "evaluation")
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
SHAPE = "| | modules | lines | median / max file | depth | cmt / doc % | fn | returns typed | cyc | tests ÷ source |"
DENSITY = "| | comprehensions | comment lines | lines over 100 columns |"


class Module:
    """What is counted in one file."""

    def __init__(self, path: str, source: str) -> None:
        tree, lines = ast.parse(source), source.splitlines()
        self.path, self.lines = path, len(lines)
        documented = {line for node in ast.walk(tree) for line in docstring_lines(node)}
        filled = {number for number, line in enumerate(lines, 1) if line.strip()}
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
        commented = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
        alone = {number for number in commented if lines[number - 1].lstrip().startswith("#")}
        code = filled - documented - alone
        self.docstrings, self.comments, self.code = len(documented), len(commented), len(code)
        self.long = sum(len(lines[number - 1]) > 100 for number in code)
        self.comprehensions = sum(isinstance(node, COMPREHENSIONS) for node in ast.walk(tree))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        self.functions = [node.end_lineno - node.lineno + 1 for node in functions]
        self.typed = sum(node.returns is not None for node in functions)
        self.name = path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        self.imports = set(imports(tree))


def docstring_lines(node: ast.AST) -> range:
    """The lines of a node's docstring."""
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return range(0)
    if ast.get_docstring(node) is None:
        return range(0)
    return range(node.body[0].lineno, node.body[0].end_lineno + 1)


def imports(tree: ast.Module) -> list[tuple[str, str]]:
    """What is imported at the top level of a file: module, and the name taken from it (may be empty)."""
    names = []
    for node in tree.body:
        if isinstance(node, ast.Import):
            names += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [(str(node.module), alias.name) for alias in node.names]
    return names


def modules_in_cycles(modules: list[Module]) -> int:
    """How many modules can't be put into an order of import."""
    names, graph = {module.name for module in modules}, {}
    for module in modules:
        # `from package import module` asks nothing of the package itself.
        asked = [f"{place}.{name}" if f"{place}.{name}" in names else place for place, name in module.imports]
        graph[module.name] = set(asked)
    while graph:
        free = [name for name, imported in graph.items() if not imported & (graph.keys() - {name})]
        if not free:
            break
        for name in free:
            del graph[name]
    return len(graph)


def sources(commit: str | None) -> dict[str, str]:
    """Path and text of every Python file of a commit, or of the files as they are."""
    folders = [*PACKAGES, "tests"]
    if commit is None:
        paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
        return {str(path.relative_to(ROOT)): path.read_text() for path in paths}
    archive = subprocess.run(["git", "archive", commit, *folders], cwd=ROOT, capture_output=True, check=True).stdout
    found = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            if member.name.endswith(".py"):
                found[member.name] = tar.extractfile(member).read().decode()
    return found


def rows(commit: str | None) -> tuple[list[str], list[str]]:
    """The rows of both tables for one state of the code."""
    texts = sources(commit)
    shapes, densities = [], []
    for package in PACKAGES:
        every = [Module(path, text) for path, text in texts.items() if path.startswith(f"{package}/")]
        found = [module for module in every if not module.path.endswith("__init__.py")]
        files, functions = [m.lines for m in found], [n for m in found for n in m.functions]
        lines, code, comments = sum(files), sum(m.code for m in found), sum(m.comments for m in found)
        tests = sum(len(text.splitlines()) for path, text in texts.items() if path.startswith(f"tests/{package}/"))
        typed = 100 * sum(m.typed for m in found) / len(functions)
        name = f"{package}, {commit or 'now'}"
        shapes.append(
            f"| {name} | {len(found)} | {lines / 1000:.1f}k | {median(files):.0f} / {max(files)} "
            f"| {max(m.path.count('/') for m in found) - 1} "
            f"| {100 * comments / lines:.0f} / {100 * sum(m.docstrings for m in found) / lines:.0f} "
            f"| {median(functions):.0f} / {max(functions)} | {typed:.0f} % "
            f"| {modules_in_cycles(every)} | {tests / lines:.2f} |"
        )
        densities.append(
            f"| {name} | {100 * sum(m.comprehensions for m in found) / code:.1f} | {100 * comments / code:.1f} "
            f"| {100 * sum(m.long for m in found) / code:.1f} % |"
        )
    return shapes, densities


def main() -> None:
    """Print both tables."""
    states = [rows(commit) for commit in sys.argv[1:] or [None]]
    for head, number in ((SHAPE, 0), (DENSITY, 1)):
        print(head + "\n" + "|---" * (head.count("|") - 1) + "|")
        for state in states:
            print("\n".join(state[number]))
        print()


if __name__ == "__main__":
    main()
