"""From measured samples to curves with intervals, the three stages, one figure and one page.

The stages are DyVTE's (https://arxiv.org/abs/2411.19628): text and image tokens first exchange much (early fusion),
then each kind attends to its own (intra-modality modelling), then text looks at the image again (multimodal reasoning).
:func:`find_stages` states the rule by which they are found here; the paper shows them by eye.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mllm.errors import EvalError
from mllm.eval.analyze import FEWEST, FIELDS
from mllm.eval.attention_flow import KEYS, QUERIES
from mllm.eval.results import write_json
from mllm.eval.stats import wilson

STAGES = ("early fusion", "intra-modality modelling", "multimodal reasoning")
FLOWS = [(query, key) for query in QUERIES for key in (*KEYS, "text")]
#: share of samples whose greedy answer must stay for an exit to count as free
KEPT = 0.95
_ROUNDS = 2000  # bootstrap resamples of intervals
_STAGE_ROUNDS = 200  # resamples on which the stages are looked for again
_FLOOR = 1e-4  # smallest share that is told from nothing


# --- stages -----------------------------------------------------------------------------------------------------------


def find_stages(curves: Any, seed: int = 0) -> dict[str, Any]:
    """Find the three stages in the share of attention that text rows pay to image rows.

    The rule:

    1. Take the logarithm of the mean share of each layer, so that 2 % to 4 % is as much of a change as 20 % to 40 %.
    2. Fit step functions of 1 to 4 levels by least squares and keep the one with the lowest Bayesian information
       criterion, n ln(SSE / n) + (2 levels - 1) ln n for n layers. Levels after the first last at least a tenth of
       the depth and 2 layers; a fit of k levels needs 2 (2k - 1) layers.
    3. The lowest of the inner levels is *intra-modality modelling*, if it is lower than the level before it and the
       one after it, and starts in the first third of the depth, since early fusion is quick. What lies before is
       *early fusion*; the levels after it, as long as they are higher, are *multimodal reasoning*.
    4. Repeat on 200 resamples of the samples. Fewer than 95 % of them with the stages: not found.

    Args:
        curves: (samples, layers) shares between 0 and 1.
        seed: of the resampling.

    Returns:
        ``found``; ``stages``: name, first and last layer of each, empty where not found; ``levels``: the fitted steps
        (first layer, last layer, share); ``stability``: share of resamples with stages; ``boundaries95``: 95 % range
        of the first layers of the second and third stage over these; ``reason`` in words.
    """
    curves = np.clip(np.asarray(curves, dtype=float), _FLOOR, None)  # (samples, layers)
    samples, layers = curves.shape
    steps = _fit_steps(np.log(curves.mean(axis=0)))
    levels = [{"first": a, "last": b, "share": math.exp(value)} for a, b, value in steps]
    stages, reason = _name_stages(steps)
    result = {"found": False, "stages": [], "levels": levels, "stability": None, "boundaries95": None, "reason": reason}
    if not stages:
        if layers < 10:
            result["reason"] = f"{layers} layers are too few to tell three levels from noise; 10 are needed."
        return result
    rng = np.random.default_rng(seed)
    starts = []
    for _ in range(_STAGE_ROUNDS):
        again = curves[rng.integers(0, samples, samples)].mean(axis=0)
        found, _ = _name_stages(_fit_steps(np.log(again)))
        if found:
            starts.append([found[1][1], found[2][1]])
    result["stability"] = len(starts) / _STAGE_ROUNDS
    if starts:
        result["boundaries95"] = np.percentile(starts, [2.5, 97.5], axis=0).T.tolist()
    if result["stability"] < 0.95:
        result["reason"] = f"only {result['stability']:.0%} of resamples of the samples show the three stages."
        return result
    result["found"] = True
    result["stages"] = [{"name": name, "first": first, "last": last} for name, first, last in stages]
    return result


def _fit_steps(values: np.ndarray) -> list[tuple[int, int, float]]:
    """First layer, last layer and level of each step of the best fit."""
    n = len(values)
    sums, squares = np.concatenate([[0], values.cumsum()]), np.concatenate([[0], (values**2).cumsum()])
    first, stop = np.arange(n)[:, None], np.arange(1, n + 1)[None]
    length = np.maximum(stop - first, 1)
    error = squares[stop] - squares[first] - (sums[stop] - sums[first]) ** 2 / length  # (first, stop - 1)
    error = np.where(stop > first, np.maximum(error, 0), np.inf)
    shortest = max(2, math.ceil(n / 10))  # of the levels after the first
    later = np.where(stop - first >= shortest, error, np.inf)
    best, cuts = error[0].copy(), [[0]] * n  # of the values up to and with each place
    chosen: tuple[float, list[int]] | None = None
    for levels in range(1, 5):
        if 2 * (2 * levels - 1) > n:
            break
        if levels > 1:
            sums_of = best[:-1, None] + later[1:]  # (last of the step before, stop - 1)
            before = sums_of.argmin(axis=0)
            best, cuts = sums_of.min(axis=0), [[*cuts[b], int(b) + 1] for b in before]
        # a perfect fit of made-up numbers must not win by log(0)
        score = n * math.log(max(best[-1] / n, 1e-6)) + (2 * levels - 1) * math.log(n)
        if chosen is None or score < chosen[0]:
            chosen = score, cuts[-1]
    starts = chosen[1] if chosen else [0]
    ends = [*starts[1:], n]
    return [(a, b - 1, float(values[a:b].mean())) for a, b in zip(starts, ends, strict=True)]


def _name_stages(steps: Sequence[tuple[int, int, float]]) -> tuple[list[tuple[str, int, int]], str]:
    """The stages, or none and why."""
    shares = " -> ".join(f"{math.exp(value):.0%}" for _, _, value in steps)
    if len(steps) < 3:
        return [], f"the curve has no three levels ({shares})."
    middle = min(range(1, len(steps) - 1), key=lambda i: steps[i][2])
    low, depth = steps[middle][2], steps[-1][1] + 1
    if not (steps[middle - 1][2] > low < steps[middle + 1][2]):
        return [], f"the levels do not fall and rise again ({shares})."
    if steps[middle][0] > depth / 3:
        return [], f"the levels fall and rise again ({shares}), but the fall comes late, at layer {steps[middle][0]}."
    last = middle + 1
    while last + 1 < len(steps) and steps[last + 1][2] > low:
        last += 1
    return [
        (STAGES[0], 0, steps[middle - 1][1]),
        (STAGES[1], steps[middle][0], steps[middle][1]),
        (STAGES[2], steps[middle + 1][0], steps[last][1]),
    ], f"the levels fall and rise again ({shares})."


# --- numbers ----------------------------------------------------------------------------------------------------------


def summarize(
    records: Sequence[dict[str, Any]], settings: dict[str, Any], failed: Sequence[str], names: Sequence[str]
) -> dict[str, Any]:
    """Curves over the layers from the samples' records: mean, 95 % interval and count of each number.

    Intervals: bootstrap over samples; Wilson for shares of samples; none below 5 samples.
    """
    mass = np.array([record["mass"] for record in records], dtype=float)  # (samples, layers, 5, 4), NaN where missing
    uniform = np.array([record["uniform"] for record in records], dtype=float)  # (samples, 5, 4)
    flow, flat = {}, {}
    for query, key in FLOWS:
        flow[f"{query}->{key}"] = _curve(_pick(mass, query, key))
        flat[f"{query}->{key}"] = _first(_curve(_pick(uniform, query, key)[:, None]))
    summary: dict[str, Any] = {
        **settings,
        "samples": len(records),
        "sample_names": list(names),
        "failed": list(failed),
        "layers": mass.shape[1],
        "tokens": {name: _first(_curve(_column(records, lambda r, n=name: r["tokens"][n]))) for name in QUERIES},
        "compared_tokens": _first(_curve(_column(records, lambda r: r["answer_tokens"]))),
        "empty_answers": sum(not record["answer"] for record in records),
        "examples": [{name: record[name] for name in ("name", "question", "answer")} for record in records[:5]],
        "flow": flow,
        "uniform": flat,
    }
    for what in ("contribution", "exit"):
        summary[what] = {
            name: _curve(np.array([record[what][name] for record in records], dtype=float), name.endswith("stays"))
            for name in FIELDS
        }
    summary["blank"] = {
        name: _first(_curve(_column(records, lambda r, n=name: r["blank"][n]), name.endswith("stays")))
        for name in FIELDS
    }
    summary["stages"] = find_stages(_pick(mass, "text", "image"))
    stays = summary["exit"]["answer_stays"]["mean"]
    lasting = [layer for layer in range(len(stays)) if min(stays[layer:]) >= KEPT]
    summary["free_exit_layer"] = lasting[0]
    return summary


def _pick(mass: np.ndarray, query: str, key: str) -> np.ndarray:
    """(samples, ...) shares of (samples, ..., 5, 4)."""
    rows = mass[..., QUERIES.index(query), :]
    if key == "text":
        return rows[..., KEYS.index("prefix")] + rows[..., KEYS.index("question")]
    return rows[..., KEYS.index(key)]


def _column(records: Sequence[dict[str, Any]], value: Any) -> np.ndarray:
    """(samples, 1)."""
    return np.array([[float(value(record))] for record in records])


def _curve(values: np.ndarray, shares: bool = False) -> dict[str, Any]:
    """Mean and interval of (samples, layers), over the samples that have a number."""
    there = ~np.isnan(values)  # (samples, layers)
    counts = there.sum(axis=0)  # (layers,)
    filled = np.where(there, values, 0.0)
    with np.errstate(invalid="ignore"):
        mean = filled.sum(axis=0) / counts
        if shares:
            columns = zip(filled.sum(axis=0), counts, strict=True)
            ends = [wilson(round(right), int(n)) if n else (math.nan,) * 2 for right, n in columns]
            low, high = np.array(ends).T
        else:
            rng = np.random.default_rng(0)
            draws = rng.multinomial(len(values), [1 / len(values)] * len(values), _ROUNDS)  # (rounds, samples)
            means = (draws @ filled) / (draws @ there)  # (rounds, layers)
            low, high = np.nanpercentile(means, [2.5, 97.5], axis=0) if counts.any() else (mean, mean)
    if len(values) < FEWEST:
        low = high = np.full_like(mean, math.nan)
    return {"mean": _numbers(mean), "low": _numbers(low), "high": _numbers(high), "n": int(counts.max())}


def _numbers(values: np.ndarray) -> list[float | None]:
    return [None if math.isnan(value) else float(value) for value in values]


def _first(curve: dict[str, Any]) -> dict[str, Any]:
    """A curve of one point as a number."""
    return {name: value[0] if isinstance(value, list) else value for name, value in curve.items()}


# --- page -------------------------------------------------------------------------------------------------------------


def write_report(summary: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Write ``analysis.json``, ``analysis.md`` and ``analysis.png``, each whole or not at all.

    Raises:
        EvalError: the folder cannot be written.
    """
    write_json(folder / "analysis.json", summary)
    _write(folder / "analysis.md", to_markdown(summary).encode())
    _write(folder / "analysis.png", draw(summary))
    return {kind: folder / f"analysis.{kind}" for kind in ("json", "md", "png")}


