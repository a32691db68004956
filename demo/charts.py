"""Charts as SVG that takes its colours from the page, and so is readable in light and dark; texts are escaped."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mllm.demo.recording import Inside

_WIDTH, _HEIGHT = 400, 232
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 10, 42, 40


def _svg(body: Sequence[str], label: str, height: int = _HEIGHT) -> str:
    return (
        f'<svg class="mllm-chart" role="img" aria-label="{html.escape(label, quote=True)}" '
        f'viewBox="0 0 {_WIDTH} {height}" xmlns="http://www.w3.org/2000/svg">{"".join(body)}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str = "middle", style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {style}>{html.escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10 or value == int(value) else f"{value:.2g}"


class _Plot:
    """A plot area with axes from (x0, y0) to (x1, y1) in numbers."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.x0, self.x1 = x
        self.y0, self.y1 = y
        self.body: list[str] = []

    def x(self, value: float) -> float:
        share = (value - self.x0) / ((self.x1 - self.x0) or 1)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.y0) / ((self.y1 - self.y0) or 1)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def axes(
        self, title: str, x_ticks: Sequence[float], x_title: str, y_ticks: Sequence[float], unit: str = ""
    ) -> None:
        self.body.append(_text(2, 14, title, "start", 'class="title"'))
        for tick in y_ticks:
            self.body.append(_line(_LEFT, self.y(tick), _WIDTH - _RIGHT, self.y(tick), "grid"))
            self.body.append(_text(_LEFT - 6, self.y(tick) + 4, _short(tick), "end"))
        for tick in x_ticks:
            self.body.append(_text(self.x(tick), _HEIGHT - _BOTTOM + 16, f"{_short(tick)}{unit}"))
        self.body.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, x_title))


def _layer_ticks(layers: int) -> list[int]:
    step = max(1, math.ceil(layers / 8))
    ticks = list(range(0, layers, step))
    # the last layer has its number too, where there is room for it
    return ticks if layers - 1 - ticks[-1] < step / 2 and layers - 1 != ticks[-1] else sorted({*ticks, layers - 1})


def _half_steps(top: float) -> list[float]:
    return [0, top / 2, top] if top % 2 == 0 or top < 2 else [0, top]


def tokens_per_layer(inside: Inside) -> str:
    """Bars of the visual tokens in each layer, and a line where they left."""
    counts, layers = inside.counts, inside.layers
    top = max(counts, default=0)
    if not top:
        return ""
    plot = _Plot((-0.5, layers - 0.5), (0, top))
    plot.axes("Visual tokens alive in each layer", _layer_ticks(layers), "layer", _half_steps(top))
    width = (plot.x(1) - plot.x(0)) * 0.78
    for layer, count in enumerate(counts):
        kind = "kept" if inside.policies[layer] == "full" else "passive"
        height = plot.y(0) - plot.y(count)
        if count:
            plot.body.append(
                f'<rect class="{kind}" x="{plot.x(layer) - width / 2:.1f}" y="{plot.y(count):.1f}" '
                f'width="{width:.1f}" height="{height:.1f}" rx="1.5"><title>layer {layer}: {count}</title></rect>'
            )
    spans, start = [], 0
    for layer in range(1, layers + 1):
        if layer == layers or counts[layer] != counts[start]:
            where = f"layers {start} to {layer - 1}" if layer - 1 > start else f"layer {start}"
            spans.append(f"{counts[start]} in {where}")
            start = layer
    if (leave := inside.exit_layer) is not None:
        x = plot.x(leave + 0.5)
        plot.body.append(_line(x, _TOP - 4, x, plot.y(0), "exit"))
        beside = min(max(x, _LEFT + 62), _WIDTH - _RIGHT - 62)  # half of the words
        plot.body.append(_text(beside, _TOP - 8, f"exit after layer {leave}", style='class="mark"'))
    chart = _svg(plot.body, f"Visual tokens alive in each layer: {', '.join(spans)}.")
    passive = {policy for policy, count in zip(inside.policies, counts, strict=True) if policy != "full" and count}
    if not passive:
        return chart
    items = ['<span><i class="kept"></i> run the whole layer</span>'] if "full" in inside.policies else []
    items += [f'<span><i class="passive"></i> {html.escape(policy)}</span>' for policy in sorted(passive)]
    return f'{chart}<div class="mllm-legend">{"".join(items)}</div>'


