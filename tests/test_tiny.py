"""The tiny models and inputs are what the other tests take them for."""

from __future__ import annotations

import pytest
import torch
from tiny import (
    FAMILIES,
    IMAGE_ID,
    KINDS,
    SPECIAL_IDS,
    VIDEO_ID,
    VOCAB_SIZE,
    images_per_row,
    row,
    save_tiny,
    tiny_image,
    tiny_inputs,
    tiny_model,
    tiny_processor,
    visual_mask,
)
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

IMAGES = {
    "one": [1],
    "text": [0],
    "batch": [1, 1, 1, 0],
    "two_images": [2, 1],
    "same_length_ragged": [1, 1, 1],
    "image_only_start": [1],
}

every_family = pytest.mark.parametrize("family", FAMILIES)
every_backend = pytest.mark.parametrize("attn", ["eager", "sdpa"])
every_kind = pytest.mark.parametrize("kind", KINDS)


@torch.no_grad()
def logits(model, inputs) -> Tensor:
    return model(**inputs).logits  # (B, S, V)


@every_family
def test_models(family):
    model = tiny_model(family)
    config = model.config.get_text_config()
    attention = model.model.language_model.layers[0].self_attn
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert config.num_key_value_heads < config.num_attention_heads
    assert attention.head_dim >= 8
    assert (attention.q_proj.bias is not None) == (family in ("llava_onevision", "qwen2_5_vl"))
    assert config.vocab_size == VOCAB_SIZE == len(tiny_processor(family).tokenizer)
    if family == "qwen2_5_vl":
        assert sum(config.rope_parameters["mrope_section"]) == attention.head_dim // 2


def test_models_are_shared_unless_fresh():
    model, state = tiny_model("llava"), torch.random.get_rng_state()
    fresh = tiny_model("llava", fresh=True)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert tiny_model("llava") is model
    assert fresh is not model
    weights, others = fresh.state_dict(), tiny_model("llava", seed=1).state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert any(not torch.equal(value, weights[name]) for name, value in others.items())
    assert len(tiny_model("llava", layers=3).model.language_model.layers) == 3


@every_family
@every_kind
def test_inputs(family, kind):
    model = tiny_model(family)
    inputs = tiny_inputs(model, tiny_processor(family), kind)
    valid, visual = inputs["attention_mask"].bool(), visual_mask(model, inputs)
    assert images_per_row(inputs) == IMAGES[kind]
    assert not (visual & ~valid).any()
    assert (valid.int().diff(dim=1) >= 0).all()  # padding only on the left
    assert valid.any(dim=0).all()
    first = [int(v.int().argmax()) for v in visual]
    lengths = valid.sum(dim=1).tolist()
    if kind == "batch":
        assert len(set(lengths)) == 4
        starts = [int(v.int().argmax()) for v in valid]
        # BOS of the LLaVA families, or the start token of Qwen, at most
        assert first[2] - starts[2] <= 1 < first[0] - starts[0]
    if kind == "same_length_ragged":
        assert len(set(first)) == 3
        assert valid.all()
    if kind == "image_only_start":
        assert first == [0]
    if kind not in ("text", "image_only_start"):
        assert visual[0].any()
        assert not visual[:, -1].any()


@every_family
@every_backend
@every_kind
def test_images_change_the_logits(family, attn, kind):
    model, processor = tiny_model(family, attn), tiny_processor(family)
    inputs, others = (tiny_inputs(model, processor, kind, seed=seed) for seed in (0, 1))
    assert torch.equal(inputs["input_ids"], others["input_ids"])
    change = (logits(model, inputs) - logits(model, others))[:, -1].abs().amax(dim=1)  # (B,)
    for images, found in zip(IMAGES[kind], change.tolist(), strict=True):
        assert found > 0.5 if images else found < 1e-4


