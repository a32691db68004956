"""What a caller hides stays hidden: padding of earlier calls, packed prompts, masks of their own."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_image, tiny_inputs, tiny_model, tiny_processor
from transformers import DynamicCache

from mllm import Stack
from mllm.adapters import LoRRA, ModalityMutualAttention
from mllm.errors import InputError
from mllm.token_pruning import EEMLLM, DyVTE, FreezeVisual, NAAViT

MMA = Stack(ModalityMutualAttention())
STACKS = [
    Stack(),
    Stack(NAAViT()),
    Stack(NAAViT(layers=[1])),
    Stack(EEMLLM()),
    Stack(FreezeVisual()),
    MMA,
    Stack(DyVTE(exit_layer=2)),
]
every_stack = pytest.mark.parametrize("stack", STACKS, ids=str)
every_backend = pytest.mark.parametrize("attn", ["eager", "sdpa"])


def text_of(model, ids):
    return ids != model.config.image_token_id


@every_backend
@every_stack
def test_padding_of_an_earlier_call_is_not_seen(stack, attn):
    """The first turn is text of two lengths, the second has a picture at the same place in both rows."""
    model, processor = tiny_model("llava", attn), tiny_processor("llava")
    asked = ["USER: name a colour and a thing please ASSISTANT:", "USER: hi ASSISTANT:"]
    pictures = [[tiny_image(1, (32, 32))], [tiny_image(2, (32, 32))]]
    text = [f" red USER: {processor.image_token}what is it? ASSISTANT:"] * 2
    options = {"padding": True, "return_tensors": "pt", "add_special_tokens": False}
    first, second = processor(text=asked, **options), processor(text=text, images=pictures, **options)
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], dim=1)
    assert not mask.all()
    positions, start = (mask.cumsum(dim=1) - 1).clamp(min=0), first["input_ids"].shape[1]
    text_rows = text_of(model, second["input_ids"])
    with torch.no_grad(), stack(model, processor):
        cache = DynamicCache(config=model.config.get_text_config())
        model(**first, position_ids=positions[:, :start], past_key_values=cache)
        more = {**second, "attention_mask": mask, "position_ids": positions[:, start:]}
        found = model(**more, past_key_values=cache).logits
        for row, kept in enumerate(mask.bool()):
            ids = torch.cat([first["input_ids"][row], second["input_ids"][row]])[kept][None]
            alone = model(input_ids=ids, pixel_values=second["pixel_values"][row : row + 1], use_cache=False).logits
            expected = alone[0, -text_rows.shape[1] :][text_rows[row]]
            torch.testing.assert_close(found[row][text_rows[row]], expected, atol=3e-5, rtol=1e-4)


@every_backend
@every_stack
def test_packed_prompts_do_not_see_each_other(stack, attn):
    model, processor = tiny_model("llava", attn), tiny_processor("llava")
    one, two = (tiny_inputs(model, processor, "one", seed=seed) for seed in (1, 2))
    length = one["input_ids"].shape[1]
    packed = {name: torch.cat([one[name], two[name]], dim=dim) for name, dim in (("input_ids", 1), ("pixel_values", 0))}
    packed["position_ids"] = torch.arange(length).repeat(2)[None]
    with torch.no_grad(), stack(model, processor):
        found = model(**packed, use_cache=False).logits[0, length:]
        alone = model(**two, use_cache=False).logits[0]
    rows = text_of(model, two["input_ids"][0])
    torch.testing.assert_close(found[rows], alone[rows], atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("stack", [stack for stack in STACKS if stack != MMA], ids=str)
def test_a_mask_of_the_caller_hides_tokens(stack):
    """Hiding what stands before a token leaves that token, and those after it, as if it had not been there."""
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    inputs = tiny_inputs(model, processor, "one")
    ids = inputs["input_ids"]
    length = ids.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[3:, 1:3] = False
    other = ids.clone()
    other[0, 1:3] = torch.tensor([41, 42])
    rows = text_of(model, ids[0])
    rows[1:3] = False
    with torch.no_grad(), stack(model, processor):
        found, changed = (
            model(input_ids=each, pixel_values=inputs["pixel_values"], attention_mask=mask[None, None], use_cache=False)
            for each in (ids, other)
        )
        causal = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(found.logits[0][rows], changed.logits[0][rows], atol=1e-5, rtol=1e-5)
    assert (found.logits - causal)[0][rows].abs().max() > 1e-3


def test_masks_that_would_be_looked_past_are_refused():
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    inputs = tiny_inputs(model, processor, "one")
    length = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    for stack in (MMA, Stack(LoRRA())):
        with stack(model, processor), pytest.raises(InputError, match="mask of your own"):
            model(**inputs)


@pytest.mark.parametrize("turns", ["first", "all_previous"])
def test_packed_prompts_have_turns_of_their_own(turns):
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    one = tiny_inputs(model, processor, "one")
    packed = {"input_ids": one["input_ids"].repeat(1, 2), "pixel_values": one["pixel_values"].repeat(2, 1, 1, 1)}
    packed["position_ids"] = torch.arange(one["input_ids"].shape[1]).repeat(2)[None]
    with ModalityMutualAttention(turns=turns)(model, processor), pytest.raises(InputError, match="packed prompts"):
        model(**packed)


def test_lorra_refuses_packed_prompts():
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    inputs = tiny_inputs(model, processor, "one")
    inputs.pop("attention_mask")
    halves = torch.arange(inputs["input_ids"].shape[1] // 2).repeat(2)
    positions = torch.nn.functional.pad(halves, (0, inputs["input_ids"].shape[1] - len(halves)), value=0)[None]
    with LoRRA()(model, processor), pytest.raises(InputError, match="one prompt a row"):
        model(**inputs, position_ids=positions)
