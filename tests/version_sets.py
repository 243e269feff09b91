"""The core smoke in the lowest, or the newest, dependency versions that `pyproject.toml` allows.

    python -m tests.version_sets lowest
    python -m tests.version_sets newest

Makes `.venv-lowest` or `.venv-newest`: an environment that sees everything installed here (torch above all, which
takes gigabytes and minutes) and has the other versions of the resolution in front of it. The resolution is uv's:
`lowest` takes the lower bound of every direct dependency and for the rest the newest that fits. torch and torchvision
stay the installed ones, so their bounds are not proved here.

Exit status: 0 if the smoke passes. 1 if it fails. 3 if the newest set fails and holds a release that is newer than
what is installed here: that says something about the release and not about the change under test, so `.ci/run` prints
it and goes on. With nothing newer than here a failure is 1 in any case.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Too large for a job of minutes; what they bring along is left out with them.
KEPT = re.compile(r"torch|torchvision|triton|nvidia-.*|cuda-.*")


def resolve(kind: str, uv: str) -> dict[str, str]:
    """Versions by package, from `pyproject.toml` alone."""
    held = "".join(f"{name}=={version(name).split('+')[0]}\n" for name in ("torch", "torchvision"))
    constraints = ROOT / f".venv-{kind}" / "constraints.txt"
    constraints.write_text(held)
    strategy = {"lowest": "lowest-direct", "newest": "highest"}[kind]
    command = [uv, "pip", "compile", "--quiet", "pyproject.toml", "--no-header", "--no-annotate"]
    command += ["--resolution", strategy, "--constraint", str(constraints), "--python", sys.executable]
    lines = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    return {name: pin for name, pin in pins.items() if not KEPT.fullmatch(name)}


def installed(name: str) -> str | None:
    """The version in this environment."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def as_numbers(text: str) -> tuple[int, ...]:
    """`"5.24.0"` as (5, 24, 0)."""
    return tuple(int(number) for number in re.findall(r"\d+", text))


def environment(kind: str) -> Path:
    """An empty environment that reads this one's packages behind its own; returns its interpreter."""
    folder = ROOT / f".venv-{kind}"
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    # A path file comes after the environment's own packages, so those win.
    (site / "shared.pth").write_text(next(path for path in sys.path if path.endswith("site-packages")) + "\n")
    return folder / "bin" / "python"


def bounds() -> dict[str, str]:
    """The lower bound of every direct dependency."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = {}
    for line in table["project"]["dependencies"]:
        name, bound = re.fullmatch(r"([\w-]+)>=([\d.]+)(?:,.*)?", line).groups()
        found[name] = bound
    return found


def main(arguments: list[str] | None = None) -> int:
    """Make the environment, say what is in it, run the smoke."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("lowest", "newest"))
    kind = parser.parse_args(arguments).kind
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if uv is None:
        raise SystemExit("uv must be installed to resolve versions: python -m pip install uv")
    python = environment(kind)
    pins = resolve(kind, uv)
    changed = {name: pin for name, pin in pins.items() if installed(name) != pin}
    newer = {
        name: pin for name, pin in changed.items() if as_numbers(pin) > as_numbers(installed(name) or "0")
    } if kind == "newest" else {}  # fmt: skip
    listed = ", ".join(f"{name} {pin} (here {installed(name)})" for name, pin in sorted(changed.items()))
    print(f"{kind} versions that pyproject.toml allows, where they differ from here: {listed or 'none'}", flush=True)
    if changed:
        packages = [f"{name}=={pin}" for name, pin in changed.items()]
        subprocess.run([uv, "pip", "install", "--quiet", "--no-deps", "--python", str(python), *packages], check=True)
    found = subprocess.run([str(python), "-m", "tests.core_smoke"], cwd=ROOT, check=False).returncode
    if found and newer:
        print(
            f"\n{'!' * 100}\nThe core fails with releases newer than those here: {newer}.\nThe change under test was "
            f"not made for them: exclude them in pyproject.toml, or repair the package.\n{'!' * 100}", flush=True
        )  # fmt: skip
        return 3
    print(f"{kind} versions: {'failed' if found else 'passed'}", flush=True)
    return int(found != 0)


if __name__ == "__main__":
    sys.exit(main())
