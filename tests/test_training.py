"""The default model's recipe: what it learns from, that it learns, and that a kill costs nothing."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import train_default
from data_sources import SOURCES
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from mllm.compose import compose
from mllm.drawn import scene_samples
from mllm.inputs import chat_inputs
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
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [("validation" in row, row["step"]) for row in rows] == [(True, 0), (False, 0), (False, 1), (True, 2)]


def test_a_killed_run_ends_like_one_that_was_not(parts, tmp_path, monkeypatch):
    model, processor = parts
    start = {name: value.clone() for name, value in model.model.multi_modal_projector.state_dict().items()}
    train_default.train(model, processor, tmp_path / "whole", steps=4, micro_size=2, micros=1, validation=0)
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
        train_default.train(model, processor, tmp_path / "cut", steps=4, micro_size=2, micros=1, validation=0)
    model.model.multi_modal_projector.load_state_dict(start)  # a new process knows nothing
    train_default.train(model, processor, tmp_path / "cut", steps=4, micro_size=2, micros=1, validation=0)
    for name, value in model.model.multi_modal_projector.state_dict().items():
        assert torch.equal(value, whole[name])
    logged = [json.loads(line)["step"] for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert logged == [0, 1, 2, 3]


def test_export_and_model_card(parts, tmp_path):
    train_default.train(*parts, tmp_path / "run", steps=2, micro_size=2, micros=1, validation=2)
    train_default.export(tmp_path / "run", tmp_path / "weights")
    path = tmp_path / "weights" / "projector.safetensors"
    assert {value.dtype for value in load_file(path).values()} == {torch.float16}
    assert (tmp_path / "weights" / "loss.png").stat().st_size > 1000
    with safe_open(path, "pt") as file:  # the card needs nothing but this file
        recipe = file.metadata()
    assert (recipe["steps"], recipe["chats_per_step"], recipe["init"]) == ("2", "2", "random")
    rows = [
        {"task": "mllm_vqa", "kind": kind, "input": control, "n": 10, "score": 0.5, "ci95": [0.2, 0.8]}
        for kind in ("all", "color")
        for control in train_default.CONTROLS
    ]
    train_default.write_card(rows, recipe, tmp_path / "weights")
    card = (tmp_path / "weights" / "README.md").read_text()
    assert "| mllm_vqa | **all** | 10 | 0.50 [0.20, 0.80] | 0.50 [0.20, 0.80] | 0.50 [0.20, 0.80] |" in card
    assert "2 steps of 2 pictures" in card
    assert "before and after:\nscenes" in card
    assert json.loads((tmp_path / "weights" / "scores.json").read_text()) == rows


def test_only_answers_are_labelled(parts):
    _, processor = parts
    sample = next(scene_samples("train", 0, 1))
    chat = train_default.encode(sample, processor, 4)
    assert chat.ids.count(processor.tokenizer.convert_tokens_to_ids("<image>")) == 4
    labelled = [label for label in chat.labels if label != train_default.IGNORED]
    assert processor.tokenizer.decode(labelled) == "".join(f"{turn.answer}<|im_end|>" for turn in sample.turns)
    assert [i for i, label in zip(chat.ids, chat.labels, strict=True) if label != train_default.IGNORED] == labelled


def test_questions_about_a_picture_do_not_see_each_other(parts):
    """Together in one sequence they cost what each costs alone, in a chat of its own."""
    model, processor = parts
    sample = next(s for s in scene_samples("train", 0, 20) if len(s.turns) > 2)
    alone = [replace(sample, turns=[turn]) for turn in sample.turns]
    with torch.no_grad():
        together = train_default.batch_loss(model, processor, [sample], 1)
        apart = [train_default.batch_loss(model, processor, [one], 1) for one in alone]
    assert together.item() == pytest.approx(torch.stack(apart).mean().item(), rel=1e-4)


def test_a_question_in_training_reads_as_in_a_chat(parts):
    _, processor = parts
    sample = next(scene_samples("train", 1, 1))
    sample = replace(sample, turns=sample.turns[:1])
    inputs = chat_inputs(processor, [sample.turns[0].question], [sample.images])
    ids = inputs["input_ids"][0].tolist()[1:]  # the tiny tokenizer begins with a token that SmolLM2's does not have
    tokens = ids.count(processor.tokenizer.convert_tokens_to_ids("<image>"))
    assert train_default.encode(sample, processor, tokens).ids[: len(ids)] == ids


def test_validation_keeps_whole_groups_from_training():
    learnt = {s.group for s in train_default.draw("scenes", 3, 200)}
    kept = {s.group for s in train_default.draw("scenes", 4, 40, validation=True)}
    assert kept
    assert not learnt & kept


def test_a_control_shows_another_picture_that_does_not_answer():
    doc = {"images": [1], "kind": "color", "answer": "red"}
    assert train_default.exchangeable(doc, {**doc, "answer": "blue"})
    for other in ({"answer": "red"}, {"kind": "count", "answer": "two"}, {"images": [1, 2], "answer": "blue"}):
        assert not train_default.exchangeable(doc, {**doc, **other})


def test_sources_cover_the_mixture():
    assert {"pictures", "scenes", "reading", "documents", "text"} == set(SOURCES)