def line_per_layer(title: str, values: Mapping[int, float], layers: int) -> str:
    """A line over layers, for shares and probabilities."""
    top = max(1.0, max(values.values(), default=1.0))
    plot = _Plot((0, max(layers - 1, 1)), (min(0.0, *values.values()), top))
    plot.axes(title, _layer_ticks(layers), "layer", [0, top / 2, top])
    points = [(plot.x(layer), plot.y(value)) for layer, value in sorted(values.items())]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    plot.body.append(f'<polyline class="curve" points="{path}"/>')
    for (x, y), (layer, value) in zip(points, sorted(values.items()), strict=True):
        plot.body.append(
            f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{layer}: {value:.3f}</title></circle>'
        )
    told = ", ".join(f"{value:.2f} at layer {layer}" for layer, value in sorted(values.items())[:40])
    return _svg(plot.body, f"{title}: {told}.")


@dataclass(frozen=True)
class Point:
    """One evaluated setting.

    Attributes:
        label: the settings.
        task: name of the task.
        score: 0 to 1.
        interval: 95 % interval of the score.
        flops_ratio: decoder FLOPs over those of the plain model.
        samples: how many were answered.
        front: no other point of the task is as good for as few FLOPs.
    """

    label: str
    task: str
    score: float
    interval: tuple[float, float]
    flops_ratio: float
    samples: int
    front: bool = False


def pareto(points: Sequence[Point]) -> str:
    """Score against FLOPs of one task; points are numbered, and a table below says which is which."""
    if not points:
        return ""
    right = max(1.0, *(point.flops_ratio for point in points))
    low = min(0.9, math.floor(min(point.flops_ratio for point in points) * 10) / 10 - 0.05)
    plot = _Plot((low, right + 0.05), (0, 1))
    ticks = [tick / 10 for tick in range(math.ceil(low * 10), math.floor((right + 0.05) * 10) + 1)]
    step = max(1, math.ceil(len(ticks) / 6))
    shown = [100 * tick for tick in ticks if round((1 - tick) * 10) % step == 0]
    plot.axes(f"{points[0].task}: score", [], "FLOPs of the decoder, % of the full model", [0, 0.5, 1])
    for tick in shown:
        plot.body.append(_text(plot.x(tick / 100), _HEIGHT - _BOTTOM + 16, _short(tick)))
    front = sorted((p.flops_ratio, p.score) for p in points if p.front)
    steps = []
    for number, (cost, score) in enumerate(front):
        if number:
            steps.append(f"{plot.x(cost):.1f},{plot.y(front[number - 1][1]):.1f}")
        steps.append(f"{plot.x(cost):.1f},{plot.y(score):.1f}")
    if len(front) > 1:
        plot.body.append(f'<polyline class="front" points="{" ".join(steps)}"/>')
    places: dict[tuple[int, int], list[int]] = {}
    for number, point in enumerate(points, 1):
        x, y = plot.x(point.flops_ratio), plot.y(point.score)
        plot.body.append(_line(x, plot.y(point.interval[0]), x, plot.y(point.interval[1]), "interval"))
        kind = "best" if point.front else "dot"
        plot.body.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
        near = next((place for place in places if abs(place[0] - x) < 22 and abs(place[1] - y) < 14), None)
        places.setdefault(near or (round(x), round(y)), []).append(number)
    for (x, y), numbers in places.items():  # points that lie on each other share a label
        end = x > _WIDTH - 60
        plot.body.append(
            _text(
                x + (-9 if end else 9), y - 7, ", ".join(map(str, numbers)), "end" if end else "start", 'class="mark"'
            )
        )
    rows = "".join(
        f"<tr><td>{number}</td><td>{html.escape(point.label)}</td><td>{point.score:.2f} "
        f"<small>({point.interval[0]:.2f} to {point.interval[1]:.2f})</small></td>"
        f"<td>{100 * point.flops_ratio:.0f} %</td><td>{point.samples}</td></tr>"
        for number, point in enumerate(points, 1)
    )
    told = "; ".join(f"{p.label}: {p.score:.2f} at {100 * p.flops_ratio:.0f} % of the FLOPs" for p in points)
    table = (
        '<div class="mllm-table"><table><thead><tr><th></th><th>settings</th><th>score (95 % interval)</th>'
        f"<th>FLOPs</th><th>samples</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )
    return _svg(plot.body, f"{points[0].task}, score against FLOPs: {told}.") + table


def router_text(tokens: Sequence[str], visual: Sequence[bool], weights: Sequence[float]) -> str:
    """The prompt's text, each token tinted by the weight of the visual learner; pictures stand as one mark."""
    parts, inside = [], False
    for token, seen, weight in zip(tokens, visual, weights, strict=True):
        if seen:
            if not inside:
                parts.append('<span class="picture">picture</span>')
            inside = True
            continue
        inside = False
        shown = html.escape(token).replace("\n", "<br>")
        share = round(100 * min(max(weight, 0.0), 1.0))
        parts.append(f'<span class="token" style="--share:{share}%" title="visual learner {weight:.2f}">{shown}</span>')
    return f'<div class="mllm-router">{"".join(parts)}</div>'
