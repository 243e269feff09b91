"""The search page: a text box and a drop zone, hits as a grid, and for a hit what the bottleneck tokens looked at.

What is served: thumbnails out of the index, and previews that are drawn here from files of the indexed folder. No
path that comes from the browser is ever opened: a hit is named by its number in the grid, and an upload goes through
the checked reader like any other input.
"""

from __future__ import annotations

import html
import io
import os
import tempfile
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, ImageDraw, ImageFont
from sentence_transformers import SentenceTransformer

from recipes.search.folder import KINDS, Source, file_hash, inside, items_of, root_of
from recipes.search.lookup import find, query_of
from recipes.search.store import Hit, Store
from st_btok import btok_attention, btok_ids, checked_inputs, decode_btoks, draw_attention

PREVIEW_PIXELS = 1_000_000
LIMIT = 24
STYLE = ".hits img {object-fit: contain} .details {font-family: ui-monospace, monospace}"


class Page:
    """What the page's buttons call; holds the model and the index, and nothing of a visitor.

    Args:
        store: From `open_index`.
        model: The model of the index.
        folder: Where the paths in the index start from.
    """

    def __init__(self, store: Store, model: SentenceTransformer, folder: Path) -> None:
        self.store, self.model, self.folder = store, model, root_of(folder)
        tokenizer = getattr(model[0], "tokenizer", None)
        self.explains = tokenizer is not None and bool(btok_ids(tokenizer))

    def search(self, text: str, upload: str | None, kinds: list[str], path: str) -> tuple[Any, ...]:
        """Hits of a text, a picture or both: gallery, the hits themselves, a line about them, cleared details."""
        if not (text or "").strip() and not upload:
            return [], [], "Type a query or drop a picture.", *self._no_details()
        try:
            hits = find(self.store, self.model, query_of(text, upload), LIMIT, kinds or [], (path or "").strip())
        except ValueError as error:
            raise gr.Error(str(error)) from error
        return *self._shown(hits), *self._no_details()

    def more_like(self, hits: list[Hit], chosen: int | None, kinds: list[str], path: str) -> tuple[Any, ...]:
        """Hits nearest to a hit's own stored vector."""
        hit = self._chosen(hits, chosen)
        found = self.store.search(self.store.vector(hit.row["id"]), LIMIT, kinds or [], (path or "").strip())
        return *self._shown(found), *self._no_details()

    def details(self, hits: list[Hit], event: gr.SelectData) -> tuple[Any, ...]:
        """A larger picture or the passage of the hit that was clicked."""
        hit = self._chosen(hits, event.index)
        value = self._value(hit)
        row = hit.row
        head = f"**{_escaped(row['path'])}** {_escaped(row['place'])} · {row['kind']} · score {hit.score:.3f}"
        if value is None:
            head += "\n\nThe file has changed or gone since it was indexed."
        if row["text"]:
            head += f"\n\n<pre class='details'>{_escaped(row['text'])}</pre>"
        return event.index, head, self._picture(value), None, ""

    def explain(self, hits: list[Hit], chosen: int | None) -> tuple[Any, str]:
        """Heat maps of a hit, and the text that its bottleneck tokens can generate."""
        hit = self._chosen(hits, chosen)
        value = self._value(hit)
        if value is None:
            raise gr.Error("The file has changed or gone since it was indexed.")
        (read,) = checked_inputs([value], self.model).inputs
        picture = self._picture(value)
        attention = btok_attention(self.model, read)
        pictures = [picture] if picture is not None and len(attention.media) == 1 else []
        with tempfile.TemporaryDirectory() as folder:
            draw_attention(attention, Path(folder) / "map.png", pictures)
            drawn = Image.open(io.BytesIO((Path(folder) / "map.png").read_bytes()))
        try:
            text = decode_btoks(self.model, [read])[0].text
        except ValueError as error:  # a backbone without its LM head at hand
            return drawn, f"No text: {error}"
        return drawn, text or "(nothing)"

    def _shown(self, hits: list[Hit]) -> tuple[Any, ...]:
        gallery = []
        for hit in hits:
            row = hit.row
            label = f"{hit.score:.3f}  {row['path']} {row['place']}".strip()
            picture = Image.open(io.BytesIO(row["thumbnail"])) if row["thumbnail"] else _card(row["text"])
            gallery.append((picture, label))
        return gallery, hits, f"{len(hits)} of {self.store.count()} items"

    def _value(self, hit: Hit) -> Any:
        """The model's input of a hit, read again from its file; None if that is not the file that was indexed."""
        row = hit.row
        file = self.folder / row["path"]
        if not inside(self.folder, file) or not file.is_file():
            return None
        stat = file.stat()
        touched = (stat.st_size, stat.st_mtime_ns) != (row["size"], row["changed"])
        if touched and file_hash(file) != row["content"]:
            return None
        for part, item in enumerate(items_of(self.folder, Source(row["path"], row["kind"], row["content"]))):
            if part == row["part"]:
                return item.value
        return None

    def _picture(self, value: Any) -> Image.Image | None:
        if not isinstance(value, dict) or "image" not in value:
            return None
        (read,) = checked_inputs([value], self.model, max_pixels=PREVIEW_PIXELS).inputs
        return read["image"] if isinstance(read, dict) else read

    @staticmethod
    def _chosen(hits: list[Hit], chosen: int | None) -> Hit:
        if chosen is None or not 0 <= chosen < len(hits or []):
            raise gr.Error("Click a hit first.")
        return hits[chosen]

    @staticmethod
    def _no_details() -> tuple[Any, ...]:
        return None, "", None, None, ""


