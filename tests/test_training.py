"""The default model's recipe: what it learns from, that it learns, and that a kill costs nothing."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
import train_default
import train_documents
from data_sources import SOURCES
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from mllm import load
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
    """A model and its processor, small."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer("llava")
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    tower = VisionTowerConfig.for_architecture(
        library="timm", architecture="tf_efficientnet_lite0", image_size=64, levels=[3, 4], final=True
    )
    model, processor = compose(LlamaForCausalLM(text), tokenizer, VisionTowerModel(tower), (0.5,) * 3, (0.5,) * 3)
    train_default.freeze(model)
    return model, processor


@pytest.mark.parametrize("rank", [0, 4])
def test_only_the_projector_and_the_lora_learn(parts, tmp_path, rank):
    learner = train_default.Learner(*parts, rank)
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    train_default.train(learner, tmp_path, steps=2, micro_size=2, micros=1)
    changed = {name for name, value in learner.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "multi_modal_projector" in name or "lora_" in name}
    assert len(changed) == 4 + 2 * 7 * 2 * bool(rank)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [("validation" in row, row["step"]) for row in rows] == [(True, 0), (False, 0), (False, 1), (True, 2)]


def test_a_killed_run_ends_like_one_that_was_not(parts, tmp_path, monkeypatch):
    learner = train_default.Learner(*parts, 2)
    start = copy.deepcopy(learner.state())
    train_default.train(learner, tmp_path / "whole", steps=4, micro_size=2, micros=1, validation=0)
    whole = copy.deepcopy(learner.state())

    learner.load(start)
    batch_loss, calls = train_default.batch_loss, []

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return batch_loss(*arguments)

    monkeypatch.setattr(train_default, "batch_loss", dies)
    monkeypatch.setattr(train_default.time, "monotonic", iter(range(0, 200_000, 200)).__next__)  # a save each step
    with pytest.raises(KeyboardInterrupt):
        train_default.train(learner, tmp_path / "cut", steps=4, micro_size=2, micros=1, validation=0)
    learner.load(start)  # a new process knows nothing
    train_default.train(learner, tmp_path / "cut", steps=4, micro_size=2, micros=1, validation=0)
    for kind in ("projector", "adapter"):
        for name, value in learner.state()[kind].items():
            assert torch.equal(value, whole[kind][name])
    logged = [json.loads(line)["step"] for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert logged == [0, 1, 2, 3]


def test_what_is_exported_is_what_was_trained(parts, tmp_path):
    model, processor = parts
    plain = copy.deepcopy(model)
    learner = train_default.Learner(model, processor, 4)
    train_default.train(learner, tmp_path / "run", steps=3, micro_size=2, micros=1, validation=0)
    train_default.export(tmp_path / "run", tmp_path / "weights")
    weights = load_file(tmp_path / "weights" / "projector.safetensors")
    plain.model.multi_modal_projector.load_state_dict({name: value.float() for name, value in weights.items()})
    merged = PeftModel.from_pretrained(plain, tmp_path / "weights" / "lora").merge_and_unload()
    sample = next(scene_samples("train", 5, 1))
    with torch.no_grad():
        losses = [train_default.batch_loss(one, processor, [sample], 1).item() for one in (model, merged)]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


def test_what_reads_documents_is_an_adapter_that_loads(parts, tmp_path):
    """Its updates of the projector too, and the size of its pictures."""
    model, processor = parts
    base = tmp_path / "base"
    model.save_pretrained(base)
    processor.save_pretrained(base)
    processor.image_processor.size = {"height": 128, "width": 128}
    learner = train_default.Learner(model, processor, 4, train_documents.TARGETS)
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    train_default.train(learner, tmp_path / "run", steps=2, micro_size=2, micros=1, validation=0)
    changed = {name for name, value in learner.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert len(changed) == (2 * 7 + 2) * 2
    processor.image_processor.save_pretrained(tmp_path / "run")
    train_documents.export(tmp_path / "run", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}))
    merged, its_own = load(tmp_path / "adapter", dtype="float32", device="cpu")
    sample = next(scene_samples("train", 5, 1))
    assert chat_inputs(its_own, ["Q?"], [list(sample.images)])["pixel_values"].shape[-1] == 128
    with torch.no_grad():
        losses = [
            train_default.batch_loss(one, two, [sample], 1).item()
            for one, two in ((learner.model, processor), (merged, its_own))
        ]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


def test_a_page_has_few_tokens_at_first_and_all_of_them_at_last():
    draws = train_default.Draws({}, {"scenes": 1.0}, train_documents.POOLS)
    pools = [{draws.batch(step, 0, 1, progress)[1] for step in range(30)} for progress in (0.0, 0.4, 0.6, 0.75, 0.99)]
    assert pools[:4] == [{4}, {4}, {4, 2}, {2}]
    assert 1 in pools[4] <= {2, 1}


