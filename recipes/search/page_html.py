"""How the search page looks: the grid of hits, a hit in large, heat maps, and the style sheet."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from PIL import Image

from recipes.search.store import Hit

# A click on a card is an event that names the row. Listens on the component, so it holds for every later grid.
CLICK = """
element.addEventListener('click', (event) => {
  const card = event.target.closest('[data-hit]');
  if (!card) return;
  for (const other of element.querySelectorAll('.chosen')) other.classList.remove('chosen');
  card.classList.add('chosen');
  trigger('click', {hit: card.dataset.hit});
});
"""

STYLE = """
#title h1 {font-size: 1.25rem; font-weight: 600; margin: 0}
#title, #status, #hits, #about {--faint: color-mix(in srgb, var(--body-text-color) 68%, transparent)}
#status {padding: .25rem 0; color: var(--faint)}
#query .submit-button {background: var(--color-accent); color: white}
#found {align-items: flex-start; flex-wrap: nowrap}
#hits {flex: 3 1 0; min-width: 0}
#hits .grid {display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .75rem}
#hits .card {display: flex; flex-direction: column; width: 100%; min-width: 0; padding: 0; overflow: hidden;
  text-align: left; font-weight: 400; cursor: pointer; color: var(--body-text-color);
  background: var(--block-background-fill); border: 1px solid var(--border-color-primary); border-radius: .5rem}
#hits .card:hover, #hits .card:focus-visible, #hits .card.chosen {border-color: var(--color-accent);
  outline: 2px solid var(--color-accent); outline-offset: -1px}
#hits .view {height: 10rem; display: flex; align-items: center; justify-content: center; overflow: hidden;
  background: var(--background-fill-secondary)}
#hits .view img {max-width: 100%; max-height: 100%; object-fit: contain}
#hits .view .words {display: block; align-self: stretch; width: 100%; margin: 0; padding: .6rem; font-size: .8rem;
  line-height: 1.35; white-space: pre-line; overflow-wrap: anywhere; background: var(--block-background-fill)}
.caption {padding: .4rem .6rem .5rem; font-size: .8rem; line-height: 1.3; overflow-wrap: anywhere}
.caption .place {color: var(--faint)}
.score {display: flex; align-items: center; gap: .4rem; font-variant-numeric: tabular-nums; font-size: .75rem}
.score .bar {flex: 1; height: .3rem; border-radius: .15rem; background: var(--border-color-primary)}
.score .bar i {display: block; height: 100%; border-radius: .15rem; background: var(--color-accent)}
#hits .path, #about .path {font-weight: 600}
#hits .chance {grid-column: 1 / -1; margin: .5rem 0 0; padding-top: .5rem; font-size: .85rem;
  border-top: 1px solid var(--border-color-primary); color: var(--faint)}
#hits .chance ~ .card .view {opacity: .55}
#hits .chance ~ .card .score .bar i {background: var(--faint)}
#details {flex: 2 1 0; min-width: 20rem; position: sticky; top: .5rem; padding: .75rem; gap: .5rem;
  border: 1px solid var(--border-color-primary); border-radius: .5rem; background: var(--body-background-fill)}
