"""The report, from synthetic result cells: numbers, fronts, gaps and damage."""

from __future__ import annotations

import io
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm.errors import EvalError
from mllm.eval import report
from mllm.eval.report import (
    OVERALL,
    build_report,
    collect_cells,
    combine_intervals,
    paired_difference,
    pareto_front,
    print_table,
    summarize,
)

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install -e '.[all,dev]'")


def cell(config: str = "none", task: str = "mllm_vqa", score: float | None = 0.6, **other: Any) -> dict[str, Any]:
    dear = 1.0 if config == "none" else 0.5
    return {
        "model": "default",
        "config": config,
        "task": task,
        "metric": "accuracy",
        "n": 50,
        "score": score,
        "ci95": None if score is None else [max(0.0, score - 0.1), min(1.0, score + 0.1)],
        "errors": 0,
        "error_reasons": [],
        "flops": 9.0e10 * dear,
        "dense_flops": 9.0e10,
        "ttft_ms_median": 900.0 * dear,
        "ttft_ms_p90": 1000.0 * dear,
        "tokens_per_s": 10.0 / dear,
        "kv_bytes": 5.0e6 * dear,
        "dense_kv_bytes": 5.0e6,
        "peak_bytes": 1.5e9,
        "env": {"torch": "2.13.0", "gpu": None},
        "backend": "sdpa",
        "dtype": "float32",
        "device": "cpu",
        "batch_size": 4,
        "limit": 50,
        "config_digest": config,
        **other,
    }


def write(folder: Path, cells: list[dict[str, Any]]) -> Path:
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    for number, entry in enumerate(cells):
        (folder / "cells" / f"{number:03}.json").write_text(json.dumps(entry))
    return folder


def row_of(cells: list[dict[str, Any]], task: str, config: str) -> report.Row:
    return next(row for row in summarize(cells).tables[task] if row.config == config)


# --- Pareto front -----------------------------------------------------------------------------------------------------

number = st.one_of(st.none(), st.integers(0, 4).map(float))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(number, number), max_size=8))
def test_pareto_front_equals_its_definition(points):
    known = [p for p in points if None not in p]

    def beaten(p):
        return any(q[0] <= p[0] and q[1] >= p[1] and q != p for q in known)

    assert pareto_front(points) == [None not in p and not beaten(p) for p in points]


def test_pareto_front_by_hand():
    points = [(4.0, 0.9), (2.0, 0.8), (3.0, 0.7), (1.0, 0.1), (2.0, 0.8), (None, 1.0), (0.5, None)]
    assert pareto_front(points) == [True, True, False, True, True, False, False]


# --- intervals --------------------------------------------------------------------------------------------------------


def test_interval_of_one_task_stays_and_of_several_shrinks():
    assert combine_intervals([0.5], [(0.4, 0.7)]) == pytest.approx((0.4, 0.7))
    low, high = combine_intervals([0.5, 0.5, 0.5, 0.5], [(0.4, 0.6)] * 4)
    assert (low, high) == pytest.approx((0.45, 0.55))
    assert combine_intervals([0.5, 0.5], [(0.4, 0.6), None]) is None
    assert combine_intervals([], []) is None


def test_combined_interval_covers_the_truth():
    from mllm.eval.stats import wilson

    rng, truth, held, rounds = random.Random(0), (0.1, 0.5, 0.95), 0, 400
    for _ in range(rounds):
        right = [sum(rng.random() < p for _ in range(40)) for p in truth]
        low, high = combine_intervals([r / 40 for r in right], [wilson(r, 40) for r in right])
        held += low <= sum(truth) / 3 <= high
    assert 0.92 <= held / rounds <= 0.985