def build_page(store: Store, model: SentenceTransformer, folder: Path) -> gr.Blocks:
    """The page, not yet served.

    Args:
        store: From `open_index`.
        model: The model of the index.
        folder: Where the paths in the index start from.

    Returns:
        Gradio's blocks.
    """
    page = Page(store, model, folder)
    with gr.Blocks(title="Search", analytics_enabled=False) as blocks:
        hits, chosen = gr.State([]), gr.State(None)
        gr.Markdown(f"## Search in {_escaped(folder.name)}")
        with gr.Row():
            text = gr.Textbox(label="Query", placeholder="what are you looking for?", scale=3, elem_id="query")
            # A file and not gr.Image, which would open the upload by itself, before the checked reader does.
            upload = gr.File(label="or drop a picture", file_types=["image"], scale=1, height=120, elem_id="upload")
        with gr.Row():
            kinds = gr.CheckboxGroup(list(KINDS), label="only", scale=2)
            path = gr.Textbox(label="only below", placeholder="folder/", scale=1)
            go = gr.Button("Search", variant="primary", elem_id="go")
        status = gr.Markdown("", elem_id="status")
        with gr.Row():
            gallery = gr.Gallery(label="hits", columns=4, height=560, elem_id="hits", elem_classes="hits", scale=3)
            with gr.Column(scale=2):
                about = gr.Markdown("", elem_id="about")
                preview = gr.Image(label="preview", interactive=False)
                more = gr.Button("More like this", elem_id="more")
                why = gr.Button("Why? What the bottleneck tokens saw", elem_id="why", visible=page.explains)
                heat = gr.Image(label="where they looked", interactive=False, elem_id="heat", visible=page.explains)
                generated = gr.Textbox(label="what they can generate", elem_id="generated", visible=page.explains)
        details = [chosen, about, preview, heat, generated]
        results = [gallery, hits, status, *details]
        for trigger in (go.click, text.submit, upload.upload):
            trigger(page.search, [text, upload, kinds, path], results, api_visibility="private")
        more.click(page.more_like, [hits, chosen, kinds, path], results, api_visibility="private")
        gallery.select(page.details, [hits], details, api_visibility="private")
        why.click(page.explain, [hits, chosen], [heat, generated], api_visibility="private")
    return blocks


def serve(store: Store, model: SentenceTransformer, folder: Path, host: str, port: int) -> None:
    """Serve the page until it is stopped.

    Args:
        store: From `open_index`.
        model: The model of the index.
        folder: Where the paths in the index start from.
        host: Address to listen on.
        port: Port.
    """
    launch(build_page(store, model, folder), host, port)


def launch(blocks: gr.Blocks, host: str, port: int, block: bool = True) -> Any:
    """Start the server; nothing is shared, and neither the working directory nor the folder is served as files."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    return blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        prevent_thread_lock=not block,
        blocked_paths=[str(Path.cwd())],
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=STYLE,
        quiet=not block,
    )


def _card(text: str) -> Image.Image:
    """A text's beginning as a picture, for the grid."""
    image = Image.new("RGB", (256, 256), "white")
    words, lines = text.split(), [""]
    for word in words[:80]:
        if len(lines[-1]) + len(word) > 34:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    ImageDraw.Draw(image).multiline_text((8, 8), "\n".join(lines[:16]), fill="black", font=ImageFont.load_default(13))
    return image


def _escaped(text: str) -> str:
    """A file's name or text as text, never as markup."""
    return html.escape(text).replace("*", "&#42;").replace("_", "&#95;").replace("[", "&#91;").replace("`", "&#96;")
