"""``mllm train``: from the command line to a saved technique, with a technique of its own."""

from __future__ import annotations

import json
import time
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import run
from tiny import save_tiny, tiny_image

from mllm import technique
from mllm.errors import ConfigError
from mllm.technique import Technique
from mllm.training import read_log, read_settings, train_technique, trainable


class TinyProjector(Technique):
    """Stands in for a technique with something to train."""

    name: ClassVar[str] = "TinyProjector"
    paper: ClassVar[str] = "https://arxiv.org/abs/0000.00000"
    training: ClassVar[str] = "tiny_recipe:recipe"

    layers: str = "all"


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    technique.load_all()
    monkeypatch.setitem(technique.REGISTRY, "TinyProjector", TinyProjector)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("llava", tmp_path_factory.mktemp("model"), layers=2)


def test_train_and_go_on(monkeypatch, capsys, model, tmp_path):
    command = ["train", "tinyprojector", "--model", model, "--steps", 2, "--batch-size", 1, "--out", tmp_path / "run"]
    command += [
        "--lr",
        0.01,
        "--seed",
        3,
        "--option",
        "bias_rate=0.5",
        "--argument",
        "layers=0:2",
        "--dtype",
        "float32",
    ]
    code, out, err = run(monkeypatch, capsys, *command)
    assert code == 0, err
    assert out == f"{tmp_path / 'run'}\n"
    assert "2/2" in err
    saved = load_file(tmp_path / "run" / "projector.safetensors")
    kept = json.loads((tmp_path / "run" / "training.json").read_text())
    assert kept["technique"] == "TinyProjector"
    assert kept["options"] == {"bias_rate": 0.5}
    assert kept["arguments"] == {"layers": "0:2"}
    assert (kept["steps"], kept["seed"], kept["lr"]) == (2, 3, 0.01)
    code, _, err = run(monkeypatch, capsys, *command)
    assert code == 0, err
    again = load_file(tmp_path / "run" / "projector.safetensors")
    assert all((value == again[name]).all() for name, value in saved.items())
    code, _, err = run(monkeypatch, capsys, *command, "--option", "bias_rate=0.1")
    assert code == 1
    assert "holds a run with options={'bias_rate': 0.5}, this one has options={'bias_rate': 0.1}" in err


def test_a_config_file_and_options_that_win(monkeypatch, capsys, model, tmp_path):
    tiny_image().save(tmp_path / "a.png")
    record = {"image": "a.png", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    (tmp_path / "data.jsonl").write_text(json.dumps(record))
    (tmp_path / "train.yaml").write_text(
        f"model: {model}\ndata: {tmp_path / 'data.jsonl'}\noptions: {{bias_rate: 0.25}}\n"
        "training: {steps: 50, batch_size: 2, save_seconds: 0}\n"
    )
    command = ["train", "TinyProjector", "--config", tmp_path / "train.yaml", "--steps", 1, "--out", tmp_path / "run"]
    code, _, err = run(monkeypatch, capsys, *command)
    assert code == 0, err
    kept = json.loads((tmp_path / "run" / "training.json").read_text())
    assert (kept["steps"], kept["batch_size"], kept["options"]) == (1, 2, {"bias_rate": 0.25})
    assert kept["data"].endswith("data.jsonl")
    (tmp_path / "data.jsonl").write_text(json.dumps({**record, "id": "2"}))
    code, _, err = run(monkeypatch, capsys, *command)
    assert code == 1
    assert "holds a run with contents=" in err


def test_another_base_model_in_the_same_place_is_refused(monkeypatch, capsys, tmp_path):
    source = save_tiny("llava", tmp_path / "model", layers=2)
    command = ["train", "tinyprojector", "--model", source, "--steps", 1, "--batch-size", 1, "--out", tmp_path / "run"]
    assert run(monkeypatch, capsys, *command)[0] == 0
    file = next((tmp_path / "model").glob("*.safetensors"))
    weights = load_file(file)
    name = next(name for name in weights if "mlp" in name and "language_model" in name)
    save_file({**weights, name: weights[name] + 1}, file, metadata={"format": "pt"})
    code, _, err = run(monkeypatch, capsys, *command)
    assert code == 1
    assert "holds a run with weights=" in err


def test_smoke(monkeypatch, capsys, model, tmp_path):
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    code, out, err = run(monkeypatch, capsys, "train", "tinyprojector", "--model", model, "--smoke")
    assert code == 0, err
    assert time.monotonic() - started < 60
    assert out == "runs/smoke-tinyprojector\n"
    assert len(read_log(tmp_path / "runs" / "smoke-tinyprojector" / "log.jsonl")) == 3
    assert not (tmp_path / "runs" / "train-tinyprojector").exists()  # the folder of a real run stays free


def test_list_shows_the_command(monkeypatch, capsys):
    _, out, _ = run(monkeypatch, capsys, "list", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert rows["TinyProjector"]["training"] == "mllm train tinyprojector"
    assert "tinyprojector" in trainable()
    _, out, _ = run(monkeypatch, capsys, "list")
    assert "mllm train tinyprojector" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "dvte"}, r"nothing to train under the name 'dvte'\. Trainable: .*tinyprojector"),
        ({"arguments": {"layer": 1}}, r"Unknown argument layer=1 of TinyProjector\. Its arguments: layers\."),
        ({"training": {"step": 1}}, r"step=1: .*Settings of training: steps"),
        ({"training": {"steps": 0}}, r"steps=0"),
        ({"device": "cuda"}, r"device='cuda': no usable GPU here"),
        ({"out": __file__}, r"test_train_command\.py is a file\. Give a folder"),
        ({"data": "nowhere.json"}, r"data='nowhere\.json' is neither a file nor one of: scenes"),
        ({"options": {"rate": 1}}, r"Unknown option rate=1\. Options of this recipe: bias_rate\."),
    ],
)
def test_mistakes(model, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        train_technique(**{"name": "tinyprojector", "model": str(model), "out": tmp_path / "run", **arguments})
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_named(model, monkeypatch):
    monkeypatch.setattr(TinyProjector, "training", "no_such_package.recipes:recipe")
    with pytest.raises(ConfigError, match=r"needs the package no_such_package\. Install it: pip install"):
        train_technique("tinyprojector", str(model))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", r"a training config is a mapping with the keys model, data"),
        ("step: 3", r"unknown key 'step' = 3\. Allowed keys: model.*, training\.$"),
        ("steps: 3", r"unknown key 'steps' = 3\. Allowed keys: model.*Did you mean training: \{steps: 3\}\?"),
        ("training: 3", "training = 3 must be a mapping"),
        ("model: 3", "model = 3 must be a text"),
        ("a: [", "cannot be read"),
    ],
)
def test_broken_config_files(tmp_path, text, message):
    (tmp_path / "train.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        read_settings(tmp_path / "train.yaml")