def _write(path: Path, content: bytes) -> None:
    scratch = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        scratch.write_bytes(content)
        os.replace(scratch, path)
    except OSError as error:
        raise EvalError(f"{path} cannot be written: {error}. Free some space or give another --out.") from error


def describe_stages(summary: dict[str, Any]) -> str:
    """The stages, or that there are none, in one line."""
    stages = summary["stages"]
    if not stages["found"]:
        return f"stages not found: {stages['reason']}"
    return "; ".join(f"{stage['name']}: layers {stage['first']} to {stage['last']}" for stage in stages["stages"])


def describe_exit(summary: dict[str, Any]) -> str:
    """From which layer on the visual tokens may leave, in one line."""
    layer, last = summary["free_exit_layer"], summary["layers"] - 1
    if layer == last:
        return f"no exit before the last layer keeps the greedy answer of {KEPT:.0%} of the samples"
    stays = _text(_at(summary["exit"]["answer_stays"], layer), ".0%")
    return f"visual tokens may leave after layer {layer} of {last}: there {stays} of the greedy answers stay"


def describe(summary: dict[str, Any]) -> str:
    """What was found, in a few lines for a terminal."""
    contribution = summary["contribution"]["answer_kl"]["mean"]
    order = sorted(range(len(contribution)), key=lambda layer: -contribution[layer])
    lines = [
        f"{summary['samples']} samples, {summary['layers']} layers"
        + (f", {len(summary['failed'])} could not be read" if summary["failed"] else ""),
        describe_stages(summary),
        describe_exit(summary),
        "layers that contribute most: " + ", ".join(f"{layer} ({contribution[layer]:.2g} nats)" for layer in order[:3]),
        f"a grey picture instead: {_text(summary['blank']['answer_kl'])} nats, "
        f"{_text(summary['blank']['answer_stays'], '.0%')} of the answers stay",
    ]
    if "chosen" in summary:
        chosen = summary["chosen"]
        lines.append(
            f"{chosen['technique']} on layers {chosen['layers']}: {_text(chosen['answer_kl'])} nats, "
            f"{_text(chosen['answer_stays'], '.0%')} of the answers stay"
        )
    return "\n".join(lines)