#about img {width: 100%; max-height: 75vh; object-fit: contain; background: var(--background-fill-secondary)}
#about .caption {padding: .25rem 0; font-size: .95rem}
#about .passage {white-space: pre-wrap; overflow-wrap: anywhere; font-size: .9rem; margin: .5rem 0}
#about .passage mark {color: inherit; padding: 0}
#about .note {font-size: .9rem; margin: .4rem 0}
@media (max-width: 760px) {
  .gradio-container main {padding: .5rem !important}
  #title h1 {font-size: 1rem}
  #hits .grid {grid-template-columns: repeat(2, 1fr); gap: .5rem}
  #hits .view {height: 7.5rem}
  #details {position: fixed; inset: 0; z-index: 100; min-width: 0; overflow-y: auto; border: 0; border-radius: 0}
  #details #actions {position: sticky; top: 0; z-index: 1; background: var(--body-background-fill)}
}
"""

_SHOWN_TEXT = 220  # characters of a text on its card


def grid(hits: Sequence[Hit], chance: float | None = None) -> str:
    """The hits as cards, best first; a line stands before those that are no closer than `chance`, if given.

    `chance` is how similar random items of the index are to each other.
    """
    cards, has_line = [], False
    for hit in hits:
        if chance is not None and hit.score <= chance and not has_line:
            has_line = True
            cards.append(
                '<p class="chance">From here on no closer to the query than random items of this index are to each '
                f"other ({chance:.3f}).</p>"
            )
        row = hit.row
        name = escaped(f"{row['path']} {row['place']}".strip())
        if row["thumbnail"]:
            view = f'<img alt="{name}" src="data:image/jpeg;base64,{base64.b64encode(row["thumbnail"]).decode()}">'
        else:
            view = f'<span class="words">{escaped(row["text"][:_SHOWN_TEXT])}</span>'
        cards.append(
            f'<button type="button" class="card" data-hit="{escaped(row["id"])}"><span class="view">{view}</span>'
            f"{_caption(hit)}</button>"
        )
    return f'<div class="grid">{"".join(cards)}</div>' if cards else ""


def _caption(hit: Hit) -> str:
    place = f' <span class="place">{escaped(hit.row["place"])}</span>' if hit.row["place"] else ""
    width = 100 * min(max(hit.score, 0.0), 1.0)
    return (
        f'<span class="caption"><span class="path">{escaped(hit.row["path"])}</span>{place}'
        f'<span class="score"><span class="bar"><i style="width:{width:.0f}%"></i></span>{hit.score:.3f}</span></span>'
    )


def details(
    hit: Hit,
    pictures: Sequence[Image.Image],
    words: Sequence[tuple[str, float]] = (),
    generated: str | None = None,
    note: str = "",
) -> str:
    """A hit in large.

    Args:
        hit: The hit.
        pictures: Its picture, or heat maps over it.
        words: The input's tokens and the attention to each; shown instead of the plain text.
        generated: What the bottleneck tokens can generate; None where nobody asked.
        note: What there is to say about the file.
    """
    parts = [f'<p class="note">{escaped(note)}</p>'] if note else []
    parts += [f'<img alt="{escaped(hit.row["path"])}" src="{_address(picture)}">' for picture in pictures]
    parts.append(_caption(hit))
    if generated is not None:
        parts.append('<p class="note">Bright: what the bottleneck tokens looked at, the mean over all of them.</p>')
    if words:
        highest = max(weight for _, weight in words) or 1.0
        marked = "".join(
            f'<mark style="background:rgba(255,170,0,{weight / highest:.2f})">{escaped(text)}</mark>'
            for text, weight in words
        )
        parts.append(f'<div class="passage">{marked}</div>')
    elif hit.row["text"]:
        parts.append(f'<div class="passage">{escaped(hit.row["text"])}</div>')
    if generated is not None:
        parts.append(f'<p class="note" id="generated">What they can write: <b>{escaped(generated)}</b></p>')
    return "".join(parts)


def heat(picture: Image.Image, weights: np.ndarray, highest: float) -> Image.Image:
    """A heat map of attention (rows, columns) over an RGB picture, which shows in dim grey where attention is low.

    The value `highest` is drawn brightest.
    """
    lowest = float(weights.min())
    share = Image.fromarray(((weights - lowest) / max(highest - lowest, 1e-12)).astype(np.float32))
    large = np.clip(np.asarray(share.resize(picture.size, Image.Resampling.BICUBIC)), 0, 1)
    colours = colormaps["inferno"](large)[..., :3] * 255
    grey = np.asarray(picture.convert("L").convert("RGB"), dtype=np.float32)
    visible = 0.15 + 0.4 * large[..., None]
    return Image.fromarray((grey * (1 - visible) + colours * visible).astype(np.uint8))


def _address(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def escaped(text: str) -> str:
    """A file's name or text as text: never markup, nor the braces and dollars of Gradio's templates."""
    return html.escape(text).replace("{", "&#123;").replace("}", "&#125;").replace("$", "&#36;").replace("`", "&#96;")