def test_paired_difference():
    plain = {str(i): float(i % 2) for i in range(40)}
    value, (low, high) = paired_difference(plain, plain)
    assert value == 0
    assert low == pytest.approx(-high)
    assert 0 < high < 0.1  # seeing no difference is not the same as there being none
    better = dict.fromkeys(plain, 1.0)
    value, (low, high) = paired_difference(better, plain)
    assert value == 0.5
    assert 0.2 < low < 0.5 < high + 0.05
    assert paired_difference({"x": 1.0}, plain) is None
    assert paired_difference({"0": 1.0, "x": 1.0}, plain)[0] == 1.0  # only what both answered


def test_paired_interval_covers_the_truth():
    rng, held, rounds = random.Random(1), 0, 400
    for _ in range(rounds):
        plain = {i: float(rng.random() < 0.7) for i in range(60)}
        other = {i: s if rng.random() < 0.8 else float(rng.random() < 0.2) for i, s in plain.items()}
        _, (low, high) = paired_difference(other, plain)
        held += low <= 0.2 * (0.2 - 0.7) <= high
    assert 0.92 <= held / rounds <= 0.99


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=30))
def test_paired_difference_is_antisymmetric_and_bounded(pairs):
    a, b = ({i: pair[k] for i, pair in enumerate(pairs)} for k in (0, 1))
    value, (low, high) = paired_difference(a, b)
    back, (low_back, high_back) = paired_difference(b, a)
    assert (back, low_back, high_back) == pytest.approx((-value, -high, -low), abs=1e-9)
    assert -1 <= low <= high <= 1


# --- tables -----------------------------------------------------------------------------------------------------------


def test_ratios_and_baseline():
    cells = [cell("exit_half", score=0.5), cell("none")]
    rows = summarize(cells).tables["mllm_vqa"]
    assert [row.config for row in rows] == ["none", "exit_half"]  # the plain model first
    assert [row.baseline for row in rows] == [True, False]
    assert rows[1].ratios == {
        "flops": 0.5,
        "ttft_ms_median": 0.5,
        "tokens_per_s": 2.0,
        "kv_bytes": 0.5,
        "peak_bytes": 1.0,
    }


@pytest.mark.parametrize(
    "mark", [{"baseline": True}, {"techniques": []}, {"flops": 7.0, "dense_flops": 7.0}], ids=["flag", "empty", "cost"]
)
def test_baseline_need_not_be_named_none(mark):
    cells = [cell("dyvte", techniques=[{"technique": "DyVTE"}]), cell("as_it_is", **mark)]
    assert row_of(cells, "mllm_vqa", "as_it_is").baseline
    assert not row_of(cells, "mllm_vqa", "dyvte").baseline


def test_without_a_baseline_only_the_known_dense_cost_is_compared():
    summary = summarize([cell("exit_half")])
    (row,) = summary.tables["mllm_vqa"]
    assert row.ratios["flops"] == 0.5
    assert row.ratios["ttft_ms_median"] is None
    assert any("plain model" in warning for warning in summary.warnings)


def test_longer_replies_are_not_booked_as_the_techniques_cost():
    cells = [cell(t, task, **o) for task in "ab" for t, o in (("none", {}), ("x", {"kv_bytes": 6e6, "flops": 5e10}))]
    for entry in cells:
        if entry["config"] == "x":
            entry |= {"dense_kv_bytes": 6e6, "dense_flops": 10e10}
    for task in ("a", "b", OVERALL):
        ratios = row_of(cells, task, "x").ratios
        assert (ratios["kv_bytes"], ratios["flops"]) == (1.0, 0.5)


def test_overall_is_the_mean_over_tasks():
    cells = [cell("none", "a", 0.4), cell("none", "b", 0.8, n=10, peak_bytes=3e9, flops=3e10)]
    row = row_of(cells, OVERALL, "none")
    assert row.score == pytest.approx(0.6)
    assert row.ci == pytest.approx((0.6 - 0.1 / math.sqrt(2), 0.6 + 0.1 / math.sqrt(2)))
    assert (row.n, row.errors) == (60, 0)
    assert row.costs["flops"] == pytest.approx(6e10)
    assert row.costs["peak_bytes"] == 3e9


