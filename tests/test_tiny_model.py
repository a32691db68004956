"""The model ``tiny`` as it is committed: it loads as a stock model, and it looks at its pictures."""

from __future__ import annotations

import json

import pytest
import torch
import train_tiny
from transformers import LlavaForConditionalGeneration

from mllm import load
from mllm.chats import Chat, collate
from mllm.eval.stats import wilson
from mllm.inputs import chat_inputs
from mllm.loading import TINY
from mllm.puzzles import CHANCE, PUZZLES
from mllm.roles import ChatFormat


@pytest.fixture(scope="module")
def tiny():
    return load("tiny", dtype="float32", device="cpu")


def test_it_is_a_stock_model_of_its_size(tiny):
    model, processor = tiny
    assert type(model) is LlavaForConditionalGeneration
    assert sum(p.numel() for p in model.parameters()) < 7.5e6
    assert sum(file.stat().st_size for file in TINY.glob("*.safetensors")) < 15e6
    assert processor.tokenizer.padding_side == "left"


def test_it_answers_in_batches_and_stops(tiny):
    model, processor = tiny
    samples = list(PUZZLES["grids"]("test", "answers", 24))
    asked = [next(turn for turn in sample.turns if turn.kind == "shape at") for sample in samples]
    inputs = chat_inputs(processor, [turn.question for turn in asked], [[s.images[0]] for s in samples])
    new = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    answers = processor.batch_decode(new, skip_special_tokens=True)
    assert sum(answer.strip() == turn.answer for answer, turn in zip(answers, asked, strict=True)) >= 22
    assert new.shape[1] < 8  # all have ended


@pytest.mark.parametrize("name", ["grids", "album", "talk"])
def test_training_lays_out_tokens_as_the_processor_does(tiny, name):
    _, processor = tiny
    packer = train_tiny.Packer(processor.tokenizer)
    sample = next(s for s in PUZZLES[name]("train", 3, 20) if s.images)
    chat = collate(processor, ChatFormat.from_processor(processor), [Chat.from_sample(sample)])
    ids, positions, *_ = packer.sample(sample, 1, chat=True)
    assert chat["input_ids"][0].tolist() == ids
    assert positions == list(range(len(ids)))


def test_training_computes_what_the_stock_model_does(tiny):
    model, processor = tiny
    packer = train_tiny.Packer(processor.tokenizer)
    sample = next(s for s in PUZZLES["talk"]("train", 5, 20) if s.images)
    packed = packer.pack([(sample, 1)], width=8)
    chat = collate(processor, ChatFormat.from_processor(processor), [Chat.from_sample(sample)])
    with torch.no_grad():
        found, targets = train_tiny.decode(
            model, packed, train_tiny.visual_tokens(model, packed, frozen=True), packer.image
        )
        stock = model(**{name: value for name, value in chat.items() if name != "labels"}).logits[0, :-1]
    labels = chat["labels"][0, 1:]
    assert targets.tolist() == labels[labels != -100].tolist()
    assert torch.allclose(found, stock[labels != -100], atol=1e-3)


def test_every_score_of_its_card_stands_above_its_controls():
    scores = json.loads((TINY / "scores.json").read_text(encoding="utf-8"))
    card = (TINY / "README.md").read_text(encoding="utf-8")
    cannot = card.split("<!-- not able -->")[1].split("\n")[0]
    for kind, found in scores.items():
        assert kind in CHANCE
        assert f"| {kind} |" in card
        if kind not in ("sum", "larger", "repeat", "fact") and f"`{kind}`" not in cannot:
            low = wilson(*found["picture"])[0]
            assert low > max(wilson(*found[control])[1] for control in ("none", "shuffled")), kind
