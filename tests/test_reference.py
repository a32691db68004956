"""The reference equals the stock models, and each policy what hooks and masks make of a stock model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from reference import (
    decoder_shape,
    prompts,
    reference_flops,
    reference_generate,
    reference_logits,
    reference_states,
)
from tiny import FAMILIES, IMAGE_ID, KINDS, row, tiny_inputs, tiny_model, tiny_processor, visual_mask
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

LAYERS = 6
WITH_IMAGES = [kind for kind in KINDS if kind != "text"]

every_family = pytest.mark.parametrize("family", FAMILIES)
every_backend = pytest.mark.parametrize("attn", ["eager", "sdpa"])
every_kind = pytest.mark.parametrize("kind", KINDS)


def prepared(family: str, attn: str, kind: str):
    model = tiny_model(family, attn)
    return model, tiny_inputs(model, tiny_processor(family), kind)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal to ``tolerance`` of the largest value."""
    scale = max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(found, expected, atol=tolerance * scale, rtol=0)


# --- against the stock model ------------------------------------------------------------------------------------------


@every_family
@every_backend
@every_kind
@torch.no_grad()
def test_dense_equals_the_stock_model(family, attn, kind):
    model, inputs = prepared(family, attn, kind)
    stock = model(**inputs).logits  # (B, S, V)
    valid = inputs["attention_mask"].bool()
    for number, found in enumerate(reference_logits(model, inputs)):
        close(found, stock[number, valid[number]])