@every_family
@every_backend
@every_kind
def test_rows_equal_the_batch(family, attn, kind):
    model = tiny_model(family, attn)
    inputs = tiny_inputs(model, tiny_processor(family), kind)
    together, valid = logits(model, inputs), inputs["attention_mask"].bool()
    length = inputs["input_ids"].shape[1]
    answers = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, length:]
    assert answers.shape == (len(IMAGES[kind]), 4)
    assert not torch.isin(answers, torch.tensor(SPECIAL_IDS)).any()
    for number in range(len(together)):
        alone = row(inputs, number)
        assert images_per_row(alone) == [IMAGES[kind][number]]
        assert alone["attention_mask"].all()
        assert ("pixel_values" in alone) == (IMAGES[kind][number] > 0)
        torch.testing.assert_close(logits(model, alone)[0], together[number, valid[number]], atol=1e-4, rtol=0)
        answer = model.generate(**alone, max_new_tokens=4, do_sample=False)[0, alone["input_ids"].shape[1] :]
        assert torch.equal(answer, answers[number])


@every_family
def test_row_takes_extended_inputs_and_refuses_what_it_cannot_divide(family):
    model = tiny_model(family)
    inputs = dict(tiny_inputs(model, tiny_processor(family), "two_images"))
    tokens = torch.full((2, 3), 7)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens], dim=1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], dim=1)
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(tokens)], dim=1)
    together = logits(model, inputs)
    for number in range(2):
        alone = logits(model, row(inputs, number))[0]
        torch.testing.assert_close(alone[-5:], together[number, -5:], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="labels"):
        row(inputs | {"labels": inputs["input_ids"]}, 0)
    first = visual_mask(model, inputs)[1]
    inputs["input_ids"][1, first] = 7  # the image of the second row is still there
    with pytest.raises(ValueError, match="3 images"):
        row(inputs, 0)


@every_family
def test_processor_and_chat_template(family):
    model, processor = tiny_model(family), tiny_processor(family)
    assert type(processor).__name__.lower().startswith(family.replace("_", "")[:5])
    assert processor.tokenizer.padding_side == "left"
    assert (processor.image_token_id, model.config.image_token_id) == (IMAGE_ID, IMAGE_ID)
    assert processor.tokenizer.convert_tokens_to_ids(processor.image_token) == IMAGE_ID
    if family in ("llava_onevision", "qwen2_5_vl"):
        assert (processor.video_token_id, model.config.video_token_id) == (VIDEO_ID, VIDEO_ID)
    text = "What is 3+4?\n  {a, b}"
    assert processor.decode(processor.tokenizer(text)["input_ids"], skip_special_tokens=True) == text

    content = [{"type": "image", "image": tiny_image()}, {"type": "text", "text": "What is it?"}]
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    batch = [conversation, [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]]
    inputs = processor.apply_chat_template(
        batch,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"padding": True, "return_tensors": "pt"},
    )
    assert images_per_row(inputs) == [1, 0]
    assert "What is it?" in processor.decode(inputs["input_ids"][0])
    assert logits(model, inputs).isfinite().all()


@every_family
def test_saved_folder_loads(family, tmp_path):
    save_tiny(family, tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    original = tiny_model(family)
    assert type(model) is type(original)
    assert type(processor) is type(tiny_processor(family))
    for kind in ("batch", "two_images"):
        expected, inputs = (tiny_inputs(original, p, kind) for p in (tiny_processor(family), processor))
        assert expected.keys() == inputs.keys()
        assert all(torch.equal(value, inputs[name]) for name, value in expected.items())
        assert torch.equal(logits(model, inputs), logits(original, expected))
    chat = [{"role": "user", "content": "Hi"}]
    assert processor.apply_chat_template(chat) == tiny_processor(family).apply_chat_template(chat)


def test_unknown_names():
    model, processor = tiny_model("llava"), tiny_processor("llava")
    with pytest.raises(ValueError, match=r"llava_2.*llava_next"):
        tiny_model("llava_2")
    with pytest.raises(ValueError, match=r"'both'.*two_images"):
        tiny_inputs(model, processor, "both")