def _text(number: dict[str, Any], form: str = ".3g") -> str:
    if number["mean"] is None:
        return "-"
    spread = "" if number["low"] is None else f" [{number['low']:{form}}, {number['high']:{form}}]"
    return f"{number['mean']:{form}}{spread}"


def _at(curve: dict[str, Any], layer: int) -> dict[str, Any]:
    return {name: value[layer] if isinstance(value, list) else value for name, value in curve.items()}


def to_markdown(summary: dict[str, Any]) -> str:
    """The page that stands beside the figure."""
    blank, tokens = summary["blank"], summary["tokens"]
    lines = [
        f"# Where `{summary['model']}` looks, and which layers change its answer",
        "",
        f"{summary['samples']} samples, {summary['layers']} layers, {summary['dtype']}, {summary['backend']}, "
        f"{summary['device']}. Means over samples with 95 % intervals.",
        "",
        "![curves](analysis.png)",
        "",
        f"- {_sentence(describe_stages(summary))}",
        f"- {_sentence(describe_exit(summary))}",
        f"- How much the picture matters at all: with a grey picture instead, the answer moves by "
        f"{_text(blank['answer_kl'])} nats a token, and {_text(blank['answer_stays'], '.0%')} of the greedy answers "
        "stay. Contributions and exit effects are to be read against this.",
        f"- Tokens of a prompt: {_text(tokens['prefix'], '.0f')} before the image, {_text(tokens['image'], '.0f')} of "
        f"images, {_text(tokens['question'], '.0f')} after; compared tokens of an answer: "
        f"{_text(summary['compared_tokens'], '.1f')} (at most {summary['answer_tokens']}).",
    ]
    if summary["empty_answers"]:
        lines.append(
            f"- **{summary['empty_answers']} of {summary['samples']} greedy answers are empty**: the model ends at "
            "once. What is measured there is how sure it is of that."
        )
    if summary["failed"]:
        lines.append(f"- {len(summary['failed'])} samples could not be read: {'; '.join(summary['failed'][:3])}")
    if "chosen" in summary:
        chosen = summary["chosen"]
        lines += ["", "## Chosen layers", "", f"{chosen['technique']} on layers {chosen['layers']}, all together:", ""]
        lines += [
            f"- answer moves by {_text(chosen['answer_kl'])} nats a token (first token {_text(chosen['next_kl'])})",
            f"- the greedy answer stays on {_text(chosen['answer_stays'], '.0%')} of the samples",
        ]
    lines += ["", "## Attention", "", "Share of the attention that rows of one kind pay to rows of another.", ""]
    flows = ["question->image", "last->image", "image->image", "text->text", "image->text", "question->first"]
    lines += ["| layer | " + " | ".join(flow.replace("->", " → ") for flow in flows) + " |", "|--:" * 7 + "|"]
    for layer in range(summary["layers"]):
        cells = [_text(_at(summary["flow"][flow], layer), ".3f") for flow in flows]
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    lines.append("| *even* | " + " | ".join(_text(summary["uniform"][flow], ".3f") for flow in flows) + " |")
    lines += ["", "*even*: every visible key weighs the same. *first*: the first token of the row alone.", ""]
    lines += [
        "## Layers",
        "",
        "KL from the plain model in nats a token of the answer, and greedy answers that stay.",
        "",
    ]
    lines += ["| layer | frozen here: KL | stays | gone after it: KL | stays |", "|--:" * 5 + "|"]
    for layer in range(summary["layers"]):
        cells = []
        for what in ("contribution", "exit"):
            cells.append(_text(_at(summary[what]["answer_kl"], layer)))
            cells.append(_text(_at(summary[what]["answer_stays"], layer), ".0%"))
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    lines += ["", "## Answers", "", "| sample | question | greedy answer |", "|:--|:--|:--|"]
    for example in summary["examples"]:
        cells = [str(example[name]).replace("|", "\\|").replace("\n", " ") for name in ("name", "question", "answer")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:].rstrip(".") + "."