def test_export_and_model_card(parts, tmp_path):
    learner = train_default.Learner(*parts, 2)
    train_default.train(learner, tmp_path / "run", steps=2, micro_size=2, micros=1, validation=2)
    train_default.export(tmp_path / "run", tmp_path / "weights")
    path = tmp_path / "weights" / "projector.safetensors"
    assert {value.dtype for value in load_file(path).values()} == {torch.float16}
    assert (tmp_path / "weights" / "loss.png").stat().st_size > 1000
    with safe_open(path, "pt") as file:  # the card needs nothing but this file
        recipe = file.metadata()
    assert [recipe[key] for key in ("steps", "chats_per_step", "rank", "init")] == ["2", "2", "2", "random"]
    rows = [
        {"task": task, "kind": kind, "input": control, "n": 10, "score": 0.5, "ci95": [0.2, 0.8]}
        for task, controls in (("mllm_vqa", train_default.CONTROLS), ("mllm_text", train_default.TEXT_ONLY))
        for kind in ("all", "color")
        for control in controls
    ]
    train_default.write_card(rows, recipe, tmp_path / "weights")
    card = (tmp_path / "weights" / "README.md").read_text()
    assert "| mllm_vqa | **all** | 10 | 0.50 [0.20, 0.80] | 0.50 [0.20, 0.80] | 0.50 [0.20, 0.80] |" in card
    assert "| mllm_text | color | 10 | 0.50 [0.20, 0.80] | 0.50 [0.20, 0.80] |" in card
    assert "2 steps of 2 chats" in card
    assert "before and after:\nscenes" in card
    assert json.loads((tmp_path / "weights" / "scores.json").read_text()) == rows


@pytest.mark.parametrize("talk", [False, True])
def test_only_answers_are_labelled(parts, talk):
    _, processor = parts
    sample = next(scene_samples("train", 0, 1))
    chat = train_default.encode(sample, processor, 4, talk)
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
    assert train_default.encode(sample, processor, tokens, False).ids[: len(ids)] == ids


def test_turns_of_a_talk_read_and_see_as_in_a_chat(parts):
    """The loss of a talk is the model's own on the chat as the processor writes it."""
    model, processor = parts
    sample = next(s for s in scene_samples("train", 0, 20) if len(s.turns) > 2)
    messages = []
    for number, turn in enumerate(sample.turns):
        images = [{"type": "image"}] if number == 0 else []
        messages.append({"role": "user", "content": [*images, {"type": "text", "text": turn.question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    text = processor.apply_chat_template(messages).removesuffix("\n")
    inputs = processor(text=[text], images=list(sample.images), return_tensors="pt", add_special_tokens=False)
    (ids,) = inputs["input_ids"].tolist()
    tokens = ids.count(processor.tokenizer.convert_tokens_to_ids("<image>"))
    chat = train_default.encode(sample, processor, tokens, True)
    assert (chat.ids, chat.positions) == (ids, list(range(len(ids))))
    with torch.no_grad():
        logits = model(**inputs).logits[0, :-1].float()
        loss = train_default.batch_loss(model, processor, [sample], 1, True)
    turns, labels = torch.tensor(chat.turns)[1:], torch.tensor(chat.labels)[1:]
    each = [
        torch.nn.functional.cross_entropy(logits[chosen], labels[chosen])
        for number in range(1, len(sample.turns) + 1)
        if (chosen := (labels >= 0) & (turns == number)).any()
    ]
    assert loss.item() == pytest.approx(torch.stack(each).mean().item(), rel=2e-2)


def test_requests_without_a_picture_learn_their_replies(parts):
    model, processor = parts
    asked = train_default.requests("train")
    draws = train_default.Draws({request: f"Reply to {request}" for request in asked[:30]}, {"instructions": 1.0})
    samples, pool, _ = draws.batch(0, 0, 3, 0.5)
    assert all(turn.answer == f"Reply to {turn.question}" for sample in samples for turn in sample.turns)
    assert not any(sample.images for sample in samples)
    assert train_default.batch_loss(model, processor, samples, pool).isfinite()
    assert not set(asked) & set(train_default.requests("test"))


def test_its_own_replies_are_kept(parts, tmp_path, monkeypatch):
    model, processor = parts
    monkeypatch.setattr(train_default, "requests", lambda split: ["Hello!", "Who are you?", "Why?"])
    replies = train_default.own_replies(model, processor, tmp_path / "run" / "replies.json", size=2, tokens=4)
    assert set(replies) <= {"Hello!", "Who are you?", "Why?"}
    monkeypatch.setattr(model, "generate", None)  # not asked again
    assert train_default.own_replies(model, processor, tmp_path / "run" / "replies.json") == replies


def test_validation_keeps_whole_groups_from_training():
    draws = train_default.Draws({}, {"scenes": 1.0})
    learnt = {s.group for s in draws.draw("scenes", 3, 200)}
    kept = {s.group for s in draws.draw("scenes", 4, 40, validation=True)}
    assert kept
    assert not learnt & kept


def test_a_control_shows_another_picture_that_does_not_answer():
    doc = {"images": [1], "kind": "color", "answer": "red"}
    assert train_default.exchangeable(doc, {**doc, "answer": "blue"})
    for other in ({"answer": "red"}, {"kind": "count", "answer": "two"}, {"images": [1, 2], "answer": "blue"}):
        assert not train_default.exchangeable(doc, {**doc, **other})


def test_sources_cover_the_mixture():
    assert {"pictures", "pairs", "scenes", "reading", "documents", "every page", "text"} == set(SOURCES)
