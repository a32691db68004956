"""What ``mllm bench`` shows: the rows as Markdown, and realised against predicted speed-up as a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from mllm.eval.bench import Row, read_rows

_LONG, _LONGEST = 2816, 9920  # visual tokens from which the clock must show what FLOPs, and what bytes promise


def write_report(folder: Path) -> None:
    """``bench.md`` and ``bench.png`` from the ``bench.json`` of a folder."""
    rows = read_rows(folder / "bench.json")
    (folder / "bench.md").write_text(f"{targets(rows)}\n{table(rows)}", encoding="utf-8")
    draw(rows, folder / "bench.png")


def targets(rows: Sequence[Row]) -> str:
    """What was aimed at, and in which rows it was reached, as Markdown."""
    done = [row for row in rows if row.speedup is not None]
    prefill, decode = ([row for row in done if row.phase == phase] for phase in ("prefill", "decode"))
    # a stack that drops nothing (no saving to realise) is held to the oracle alone
    saving = [row for row in prefill if row.predicted > 1]
    found = [
        ("realised / oracle, prefill", [(row, row.realised_over_oracle) for row in prefill], 0.97),
        ("realised / oracle, decode", [(row, row.realised_over_oracle) for row in decode], 0.97),
        (
            "realised / predicted, prefill, 2,880 visual tokens and more",
            [(row, row.realised_over_predicted) for row in saving if row.visual_tokens >= _LONG],
            0.95,
        ),
        (
            "realised / predicted, prefill, fewer",
            [(row, row.realised_over_predicted) for row in saving if row.visual_tokens < _LONG],
            None,
        ),
        ("a neutral technique: plain / its time", [(r, r.speedup) for r in prefill if r.setting == "neutral"], 0.99),
        (
            "a second question on kept pictures: text alone / its time",
            [(row, row.text_only_ms / row.technique_ms) for row in prefill if "reuse" in row.setting],
            1 / 1.1,
        ),
        (
            "decode, 10,000 visual tokens, exit at half depth: share of their time saved / share of their bytes",
            [(row, _saved(row)) for row in decode if row.setting == "exit_half" and row.visual_tokens >= _LONGEST],
            1.0,
        ),
    ]

    def size(row: Row) -> str:
        own = f"{row.visual_tokens}"
        own += f" x {row.batch}" if len({row.batch for row in done}) > 1 else ""
        return own + (f" ({row.arch})" if len({row.arch for row in done}) > 1 else "")

    lines = ["| what | target | median | lowest | missed |", "|---|---|---|---|---|"]
    for what, measured, least in found:
        if not measured:
            continue
        values = [value for _, value in measured]
        missed = [] if least is None else [(row, value) for row, value in measured if round(value, 2) < round(least, 2)]
        told = ", ".join(f"{row.setting} at {size(row)}: {value:.2f}" for row, value in missed) or "-"
        lines.append(
            f"| {what} | {'-' if least is None else f'>= {least:.2f}'} | {statistics.median(values):.2f} | "
            f"{min(values):.2f} | {told} |"
        )
    return "\n".join(lines) + "\n"


def _saved(row: Row) -> float:
    """What reading the visual keys takes is the plain model's time beyond the text's alone; how much of it is gone, to
    how many of their bytes are."""
    time = (row.plain_ms - row.technique_ms) / (row.plain_ms - row.text_only_ms)
    visual_bytes = row.dense_kv_bytes * row.visual_tokens / (row.visual_tokens + row.text_tokens)
    return time / ((row.dense_kv_bytes - row.kv_bytes) / visual_bytes)


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""

    def ratio(value: float | None, spread: Sequence[float] = ()) -> str:
        if value is None:
            return "-"
        return f"{value:.2f}" + (f" [{spread[0]:.2f}, {spread[1]:.2f}]" if spread else "")

    lines = [
        "| model | batch | visual | phase | setting | plain ms | ms | speed-up | predicted | oracle | "
        "realised / oracle | realised / predicted | KV | peak | note |",
        "|---" * 15 + "|",
    ]
    for row in rows:
        plain, own = ("-" if ms is None else f"{ms:.1f}" for ms in (row.plain_ms, row.technique_ms))
        cache = f"{row.kv_bytes / row.dense_kv_bytes:.2f}x" if row.dense_kv_bytes else "-"
        peak = f"{row.peak_bytes / row.dense_peak_bytes:.2f}x" if row.peak_bytes and row.dense_peak_bytes else "-"
        note = row.note
        if row.text_only_ms and "reuse" in row.setting:
            note = "; ".join(filter(None, [note, f"{row.technique_ms / row.text_only_ms:.2f}x of the text alone"]))
        lines.append(
            f"| {row.arch} | {row.batch} | {row.visual_tokens} | {row.phase} | {row.setting} | {plain} | {own} | "
            f"{ratio(row.speedup)} | {ratio(row.predicted)} | {ratio(row.oracle)} | "
            f"{ratio(row.realised_over_oracle, row.realised_over_oracle_ci95)} | "
            f"{ratio(row.realised_over_predicted, row.realised_over_predicted_ci95)} | {cache} | {peak} | {note} |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Realised against predicted speed-up of the prefill, a mark a setting; hollow marks are the oracle."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [row for row in rows if row.phase == "prefill" and row.speedup is not None]
    figure, axes = plt.subplots(figsize=(6, 5.5), dpi=110)
    values = [value for row in shown for value in (row.speedup, row.predicted, row.oracle)]
    low, high = min([0.5, *values]) * 0.9, max([2.0, *values]) * 1.1
    axes.plot([low, high], [low, high], color="#999999", linewidth=1, label="as predicted")
    marks = "osD^vP*X<>h"
    colors = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
    for number, setting in enumerate(dict.fromkeys(row.setting for row in shown)):
        own = [row for row in shown if row.setting == setting]
        style = {"marker": marks[number % len(marks)], "edgecolors": colors[number % len(colors)]}
        at = [row.predicted for row in own]
        axes.scatter(at, [row.oracle for row in own], facecolors="none", s=60, **style)
        axes.scatter(at, [row.speedup for row in own], c=style["edgecolors"], s=22, label=setting, **style)
    axes.set(xlabel="predicted from FLOPs", ylabel="measured (hollow: oracle)", title="Speed-up of the prefill")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