@every_family
@every_backend
@every_kind
def test_generate_equals_the_stock_model(family, attn, kind):
    model, inputs = prepared(family, attn, kind)
    stock = model.generate(
        **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    tokens, logits = reference_generate(model, inputs, 4)
    assert tokens == stock.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    close(torch.stack(logits), torch.stack(stock.logits, dim=1))


@every_family
def test_a_generated_placeholder_is_text(family):
    model = tiny_model(family, fresh=True)
    inputs = tiny_inputs(model, tiny_processor(family), "one")
    [[first, *_]], _ = reference_generate(model, inputs, 1)
    with torch.no_grad():
        model.lm_head.weight[IMAGE_ID] = 2 * model.lm_head.weight[first]
    stock = model.generate(
        **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    [tokens], [logits] = reference_generate(model, inputs, 4)
    assert tokens[0] == IMAGE_ID
    assert tokens == stock.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    close(logits, torch.stack(stock.logits, dim=1)[0])


@every_family
def test_gradients_equal_the_stock_model(family):
    model = tiny_model(family, fresh=True)
    inputs = tiny_inputs(model, tiny_processor(family), "one")
    projector = next(p for n, p in model.named_parameters() if "projector" in n or "merger" in n)
    chosen = [projector, *model.model.language_model.layers[1].self_attn.parameters()]
    losses = [model(**inputs).logits[0].logsumexp(-1).sum(), reference_logits(model, inputs)[0].logsumexp(-1).sum()]
    stock, found = (torch.autograd.grad(loss, chosen) for loss in losses)
    for ours, theirs in zip(found, stock, strict=True):
        assert theirs.abs().max() > 0
        close(ours, theirs, 1e-4)


# --- policies against a stock model with masks and hooks --------------------------------------------------------------


def mask_for(attn: str, allowed: Tensor) -> Tensor:
    """(1, 1, S, S): boolean for SDPA, additive for eager, which would add True as 1."""
    mask = allowed[None, None]
    if attn == "sdpa":
        return mask
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def decode_stock(model, inputs, mask: Tensor) -> Tensor:
    """(S, V) logits of the stock decoder for one row; run directly, as Qwen counts positions from a 2-D mask only."""
    [prompt] = prompts(model, inputs)
    axes = len(prompt.positions)
    out = model.model.language_model(
        inputs_embeds=prompt.embeds[None],
        position_ids=prompt.positions if axes == 1 else prompt.positions[:, None],  # (1, S) or (3, 1, S)
        attention_mask=mask,
        use_cache=False,
    )
    return model.lm_head(out.last_hidden_state)[0]


@contextmanager
def hooked(model, chosen: tuple[int, ...], which: str, visual: Tensor) -> Iterator[None]:
    """In these layers visual rows get nothing from attention, or leave the layer as they came."""

    def no_attention(module, args, kwargs, output):
        return (output[0].masked_fill(visual[None, :, None], 0.0), *output[1:])

    def unchanged(module, args, kwargs, output):
        before = args[0] if args else kwargs["hidden_states"]
        return torch.where(visual[None, :, None], before, output)

    handles = []
    for index in chosen:
        layer = model.model.language_model.layers[index]
        target, hook = (layer.self_attn, no_attention) if which == "naavit" else (layer, unchanged)
        handles.append(target.register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def masked_from(model, first: int, mask: Tensor) -> Iterator[None]:
    """Layers from ``first`` on get another mask."""

    def replace(module, args, kwargs):
        return args, kwargs | {"attention_mask": mask}

    handles = [
        layer.register_forward_pre_hook(replace, with_kwargs=True)
        for layer in model.model.language_model.layers[first:]
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


@every_family
@every_backend
@pytest.mark.parametrize("kind", WITH_IMAGES)
@torch.no_grad()
def test_ee_equals_a_mask_on_the_stock_model(family, attn, kind):
    model, inputs = prepared(family, attn, kind)
    for number, found in enumerate(reference_logits(model, inputs, "ee")):
        alone = row(inputs, number)
        visual = visual_mask(model, alone)[0]  # (S,)
        length = len(visual)
        allowed = causal(length) & (~visual[:, None] | torch.eye(length, dtype=torch.bool))
        close(found, decode_stock(model, alone, mask_for(attn, allowed)))


@every_family
@every_backend
@pytest.mark.parametrize("policy", ["naavit", "freeze"])
@pytest.mark.parametrize("chosen", [(0, 1, 2, 3, 4, 5), (1, 2, 4)])
@torch.no_grad()
def test_naavit_and_freeze_equal_hooks_on_the_stock_model(family, attn, policy, chosen):
    model, inputs = prepared(family, attn, "batch")
    for number, found in enumerate(reference_logits(model, inputs, policy, chosen)):
        alone = row(inputs, number)
        visual = visual_mask(model, alone)[0]  # (S,)
        with hooked(model, chosen, policy, visual):
            close(found, decode_stock(model, alone, mask_for(attn, causal(len(visual)))))


@every_family
@every_backend
@pytest.mark.parametrize("exit_after", [-1, 0, 2, LAYERS - 1])
@torch.no_grad()
def test_exit_equals_masked_keys_on_the_stock_model(family, attn, exit_after):
    model, inputs = prepared(family, attn, "two_images")
    for number, found in enumerate(reference_logits(model, inputs, exit_after=exit_after)):
        alone = row(inputs, number)
        visual = visual_mask(model, alone)[0]  # (S,)
        allowed = causal(len(visual))
        # the diagonal keeps the rows of dropped tokens from having no key at all
        dropped = allowed & (~visual[None, :] | torch.eye(len(visual), dtype=torch.bool))
        with masked_from(model, exit_after + 1, mask_for(attn, dropped)):
            stock = decode_stock(model, alone, mask_for(attn, allowed))
        close(found[~visual], stock[~visual])


@every_family
@torch.no_grad()
def test_exit_after_the_last_layer_is_dense(family):
    model, inputs = prepared(family, "eager", "batch")
    for found, dense in zip(
        reference_logits(model, inputs, exit_after=LAYERS - 1), reference_logits(model, inputs), strict=True
    ):
        assert torch.equal(found, dense)


@every_family
@torch.no_grad()
def test_rows_may_exit_after_different_layers(family):
    model, inputs = prepared(family, "eager", "batch")
    exits = [0, None, 3, 2]
    for number, result in enumerate(reference_states(model, inputs, exit_after=exits)):
        alone = reference_states(model, row(inputs, number), exit_after=exits[number])[0]
        assert torch.equal(result.logits, alone.logits)
        assert len(result.states) == LAYERS + 1
        if exits[number] is not None:  # a row that left stays as it was
            left = result.states[exits[number] + 1][result.visual]
            assert all(torch.equal(state[result.visual], left) for state in result.states[exits[number] + 2 :])


@every_family
@torch.no_grad()
def test_every_policy_changes_text_rows_and_no_text_only_row(family):
    model, inputs = prepared(family, "eager", "batch")
    dense = reference_states(model, inputs)
    settings = [{"policy": policy} for policy in ("naavit", "ee", "freeze")] + [{"exit_after": 2}]
    for options in settings:
        changes = [
            float((found.logits - plain.logits)[~plain.visual].abs().max())
            for found, plain in zip(reference_states(model, inputs, **options), dense, strict=True)
        ]
        assert min(changes[:3]) > 0.3, options
        assert changes[3] == 0, options
    # the policies differ from each other
    named = [reference_logits(model, inputs, policy)[0][-1] for policy in ("naavit", "ee", "freeze")]
    assert all((a - b).abs().max() > 0.3 for a, b in [(named[0], named[1]), (named[1], named[2]), (named[0], named[2])])


@every_family
@pytest.mark.parametrize(
    "options",
    [{"policy": "naavit"}, {"policy": "ee", "policy_layers": (1, 3)}, {"policy": "freeze"}, {"exit_after": 1}],
    ids=str,
)
def test_generate_continues_what_one_pass_over_the_answer_gives(family, options):
    model, inputs = prepared(family, "sdpa", "one")
    [tokens], [logits] = reference_generate(model, inputs, 3, **options)
    answer = torch.tensor([tokens[:-1]])
    longer = dict(inputs)
    longer["input_ids"] = torch.cat([inputs["input_ids"], answer], dim=1)
    longer["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(answer)], dim=1)
    if "mm_token_type_ids" in inputs:
        longer["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(answer)], dim=1)
    with torch.no_grad():
        close(logits, reference_logits(model, longer, **options)[0][-3:])


def test_bad_arguments():
    model, inputs = prepared("llava", "eager", "batch")
    with pytest.raises(ValueError, match="saisa"):
        reference_logits(model, inputs, "saisa")
    with pytest.raises(ValueError, match="exit_after=6"):
        reference_logits(model, inputs, exit_after=6)
    with pytest.raises(ValueError, match="policy_layers"):
        reference_logits(model, inputs, "ee", [6])
    with pytest.raises(ValueError, match="2 entries for 4 rows"):
        reference_logits(model, inputs, exit_after=[1, 2])
    with pytest.raises(ValueError, match="position_ids"):
        reference_logits(model, {**inputs, "position_ids": inputs["input_ids"]})


# --- cost -------------------------------------------------------------------------------------------------------------

VICUNA_7B = {"layers": 32, "hidden": 4096, "intermediate": 11008, "heads": 32}
VICUNA_13B = {"layers": 40, "hidden": 5120, "intermediate": 13824, "heads": 40}


@pytest.mark.parametrize(
    ("shape", "options", "tflops"),
    [
        (VICUNA_7B, {}, 8.504),
        (VICUNA_7B, {"exit_after": 15}, 4.668),
        (VICUNA_7B, {"policy": "naavit"}, 7.074),
        (VICUNA_7B, {"policy": "ee"}, 7.692),
        (VICUNA_7B, {"policy": "freeze"}, 2.087),
        (VICUNA_13B, {}, 16.576),
        (VICUNA_13B, {"policy": "naavit"}, 13.858),
        (VICUNA_13B, {"policy": "ee"}, 15.066),
        (VICUNA_13B, {"policy": "freeze"}, 4.074),
    ],
)
def test_published_flops(shape, options, tflops):
    assert round(reference_flops(**shape, **options, n_text=64, n_visual=576) / 1e12, 3) == tflops


@every_family
@every_backend
@torch.no_grad()
def test_flops_equal_the_counted_ones(family, attn):
    model, inputs = prepared(family, attn, "one")
    counter = FlopCounterMode(display=False, depth=None)
    # the counter knows no formula for the CPU's fused attention: have it computed as matrix products
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(**inputs)
    counts = counter.get_flop_counts()
    counted = [counts[name] for name in counts if name.rpartition(".")[0].endswith("language_model.layers")]
    visual = int(visual_mask(model, inputs).sum())
    expected = reference_flops(**decoder_shape(model), n_text=inputs["input_ids"].shape[1] - visual, n_visual=visual)
    assert len(counted) == LAYERS
    assert sum(sum(layer.values()) for layer in counted) == expected
