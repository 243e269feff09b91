"""An OpenAI-compatible server in a thread: what vLLM does with a saved model, told in 100 lines.

The chat template is rendered by bare transformers with the request's arguments alone (an engine does not know what
sentence-transformers saved), a bare `input` skips it, and a prompt over the model's limit is refused. `pooling` says
what happens to the states: `"as saved"` runs the saved modules, `"mean over all"` is what an engine computes that
reads `Pooling` and skips `WordWeights`.
"""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from PIL import Image
from sentence_transformers import SentenceTransformer


@contextmanager
def serving(model: SentenceTransformer, pooling: str = "as saved", plugin: bool = False) -> Iterator[str]:
    """The URL of a server of `model`, alive inside the block; `plugin` refuses prompts that do not end with BToks."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(model, pooling, plugin))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _handler(model: SentenceTransformer, pooling: str, plugin: bool) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            self.answer(200, {"data": [{"id": "served"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                features = _render(model, body)
                length = features["input_ids"].shape[1]
                if length > model.tokenizer.model_max_length:
                    raise ValueError(f"a prompt has at most {model.tokenizer.model_max_length} tokens, not {length}")
                if plugin and features["input_ids"][0, -1] != model.tokenizer.convert_tokens_to_ids("<|btok_3|>"):
                    raise ValueError("a prompt must end with its bottleneck tokens")
                states = self.path == "/pooling"
                self.answer(200, {"data": [_pool(model, features, "none" if states else pooling)]})
            except Exception as error:  # as an engine does: everything is a message
                self.answer(400, {"error": {"message": str(error)}})

        def answer(self, status, body):
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler


def _render(model: SentenceTransformer, body: dict) -> dict:
    """A request as features of the backbone."""
    if "input" in body:
        return dict(model.tokenizer([body["input"]], return_tensors="pt"))
    messages = [{**turn, "content": [_part(part) for part in turn["content"]]} for turn in body["messages"]]
    features = model[0].processor.apply_chat_template(
        [messages],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=body.get("add_generation_prompt", False),
        **body.get("chat_template_kwargs", {}),
    )
    if "truncate_prompt_tokens" in body:  # -1: to the limit
        limit = model.tokenizer.model_max_length
        features = {name: value[:, :limit] if value.dim() == 2 else value for name, value in features.items()}
    return dict(features)


def _part(part: dict) -> dict:
    if part["type"] != "image_url":
        return part
    data = base64.b64decode(part["image_url"]["url"].split(",", 1)[1])
    return {"type": "image", "image": Image.open(io.BytesIO(data)).convert("RGB")}


@torch.no_grad()
def _pool(model: SentenceTransformer, features: dict, pooling: str) -> dict:
    features = model[0]({**features, "modality": "message"})
    states = features["token_embeddings"][0]
    if pooling == "none":
        return {"data": states.tolist()}
    if pooling == "mean over all":
        return {"embedding": torch.nn.functional.normalize(states.mean(0), dim=0).tolist()}
    for module in list(model)[1:]:
        features = module(features)
    return {"embedding": features["sentence_embedding"][0].tolist()}
