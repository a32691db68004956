"""Every python block of the docs runs, on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tiny import tiny_image, tiny_model, tiny_processor

from mllm.inputs import chat_inputs

ROOT = Path(__file__).parent.parent
#: pages whose blocks compose models of their own, which other tests do
_NOT_HERE = {"default_model.md"}
PAGES = sorted(page for page in (ROOT / "docs").glob("*.md") if page.name not in _NOT_HERE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page, tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    model, processor = tiny_model("llava", "sdpa", fresh=True), tiny_processor("llava")
    image = tiny_image()
    names = {
        "model": model,
        "processor": processor,
        "image": image,
        "inputs": chat_inputs(processor, ["what is it?"], [[image]]),
        "tmp": tmp_path,
    }
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
