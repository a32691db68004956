"""Every python block of the docs runs as a reader would run it, and prints what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tiny import tiny_image, tiny_model, tiny_processor

import mllm
from mllm.token_pruning import DyVTE

ROOT = Path(__file__).parent.parent
#: pages whose blocks compose models of their own, which other tests do
_NOT_HERE = {"default_model.md"}
PAGES = sorted(page for page in (ROOT / "docs").glob("*.md") if page.name not in _NOT_HERE)
#: comments that say what is printed, up to a remark behind a colon
_PRINTED = re.compile(r"^print\((?:run\.report\(|processor\.decode\().*\)  # ([^:\n]+)", re.MULTILINE)


def _blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in _blocks(page):
        exec(compile(block, page.name, "exec"), names)
        printed = capsys.readouterr().out
        for told in _PRINTED.findall(block):
            assert told in printed
    if "model" in names:  # it was left as it was loaded
        plain = mllm.load("tiny")[0].state_dict()
        assert all(torch.equal(value, plain[name]) for name, value in names["model"].state_dict().items())


def test_examples_of_the_readme_run(tmp_path, monkeypatch):
    """With a small stand-in for the default model, a picture, and gates that were trained for it."""
    monkeypatch.chdir(tmp_path)
    model, processor = tiny_model("llava", layers=16, fresh=True), tiny_processor("llava")
    monkeypatch.setattr(mllm, "load", lambda name: (model, processor))
    tiny_image().save("photo.jpg")
    handle = DyVTE(gate="light").attach(model, processor)
    handle.save_pretrained("runs/dyvte")
    handle.detach()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = {}
    for block in _blocks(ROOT / "README.md"):
        exec(compile(block, "README.md", "exec"), names)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def _rows(text: str) -> list[list[str]]:
    """The cells of the first table of configs in a Markdown text."""
    lines = re.search(r"^\| config .*?\n(?!\|)", text, re.MULTILINE | re.DOTALL).group().splitlines()
    cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    return [cells[0], *cells[2:]]


def _numbers(cell: str) -> list[float]:
    """The numbers of a cell, as the README rounds them."""
    return [round(float(number), 2) for number in re.findall(r"[-+]?\d+\.\d+", cell)]


def test_the_numbers_of_the_readme_are_those_of_the_report():
    """docs/report is what `make run` wrote: copy report.md and pareto.png there when the numbers change."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    head, *rows = _rows((ROOT / "docs" / "report" / "report.md").read_text(encoding="utf-8"))
    report = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    shown = {row[0].split()[0]: row[1:] for row in _rows(readme)[1:]}
    configs = {path.stem for pattern in ("*.yaml", "default/*.yaml") for path in (ROOT / "configs").glob(pattern)}
    assert set(shown) == set(report) <= configs
    for config, (score, difference, *costs) in shown.items():
        row = report[config]
        assert _numbers(score) == _numbers(row["score [95 % CI]"])
        assert _numbers(difference) == _numbers(row["paired difference [95 % CI]"])
        for cost, name in zip(costs, ("GFLOPs", "TTFT ms", "KV MB"), strict=True):
            ratio = re.search(r"\((.*)×\)", row[name])
            assert cost.split()[0].rstrip("x") == (ratio.group(1) if ratio else row[name]), (config, name)
    headline = readme.split("## Quick start")[0]
    late = report["exit_late"]
    for number in (*_numbers(late["score [95 % CI]"])[:1], *_numbers(late["paired difference [95 % CI]"])):
        assert f"{number:.2f}" in headline
    assert re.search(r"\((.*)×\)", late["GFLOPs"]).group(1) + "x" in headline