def test_overall_needs_every_task():
    cells = [cell("none", "a"), cell("none", "b"), cell("exit_half", "a"), cell("ee", "a"), cell("ee", "b", None)]
    summary = summarize(cells)
    scores = {row.config: row.score for row in summary.tables[OVERALL]}
    assert scores == {"none": pytest.approx(0.6), "exit_half": None, "ee": None}
    assert [row.config for row in summary.tables["b"] if row.score is None] == ["ee", "exit_half"]
    assert any("No overall score" in w and "exit_half" in w and "ee" in w for w in summary.warnings)


def test_one_task_needs_no_overall_table():
    assert list(summarize([cell()]).tables) == ["mllm_vqa"]


def test_paired_difference_in_tables():
    samples = [{"id": i, "score": float(i < 30)} for i in range(50)]
    worse = [{"id": i, "score": float(i < 20)} for i in range(49)] + [{"id": 49, "score": None}]
    cells = [cell("none", t, samples=samples) for t in ("a", "b")] + [cell("x", t, samples=worse) for t in ("a", "b")]
    gain = row_of(cells, "a", "x").gain
    assert gain[0] == pytest.approx(-10 / 49)
    assert gain[1][1] < 0
    overall = row_of(cells, OVERALL, "x").gain
    assert overall[0] == pytest.approx(-10 / 49)
    assert overall[1][1] - overall[1][0] < gain[1][1] - gain[1][0]
    assert row_of(cells, "a", "none").gain is None


def test_constant_replies_and_mixed_settings():
    cells = [cell("none", "a", constant_reply=0.2), cell("none", "b", constant_reply=0.4, backend="eager")]
    summary = summarize(cells)
    assert summary.constants == {"a": 0.2, "b": 0.4, OVERALL: pytest.approx(0.3)}
    assert any("backend: eager, sdpa" in warning for warning in summary.warnings)


def test_the_larger_of_two_results_counts():
    summary = summarize([cell(n=20, score=0.1), cell(n=50, score=0.6), cell(n=30, score=0.2)])
    assert [row.score for row in summary.tables["mllm_vqa"]] == [0.6]
    assert any("several results" in warning for warning in summary.warnings)


def test_configurations_and_environment_are_kept():
    summary = summarize(
        [cell("none", techniques=[]), cell("half", techniques=[{"technique": "X", "k": 3}], limit=None)]
    )
    assert summary.techniques == {"none": "the plain model", "half": "X(k=3)"}
    assert summary.environment["torch"] == "2.13.0"
    assert summary.environment["limit"] == "50, all samples"
    assert summary.environment["gpu"] == "–"


# --- missing values ---------------------------------------------------------------------------------------------------

GAPS = dict.fromkeys(
    ["score", "ci95", "flops", "ttft_ms_median", "ttft_ms_p90", "tokens_per_s", "kv_bytes", "peak_bytes", "n", "errors"]
)


def test_missing_values_are_dashes_never_zeros(tmp_path, capsys):
    cells = [cell("none"), cell("broken", **GAPS)]
    paths = build_report(write(tmp_path, cells))
    line = next(x for x in paths["markdown"].read_text().splitlines() if x.startswith("| broken |"))
    values = [value.strip() for value in line.strip("|").split("|")][1:]
    assert set(values) <= {"–", ""}
    assert values.count("–") >= 8
    html = paths["html"].read_text()
    broken = re.search(r"<tr[^>]*><td title=\"broken\">.*?</tr>", html).group()
    assert "0" not in re.sub(r"<[^>]*>", "", broken)
    print_table(cells)
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("broken"))
    assert "0" not in line
    assert line.count("–") >= 6


def test_odd_values_are_unknown_values(tmp_path):
    odd = cell("odd", score=float("nan"), flops="many", kv_bytes=True, ttft_ms_median=float("inf"), ci95=[0.9, 0.1])
    row = row_of([cell("none"), odd], "mllm_vqa", "odd")
    assert row.score is None
    assert row.ci is None
    assert set(row.costs.values()) == {20.0, 1.5e9, None}
    build_report(write(tmp_path, [odd]))