# --- figure -----------------------------------------------------------------------------------------------------------

# Okabe and Ito: told apart with every kind of colour vision; marker and line differ too
_BLUE, _RED, _GREEN, _PURPLE, _GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#555555"
_SHADES = ("#E8EEF4", "#FFFFFF", "#F6EEDC")


def draw(summary: dict[str, Any]) -> bytes:
    """PNG: attention flow, layer contribution, exit effect and kept answers over the layers, stages shaded."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = np.arange(summary["layers"])
    settings = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.7}
    with rc_context(settings):
        figure = Figure(figsize=(9.2, 10.2), dpi=110, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        flow, contribution, leaving, kept = figure.subplots(4, 1, sharex=True, height_ratios=[3.2, 2.4, 2.4, 2])
        _draw_flow(flow, layers, summary)
        grey = summary["blank"]["answer_kl"]
        _draw_kl(contribution, layers, summary["contribution"]["answer_kl"], grey, _GREEN, "s")
        contribution.set_title(
            "Layer contribution: visual rows frozen in this layer alone", loc="left", fontweight="bold"
        )
        _draw_kl(leaving, layers, summary["exit"]["answer_kl"], grey, _PURPLE, "D")
        leaving.set_title("Exit effect: visual rows gone after this layer", loc="left", fontweight="bold")
        _draw_kept(kept, layers, summary)
        for axes in (flow, contribution, leaving, kept):
            _shade(axes, summary["stages"])
            axes.grid(color="#dddddd", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.legend(loc="upper left", bbox_to_anchor=(1.005, 1.0), frameon=False, borderaxespad=0)
        step = max(1, math.ceil(len(layers) / 20))
        kept.set_xticks(layers[::step])
        kept.set_xlim(-0.5, len(layers) - 0.5)
        kept.set_xlabel("layer")
        _name_the_stages(flow, summary["stages"])
        figure.align_ylabels()
        buffer, small = io.BytesIO(), io.BytesIO()
        figure.savefig(buffer, format="png")
    with Image.open(buffer) as picture:  # few colours: a third of the size
        picture.convert("RGB").quantize(96, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
    return small.getvalue()


def _line(
    axes: Any, layers: np.ndarray, curve: dict[str, Any], color: str, marker: str, label: str, **more: Any
) -> None:
    mean, low, high = (np.array(curve[name], dtype=float) for name in ("mean", "low", "high"))
    axes.fill_between(layers, low, high, color=color, alpha=0.18, linewidth=0)
    axes.plot(layers, mean, color=color, marker=marker, ms=4, lw=1.4, label=label, **more)


def _draw_flow(axes: Any, layers: np.ndarray, summary: dict[str, Any]) -> None:
    looks = [
        ("text->image", _BLUE, "o", "-"),
        ("image->image", _RED, "s", "-"),
        ("text->text", _BLUE, "o", "--"),
        ("image->text", _RED, "s", "--"),
    ]
    for name, color, marker, line in looks:
        hollow = {"mfc": "white"} if line == "--" else {}
        label = name.replace("->", " to ")
        _line(axes, layers, summary["flow"][name], color, marker, label, ls=line, **hollow)
    _line(axes, layers, summary["flow"]["last->image"], "#000000", "^", "last token to image")
    for name, color in (("text->image", _BLUE), ("image->image", _RED)):
        level = summary["uniform"][name]["mean"]
        if level is not None:
            label = f"{name.replace('->', ' to ')}, if every\nvisible key weighed the same"
            axes.axhline(level, color=color, lw=1.1, ls=":", label=label)
    axes.set_ylim(0, 1)
    axes.set_ylabel("share of attention")


def _draw_kl(
    axes: Any, layers: np.ndarray, curve: dict[str, Any], grey: dict[str, Any], color: str, marker: str
) -> None:
    """On a logarithmic scale; layers of exactly nothing are marked at the lower edge."""
    tiny = 1e-9
    mean = np.array(curve["mean"], dtype=float)
    shown = {name: [v if v is not None and v > tiny else None for v in curve[name]] for name in ("mean", "low", "high")}
    _line(axes, layers, shown, color, marker, "answer, mean a token")
    axes.set_yscale("log")
    axes.set_ylabel("KL, nats")
    if grey["mean"] is not None and grey["mean"] > tiny:
        axes.axhline(grey["mean"], color=_GREY, lw=1.1, ls="-.", label="grey picture instead")
    nothing = layers[mean <= tiny]
    if len(nothing):
        transform = axes.get_xaxis_transform()
        axes.plot(
            nothing,
            [0.03] * len(nothing),
            "v",
            color=color,
            ms=6,
            transform=transform,
            clip_on=False,
            label="exactly 0",
        )


def _draw_kept(axes: Any, layers: np.ndarray, summary: dict[str, Any]) -> None:
    _line(axes, layers, summary["exit"]["answer_stays"], _PURPLE, "D", "gone after this layer")
    _line(
        axes, layers, summary["contribution"]["answer_stays"], _GREEN, "s", "frozen in this layer", ls="--", mfc="white"
    )
    axes.axhline(summary["blank"]["answer_stays"]["mean"], color=_GREY, lw=1.1, ls="-.", label="grey picture instead")
    axes.axhline(KEPT, color="black", lw=0.9, ls=":", label=f"{KEPT:.0%}")
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("share of samples")
    axes.set_title("Greedy answers that stay the same", loc="left", fontweight="bold")


def _shade(axes: Any, stages: dict[str, Any]) -> None:
    for stage, color in zip(stages["stages"], _SHADES, strict=False):
        axes.axvspan(stage["first"] - 0.5, stage["last"] + 0.5, color=color, zorder=0, lw=0)
        if stage["first"]:
            axes.axvline(stage["first"] - 0.5, color="#999999", lw=0.8, zorder=1)


def _name_the_stages(axes: Any, stages: dict[str, Any]) -> None:
    """Names above the first panel, numbered where a stage is too narrow for its name."""
    title = "Attention between kinds of rows"
    if not stages["found"]:
        axes.set_title(f"{title} (three stages: not found)", loc="left", fontweight="bold")
        return
    axes.set_title(title, loc="left", fontweight="bold", pad=20)
    total = axes.get_xlim()[1] - axes.get_xlim()[0]
    for number, stage in enumerate(stages["stages"], 1):
        width = (stage["last"] - stage["first"] + 1) / total
        room = 0.0085 * len(stage["name"])  # of the panel's width, at this size
        name = stage["name"] if width > room else f"{number}"
        middle = (stage["first"] + stage["last"]) / 2
        axes.text(middle, 1.02, name, transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=8.5)
        if name != stage["name"]:
            axes.plot([], [], " ", label=f"{number}: {name and stage['name']}")
    axes.legend(loc="upper left", bbox_to_anchor=(1.005, 1.0), frameon=False, borderaxespad=0)
