"""What happened inside, as pictures: tokens over the image, pages with scores, the router's weights."""

from __future__ import annotations

import base64
import html
import io
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mllm.demo.charts import line_per_layer, router_text
from mllm.demo.recording import Inside

_SIDE = 448
_GONE, _PASSIVE = (24, 24, 32), (245, 158, 11)

#: picture, caption, class in the style sheet
Shown = list[tuple[Image.Image, str, str]]


def data_address(image: Image.Image) -> str:
    """The picture inside the page itself: no file is left behind that somebody must remove."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def figures(shown: Shown) -> str:
    """Pictures side by side with their captions; nothing where there are none."""
    parts = []
    for image, caption, kind in shown:
        text = html.escape(caption)
        parts.append(
            f'<figure class="{kind}"><img src="{data_address(image)}" alt="{html.escape(caption, quote=True)}">'
            f"<figcaption>{text}</figcaption></figure>"
        )
    return f'<div class="mllm-figures">{"".join(parts)}</div>' if parts else ""


def _fit(image: Image.Image, side: int = _SIDE) -> Image.Image:
    scale = side / max(image.size)
    return image.resize([max(1, round(length * scale)) for length in image.size], Image.Resampling.BICUBIC)


def _name(inside: Inside, number: int) -> str:
    picture = inside.pictures[number]
    if picture.page is not None:
        return f"Page {picture.page}"
    return f"Picture {number + 1}" if len(inside.pictures) > 1 else "Picture"


def tokens_over_pictures(inside: Inside, layer: int) -> Shown:
    """Each picture with the tokens that left before ``layer`` dark, those that only offer keys and values tinted."""
    layer = min(max(int(layer), 0), inside.layers - 1)
    shown: Shown = []
    for number, (picture, block) in enumerate(zip(inside.pictures, inside.blocks, strict=True)):
        alive = inside.alive[layer][block]  # (tokens,)
        caption = f"{_name(inside, number)}: {int(alive.sum())} of {len(block)} tokens in this layer"
        grid = inside.grids[number]
        if grid is None:
            shown.append((_fit(picture.image), f"{_name(inside, number)}: places not known", ""))
            continue
        image = picture.image
        if grid.crop:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
        image = _fit(image)
        cells = grid.first + np.arange(grid.height)[:, None] * grid.step + np.arange(grid.width)  # (height, width)
        there = alive[cells]
        tint = np.zeros((grid.height, grid.width, 4), dtype=np.uint8)
        tint[~there] = (*_GONE, 185)
        if inside.policies[layer] != "full":
            tint[there] = (*_PASSIVE, 105)
        over = Image.fromarray(tint).resize(image.size, Image.Resampling.NEAREST)
        drawn = Image.alpha_composite(image.convert("RGBA"), over)
        _lines(drawn, grid.height, grid.width)
        shown.append((drawn.convert("RGB"), caption, ""))
    return shown


def _lines(image: Image.Image, height: int, width: int) -> None:
    if image.height / height < 6 or image.width / width < 6:
        return
    lines = Image.new("RGBA", image.size)
    draw = ImageDraw.Draw(lines)
    for column in range(1, width):
        x = column * image.width / width
        draw.line((x, 0, x, image.height), fill=(128, 128, 128, 70))
    for row in range(1, height):
        y = row * image.height / height
        draw.line((0, y, image.width, y), fill=(128, 128, 128, 70))
    image.alpha_composite(lines)


def layer_words(inside: Inside, layer: int) -> str:
    """What visual tokens do in a layer, in words."""
    count, total = inside.counts[layer], int(inside.visual.sum())
    if not count:
        return f"Layer {layer}: no visual tokens{f'; all {total} left before' if total else ''}."
    policy = inside.policies[layer]
    does = "they run the whole layer" if policy == "full" else f"they do not attend: {policy}"
    dark = " Dark ones left before." if count < total else ""
    return f"Layer {layer}: {count} of {total} visual tokens; {does}.{dark}"


def page_gallery(inside: Inside) -> Shown:
    """Pages with their scores, kept ones framed, where a technique chose among pages; else nothing."""
    for output in inside.outputs.values():
        if "scores" not in output or "kept" not in output:
            continue
        scores = output["scores"][0] if output["scores"] else None
        kept = set(output["kept"][0]) if output["kept"] else set()
        shown: Shown = []
        for number, picture in enumerate(inside.pictures):
            stays = number in kept
            told = "" if scores is None or number >= len(scores) else f", score {float(scores[number]):.2f}"
            caption = f"{_name(inside, number)}{told}, {'kept' if stays else 'left out'}"
            shown.append((_fit(picture.image, 320), caption, "framed" if stays else "left-out"))
        return shown
    return []


def router_weights(inside: Inside, layer: int) -> str:
    """The router's weights in one layer for each token, and their mean over layers; empty without a router."""
    for name, output in inside.outputs.items():
        router = output.get("router")
        if not isinstance(router, dict) or not router:
            continue
        text = ~inside.visual
        means = {int(n): float(w[0][text, 0].mean()) for n, w in router.items() if w is not None}
        if not means:
            continue
        nearest = min(means, key=lambda known: abs(known - layer))
        weights = router[nearest][0][:, 0]  # (S,)
        chart = line_per_layer(f"{name}: weight of the visual learner, mean over text", means, inside.layers)
        words = f"<p>Layer {nearest}, token by token: the stronger the tint, the more the visual learner counts.</p>"
        return chart + words + router_text(inside.tokens, inside.visual.tolist(), weights.tolist())
    return ""


def told_per_layer(inside: Inside) -> str:
    """Charts of whatever else a technique tells as one number per layer, such as a gate's probabilities."""
    charts = []
    for name, output in inside.outputs.items():
        for key, value in output.items():
            numbers = _per_layer(value) if key != "router" else None
            if numbers:
                charts.append(line_per_layer(f"{name}: {key.replace('_', ' ')}", numbers, inside.layers))
    return "".join(charts)


def _per_layer(value: Any) -> dict[int, float] | None:
    if not isinstance(value, dict) or not all(isinstance(layer, int) for layer in value):
        return None
    found = {}
    for layer, entry in value.items():
        first = entry[0] if isinstance(entry, (list, np.ndarray)) and len(entry) else entry
        if isinstance(first, (int, float, np.floating)) and not isinstance(first, bool):
            found[layer] = float(first)
    return found or None