def test_nothing_to_draw_still_gives_a_report(tmp_path):
    paths = build_report(write(tmp_path, [cell("none", score=None, errors=3, error_reasons=["no image"], n=0)]))
    assert paths["png"].read_bytes().startswith(b"\x89PNG")
    assert "no image" in paths["markdown"].read_text()


def test_failures_are_listed_with_their_reasons(tmp_path):
    cells = [
        cell("a", errors=3, error_reasons=["InputError: truncated", "InputError: truncated", "too wide"]),
        cell("b", errors=2, error_reasons={"broken": 2}),
        cell("c", errors=1, error_reasons=None),
    ]
    text = build_report(write(tmp_path, cells))["markdown"].read_text()
    assert "default / a / mllm_vqa: 3 failed; InputError: truncated (2x); too wide" in text
    assert "broken (2x)" in text
    assert "no reason recorded" in text


# --- files ------------------------------------------------------------------------------------------------------------


def test_empty_folder(tmp_path):
    with pytest.raises(EvalError, match="holds no results"):
        build_report(tmp_path)
    with pytest.raises(EvalError, match="holds no results"):
        build_report(tmp_path / "absent")
    with pytest.raises(EvalError, match="no results to print"):
        print_table([])


def test_results_file_alone_is_enough(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps([cell("none"), cell("exit_half")]))
    assert len(collect_cells(tmp_path)[0]) == 2
    assert "exit_half" in build_report(tmp_path)["markdown"].read_text()


def test_unreadable_cells_are_named(tmp_path):
    write(tmp_path, [cell("none")])
    (tmp_path / "cells" / "half.json").write_text('{"model": "de')
    (tmp_path / "cells" / "binary.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "cells" / "other.json").write_text('{"score": 1}')
    paths = build_report(tmp_path)
    for kind in ("markdown", "html"):
        text = paths[kind].read_text()
        assert "Unreadable result files" in text
        assert all(name in text for name in ("half.json", "binary.json", "other.json"))


def test_only_unreadable_cells(tmp_path):
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "half.json").write_text("{")
    with pytest.raises(EvalError, match=r"No result .* can be read: half\.json"):
        build_report(tmp_path)


def test_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    write(tmp_path, [cell()])
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(EvalError, match=r"report\.md cannot be written: .*No space left"):
        build_report(tmp_path)


def test_same_cells_same_report(tmp_path):
    cells = [cell(c, t) for c in ("none", "exit_half") for t in ("a", "b")]
    first, second = (build_report(write(tmp_path / name, cells)) for name in ("x", "y"))
    assert all(first[kind].read_bytes() == second[kind].read_bytes() for kind in first)


