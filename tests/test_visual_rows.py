"""NAAViT and its family: no path between visual rows, and keys of images kept for the next question."""

from __future__ import annotations

import pytest
import torch
from contract import close, logits
from reference import reference_logits
from tiny import FAMILIES, row, tiny_inputs, tiny_model, tiny_processor, visual_mask

from mllm import Stack
from mllm.engine import Step
from mllm.errors import ConfigError
from mllm.token_pruning import EEMLLM, DyVTE, NAAViT


@pytest.mark.parametrize("family", FAMILIES)
def test_no_gradient_flows_between_visual_rows(family):
    """The state of a visual row after all layers depends on its own embedding alone: the Jacobian is zero elsewhere."""
    model, processor = tiny_model(family, "sdpa"), tiny_processor(family)
    inputs = tiny_inputs(model, processor, "one")
    visual = visual_mask(model, inputs)[0].nonzero()[:, 0]
    seen = {}

    def keep(module, args, kwargs):
        seen["embeds"] = kwargs["inputs_embeds"].detach().requires_grad_(True)
        return args, {**kwargs, "inputs_embeds": seen["embeds"]}

    hook = model.model.language_model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with NAAViT()(model):
            last = model.model(**inputs, output_hidden_states=True, use_cache=False).hidden_states[-2]
    finally:
        hook.remove()
    place = visual[len(visual) // 2]
    (gradient,) = torch.autograd.grad(last[0, place].square().sum(), seen["embeds"])
    touched = gradient[0].abs().sum(dim=-1).nonzero()[:, 0].tolist()
    assert touched == [int(place)]


# --- images kept for the next question --------------------------------------------------------------------------------

REUSING = [
    Stack(NAAViT(image_cache=4)),
    Stack(EEMLLM(image_cache=4)),
    Stack(NAAViT(image_cache=4), DyVTE(exit_layer=3)),
]


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stack", REUSING, ids=str)
def test_a_second_question_equals_no_reuse_and_pays_text_only(family, attn, stack):
    model, processor = tiny_model(family, attn), tiny_processor(family)
    plain = Stack(*(t.model_copy(update={"image_cache": 0}) for t in stack.techniques))
    first = tiny_inputs(model, processor, "one")
    second = dict(first)
    second["input_ids"] = first["input_ids"].clone()
    question = first["attention_mask"].shape[1] - 4
    second["input_ids"][:, question] = 30  # another question of the same length about the same image
    with plain(model) as run:
        expected = [logits(model, inputs) for inputs in (first, second)]
        full = run.flops / 2
    with stack(model) as run:
        found = []
        for inputs in (first, second):
            run.reset()
            found.append(logits(model, inputs))
        assert run.flops < full
        visual = int(visual_mask(model, first).sum())
        spec = run.spec
        layers = 4 if len(stack.techniques) == 2 else spec.layers
        per_row = 4 * spec.hidden * spec.kv_width + 6 * spec.hidden * spec.intermediate
        if isinstance(stack.techniques[0], EEMLLM):
            per_row += 2 * spec.q_width * spec.hidden
        assert full - run.flops == layers * visual * per_row
        assert (run.image_cache.hits, run.image_cache.misses, len(run.image_cache)) == (1, 1, 1)
        answer = model.generate(**second, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    for one, other in zip(found, expected, strict=True):
        text = ~visual_mask(model, first)
        close(one[text], other[text])
    with plain(model):
        assert torch.equal(model.generate(**second, max_new_tokens=3, min_new_tokens=3, do_sample=False), answer)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_known_and_new_images(family):
    """Some rows find their image, some do not, some have two or none; padded to one length."""
    model, processor = tiny_model(family, "sdpa"), tiny_processor(family)
    for kind in ("batch", "two_images"):
        inputs = tiny_inputs(model, processor, kind)
        expected = reference_logits(model, inputs, policy="naavit")
        with NAAViT(image_cache=8)(model) as run:
            # a batch's padding moves M-RoPE positions of no row: what was kept for the row alone serves it here
            logits(model, row(inputs, 0))
            known = run.image_cache.hits
            for _ in range(2):
                found = logits(model, inputs)
                valid, text = inputs["attention_mask"].bool(), ~visual_mask(model, inputs)
                for number, reference in enumerate(expected):
                    use = valid[number] & text[number]
                    close(found[number][use], reference[text[number][valid[number]]])
            assert run.image_cache.hits > known


def test_another_image_or_place_is_not_taken_for_it():
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    inputs, other = (tiny_inputs(model, processor, "one", seed=seed) for seed in (0, 1))
    moved = tiny_inputs(model, processor, "image_only_start")
    with NAAViT(image_cache=8)(model) as run:
        for kind in (inputs, other, moved):
            logits(model, kind)
        assert (run.image_cache.hits, len(run.image_cache)) == (0, 3)


def test_the_cache_is_bounded_and_can_be_cleared():
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    many = [tiny_inputs(model, processor, "one", seed=seed) for seed in range(4)]
    with NAAViT(image_cache=2)(model) as run:
        sizes = []
        for inputs in many:
            logits(model, inputs)
            sizes.append(run.image_cache.nbytes)
        assert len(run.image_cache) == 2
        assert sizes[1] == sizes[3] == 2 * sizes[0]
        spec, visual = run.spec, int(visual_mask(model, many[0]).sum())
        assert sizes[0] == 2 * spec.layers * visual * spec.kv_width * 4
        logits(model, many[3])
        assert run.image_cache.hits == 1
        logits(model, many[0])  # the oldest has gone
        assert run.image_cache.hits == 1
        run.image_cache.clear()
        assert (len(run.image_cache), run.image_cache.nbytes) == (0, 0)


def test_an_interrupted_call_leaves_no_half_image():
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    inputs = tiny_inputs(model, processor, "one")
    with NAAViT(image_cache=2)(model) as run:
        hook = model.model.language_model.layers[3].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        try:
            with pytest.raises(ZeroDivisionError):
                logits(model, inputs)
        finally:
            hook.remove()
        assert len(run.image_cache) == 0
        logits(model, inputs)
        assert len(run.image_cache) == 1


def test_training_does_not_read_the_cache():
    """Kept keys carry no gradient: while gradients are wanted nothing is kept and nothing is read."""
    model, processor = tiny_model("llava", "sdpa", fresh=True), tiny_processor("llava")
    inputs = tiny_inputs(model, processor, "one")
    with NAAViT(image_cache=2)(model) as run:
        for _ in range(2):
            model.zero_grad()
            model(**inputs, use_cache=False).logits[:, -1].sum().backward()
            gradient = model.model.language_model.layers[2].mlp.up_proj.weight.grad.clone()
        assert len(run.image_cache) == 0
    with NAAViT()(model):
        model.zero_grad()
        model(**inputs, use_cache=False).logits[:, -1].sum().backward()
    close(gradient, model.model.language_model.layers[2].mlp.up_proj.weight.grad)


def test_reuse_needs_the_policy_in_all_layers():
    with pytest.raises(ConfigError, match=r"image_cache=2 with layers=\[1\]"):
        NAAViT(layers=[1], image_cache=2).attach(tiny_model("llava", "sdpa"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["one", "same_length_ragged"])
def test_segments_equal_the_mask(family, kind, monkeypatch):
    model, processor = tiny_model(family, "sdpa"), tiny_processor(family)
    inputs = tiny_inputs(model, processor, kind)
    text = ~visual_mask(model, inputs)
    with NAAViT()(model):
        fast = logits(model, inputs)
    monkeypatch.setattr(Step, "_segments", lambda *_: None)
    with NAAViT()(model):
        close(fast[text], logits(model, inputs)[text])


def test_other_weights_forget_pictures():
    """Between training steps, or after an adapter was merged, kept keys would be those of another model."""
    model, processor = tiny_model("llava", fresh=True), tiny_processor("llava")
    inputs = tiny_inputs(model, processor, "one")
    with torch.no_grad(), NAAViT(image_cache=4)(model) as run:
        model(**inputs)
        model(**inputs)
        assert run.image_cache.hits == 1
        for parameter in model.model.language_model.layers.parameters():
            parameter.mul_(1.5)
        found = model(**inputs).logits
        assert run.image_cache.hits == 1
        run.image_cache.clear()
        torch.testing.assert_close(found, model(**inputs).logits, atol=0, rtol=0)


def test_hidden_states_are_not_served_from_kept_pictures():
    model, processor = tiny_model("llava"), tiny_processor("llava")
    inputs = tiny_inputs(model, processor, "one")
    with torch.no_grad(), NAAViT(image_cache=4)(model) as run:
        first, second = (model(**inputs, output_hidden_states=True) for _ in "ab")
    assert run.image_cache.hits == 0
    for one, two in zip(first.hidden_states, second.hidden_states, strict=True):
        torch.testing.assert_close(one, two, atol=0, rtol=0)
