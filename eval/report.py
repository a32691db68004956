"""The report: one table, one picture and one page from the result files of a folder, and from nothing else.

Scores are point estimates with 95 % intervals. A value that is not there is printed as a dash, never as 0.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from mllm.errors import EvalError
from mllm.eval.stats import adjusted

DASH = "–"
OVERALL = "overall"
SMALL_N = 200  # below this a 95 % interval of an accuracy can be wider than +-0.07
TERMINAL_WIDTH = 120
Cell = dict[str, Any]


# --- reading ----------------------------------------------------------------------------------------------------------


def collect_cells(out_dir: str | Path) -> tuple[list[Cell], list[str]]:
    """Cells of a result folder and the files that could not be read, each with its reason.

    ``cells/*.json`` counts where it exists, ``results.json`` otherwise.

    Raises:
        EvalError: there is no result file at all, or none of them can be read.
    """
    folder = Path(out_dir)
    files = sorted((folder / "cells").glob("*.json")) or [p for p in [folder / "results.json"] if p.is_file()]
    if not files:
        raise EvalError(
            f"{folder} holds no results: neither cells/*.json nor results.json. "
            "Give the folder that `mllm eval --out` wrote, or run `mllm eval` first."
        )
    cells: list[Cell] = []
    unreadable: list[str] = []
    for path in files:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            unreadable.append(f"{path.name}: {error}")
            continue
        for entry in data if isinstance(data, list) else [data]:
            keys = ("model", "config", "task")
            if isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in keys):
                cells.append(entry)
            else:
                unreadable.append(f"{path.name}: not a result cell with the texts {', '.join(keys)}")
    if not cells:
        raise EvalError(f"No result in {folder} can be read: {'; '.join(unreadable)}. Run `mllm eval` again.")
    return cells, unreadable


def _number(value: Any) -> float | None:
    """The value where it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _interval(value: Any) -> tuple[float, float] | None:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    low, high = (_number(v) for v in value)
    return None if low is None or high is None or low > high else (low, high)


# --- numbers ----------------------------------------------------------------------------------------------------------

#: what a configuration costs: key of the cell -> (column, divisor, what more of it is)
COSTS = {
    "flops": ("GFLOPs", 1e9),
    "ttft_ms_median": ("TTFT ms", 1.0),
    "tokens_per_s": ("tokens/s", 1.0),
    "kv_bytes": ("KV MB", 1e6),
    "peak_bytes": ("peak GB", 1e9),
}


@dataclass
class Row:
    """One configuration of one model on one task, or over all tasks.

    Attributes:
        score: fraction between 0 and 1, or whatever the metric gives; None where it is not known.
        ci: 95 % interval of the score.
        gain: score minus that of the plain model on the same samples, with its 95 % interval.
        costs: values by the keys of :data:`COSTS`, in their own units (FLOPs, ms, 1/s, bytes).
        dense: what the plain model would have spent on the same tokens, where the cell tells it.
        ratios: costs relative to ``dense``, else to what the plain model did spend, whose replies have other lengths.
        front: no other row has a score as good for as few FLOPs.
        higher: a higher score is better.
    """

    model: str
    config: str
    task: str
    metric: str | None = None
    score: float | None = None
    ci: tuple[float, float] | None = None
    gain: tuple[float, tuple[float, float]] | None = None
    n: int | None = None
    errors: int | None = None
    ttft_p90: float | None = None
    costs: dict[str, float | None] = field(default_factory=dict)
    dense: dict[str, float | None] = field(default_factory=dict)
    ratios: dict[str, float | None] = field(default_factory=dict)
    baseline: bool = False
    front: bool = False
    higher: bool = True


def pareto_front(points: Sequence[tuple[float | None, float | None]]) -> list[bool]:
    """Which (cost, score) points no other point beats: as cheap and as good, and better in one of the two.

    Equal points are all on the front; a point with a missing number never is.
    """
    order = sorted((p[0], -p[1]) for p in points if p[0] is not None and p[1] is not None)
    best, kept = -math.inf, set()
    for cost, negative in order:
        if -negative > best:
            best = -negative
            kept.add((cost, best))
    return [p in kept for p in points]


def combine_intervals(
    scores: Sequence[float], intervals: Sequence[tuple[float, float] | None]
) -> tuple[float, float] | None:
    """95 % interval of the mean of independent scores from their own intervals; None where one is missing.

    The distances to the limits add in quadrature, each side for itself (MOVER, Zou and Donner 2008), so that the
    one-sided intervals of scores near 0 or 1 stay inside the range.
    """
    known = [i for i in intervals if i is not None]
    if not scores or len(known) != len(scores):
        return None
    count, mean = len(scores), sum(scores) / len(scores)
    low = math.sqrt(sum((s - i[0]) ** 2 for s, i in zip(scores, known, strict=True))) / count
    high = math.sqrt(sum((i[1] - s) ** 2 for s, i in zip(scores, known, strict=True))) / count
    return mean - low, mean + high


def paired_difference(scores: dict[Any, float], plain: dict[Any, float]) -> tuple[float, tuple[float, float]] | None:
    """Mean difference of two configurations on the samples that both answered, and its 95 % interval.

    The interval is that of Bonett and Price (2012): one gain and one loss are added to what was seen, so that it keeps
    a width where no sample differs. None where the two share no sample.
    """
    shared = [key for key in scores if key in plain]
    if not shared:
        return None
    differences = [scores[key] - plain[key] for key in shared]
    unit = max(1.0, *(abs(d) for d in differences))  # scores of 0 to 1, unless the metric says otherwise
    return sum(differences) / len(differences), adjusted(differences, -unit, unit)


def _sample_scores(cell: Cell) -> dict[Any, float]:
    samples = cell.get("samples")
    rows = [s for s in samples if isinstance(s, dict)] if isinstance(samples, list) else []
    return {str(s.get("id")): score for s in rows if (score := _number(s.get("score"))) is not None}


def _baseline_config(cells: Iterable[Cell]) -> str | None:
    """Name of the plain model among the configurations of one model."""
    cells = list(cells)
    for cell in cells:
        if cell.get("baseline") is True or cell.get("techniques") == []:
            return cell["config"]
    names = {cell["config"] for cell in cells}
    if "none" in names:
        return "none"
    for name in sorted(names):
        pairs = [(_number(c.get("flops")), _number(c.get("dense_flops"))) for c in cells if c["config"] == name]
        if all(a is not None and a == b for a, b in pairs):
            return name
    return None


@dataclass
class Summary:
    """What the report prints: rows by task (``overall`` first where there are several), and remarks."""

    tables: dict[str, list[Row]]
    models: list[str]
    constants: dict[str, float]
    warnings: list[str]
    failures: list[str]
    techniques: dict[str, str]
    environment: dict[str, str]


def summarize(cells: Sequence[Cell]) -> Summary:
    """Order the cells into tables, compare each configuration with the plain model and find the Pareto fronts."""
    warnings: list[str] = []
    chosen: dict[tuple[str, str, str], Cell] = {}
    for cell in cells:
        key = (cell["model"], cell["config"], cell["task"])
        if key in chosen:
            warnings.append(f"{' / '.join(key)} has several results; the one with the most samples is shown.")
            if (_number(cell.get("n")) or 0) <= (_number(chosen[key].get("n")) or 0):
                continue
        chosen[key] = cell
    models = list(dict.fromkeys(key[0] for key in chosen))
    tasks = list(dict.fromkeys(key[2] for key in chosen))
    plain = {m: _baseline_config(c for k, c in chosen.items() if k[0] == m) for m in models}
    warnings += [
        f"{m}: no configuration is the plain model, so nothing can be compared with it."
        for m in models
        if plain[m] is None
    ]
    pairs = list(dict.fromkeys(key[:2] for key in chosen))
    # the plain model first, then from dear to cheap
    spent = {pair: [_number(c.get("flops")) or 0.0 for k, c in chosen.items() if k[:2] == pair] for pair in pairs}
    pairs.sort(key=lambda p: (models.index(p[0]), p[1] != plain[p[0]], -sum(spent[p]) / len(spent[p]), p[1]))

    tables: dict[str, list[Row]] = {}
    for task in tasks:
        tables[task] = [
            _task_row(model, config, task, chosen.get((model, config, task)), plain[model] == config)
            for model, config in pairs
            if any((model, c, task) in chosen for m, c in pairs if m == model)
        ]
    for (model, config, task), cell in chosen.items():
        base = chosen.get((model, plain[model] or "", task))
        if base is not None and base is not cell:
            others = [what for what in ("weights", "data") if cell.get(what) != base.get(what)]
            if others:
                warnings.append(
                    f"{model} / {config} / {task} was measured with other {' and '.join(others)} than "
                    f"{plain[model]}: they do not compare. Measure both again."
                )
                continue
            row = next(r for r in tables[task] if (r.model, r.config) == (model, config))
            row.gain = paired_difference(_sample_scores(cell), _sample_scores(base))
    if len(tasks) > 1:
        overall = [_overall_row(model, config, tables, plain[model] == config) for model, config in pairs]
        tables = {OVERALL: overall, **tables}
    for rows in tables.values():
        points = [(r.costs.get("flops"), r.score if r.higher or r.score is None else -r.score) for r in rows]
        for row, front in zip(rows, pareto_front(points), strict=True):
            row.front = front
        for row in rows:
            base = next((r for r in rows if r.model == row.model and r.baseline), None)
            for key in COSTS:
                row.ratios[key] = _ratio(row.costs.get(key), row.dense.get(key) or (base and base.costs.get(key)))
    return Summary(
        tables,
        models,
        _constants(tables, chosen),
        warnings + _mixtures(tables, chosen),
        _failures(tables, chosen),
        _techniques(chosen.values()),
        _environment(chosen.values()),
    )


def _task_row(model: str, config: str, task: str, cell: Cell | None, baseline: bool) -> Row:
    if cell is None:
        return Row(model, config, task, costs=dict.fromkeys(COSTS), baseline=baseline)
    n, errors, score = (_number(cell.get(key)) for key in ("n", "errors", "score"))
    return Row(
        model,
        config,
        task,
        metric=str(cell["metric"]) if cell.get("metric") else None,
        score=score,
        ci=None if score is None else _interval(cell.get("ci95")),
        n=None if n is None else int(n),
        errors=None if errors is None else int(errors),
        ttft_p90=_number(cell.get("ttft_ms_p90")),
        costs={key: _number(cell.get(key)) for key in COSTS},
        dense={key: _number(cell.get(f"dense_{key}")) for key in ("flops", "kv_bytes")},
        baseline=baseline,
        higher=cell.get("higher_is_better") is not False,
    )


def _overall_row(model: str, config: str, tables: dict[str, list[Row]], baseline: bool) -> Row:
    """Mean over tasks; only where every task that the model was scored on is there: other means would not compare."""
    mine = [row for rows in tables.values() for row in rows if row.model == model]
    wanted = {row.task for row in mine if row.score is not None}
    rows = [row for row in mine if row.config == config]
    parts = [row for row in rows if row.task in wanted]
    total = Row(model, config, OVERALL, metric="mean over tasks", costs=dict.fromkeys(COSTS), baseline=baseline)
    counted = [row.n for row in rows if row.n is not None]
    failed = [row.errors for row in rows if row.errors is not None]
    total.n, total.errors = sum(counted) if counted else None, sum(failed) if failed else None
    scores = [row.score for row in parts if row.score is not None]
    if not scores or len(scores) != len(parts) or not all(row.higher for row in parts):
        return total
    total.score = sum(scores) / len(scores)
    total.ci = combine_intervals(scores, [row.ci for row in parts])
    gains = [row.gain for row in parts if row.gain is not None]
    if len(gains) == len(parts):
        means = [gain for gain, _ in gains]
        interval = combine_intervals(means, [i for _, i in gains])
        total.gain = None if interval is None else (sum(means) / len(means), interval)
    for key in COSTS:
        values = [row.costs[key] for row in parts]
        known = [v for v in values if v is not None]
        if len(known) == len(values):
            total.costs[key] = max(known) if key == "peak_bytes" else sum(known) / len(known)
        dense = [d for row in parts if (d := row.dense.get(key)) is not None]
        if len(dense) == len(parts):
            total.dense[key] = sum(dense) / len(dense)
    return total


def _ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else value / base


def _constants(tables: dict[str, list[Row]], chosen: dict[tuple[str, str, str], Cell]) -> dict[str, float]:
    """Score of the best constant reply to each question, where the cells tell it."""
    known = {}
    for (_, _, task), cell in chosen.items():
        value = _number(cell.get("constant_reply"))
        if value is not None:
            known[task] = value
    tasks = [task for task in tables if task != OVERALL]
    if OVERALL in tables and all(task in known for task in tasks):
        known[OVERALL] = sum(known[task] for task in tasks) / len(tasks)
    return known


def _mixtures(tables: dict[str, list[Row]], chosen: dict[tuple[str, str, str], Cell]) -> list[str]:
    """Remarks on what makes rows hard to compare."""
    remarks = []
    lower = list(dict.fromkeys(row.task for rows in tables.values() for row in rows if not row.higher))
    for key in ("backend", "dtype", "device", "batch_size", "seed"):
        values = sorted({str(cell[key]) for cell in chosen.values() if key in cell})
        if len(values) > 1:
            remarks.append(f"The results mix several values of {key}: {', '.join(values)}.")
    for task, rows in tables.items():
        counts = {(row.n or 0) + (row.errors or 0) for row in rows if row.score is not None}
        if task != OVERALL and len(counts) > 1:
            remarks.append(f"{task}: the configurations were not given the same number of samples.")
        missing = [_label(row, True) for row in rows if row.score is None]
        if missing and task == OVERALL and lower:
            remarks.append(f"No overall score, because less is better in {', '.join(lower)}.")
        elif missing and task == OVERALL:
            remarks.append(f"No overall score, because a task is missing: {', '.join(missing)}.")
        elif missing:
            remarks.append(f"{task}: no score for {', '.join(missing)}.")
    return remarks


def _failures(tables: dict[str, list[Row]], chosen: dict[tuple[str, str, str], Cell]) -> list[str]:
    lines = []
    for key, cell in chosen.items():
        count, reasons = _number(cell.get("errors")), cell.get("error_reasons")
        if not count:
            continue
        if isinstance(reasons, dict):
            listed = [f"{reason} ({number}x)" for reason, number in reasons.items()]
        elif isinstance(reasons, list):
            counts = Counter(map(str, reasons)).most_common()
            listed = [f"{reason} ({number}x)" if number > 1 else reason for reason, number in counts]
        else:
            listed = [str(reasons)] if reasons else ["no reason recorded"]
        lines.append(f"{' / '.join(key)}: {int(count)} failed; {'; '.join(listed)}")
    return lines


def _techniques(cells: Iterable[Cell]) -> dict[str, str]:
    """What each configuration switches on."""
    found = {}
    for cell in cells:
        entries = cell.get("techniques")
        if isinstance(entries, list):
            parts = []
            for entry in (e for e in entries if isinstance(e, dict)):
                arguments = ", ".join(f"{k}={v}" for k, v in entry.items() if k != "technique")
                parts.append(f"{entry.get('technique', DASH)}({arguments})")
            found[cell["config"]] = " + ".join(parts) or "the plain model"
    return found


def _environment(cells: Iterable[Cell]) -> dict[str, str]:
    """Settings and versions of all cells; several values of one key are listed side by side."""
    values: dict[str, dict[str, None]] = {}
    for cell in cells:
        env = cell.get("env") if isinstance(cell.get("env"), dict) else {}
        settings = {k: cell[k] for k in ("backend", "dtype", "device", "batch_size", "limit", "seed") if k in cell}
        if "limit" in settings and settings["limit"] is None:
            settings["limit"] = "all samples"
        for key, value in {**settings, **env}.items():
            values.setdefault(str(key), {})[DASH if value is None else str(value)] = None
    return {key: ", ".join(found) for key, found in values.items()}


# --- words ------------------------------------------------------------------------------------------------------------


def _show(value: float | None, divisor: float = 1.0) -> str:
    """Three significant digits, or a dash."""
    if value is None:
        return DASH
    value /= divisor
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 0.01 else f"{value:.1g}"


def _score(row: Row) -> str:
    if row.score is None:
        return DASH
    return f"{row.score:.3f}" + (f" [{row.ci[0]:.2f}, {row.ci[1]:.2f}]" if row.ci else f" [{DASH}]")


def _gain(row: Row) -> str:
    if row.gain is None:
        return "" if row.baseline else DASH
    value, (low, high) = row.gain
    return f"{value:+.3f} [{low:+.2f}, {high:+.2f}]"


def _count(value: int | None) -> str:
    return DASH if value is None else str(value)


def _label(row: Row, several_models: bool) -> str:
    return f"{Path(row.model).name} / {row.config}" if several_models else row.config


def _times(ratio: float | None) -> str:
    return DASH if ratio is None else f"{ratio:.2f}×"


def _with_ratio(row: Row, key: str, divisor: float) -> str:
    value = _show(row.costs.get(key), divisor)
    ratio = row.ratios.get(key)
    return value if ratio is None or row.baseline else f"{value} ({_times(ratio)})"


#: column title -> text of a row's cell
Columns = dict[str, Callable[[Row], str]]


def _paired(summary: Summary) -> bool:
    return any(row.gain for rows in summary.tables.values() for row in rows)


def _columns(summary: Summary) -> Columns:
    several = len(summary.models) > 1
    columns: Columns = {
        "config": lambda r: _label(r, several),
        "score [95 % CI]": _score,
        "front": lambda r: "★" if r.front else "",
        **({"paired difference [95 % CI]": _gain} if _paired(summary) else {}),
        "n": lambda r: _count(r.n),
        "errors": lambda r: _count(r.errors),
    }
    for key, (title, divisor) in COSTS.items():
        columns[title] = lambda r, key=key, divisor=divisor: _with_ratio(r, key, divisor)
        if key == "ttft_ms_median":
            columns["TTFT p90"] = lambda r: _show(r.ttft_p90)
    return columns


def _title(task: str, rows: Sequence[Row]) -> str:
    metrics = list(dict.fromkeys(row.metric for row in rows if row.metric))
    return f"{task} ({', '.join(metrics)})" if metrics else task


def _constant_line(task: str, summary: Summary) -> str | None:
    if task not in summary.constants:
        return None
    value = summary.constants[task]
    return f"A constant reply to each kind of question, the best there is, scores {value:.3f} without any picture."


def _reading(summary: Summary) -> list[str]:
    """How to read the report, and what it does not show."""
    rows = [row for task, table in summary.tables.items() for row in table if task != OVERALL]
    counts = [row.n for row in rows if row.n]
    lines = [
        "Every score is a point estimate with its 95 % interval. ★ marks the Pareto front: no other row of the table "
        "scores as high for as few FLOPs. The front compares point estimates, so a row can be on it by luck.",
    ]
    if counts:
        size = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        small = ""
        if min(counts) < SMALL_N:
            width = 1.96 * math.sqrt(0.25 / min(counts))
            small = f" That is few: an accuracy near 0.5 is known to about ±{width:.2f} only."
        lines.append(f"A task has {size} scored samples.{small}")
    rows = [row for rows in summary.tables.values() for row in rows if not row.baseline]
    if gains := [row.gain[1] for row in rows if row.gain]:
        unclear = sum(low <= 0 <= high for low, high in gains)
        lines.append(
            "The paired difference is a configuration's score minus the plain model's on the same samples; it sees "
            f"smaller differences than a comparison of two intervals. In {unclear} of {len(gains)} cases its interval "
            "holds 0: there this run does not show a difference, and does not show that there is none. With so many "
            "comparisons, about one in twenty stands out by chance alone."
        )
    else:
        lines.append(
            "Where the intervals of two configurations overlap, this run does not show a difference between them, and "
            "does not show that there is none."
        )
    lines += [
        "FLOPs are those of the language model, mean per sample (2 per multiply-add); the vision tower is not in them. "
        "For FLOPs and KV bytes, (×) compares with what the plain model spends on the very same prompt and reply. "
        "KV bytes are the cache of a sample at its end; TTFT is the time to the first token, median (and p90) over "
        "samples. In the overall table, costs are means over tasks, peak memory is the largest. The picture sets "
        "points of almost equal cost side by side.",
        "Times and memory were taken on one machine, the one below, while whatever else ran there ran: they rank "
        "configurations on such a machine and do not carry over to others. FLOPs and KV bytes do.",
        *_timing_noise(rows),
        f"{DASH} means that a value is not known. A sample that failed is counted under errors and is never scored as "
        "an empty answer.",
    ]
    if any(task.startswith("mllm_") for task in summary.tables):
        lines.append(
            "The mllm_ tasks are small sets of clip art, emoji, drawn scenes and drawn pages. They tell whether a "
            "technique keeps what the model can do, not how a model compares on photographs or published benchmarks."
        )
    return lines


def _timing_noise(rows: Iterable[Row]) -> list[str]:
    """How far apart times lie where a configuration did the very work of the plain model, as on text-only tasks."""
    same = [row for row in rows if row.task != OVERALL and row.ratios.get("flops") == 1.0]
    ratios = [ratio for row in same if (ratio := row.ratios.get("ttft_ms_median"))]
    if not ratios:
        return []
    return [
        f"Rows in which a configuration did exactly the plain model's work: {len(ratios)}. Their TTFT is "
        f"{min(ratios):.2f} to {max(ratios):.2f} times the plain model's: differences of that size are noise."
    ]


def _markdown(summary: Summary, unreadable: Sequence[str]) -> str:
    def escape(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")

    columns = _columns(summary)
    lines = ["# Evaluation report", "", f"Model: {', '.join(escape(m) for m in summary.models)}", ""]
    for title, items in (("Unreadable result files", unreadable), ("Remarks", summary.warnings)):
        if items:
            lines += [f"**{title}**", "", *(f"- {escape(item)}" for item in items), ""]
    picture = ["![Score against cost](pareto.png)", ""]
    for task, rows in summary.tables.items():
        lines += [f"## {escape(_title(task, rows))}", ""]
        lines.append("| " + " | ".join(columns) + " |")
        lines.append("|" + "|".join(":--" if title == "config" else "--:" for title in columns) + "|")
        for row in rows:
            lines.append("| " + " | ".join(escape(text(row)) for text in columns.values()) + " |")
        line = _constant_line(task, summary)
        lines += ["", *([line, ""] if line else []), *picture]
        picture = []  # after the first table
    if summary.failures:
        lines += ["## Failed samples", "", *(f"- {escape(item)}" for item in summary.failures), ""]
    if summary.techniques:
        lines += ["## Configurations", "", "| | |", "|:--|:--|"]
        lines += [f"| {escape(key)} | {escape(value)} |" for key, value in summary.techniques.items()]
        lines += [""]
    lines += ["## How to read this, and its limits", "", *(f"- {item}" for item in _reading(summary)), ""]
    lines += ["## Environment", "", "| | |", "|:--|:--|"]
    lines += [f"| {escape(key)} | {escape(value)} |" for key, value in summary.environment.items()]
    return "\n".join(lines) + "\n"


_STYLE = """
:root { --bg: #fdfdfc; --fg: #1d2129; --soft: #5c6470; --line: #dcdfe4; --head: #f2f3f5; --mark: #e8f1fb;
  --warn: #fff4d6 }
@media (prefers-color-scheme: dark) {
  :root { --bg: #15181d; --fg: #e4e7ec; --soft: #9aa3af; --line: #333942; --head: #1f242b; --mark: #1b2f45;
    --warn: #3d3214 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1180px; padding: 1.2rem; background: var(--bg); color: var(--fg);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
h1 { font-size: 1.5rem; margin: 0 0 .2rem } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
p.soft, .soft { color: var(--soft); margin: .3rem 0 }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px }
table { border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
th { background: var(--head); font-weight: 600; vertical-align: bottom }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--bg); max-width: 22rem;
  overflow: hidden; text-overflow: ellipsis }
th:first-child { background: var(--head) }
tr:last-child td { border-bottom: 0 }
tr.front td { background: var(--mark) }
tr.plain td:first-child { font-weight: 600 }
td small { color: var(--soft); font-size: .85em; display: block; line-height: 1.2 }
table.env td { text-align: left; white-space: normal; overflow-wrap: anywhere }
table.env td:first-child { white-space: nowrap; color: var(--soft) }
.note { background: var(--warn); border-radius: 6px; padding: .5rem .9rem; margin: .8rem 0 }
.note ul, ul.plain { margin: .2rem 0; padding-left: 1.1rem }
li { overflow-wrap: anywhere }
figure { margin: 1rem 0; padding: .5rem; overflow-x: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 6px }
img { display: block; width: 100%; min-width: 640px; height: auto }
@media (max-width: 600px) { body { padding: .7rem } th:first-child, td:first-child { max-width: 8.5rem } }
"""


def _html(summary: Summary, unreadable: Sequence[str], png: bytes) -> str:
    escape = html.escape
    several = len(summary.models) > 1

    def listing(items: Iterable[str], css: str = "plain") -> str:
        return f'<ul class="{css}">' + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"

    def cost(row: Row, key: str) -> str:
        small = [_times(row.ratios[key])] if row.ratios.get(key) is not None and not row.baseline else []
        if key == "ttft_ms_median" and row.ttft_p90 is not None:
            small.append(f"p90 {_show(row.ttft_p90)}")
        below = f"<small>{escape(' · '.join(small))}</small>" if small else ""
        return f"<td>{_show(row.costs.get(key), COSTS[key][1])}{below}</td>"

    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark"><title>Evaluation report</title>',
        f"<style>{_STYLE}</style></head><body>",
        "<h1>Evaluation report</h1>",
        f'<p class="soft">Model: {escape(", ".join(summary.models))}</p>',
    ]
    for title, items in (("Unreadable result files", unreadable), ("Remarks", summary.warnings)):
        if items:
            parts.append(f'<div class="note"><b>{title}</b>{listing(items)}</div>')
    alt = "Score against cost of every configuration; the numbers are in the tables."
    data = base64.b64encode(png).decode("ascii")
    figure = f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"></figure>'
    paired = _paired(summary)
    titles = [
        "config",
        "score [95 % CI]",
        *(["vs plain, paired"] if paired else []),
        "n",
        "errors",
        *(title for title, _ in COSTS.values()),
    ]
    for task, rows in summary.tables.items():
        parts.append(f"<h2>{escape(_title(task, rows))}</h2><div class='scroll'><table><thead><tr>")
        parts += [f"<th>{escape(title)}</th>" for title in titles]
        parts.append("</tr></thead><tbody>")
        for row in rows:
            css = " ".join(name for name, on in (("front", row.front), ("plain", row.baseline)) if on)
            score = f"{row.score:.3f}{' ★' if row.front else ''}" if row.score is not None else DASH
            interval = f"<small>{row.ci[0]:.2f} to {row.ci[1]:.2f}</small>" if row.ci else ""
            label = escape(_label(row, several))
            parts.append(f'<tr class="{css}"><td title="{label}">{label}</td><td>{score}{interval}</td>')
            if paired and row.gain:
                value, (low, high) = row.gain
                parts.append(f"<td>{value:+.3f}<small>{low:+.2f} to {high:+.2f}</small></td>")
            elif paired:
                parts.append(f"<td>{_gain(row)}</td>")
            parts.append(f"<td>{_count(row.n)}</td><td>{_count(row.errors)}</td>")
            parts += [cost(row, key) for key in COSTS]
            parts.append("</tr>")
        parts.append("</tbody></table></div>")
        if line := _constant_line(task, summary):
            parts.append(f'<p class="soft">{line}</p>')
        parts.append(figure)  # after the first table
        figure = ""
    if summary.failures:
        parts.append(f"<h2>Failed samples</h2>{listing(summary.failures)}")
    parts.append(f"<h2>How to read this, and its limits</h2>{listing(_reading(summary))}")
    for title, values in (("Configurations", summary.techniques), ("Environment", summary.environment)):
        if values:
            parts.append(f'<h2>{title}</h2><div class="scroll"><table class="env"><tbody>')
            parts += [f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>" for key, value in values.items()]
            parts.append("</tbody></table></div>")
    parts.append("</body></html>\n")
    return "".join(parts)


# --- picture ----------------------------------------------------------------------------------------------------------

# Okabe and Ito: told apart with every kind of colour vision; the marker differs too
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7A7A7A")
_MARKERS = "osD^vPX<>*hp"


def _draw(summary: Summary) -> bytes:
    """PNG: score against FLOPs overall, then against the other costs, then task by task."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    several = len(summary.models) > 1
    main = next(iter(summary.tables))
    rest = [task for task in summary.tables if task != main]
    panels = [(main, key) for key in list(COSTS)[1:]] + [(task, "flops") for task in rest]
    panels = [(task, key) for task, key in panels if any(_drawable(row, key) for row in summary.tables[task])]
    columns = 3
    lines = math.ceil(len(panels) / columns)
    names = list(dict.fromkeys(_label(row, several) for rows in summary.tables.values() for row in rows))
    looks = {name: (_COLORS[i % len(_COLORS)], _MARKERS[i % len(_MARKERS)]) for i, name in enumerate(names)}
    settings = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.7}
    with rc_context(settings):
        figure = Figure(figsize=(10.5, 4.6 + 2.7 * lines), dpi=140, layout="constrained", facecolor="white")
        canvas = FigureCanvasAgg(figure)
        grid = figure.add_gridspec(1 + lines, columns, height_ratios=[4.6] + [2.7] * lines)
        large = figure.add_subplot(grid[0, :])
        _panel(large, summary, main, "flops", looks, several)
        large.set_title(f"{main}: score against FLOPs, with 95 % intervals", loc="left", fontweight="bold")
        for number, (task, key) in enumerate(panels):
            axes = figure.add_subplot(grid[1 + number // columns, number % columns])
            _panel(axes, summary, task, key, looks, several)
        handles, labels = _legend(looks)
        figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False)
        canvas.draw()  # the layout must be known before labels can avoid each other
        figure.set_layout_engine("none")
        _place_labels(large, canvas.get_renderer(), [r for r in summary.tables[main] if _drawable(r, "flops")], several)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _drawable(row: Row, key: str) -> bool:
    return row.score is not None and row.costs.get(key) is not None


def _panel(axes: Any, summary: Summary, task: str, key: str, looks: dict[str, tuple[str, str]], several: bool) -> None:
    title, divisor = COSTS[key]
    rows = [row for row in summary.tables[task] if _drawable(row, key)]
    words = {"flops": "GFLOPs per sample (language model)", "ttft_ms_median": "time to first token, ms"}
    words |= {
        "kv_bytes": "KV cache, MB",
        "peak_bytes": "peak memory, GB",
        "tokens_per_s": "tokens per second (more is better)",
    }
    axes.set_xlabel(words.get(key, title))
    metric = next((row.metric for row in rows if row.metric), "score")
    axes.set_ylabel("mean score over tasks" if task == OVERALL else metric)
    axes.set_title(task, loc="left", fontweight="bold")
    axes.grid(color="#e3e3e3", linewidth=0.6)
    axes.set_axisbelow(True)
    if key == "flops":
        front = sorted((r.costs[key] / divisor, r.score) for r in rows if r.front)
        axes.plot(
            *zip(*front, strict=True) if front else ((), ()), drawstyle="steps-post", color="#999999", lw=1.2, zorder=1
        )
    if task in summary.constants:
        axes.axhline(summary.constants[task], color="#777777", lw=1, ls=(0, (4, 3)), zorder=1)
    if rows:
        high = max(row.costs[key] / divisor for row in rows)
        low = min(row.costs[key] / divisor for row in rows)
        room = (high - low) or abs(high) or 1.0
        axes.set_xlim(max(0.0, low - 0.14 * room) if low >= 0 else low - 0.14 * room, high + 0.14 * room)
        axes.margins(y=0.1)
    else:
        axes.text(0.5, 0.5, "no score with a cost", transform=axes.transAxes, ha="center", color="#666666")
    for row, x in zip(rows, _side_by_side([row.costs[key] / divisor for row in rows], axes.get_xlim()), strict=True):
        color, marker = looks[_label(row, several)]
        y = row.score
        if row.ci:
            axes.errorbar(
                x, y, [[max(0, y - row.ci[0])], [max(0, row.ci[1] - y)]], color=color, lw=1.1, capsize=2.5, zorder=2
            )
        edge = "#111111" if row.front and key == "flops" else "white"
        size, width = (8.5, 1.1) if row.front and key == "flops" else (7.5, 0.5)
        axes.plot([x], [y], marker, color=color, ms=size, mec=edge, mew=width, zorder=3)


def _side_by_side(values: Sequence[float], limits: tuple[float, float]) -> list[float]:
    """Where to draw costs, so that (almost) equal ones do not hide each other."""
    span = limits[1] - limits[0]
    places = list(values)
    group: list[int] = []
    for i in [*sorted(range(len(values)), key=lambda i: values[i]), None]:
        if i is not None and (not group or values[i] - values[group[0]] < 0.006 * span):
            group.append(i)
            continue
        for k, member in enumerate(group):
            places[member] = values[member] + (k - (len(group) - 1) / 2) * 0.045 * span
        group = [] if i is None else [i]
    return places


def _legend(looks: dict[str, tuple[str, str]]) -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=color, marker=marker, ls="", ms=8) for color, marker in looks.values()]
    handles.append(Line2D([], [], color="#999999", lw=1.2))
    handles.append(Line2D([], [], color="#777777", lw=1, ls=(0, (4, 3))))
    return handles, [*looks, "Pareto front", "best constant reply"]


def _place_labels(axes: Any, renderer: Any, rows: Sequence[Row], several: bool) -> None:
    """Names beside the points of the large panel, where they cover neither points, error bars nor each other."""
    divisor = COSTS["flops"][1]
    places = _side_by_side([row.costs["flops"] / divisor for row in rows], axes.get_xlim())
    points = [(x, row.score) for x, row in zip(places, rows, strict=True)]
    taken: list[tuple[float, float, float, float]] = []  # left, bottom, right, top in pixels
    for row, point in zip(rows, points, strict=True):
        x, y = axes.transData.transform(point)
        taken.append((x - 10, y - 10, x + 10, y + 10))
        if row.ci:
            low, high = (axes.transData.transform((point[0], limit))[1] for limit in row.ci)
            taken.append((x - 6, low - 2, x + 6, high + 2))
    for line in axes.get_lines():  # the front and the constant reply: steps and level lines
        if line.get_marker() in ("None", "", None):
            corners = line.get_transform().transform(line.get_path().vertices)
            for (x0, y0), (x1, y1) in itertools.pairwise(corners):
                taken.append((min(x0, x1) - 1, min(y0, y1) - 1, max(x0, x1) + 1, max(y0, y1) + 1))
    frame = axes.get_window_extent(renderer)
    for row, point in zip(rows, points, strict=True):
        best: tuple[float, Any, tuple[float, ...]] | None = None
        for dx, dy in sorted(_OFFSETS, key=lambda offset: math.hypot(*offset)):
            far = math.hypot(dx, dy) > 24
            text = axes.annotate(
                _label(row, several),
                point,
                xytext=(dx, dy),
                textcoords="offset points",
                ha="left" if dx > 3 else "right" if dx < -3 else "center",
                va="center" if abs(dy) < 8 else "bottom" if dy > 0 else "top",
                fontsize=9.5,
                zorder=4,
                arrowprops={"arrowstyle": "-", "color": "#888888", "lw": 0.7, "shrinkB": 5} if far else None,
            )
            extent = text.get_window_extent(renderer)
            box = (extent.x0, extent.y0, extent.x1, extent.y1)
            beyond = frame.x0 - box[0], box[2] - frame.x1, frame.y0 - box[1], box[3] - frame.y1
            covered = sum(_common(box, other) for other in taken) + 1000 * sum(max(0.0, b) for b in beyond)
            if best is not None and covered >= best[0]:
                text.remove()
                continue
            if best is not None:
                best[1].remove()
            best = (covered, text, box)
            if covered == 0:
                break
        if best is not None:
            taken.append(best[2])


_OFFSETS = [
    (distance * math.cos(math.radians(angle)), distance * math.sin(math.radians(angle)))
    for distance in (12, 18, 28, 42, 60, 80, 105)
    for angle in range(0, 360, 30)
]


def _common(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Area that two boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


# --- output -----------------------------------------------------------------------------------------------------------


def build_report(out_dir: str | Path) -> dict[str, Path]:
    """Write ``report.md``, ``report.html`` (self-contained) and ``pareto.png`` from the result files of a folder.

    Returns the paths by ``markdown``, ``html`` and ``png``.

    Raises:
        EvalError: the folder holds no readable result, or cannot be written.
    """
    folder = Path(out_dir)
    cells, unreadable = collect_cells(folder)
    summary = summarize(cells)
    png = _draw(summary)
    contents = {
        "markdown": ("report.md", _markdown(summary, unreadable).encode()),
        "html": ("report.html", _html(summary, unreadable, png).encode()),
        "png": ("pareto.png", png),
    }
    paths = {}
    for kind, (name, content) in contents.items():
        path = paths[kind] = folder / name
        temporary = path.with_name(path.name + ".tmp")
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        except OSError as error:
            raise EvalError(f"{path} cannot be written: {error}. Free some space or choose another folder.") from error
    return paths


def print_table(cells: Sequence[Cell], stream: TextIO | None = None) -> None:
    """Print the results, task by task and overall last, in at most 120 columns.

    Raises:
        EvalError: there are no cells.
    """
    if not cells:
        raise EvalError("There are no results to print. Run `mllm eval` first.")
    summary = summarize(cells)
    several = len(summary.models) > 1
    columns: Columns = {"config": lambda r: _label(r, several), "": lambda r: "*" if r.front else ""}
    columns |= {"score [95 % CI]": _score, "n": lambda r: _count(r.n), "err": lambda r: _count(r.errors)}
    for key, (title, divisor) in COSTS.items():
        columns[title] = lambda r, key=key, divisor=divisor: _with_ratio(r, key, divisor)
    lines: list[str] = []
    order = [task for task in summary.tables if task != OVERALL] + ([OVERALL] if OVERALL in summary.tables else [])
    for task in order:
        rows = summary.tables[task]
        constant = f", constant reply {summary.constants[task]:.3f}" if task in summary.constants else ""
        texts = [[text(row) for text in columns.values()] for row in rows]
        widths = [max(map(len, column)) for column in zip(columns, *texts, strict=True)]
        widths[0] = max(6, min(widths[0], TERMINAL_WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1)))
        lines += ["", _cut(f"{_title(task, rows)}{constant}", TERMINAL_WIDTH)]
        for values in [list(columns), *texts]:
            first = _cut(values[0], widths[0]).ljust(widths[0])
            others = (value.rjust(width) for value, width in zip(values[1:], widths[1:], strict=True))
            lines.append("  ".join([first, *others]).rstrip())
    lines += ["", "* Pareto front of score against FLOPs; (×) relative to the plain model; – not known"]
    lines += [f"warning: {warning}" for warning in summary.warnings]
    print("\n".join(lines).lstrip("\n"), file=stream or sys.stdout)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