class _Page(HTMLParser):
    """Collects tags that are left open and addresses that a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_whole_self_contained_and_escaped(tmp_path):
    cells = [cell("none"), cell("x", model="a<b>|c", errors=1, error_reasons=["<script>alert(1)</script>"])]
    paths = build_report(write(tmp_path, cells))
    text = paths["html"].read_text()
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert len(page.addresses) == 1
    assert page.addresses[0].startswith("data:image/png;base64,")
    assert "<script" not in text
    assert "@import" not in text
    assert "url(" not in text
    table = [line for line in paths["markdown"].read_text().splitlines() if line.startswith("| ")]
    assert "<script" not in "".join(table)


def test_picture_is_large_enough_to_read(tmp_path):
    from PIL import Image

    cells = [cell(f"config_{i}", t, flops=1e10 * (i + 1)) for i in range(14) for t in ("a", "b")]
    image = Image.open(io.BytesIO(build_report(write(tmp_path, cells))["png"].read_bytes()))
    assert image.width >= 1200
    assert len(image.convert("RGB").getcolors(1 << 20)) > 20


def test_labels_cover_neither_each_other_nor_points():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rng = random.Random(3)
    cells = [cell(f"config_{i}", score=rng.uniform(0.2, 0.8), flops=rng.uniform(1, 9) * 1e10) for i in range(10)]
    summary = summarize(cells)
    rows = summary.tables["mllm_vqa"]
    figure = Figure(figsize=(10, 5), dpi=100)
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
    looks = {row.config: ("#0072B2", "o") for row in rows}
    report._panel(axes, summary, "mllm_vqa", "flops", looks, False)
    canvas.draw()
    report._place_labels(axes, canvas.get_renderer(), rows, False)
    extents = [text.get_window_extent() for text in axes.texts]
    assert len(extents) == 10
    for i, one in enumerate(extents):
        assert not any(one.overlaps(other) for other in extents[i + 1 :])
        for row in rows:
            x, y = axes.transData.transform((row.costs["flops"] / 1e9, row.score))
            assert not (one.x0 < x < one.x1 and one.y0 < y < one.y1)


def test_terminal_table_fits(capsys):
    long = "a_very_long_configuration_name_that_nobody_should_choose_but_somebody_will"
    print_table([cell("none", ttft_ms_median=123456.7), cell(long, ttft_ms_median=54321.0, errors=12, n=1000)])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= report.TERMINAL_WIDTH
    assert any(line.startswith("a_very_long") for line in lines)


def test_front_is_marked_in_every_form(tmp_path, capsys):
    cells = [cell("none", score=0.6), cell("good", score=0.6), cell("bad", score=0.3, flops=5e10)]
    paths = build_report(write(tmp_path, cells))
    print_table(cells)
    printed = capsys.readouterr().out.splitlines()
    for config, front in (("none", False), ("good", True), ("bad", False)):
        line = next(x for x in paths["markdown"].read_text().splitlines() if x.startswith(f"| {config} "))
        assert ("★" in line) is front
        assert ("*" in next(x for x in printed if x.startswith(config))) is front


def test_reading_advice_says_how_few_samples_there_are(tmp_path):
    text = build_report(write(tmp_path, [cell("none", n=24), cell("exit_half", n=24)]))["markdown"].read_text()
    assert "24 scored samples. That is few" in text
    assert "±0.20" in text
    assert "one machine" in text


def test_equal_work_tells_the_noise_of_times(tmp_path):
    cells = [cell("none"), cell("a", flops=9e10, ttft_ms_median=1080.0), cell("b", flops=9e10, ttft_ms_median=720.0)]
    text = build_report(write(tmp_path, [*cells, cell("c")]))["markdown"].read_text()
    assert "work: 2. Their TTFT" in text
    assert "0.80 to 1.20 times" in text
    assert "noise" not in build_report(write(tmp_path / "x", [cell("none"), cell("c")]))["markdown"].read_text()


@pytest.mark.parametrize("what", ["weights", "data"])
def test_other_weights_or_data_are_not_compared(what):
    answers = [{"id": number, "score": number % 2} for number in range(4)]
    base, other = (cell(name, samples=answers, **{what: where}) for name, where in (("none", "a"), ("exit_half", "b")))
    summary = summarize([base, other])
    assert row_of([base, other], "mllm_vqa", "exit_half").gain is None
    assert any(f"other {what}" in warning and "exit_half" in warning for warning in summary.warnings)
    assert row_of([base, {**other, what: "a"}], "mllm_vqa", "exit_half").gain is not None


def test_where_less_is_better_the_front_is_the_other_side():
    some = {"task": "wer", "higher_is_better": False}
    cells = [cell("none", score=0.1, flops=100, **some), cell("bad", score=0.9, flops=100, **some)]
    assert [row.config for row in summarize(cells).tables["wer"] if row.front] == ["none"]
    mixed = summarize([*cells, cell("none", flops=100), cell("bad", flops=100)])
    assert all(row.score is None for row in mixed.tables["overall"])
    assert any("less is better in wer" in warning for warning in mixed.warnings)
