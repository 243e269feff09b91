"""Draw the attention of bottleneck tokens as heat maps, and say what they can generate.

    st-btok explain MODEL --image page.png --text "what city?" --out heat.png

Each row of panels is an image or a step in time of a video, each column a bottleneck token; below, one strip for the
text. Colours are linear and share one scale within an image or video and within the text.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer

from st_btok.inputs.encode import checked_inputs
from st_btok.inputs.images import rgb_image
from st_btok.tools.explain import BTokAttention, btok_attention, decode_btoks

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("drawing needs matplotlib: pip install matplotlib") from error

_LINE = 48  # tokens of text in one strip
_WIDTH = 2.4  # inches of a panel


def draw_attention(
    attention: BTokAttention, path: str | Path, pictures: Sequence[Image.Image | np.ndarray] = (), title: str = ""
) -> None:
    """Write the heat maps of one input to a PNG.

    Args:
        attention: From `btok_attention`.
        path: File to write.
        pictures: What lies under the maps, one for each medium in `attention.media`: an image, or the frames of a
            video as (frames, height, width, 3) uint8. Default: none, the maps alone.
        title: Printed above.

    Raises:
        ValueError: If there are pictures, but not one for each medium.
    """
    if len(pictures) not in (0, len(attention.media)):
        raise ValueError(
            f"pictures must be one for each of the {len(attention.media)} media that the backbone saw (a tiled image "
            f"counts once per tile), got {len(pictures)}. Leave them out to draw the maps alone."
        )
    maps = [attention.media_weights(number).numpy() for number in range(len(attention.media))]
    shown = {int(position) for medium in attention.media for position in medium.positions}
    text = [position for position in range(len(attention.tokens)) if position not in shown]
    lines = [text[start : start + _LINE] for start in range(0, len(text), _LINE)]
    num_btoks = len(attention.weights)
    heights = []
    for values in maps:  # (K, steps in time, rows, columns): a row of panels for each step, as high as its picture
        heights += [_WIDTH * values.shape[2] / values.shape[3] + 0.35] * values.shape[1]
    heights += [0.22 * num_btoks + 0.9] * len(lines)
    figure = Figure(figsize=(_WIDTH * (num_btoks + 1), sum(heights) + 0.5), layout="constrained")
    grid = figure.add_gridspec(len(heights), num_btoks + 1, height_ratios=heights)
    row = 0
    for number, values in enumerate(maps):
        for step in range(values.shape[1]):
            picture = _frame(pictures[number], step, values.shape[1]) if len(pictures) else None
            axes = [figure.add_subplot(grid[row, column]) for column in range(num_btoks + 1)]
            _draw_maps(axes, values[:, step], values.max(), picture)
            row += 1
    highest = attention.weights[:, text].max().item() if text else 0.0
    for positions in lines:
        _draw_strip(figure.add_subplot(grid[row, :]), attention, positions, highest)
        row += 1
    figure.suptitle(title)
    figure.savefig(path, dpi=90)


def _frame(picture: Image.Image | np.ndarray, step: int, steps: int) -> np.ndarray:
    """The picture of one step in time: of the frames that the backbone merges into it, the first."""
    pixels = np.asarray(picture)
    return pixels[step * len(pixels) // steps] if pixels.ndim == 4 else pixels


def _draw_maps(axes: list[Any], values: np.ndarray, highest: float, picture: np.ndarray | None) -> None:
    """The picture, then one panel per bottleneck token; values (K, rows, columns)."""
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    if picture is None:
        axes[0].axis("off")
    else:
        axes[0].imshow(picture)
        axes[0].set_title("input", fontsize=9)
    height, width = values.shape[1:] if picture is None else picture.shape[:2]
    for index, (axis, value) in enumerate(zip(axes[1:], values, strict=True)):
        if picture is not None:
            axis.imshow(np.asarray(Image.fromarray(picture).convert("L")), cmap="gray", vmin=0, vmax=255)
        alpha = 1.0 if picture is None else 0.65
        axis.imshow(value, extent=(0, width, height, 0), cmap="inferno", vmin=0, vmax=highest, alpha=alpha)
        axis.set_title(f"btok_{index}: {value.sum():.0%} of its attention", fontsize=9)


def _draw_strip(axis: Any, attention: BTokAttention, positions: list[int], highest: float) -> None:
    """Attention of every bottleneck token to one line of text tokens."""
    values = attention.weights[:, positions].numpy()
    padded = np.full((len(values), _LINE if len(positions) == _LINE else max(len(positions), 12)), np.nan)
    padded[:, : len(positions)] = values
    axis.imshow(padded, cmap="inferno", vmin=0, vmax=highest, aspect="auto")
    labels = [attention.tokens[position].replace("\n", "\\n") for position in positions]
    axis.set_xticks(range(len(positions)), labels, rotation=90, fontsize=8, parse_math=False)
    axis.set_yticks(range(len(values)), [f"btok_{index}" for index in range(len(values))], fontsize=8)
    for side in axis.spines.values():
        side.set_visible(False)


def main(
    model: str,
    image: str | None,
    text: str | None,
    prompt: str | None,
    out: Path,
    layers: list[int] | None,
    beams: int,
) -> int:
    """The command `st-btok explain`; its arguments are described in `tools/command.py`."""
    if not image and not text:
        raise ValueError("there must be something to look at. Give an --image, a --text or both.")
    picture = rgb_image(image) if image else None
    loaded = SentenceTransformer(model)
    given = {key: value for key, value in (("image", picture), ("text", text)) if value}
    sample: Any = checked_inputs([given], loaded).inputs[0]
    decoded = decode_btoks(loaded, [sample], num_beams=beams, prompt=prompt)[0]
    attention = btok_attention(loaded, sample, layers, prompt=prompt)
    pictures = [picture] if picture and len(attention.media) == 1 else []
    draw_attention(attention, out, pictures, f"generated from the bottleneck tokens: “{decoded.text}”")
    sys.stdout.write(f"generated from the bottleneck tokens: {decoded.text!r}\nheat maps: {out}\n")
    return 0
