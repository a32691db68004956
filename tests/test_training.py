"""The default model's recipe: what it learns from, that it learns, and that a kill costs nothing."""

from __future__ import annotations

import json

import pytest
import torch
import train_default
from data_sources import SOURCES
from safetensors.torch import load_file
from tiny import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from mllm.compose import compose
from mllm.drawn import Turn, scene_samples
from mllm.towers import VisionTowerConfig, VisionTowerModel


@pytest.fixture(autouse=True)
def procedural_only(monkeypatch):
    """Clip art, emoji and fonts are packages that a test machine need not have; scenes are drawn here."""
    monkeypatch.setattr(train_default, "MIXTURE", {"scenes": 1.0})


@pytest.fixture
def parts():
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer("llava")
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    tower = VisionTowerConfig.for_architecture(
        library="timm", architecture="tf_efficientnet_lite0", image_size=64, levels=[3, 4], final=True
    )
    model, processor = compose(LlamaForCausalLM(text), tokenizer, VisionTowerModel(tower), (0.5,) * 3, (0.5,) * 3)
    return train_default.freeze(model, processor)


def test_only_the_projector_learns(parts, tmp_path):
    model, processor = parts
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_default.train(model, processor, tmp_path, steps=2, micro_size=2, micros=1)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "multi_modal_projector" in name}
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


def test_a_killed_run_ends_like_one_that_was_not(parts, tmp_path, monkeypatch):
    model, processor = parts
    start = {name: value.clone() for name, value in model.model.multi_modal_projector.state_dict().items()}
    train_default.train(model, processor, tmp_path / "whole", steps=4, micro_size=2, micros=1)
    whole = {name: value.clone() for name, value in model.model.multi_modal_projector.state_dict().items()}

    model.model.multi_modal_projector.load_state_dict(start)
    batch_loss, calls = train_default.batch_loss, []

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return batch_loss(*arguments)

    monkeypatch.setattr(train_default, "batch_loss", dies)
    monkeypatch.setattr(train_default.time, "monotonic", iter(range(0, 100_000, 100)).__next__)  # a save each step
    with pytest.raises(KeyboardInterrupt):
        train_default.train(model, processor, tmp_path / "cut", steps=4, micro_size=2, micros=1)
    model.model.multi_modal_projector.load_state_dict(start)  # a new process knows nothing
    train_default.train(model, processor, tmp_path / "cut", steps=4, micro_size=2, micros=1)
    for name, value in model.model.multi_modal_projector.state_dict().items():
        assert torch.equal(value, whole[name])
    logged = [json.loads(line)["step"] for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert logged == [0, 1, 2, 3]


def test_export_and_model_card(parts, tmp_path):
    train_default.train(*parts, tmp_path / "run", steps=2, micro_size=2, micros=1)
    train_default.export(tmp_path / "run", tmp_path / "weights")
    saved = load_file(tmp_path / "weights" / "projector.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float16}
    assert (tmp_path / "weights" / "loss.png").stat().st_size > 1000
    rows = [
        {"source": "scenes", "input": control, "n": 10, "score": 0.5, "ci95": [0.2, 0.8]}
        for control in ("picture", "shuffled", "blank")
    ]
    train_default.write_card(rows, 2, tmp_path / "weights")
    card = (tmp_path / "weights" / "README.md").read_text()
    assert "| scenes | 10 | 50 % (20 to 80) |" in card


def test_only_answers_are_labelled(parts):
    _, processor = parts
    sample = next(scene_samples("train", 0, 1))
    ids, labels = train_default.encode(sample, processor, 4)
    assert ids.count(processor.tokenizer.convert_tokens_to_ids("<image>")) == 4
    text = processor.tokenizer.decode([label for label in labels if label != train_default.IGNORED])
    assert text == "".join(f"{turn.answer}<|im_end|>" for turn in sample.turns)
    assert [i for i, label in zip(ids, labels, strict=True) if label != train_default.IGNORED] == [
        label for label in labels if label != train_default.IGNORED
    ]


@pytest.mark.parametrize(
    ("reply", "right"), [("Two.", True), ("2", True), ("two shapes", True), ("three", False), ("", False)]
)
def test_scoring_in_the_evaluation(reply, right):
    assert train_default.correct(reply, Turn("How many?", "two", ("2",))) is right


def test_sources_cover_the_mixture():
    assert {"pictures", "scenes", "reading", "documents", "text"} == set(SOURCES)
