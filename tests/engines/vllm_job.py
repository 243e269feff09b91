"""vLLM on the CPU serves what sentence-transformers computes, or refuses: `python -m tests.engines.vllm_job PYTHON`.

PYTHON is the interpreter of an environment with vLLM and this package (`make engines` makes one); the comparison runs
here, in the environment of the project. Seven starts of a server, a few minutes each on two cores.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer

from st_btok import build_model
from st_btok.serving.serve_check import FORMS, LONG, RIGHT, TOKEN_STATES, Answer, serve_check
from tests.engines.table import ROOT, Row, add
from tests.engines.text_model import text_model

PORT = 8765
TEXT_ONLY = "last, text-only"
LIMITS = "--max-num-seqs 8 --enforce-eager --dtype float32".split()
CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
PATIENCE = 900  # seconds until a server must answer
# The template of a text-only model can ask for strings; vLLM sees the loop over parts in the guard, and sends parts.
STRINGS = ["--chat-template-content-format=string"]
STATES = [
    '--hf-overrides={"io_processor_plugin": null}',
    '--pooler-config={"task": "token_embed", "use_activation": false}',
]


def command(python: str, model: Path, options: list[str]) -> list[str]:
    """What `vllm serve` runs; the CPU wheel's own script asks for metadata under another name."""
    server = [python, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(PORT)]
    return [*server, "--model", str(model), "--served-model-name", "model", *LIMITS, *options]


@contextmanager
def server(python: str, model: Path, options: list[str], plugin: bool, log: Path) -> Iterator[str | None]:
    """The URL of a started server, or None if it refused to start."""
    environment = {**os.environ, **CPU, **({} if plugin else {"VLLM_PLUGINS": ""})}
    with log.open("w") as file:
        process = subprocess.Popen(
            command(python, model, options),
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            cwd=log.parent,
        )
        try:
            yield _wait(process)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
                process.wait(60)


def _wait(process: subprocess.Popen) -> str | None:
    url = f"http://127.0.0.1:{PORT}"
    for _ in range(PATIENCE):
        if process.poll() is not None:
            return None
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return url
        except OSError:
            time.sleep(1)
    raise TimeoutError(f"vLLM did not answer within {PATIENCE} seconds.")


def worst(answers: list[Answer], form: str) -> str | None:
    """One cell of the table: the verdict on one form."""
    own = [answer for answer in answers if answer.form == form]
    wrong = [answer for answer in own if answer.verdict == "WRONG"]
    if not own:
        return None
    equal = {answer.row: answer.difference or 0.0 for answer in own if answer.verdict == "equal"}
    if wrong:
        cosines = [answer.cosine for answer in wrong if answer.cosine is not None]
        names = ", ".join(answer.row for answer in wrong)
        right = f"; {max(equal.values()):.1e}: {', '.join(equal)}" if equal else ""
        return f"**wrong, no error**: cosine {min(cosines):.2f} to {max(cosines):.2f} ({names}){right}"
    refused = [answer.row for answer in own if answer.verdict == "refused"]
    if not equal:
        return "refused, HTTP 400"
    return f"{max(equal.values()):.1e} ({len(equal)} rows)" + (f"; refused: {', '.join(refused)}" if refused else "")


def measure(python: str, folder: Path, readout: str, options: list[str], plugin: bool) -> list[Row]:
    """Start one server and ask it for everything."""
    version = subprocess.check_output([python, "-c", "import vllm; print(vllm.__version__)"], text=True).split()[-1]
    name = "vLLM, this package beside it" if plugin else "vLLM"
    if options == STATES:
        name = "vLLM, states of single tokens"
    log = folder / f"{readout}_{plugin}_{len(options)}.log"
    with server(python, folder / readout, options, plugin, log) as url:
        if url is None:
            reason = [line for line in log.read_text().splitlines() if "plugin" in line and "rror" in line]
            print(log.read_text()[-3000:] if not reason else reason[-1])
            return [Row("engines", name, version, readout, "any", f"does not start: `{_last_words(reason)}`")]
        model = SentenceTransformer(str(folder / readout), device="cpu")
        answers = serve_check(url, model, progress=print)
    forms = [TOKEN_STATES] if options == STATES else [form for form in FORMS if form != TOKEN_STATES]
    cells = {form: worst(answers, form) for form in forms}
    return [Row("engines", name, version, readout, form, cell) for form, cell in cells.items() if cell]


def _last_words(lines: list[str]) -> str:
    return lines[-1].split("ValueError:")[-1].strip() if lines else "see the log"


def main(python: str) -> None:
    """All starts; each one's rows are written as soon as they are there."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        backbone = str(ROOT / "recipes" / "backbone")
        for readout in ("mean", "last"):
            model = build_model(backbone, readout=readout, model_kwargs={"dtype": torch.float32}, device="cpu")
            model.save_pretrained(str(folder / readout))
        text_model("last").save_pretrained(str(folder / TEXT_ONLY))
        starts = [
            (TEXT_ONLY, STRINGS, False),
            (TEXT_ONLY, STRINGS, True),
            ("last", [], False),
            ("mean", [], True),
            ("mean", STATES, False),
            ("last", [], True),
        ]
        rows = []
        for readout, options, plugin in starts:
            print(f"== {readout} {options} {'with' if plugin else 'without'} the plugin", flush=True)
            rows = measure(python, folder, readout, options, plugin)
            add(rows)
            forms = {row.form: row.result for row in rows}
            right = forms[TOKEN_STATES if options == STATES else RIGHT]
            # Only sentence-transformers cuts a text over the limit by tokens and keeps the BToks: it must be refused.
            if "wrong" in right or not right.endswith(f"; refused: {LONG}"):
                raise SystemExit(f"{rows}")
        rows = measure(python, folder, "mean", [], False)
        add(rows)
        if "does not start" not in rows[0].result:
            raise SystemExit("vLLM without the plugin must refuse a mean model")


if __name__ == "__main__":
    main(sys.argv[1])
