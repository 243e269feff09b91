"""The search page: a query, hits as a grid, and for a hit what it holds and what the bottleneck tokens looked at.

What is served: thumbnails out of the index, and previews that are drawn here from files of the indexed folder, both
inside the page itself; no file is served. No path that comes from the browser is ever opened: a hit is named by its
row's id, which must be among the hits that the visitor was shown, and an upload goes through the checked reader like
any other input. How things look stands in `page_html.py`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from sentence_transformers import SentenceTransformer
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from recipes.search import page_html
from recipes.search.folder import KINDS, Source, file_hash, hash_of_bytes, inside, items_of, root_of
from recipes.search.index import frames_of
from recipes.search.lookup import find, query_of, spread
from recipes.search.store import Hit, Store
from st_btok import btok_attention, btok_ids, checked_inputs, decode_btoks

PREVIEW_PIXELS = 1_000_000
LIMIT = 30
LARGEST_UPLOAD = "32mb"
# Beside what browsers know as images.
UPLOADS = ["image", ".avif", ".heic", ".heif", ".psd", ".tga", ".jp2", ".dds", ".ico", ".qoi"]
_GONE = "The file has changed or gone since it was indexed."
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")


class Page:
    """What the page's buttons call; holds the model and the index, and nothing of a visitor.

    Args:
        store: From `open_index`.
        model: The model of the index.
        folder: Where the paths in the index start from, or the table that is indexed.
    """

    def __init__(self, store: Store, model: SentenceTransformer, folder: Path) -> None:
        self.store, self.model, self.folder = store, model, folder
        tokenizer = getattr(model[0], "tokenizer", None)
        self.explains = tokenizer is not None and bool(btok_ids(tokenizer))
        self.special = set(getattr(tokenizer, "added_tokens_encoder", {}))
        self.random = spread(store)

    @property
    def welcome(self) -> str:
        """What stands under the query before the first search."""
        text = f"{self.store.count():,} items to search. Type words, add a picture, or both."
        return text if self.random is None else f"{text} {self.random.warning}".strip()

    def search(self, query: dict[str, Any] | None, kinds: list[str], path: str) -> tuple[str, str, list[Hit]]:
        """The grid of hits of a text, a picture or both, a line about it, and the hits.

        `query` holds `text`, and `files` with at most one path of an upload. An empty `kinds` means all of them; the
        paths of hits start with `path`.
        """
        text, files = (query or {}).get("text") or "", (query or {}).get("files") or []
        kinds, path = kinds or [], (path or "").strip()  # nothing comes from filters that were never unfolded
        if not text.strip() and not files:
            return "", self.welcome, []
        try:
            hits = find(self.store, self.model, query_of(text, files[0] if files else None), LIMIT, kinds, path)
        except ValueError as error:
            raise gr.Error(str(error), title="This query can't be searched with") from error
        return self._shown(hits, kinds, path)

    def more_like(
        self, hits: list[Hit], chosen: str | None, kinds: list[str], path: str
    ) -> tuple[str, str, list[Hit]]:
        """Hits nearest to a hit's own stored vector."""
        hit, kinds, path = self._chosen(hits, chosen), kinds or [], (path or "").strip()
        try:
            vector = self.store.vector(hit.row["id"])
        except KeyError as error:
            raise gr.Error(_GONE) from error
        return self._shown(self.store.search(vector, LIMIT, kinds, path), kinds, path)

    def details(self, hits: list[Hit], chosen: str | None) -> str:
        """A hit in large: its picture, or its passage, and all of its name."""
        hit = self._chosen(hits, chosen)
        value = self._value(hit)
        frames = [] if value is None else frames_of(value, self.model, PREVIEW_PIXELS)
        middle = frames[len(frames) // 2 :][:1]
        return page_html.details(hit, middle, note="" if value is not None else _GONE)

    def explain(self, hits: list[Hit], chosen: str | None) -> str:
        """A hit in large under what the bottleneck tokens looked at, and the text that they can generate."""
        hit = self._chosen(hits, chosen)
        value = self._value(hit)
        if value is None:
            raise gr.Error(_GONE)
        (read,) = checked_inputs([value], self.model).inputs
        prompt = next((self.model.prompts[name] for name in _DOCUMENT_PROMPTS if name in self.model.prompts), None)
        attention = btok_attention(self.model, read, prompt=prompt)
        pictures = []
        frames = frames_of(value, self.model, PREVIEW_PIXELS)
        if len(attention.media) == 1 and frames and attention.media[0].grid is not None:
            steps = attention.media_weights(0).mean(0).numpy()  # over the bottleneck tokens
            for number, weights in enumerate(steps):
                pictures.append(page_html.heat(frames[number * len(frames) // len(steps)], weights, steps.max()))
        seen = {int(position) for medium in attention.media for position in medium.positions}
        weights = attention.weights.mean(0).numpy()
        tokens = enumerate(attention.tokens) if hit.row["text"] else []
        # Tokens of the chat template say nothing of the hit.
        words = [(text, weights[i]) for i, text in tokens if i not in seen and text not in self.special]
        try:
            generated = decode_btoks(self.model, [read], prompt=prompt)[0].text or "(nothing)"
        except ValueError as error:  # a backbone without its LM head at hand
            generated = f"(no text: {error})"
        return page_html.details(hit, pictures, words=words, generated=generated)

    def _shown(self, hits: list[Hit], kinds: list[str], path: str) -> tuple[str, str, list[Hit]]:
        chance = None if self.random is None else self.random.high
        total = self.store.count()
        status = f"{len(hits)} items, best first"
        if len(hits) < total:
            status = f"The {len(hits)} nearest of {total:,} items, best first"
        if kinds or path:
            status = f"{len(hits)} items that pass the filters, best first"
        if chance is not None and hits and hits[0].score <= chance:
            status += ". None is closer to the query than random items of the index are to each other"
        if not hits:
            status = "Nothing passes the filters." if kinds or path else "The index is empty."
        return page_html.grid(hits, chance), status, hits

    def _value(self, hit: Hit) -> Any:
        """The model's input of a hit, read again from its file; None if that is not the file that was indexed."""
        row = hit.row
        root = root_of(self.folder)
        file = root / row["path"]
        if not inside(root, file) or not file.is_file():
            return None
        stat = file.stat()
        touched = (stat.st_size, stat.st_mtime_ns) != (row["size"], row["changed"])
        if touched and file_hash(file) != hash_of_bytes(row["content"]):
            return None
        kind = "page" if file.suffix.lower() == ".pdf" else row["kind"]
        for part, item in enumerate(items_of(self.folder, Source(row["path"], kind, row["content"]))):
            if part == row["part"]:
                return item.value
        return None

    @staticmethod
    def _chosen(hits: list[Hit], chosen: str | None) -> Hit:
        for hit in hits or []:
            if hit.row["id"] == chosen:
                return hit
        raise gr.Error("Click a hit first.")


def build_page(store: Store, model: SentenceTransformer, folder: Path) -> gr.Blocks:
    """The page, not yet served. `folder` is where the paths in the index start from, or the table that is indexed."""
    page = Page(store, model, folder)

    def choose(hits: list[Hit], event: gr.EventData) -> tuple[Any, ...]:
        chosen = str(event.hit)
        return chosen, page.details(hits, chosen), gr.update(visible=True)

    def cleared(found: tuple[Any, ...]) -> tuple[Any, ...]:
        return *found, None, "", gr.update(visible=False)  # a selection belongs to the results that it was made in

    with gr.Blocks(title=f"Search in {folder.name}", analytics_enabled=False, fill_width=True) as blocks:
        hits, chosen = gr.State([]), gr.State(None)
        gr.HTML(f"<h1>Search in {page_html.escaped(folder.name)}</h1>", elem_id="title")
        query = gr.MultimodalTextbox(
            show_label=False,
            placeholder="Words, a picture dropped here, or both",
            file_count="single",
            file_types=UPLOADS,
            sources=["upload"],
            submit_btn="Search",
            max_plain_text_length=10_000,
            elem_id="query",
        )
        with gr.Accordion("Filters", open=False, elem_id="filters"), gr.Row():
            names = [(kind.capitalize() if kind != "page" else "PDF page", kind) for kind in KINDS]
            kinds = gr.CheckboxGroup(names, label="Type", info="none chosen: all", elem_id="kinds")
            path = gr.Textbox(label="Folder", placeholder="reports/2024/", info="the path starts so", elem_id="path")
        status = gr.HTML(page_html.escaped(page.welcome), elem_id="status")
        with gr.Row(elem_id="found"):
            grid = gr.HTML("", js_on_load=page_html.CLICK, elem_id="hits")
            with gr.Column(visible=False, elem_id="details") as panel:
                with gr.Row(elem_id="actions"):
                    more = gr.Button("More like this", size="sm", min_width=80, elem_id="more")
                    why = gr.Button("Why this hit?", size="sm", min_width=80, elem_id="why", visible=page.explains)
                    close = gr.Button("Close", size="sm", min_width=80, elem_id="close")
                about = gr.HTML("", elem_id="about")
        details = [chosen, about, panel]
        results = [grid, status, hits, *details]
        # One at a time: explaining reads the model in another way for a moment.
        alone: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}

        def searched(*given: Any) -> tuple[Any, ...]:
            return cleared(page.search(*given))

        def searched_more(*given: Any) -> tuple[Any, ...]:
            return cleared(page.more_like(*given))

        query.submit(searched, [query, kinds, path], results, **alone)
        kinds.change(searched, [query, kinds, path], results, **alone)
        path.submit(searched, [query, kinds, path], results, **alone)
        more.click(searched_more, [hits, chosen, kinds, path], results, **alone)
        grid.click(choose, [hits], details, **alone)
        why.click(page.explain, [hits, chosen], about, **alone)
        close.click(lambda: (None, "", gr.update(visible=False)), None, details, api_visibility="private")
    return blocks


def launch(blocks: gr.Blocks, host: str, port: int, block: bool = True, allowed_hosts: Sequence[str] = ()) -> Any:
    """Start the server. Nothing is shared, no file of this machine is served, uploads are at most `LARGEST_UPLOAD`.

    Args:
        blocks: From `build_page`.
        host: Address to listen on.
        port: Port.
        block: Whether to stay until the server is stopped.
        allowed_hosts: Names that the page may be asked for by, beside `host`, localhost and this machine's own name
            and addresses. Any other is refused: a foreign site whose name leads here would read the answers.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    own = [host, "localhost", "127.0.0.1", *allowed_hosts]
    if host not in ("127.0.0.1", "localhost"):
        own += [socket.gethostname(), socket.getfqdn(), *_own_addresses()]
    return blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        prevent_thread_lock=not block,
        max_file_size=LARGEST_UPLOAD,
        app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=own, www_redirect=False)]},
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=page_html.STYLE,
        footer_links=[],
        quiet=not block,
    )


def _own_addresses() -> list[str]:
    try:
        return socket.gethostbyname_ex(socket.gethostname())[2]
    except OSError:
        return []
