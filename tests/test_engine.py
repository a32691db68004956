"""What is special to the engine: rows, ragged caches over several turns, and everything it refuses."""

from __future__ import annotations

import copy
import threading
from typing import ClassVar

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, tiny_image, tiny_inputs, tiny_model, tiny_processor, visual_mask
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from mllm import Stack, TokenLayout
from mllm.errors import CacheError, ConfigError, ConflictError, DidNotFireError, InputError, UnsupportedModelError
from mllm.families import find_parts
from mllm.ragged import BranchLayer, Stash
from mllm.rows import Rows, key_order
from mllm.technique import Technique
from mllm.token_pruning import DyVTE, FreezeVisual, NAAViT

every_family = pytest.mark.parametrize("family", FAMILIES)
every_backend = pytest.mark.parametrize("attn", ["eager", "sdpa"])


def prepared(family="llava", attn="sdpa", kind="one"):
    model = tiny_model(family, attn)
    return model, tiny_inputs(model, tiny_processor(family), kind)


# --- rows -------------------------------------------------------------------------------------------------------------

masks = st.integers(1, 4).flatmap(
    lambda batch: st.integers(1, 12).flatmap(
        lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=batch, max_size=batch)
    )
)


@given(masks)
def test_selected_rows_are_the_wanted_ones_in_order(wanted):
    wanted = torch.tensor(wanted)
    rows = Rows.select(wanted, wanted.sum(dim=1).tolist())
    for number, row in enumerate(wanted):
        valid = torch.ones(rows.length, dtype=torch.bool) if rows.valid is None else rows.valid[number]
        assert rows.index[number][valid].tolist() == row.nonzero()[:, 0].tolist()
        assert len(set(rows.index[number].tolist())) == rows.length  # fillers repeat nothing


@given(masks, st.integers(0, 2**31))
def test_take_and_put_are_inverse_and_leave_the_others(wanted, seed):
    wanted = torch.tensor(wanted)
    states = torch.randn(*wanted.shape, 3, generator=torch.Generator().manual_seed(seed))
    rows = Rows.select(wanted, wanted.sum(dim=1).tolist())
    taken = rows.take(states, wanted.shape[0])
    assert torch.equal(rows.put(states, taken), states)
    changed = rows.put(states, taken + 1)
    assert torch.equal(changed[wanted], states[wanted] + 1)
    assert torch.equal(changed[~wanted], states[~wanted])


@given(masks, st.randoms(use_true_random=False))
def test_joined_keys_stand_in_sequence_order(wanted, random):
    """Passive and active rows together give back the alive rows in order, whatever is ragged."""
    alive = torch.tensor(wanted)
    visual = torch.tensor([[random.random() < 0.5 for _ in row] for row in wanted])
    sets = [alive, alive & ~visual, alive & visual]
    rows, active, passive = (Rows.select(mask, mask.sum(dim=1).tolist()) for mask in sets)
    order = key_order(rows, active, passive, alive.shape[1])
    joined = torch.cat([passive.index, active.index], dim=1).gather(1, order)
    valid = torch.ones_like(rows.index, dtype=torch.bool) if rows.valid is None else rows.valid
    assert torch.equal(joined[valid], rows.index[valid])


@given(masks)
def test_layout_counts_images_and_positions(visual):
    visual = torch.tensor(visual)
    layout = TokenLayout.from_inputs((9,), torch.where(visual, 9, 1))
    assert torch.equal(layout.visual, visual)
    rows = zip(visual.tolist(), layout.image_index.tolist(), layout.positions.tolist(), strict=True)
    for row, index, position in rows:
        expected, image = [], -1
        for number, value in enumerate(row):
            image += value and (number == 0 or not row[number - 1])
            expected.append(image if value else -1)
        assert index == expected
        assert position == list(range(len(row)))


def test_layout_without_features_sees_no_visual_tokens():
    ids = torch.tensor([[9, 1, 9]])
    assert not TokenLayout.from_inputs((9,), ids, has_visual=False).visual.any()
    padded = TokenLayout.from_inputs((9,), ids, torch.tensor([[0, 1, 1]]))
    assert padded.text.tolist() == [[False, True, False]]


# --- turns and caches -------------------------------------------------------------------------------------------------


def answer(model, inputs, **options):
    return model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, **options)


@every_backend
@pytest.mark.parametrize("stack", [Stack(DyVTE(exit_layer=2)), Stack(NAAViT())], ids=str)
@pytest.mark.parametrize("kind", ["one", "batch"])
def test_a_second_text_turn_continues_the_ragged_cache(attn, stack, kind):
    """Feeding the question in two calls gives the logits of one call."""
    model, inputs = prepared(attn=attn, kind=kind)
    length = inputs["input_ids"].shape[1]
    extra = torch.randint(10, 90, (inputs["input_ids"].shape[0], 5), generator=torch.Generator().manual_seed(0))
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(extra)], dim=1)
    with stack(model) as run, torch.no_grad():
        whole = model(
            **{**inputs, "input_ids": torch.cat([inputs["input_ids"], extra], 1), "attention_mask": mask}
        ).logits
        cache = DynamicCache(config=model.config.get_text_config())
        model(**inputs, past_key_values=cache, use_cache=True)
        second = model(input_ids=extra, attention_mask=mask, past_key_values=cache, use_cache=True).logits
        assert [layer.get_seq_length() for layer in cache.layers] == run.report().cache_lengths
    torch.testing.assert_close(second, whole[:, length:], atol=1e-4, rtol=1e-4)


@every_backend
def test_a_second_turn_with_another_image(attn):
    """After the exit, a new image of a later turn is seen up to the exit layer, and leaves like the first."""
    model, processor = tiny_model("llava", attn), tiny_processor("llava")
    texts = ["USER: see <image> what is it? A:", " a cat USER: and <image> now? A:"]
    images = [tiny_image(1, (32, 32)), tiny_image(2, (32, 32))]
    turns = [
        processor(text=[text], images=[image], return_tensors="pt", add_special_tokens=number == 0)
        for number, (text, image) in enumerate(zip(texts, images, strict=True))
    ]
    both = {name: torch.cat([turn[name] for turn in turns], 0 if name == "pixel_values" else 1) for name in turns[0]}
    length = turns[0]["input_ids"].shape[1]
    with DyVTE(exit_layer=2)(model) as run, torch.no_grad():
        whole = model(**both).logits
        cache = DynamicCache(config=model.config.get_text_config())
        model(**turns[0], past_key_values=cache)
        second = model(**{**turns[1], "attention_mask": both["attention_mask"]}, past_key_values=cache).logits
        text = (~visual_mask(model, both)).sum().item()
        assert run.report().cache_lengths == [both["input_ids"].shape[1]] * 3 + [text] * 3
        third = model(input_ids=torch.tensor([[20]]), past_key_values=cache).logits
        longer = {**both, "input_ids": torch.cat([both["input_ids"], torch.tensor([[20]])], 1)}
        longer["attention_mask"] = torch.ones_like(longer["input_ids"])
        torch.testing.assert_close(third[:, 0], model(**longer).logits[:, -1], atol=1e-4, rtol=1e-4)
    keep = ~visual_mask(model, turns[1])
    torch.testing.assert_close(second[keep], whole[:, length:][keep], atol=1e-4, rtol=1e-4)


@every_family
@pytest.mark.parametrize("kind", ["one", "batch"])
def test_beam_search_equals_itself_without_cache(family, kind):
    model, inputs = prepared(family, kind=kind)
    with DyVTE(exit_layer=2)(model):
        cached = answer(model, inputs, num_beams=3)
        free = answer(model, inputs, num_beams=3, use_cache=False)
    assert torch.equal(cached, free)


def test_sampling_and_several_sequences():
    model, inputs = prepared(kind="batch")
    with DyVTE(exit_layer=2)(model):
        torch.manual_seed(0)
        first = model.generate(**inputs, max_new_tokens=4, do_sample=True, num_return_sequences=2)
        torch.manual_seed(0)
        again = model.generate(**inputs, max_new_tokens=4, do_sample=True, num_return_sequences=2, use_cache=False)
    assert torch.equal(first, again)


@every_backend
def test_a_copied_cache_goes_on(attn):
    """Reusing one prompt's cache for several questions, as users do by copying it."""
    model, inputs = prepared(attn=attn)
    with DyVTE(exit_layer=2)(model), torch.no_grad():
        cache = DynamicCache(config=model.config.get_text_config())
        model(**inputs, past_key_values=cache)
        token = torch.tensor([[30]])
        first = model(input_ids=token, past_key_values=copy.deepcopy(cache)).logits
        again = model(input_ids=token, past_key_values=copy.deepcopy(cache)).logits
    assert torch.equal(first, again)


def test_cropping_answer_tokens_is_fine_and_cropping_the_prompt_is_refused():
    model, inputs = prepared()
    with DyVTE(exit_layer=2)(model), torch.no_grad():
        cache = DynamicCache(config=model.config.get_text_config())
        model(**inputs, past_key_values=cache)
        plain = model(input_ids=torch.tensor([[30]]), past_key_values=copy.deepcopy(cache)).logits
        model(input_ids=torch.tensor([[40, 41]]), past_key_values=cache)
        cache.crop(-2)
        assert torch.equal(model(input_ids=torch.tensor([[30]]), past_key_values=cache).logits, plain)
        cache.crop(-30)
        with pytest.raises(CacheError, match="cropped"):
            model(input_ids=torch.tensor([[30]]), past_key_values=cache)


def test_a_cache_filled_elsewhere_is_refused():
    model, inputs = prepared()
    with DyVTE(exit_layer=2)(model), torch.no_grad():
        cache = DynamicCache(config=model.config.get_text_config())
        model(**inputs, past_key_values=cache)
        stranger = DynamicCache(config=model.config.get_text_config())
        for number, layer in enumerate(cache.layers):
            stranger.update(layer.keys, layer.values, number)
        with pytest.raises(CacheError, match="expected"):
            model(input_ids=torch.tensor([[30]]), past_key_values=stranger)
        doubled = copy.deepcopy(cache)
        doubled.batch_repeat_interleave(2)
        with pytest.raises(CacheError, match="batch of 1 and is used with 2"):
            model(input_ids=torch.tensor([[30], [31]]), past_key_values=doubled)


def test_a_reset_cache_starts_again():
    model, inputs = prepared()
    text = tiny_inputs(model, tiny_processor("llava"), "text")
    with DyVTE(exit_layer=2)(model), torch.no_grad():
        cache = DynamicCache(config=model.config.get_text_config())
        model(**inputs, past_key_values=cache)
        cache.reset()
        model(**text, past_key_values=cache)
        token = model(input_ids=torch.tensor([[30]]), past_key_values=cache).logits
        fresh = DynamicCache(config=model.config.get_text_config())
        model(**text, past_key_values=fresh)
        assert torch.equal(model(input_ids=torch.tensor([[30]]), past_key_values=fresh).logits, token)


def test_masks_are_made_once_for_the_layers_that_share_them(monkeypatch):
    from mllm.engine import Step

    made = []
    original = Step._make_mask
    monkeypatch.setattr(Step, "_make_mask", lambda self, *args: made.append(1) or original(self, *args))
    model, inputs = prepared(kind="batch")
    with Stack(NAAViT(layers="0:3"), DyVTE(exit_layer=3))(model), torch.no_grad():
        model(**inputs)
    assert len(made) == 2  # layers 0 to 2, and 4 to 5; layer 3 runs on the model's own mask


def test_assisted_decoding_by_prompt_lookup():
    """It crops the cache after every rejected guess."""
    model, inputs = prepared()
    with DyVTE(exit_layer=2)(model):
        plain = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        guessed = model.generate(**inputs, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=2)
    assert torch.equal(plain, guessed)


def test_static_caches_are_refused():
    model, inputs = prepared()
    with DyVTE(exit_layer=2)(model), pytest.raises(UnsupportedModelError, match=r"StaticLayer.*cache_implementation"):
        model.generate(**inputs, max_new_tokens=2, cache_implementation="static")


@given(masks, st.data())
def test_joined_stashes_hold_the_rows_of_both(first, data):
    both = []
    for number in range(2):
        width = data.draw(st.integers(1, 6))
        valid = [[data.draw(st.booleans()) for _ in range(width)] for _ in first]
        columns = torch.arange(len(first) * width).view(len(first), width) + 1000 * number
        parts = [columns[..., None].float() + part for part in range(3)]
        both.append(Stash(columns, torch.tensor(valid), *parts, columns + 3, columns + 4))
    joined = both[0].joined(both[1])
    for row in range(len(first)):
        wanted = torch.cat([stash.columns[row][stash.valid[row]] for stash in both])
        kept = joined.valid[row]
        assert torch.equal(joined.columns[row][kept], wanted)
        assert torch.equal(joined.sin[row][kept][:, 0], wanted.float() + 2)
        assert torch.equal(joined.layer[row][kept], wanted + 4)


def test_positions_of_another_length_are_refused():
    """Qwen's model, called by hand with a cache and a mask but no positions, makes them for all tokens so far."""
    model, inputs = prepared("qwen2_5_vl")
    processor = tiny_processor("qwen2_5_vl")
    text = "<|im_end|>\n<|im_start|>user\nso?<|im_end|>\n<|im_start|>assistant\n"
    ids = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    mask = torch.ones(1, inputs["input_ids"].shape[1] + ids.shape[1], dtype=torch.long)
    cache = DynamicCache(config=model.config.get_text_config())
    technique = DyVTE(gate="light", max_exit_layer=2, recoverable=True)
    with technique(model, processor), torch.no_grad():
        model(**inputs, past_key_values=cache)
        with pytest.raises(InputError, match="position_ids of the new tokens"):
            model(input_ids=ids, attention_mask=mask, past_key_values=cache)


class Forgetful(Technique):
    """Visual rows leave before layer 3, and the layers before forget their keys once the prompt is read."""

    name: ClassVar[str] = "Forgetful"
    paper: ClassVar[str] = ""

    def keep(self, view):
        if view.layer != 3:
            return None
        view.evict(view.layout.visual)
        return view.alive & ~view.layout.visual


@every_family
@every_backend
def test_evicted_keys_are_not_seen_by_later_calls(family, attn):
    """Answer tokens see the pictures in layer 0 alone; the prompt saw them in layers 0 to 2."""
    model, inputs = prepared(family, attn, "mixed")
    length = inputs["input_ids"].shape[1]
    with Forgetful()(model) as run:
        output = answer(model, inputs, return_dict_in_generate=True, output_logits=True)
        lengths = [layer.get_seq_length() for layer in output.past_key_values.layers]
        assert lengths == run.report().cache_lengths
    counts = inputs["attention_mask"].sum(dim=1) - visual_mask(model, inputs).sum(dim=1)
    assert lengths == [length + 2] + [int(counts.max()) + 2] * 5
    for number, prompt in enumerate(reference.prompts(model, inputs)):
        start = prompt.ids.shape[0]
        for token in output.sequences[number, length:-1]:
            prompt = prompt.append(model.get_input_embeddings().weight[token])
        hidden = prompt.visual.clone()

        def closed(layer, hidden=hidden, start=start):
            late = torch.arange(hidden.shape[0]) >= start
            return (late[:, None] & hidden) if layer in (1, 2) else torch.zeros(2 * hidden.shape, dtype=torch.bool)

        def keep(layer, states, alive, hidden=hidden):
            return ~hidden if layer == 3 else torch.ones_like(alive)

        with torch.no_grad():
            wanted = reference.decode(model, prompt, extras=reference.Extras(closed=closed, keep=keep)).logits
        found = torch.stack(output.logits, dim=1)[number]  # (3, V)
        torch.testing.assert_close(found, wanted[start - 1 :], atol=1e-4, rtol=1e-4)


def test_evicted_keys_survive_a_second_turn_and_cropping():
    model, inputs = prepared()
    text = int((~visual_mask(model, inputs)).sum())
    with Forgetful()(model), torch.no_grad():
        cache = DynamicCache(config=model.config.get_text_config())
        model(**inputs, past_key_values=cache)
        assert [layer.get_seq_length() for layer in cache.layers][1:] == [text] * 5
        extra = torch.tensor([[40, 41, 42]])
        together = model(input_ids=extra, past_key_values=copy.deepcopy(cache)).logits
        single = [model(input_ids=extra[:, n : n + 1], past_key_values=cache).logits for n in range(3)]
        torch.testing.assert_close(together, torch.cat(single, dim=1), atol=1e-4, rtol=1e-4)
        cache.crop(-1)
        again = model(input_ids=extra[:, 2:], past_key_values=cache).logits
        torch.testing.assert_close(again, together[:, 2:], atol=1e-4, rtol=1e-4)


class Talkative(DyVTE):
    name: ClassVar[str] = "Talkative"

    def keep(self, view):
        view.output["columns"] = view.layout.visual.shape[1]
        return super().keep(view)


def test_what_was_told_about_a_prompt_stays_while_its_answer_is_written():
    model, inputs = prepared()
    text = tiny_inputs(model, tiny_processor("llava"), "text")
    told = {"Talkative": {"columns": inputs["input_ids"].shape[1]}}
    with Talkative(exit_layer=2)(model) as run, torch.no_grad():
        answer(model, inputs)
        assert run.outputs == told
        answer(model, inputs, prompt_lookup_num_tokens=2)  # the first guesses are read with the prompt
        assert set(run.outputs) == set(told)
        cache = DynamicCache(config=model.config.get_text_config())
        model(**inputs, past_key_values=cache)
        model(input_ids=torch.tensor([[40, 41, 42]]), past_key_values=cache)
        assert run.outputs == told
        model(**text)
        assert run.outputs == {}


@every_family
def test_markers_are_told_by_id_and_by_embedding(family):
    model, inputs = prepared(family, kind="two_images")
    parts = find_parts(model)
    ids = inputs["input_ids"]
    layout = TokenLayout.from_inputs(parts.token_ids, ids, inputs["attention_mask"], marker_ids=parts.marker_ids)
    if family != "qwen2_5_vl":
        assert layout.markers is None
        return
    words = [tiny_processor(family).tokenizer.convert_ids_to_tokens(row) for row in ids.tolist()]
    wanted = [[word in ("<|vision_start|>", "<|vision_end|>") for word in row] for row in words]
    assert layout.markers.tolist() == wanted
    seen = []

    class Watcher(DyVTE):
        name: ClassVar[str] = "Watcher"

        def keep(self, view):
            seen.append(view.layout.markers)
            return super().keep(view)

    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    embeds = model.get_input_embeddings()(ids)
    positions = torch.arange(ids.shape[1]).expand(3, 2, -1)
    with Watcher(exit_layer=2)(model), torch.no_grad():
        model(**inputs)
        model(**rest, inputs_embeds=embeds, position_ids=positions)
    assert all(markers.tolist() == wanted for markers in seen)


# --- what callers of the plain model rely on --------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize(
    "stack", [Stack(DyVTE(exit_layer=2)), Stack(NAAViT(layers=[1, 3])), Stack(NAAViT()), Stack(FreezeVisual())], ids=str
)
def test_hidden_states_have_full_length(family, stack):
    model, inputs = prepared(family, kind="batch")
    with torch.no_grad():
        embeds = model(**inputs, output_hidden_states=True).hidden_states[0]
    with stack(model), torch.no_grad():
        states = model(**inputs, output_hidden_states=True)
        plain = model(**inputs)
    torch.testing.assert_close(states.hidden_states[0], embeds)
    assert [s.shape[:2] for s in states.hidden_states] == [inputs["input_ids"].shape] * 7
    text = inputs["attention_mask"].bool() & ~visual_mask(model, inputs)
    torch.testing.assert_close(states.logits[text], plain.logits[text], atol=1e-5, rtol=1e-5)
    assert torch.isfinite(plain.logits).all()


def test_hidden_states_under_generate():
    model, inputs = prepared()
    with NAAViT()(model):
        output = answer(model, inputs, output_hidden_states=True, return_dict_in_generate=True)
    assert [s.shape[1] for s in output.hidden_states[0]] == [inputs["input_ids"].shape[1]] * 7


def test_attention_weights_are_refused():
    model, inputs = prepared(attn="eager")
    with NAAViT()(model), pytest.raises(UnsupportedModelError, match="output_attentions"):
        model(**inputs, output_attentions=True)


@every_family
def test_inputs_as_embeddings(family):
    """Pictures with embedded text: the placeholders are told by their embedding."""
    model, inputs = prepared(family)
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    if family == "qwen2_5_vl":
        rest["position_ids"] = torch.arange(embeds.shape[1]).expand(3, 1, -1)
        inputs = {**inputs, "position_ids": rest["position_ids"]}
    with DyVTE(exit_layer=2)(model) as run, torch.no_grad():
        by_ids = model(**inputs).logits
        by_embeddings = model(**rest, inputs_embeds=embeds).logits
    assert run.visual_steps == 2
    assert torch.equal(by_ids, by_embeddings)


def test_positional_arguments():
    model, inputs = prepared()
    with DyVTE(exit_layer=2)(model), torch.no_grad():
        named = model(**inputs).logits
        placed = model(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]).logits
    assert torch.equal(named, placed)


@every_family
def test_no_mask_argument_at_all(family):
    model, inputs = prepared(family)
    bare = {name: value for name, value in inputs.items() if name != "attention_mask"}
    with Stack(FreezeVisual(layers=[1, 2]), DyVTE(exit_layer=3))(model), torch.no_grad():
        torch.testing.assert_close(model(**bare).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_two_threads_do_not_mix_their_calls():
    model = tiny_model("llava", "sdpa")
    jobs = [tiny_inputs(model, tiny_processor("llava"), kind) for kind in ("one", "batch", "two_images", "text")]
    with DyVTE(exit_layer=2)(model), torch.no_grad():
        expected = [model(**inputs).logits for inputs in jobs]
        found: dict[int, list[torch.Tensor]] = {n: [] for n in range(len(jobs))}

        def work(number):
            with torch.no_grad():
                for _ in range(5):
                    found[number].append(model(**jobs[number]).logits)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(len(jobs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, results in found.items():
        assert len(results) == 5
        assert all(torch.equal(result, expected[number]) for result in results)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(0, 5), max_size=6),
    st.lists(st.integers(0, 5), max_size=6),
    st.integers(0, 5),
    st.sampled_from(["one", "batch", "same_length_ragged"]),
)
def test_any_mixture_of_layers_runs_and_counts(naavit, freeze, exit_layer, kind):
    """Cached and cache-free agree for any layers, and the cost is what the cache and the layers show."""
    model, inputs = prepared(kind=kind)
    naavit = [n for n in naavit if n <= exit_layer]
    freeze = [n for n in freeze if n <= exit_layer and n not in naavit]
    stack = Stack(NAAViT(layers=naavit), FreezeVisual(layers=freeze), DyVTE(exit_layer=exit_layer))
    with stack(model) as run:
        output = answer(model, inputs, return_dict_in_generate=True, output_logits=True)
        lengths = [layer.get_seq_length() for layer in output.past_key_values.layers]
        assert lengths == run.report().cache_lengths
        assert lengths[0] == inputs["input_ids"].shape[1] + 2
        free = answer(model, inputs, use_cache=False)
    assert torch.equal(output.sequences, free)


def pad_right(inputs):
    """The batch with its padding moved to the end of each row, as trainers pad."""
    mask = inputs["attention_mask"]
    order = torch.argsort(1 - mask, dim=1, stable=True)  # (B, S)
    moved = {
        name: inputs[name].gather(1, order)
        for name in ("input_ids", "attention_mask", "mm_token_type_ids")
        if name in inputs
    }
    return {**inputs, **moved}


@every_family
@every_backend
@pytest.mark.parametrize(
    "stack",
    [Stack(DyVTE(exit_layer=2)), Stack(NAAViT()), Stack(FreezeVisual(layers=[1]), DyVTE(exit_layer=2))],
    ids=str,
)
def test_padding_on_the_right_equals_padding_on_the_left(family, attn, stack):
    model, left = prepared(family, attn, "batch")
    right = pad_right(left)
    text = [inputs["attention_mask"].bool() & ~visual_mask(model, inputs) for inputs in (left, right)]
    with stack(model), torch.no_grad():
        found = [model(**inputs).logits[mask] for inputs, mask in zip((left, right), text, strict=True)]
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_video_tokens_are_visual_tokens(family):
    model, processor = tiny_model(family), tiny_processor(family)
    frames = np.random.default_rng(0).integers(0, 255, (4, 24, 24, 3), np.uint8)
    mark = processor.video_token if family == "llava_onevision" else "<|vision_start|><|video_pad|><|vision_end|>"
    inputs = processor(text=[f"USER: see {mark} what? A:"], videos=[frames], return_tensors="pt")
    count = int((inputs["input_ids"] == model.config.video_token_id).sum())
    assert count
    with DyVTE(exit_layer=2)(model) as run:
        answer(model, inputs)
    assert run.report().visual_per_layer == [count] * 3 + [0] * 3


@every_family
@every_backend
@pytest.mark.parametrize("stack", [Stack(DyVTE(exit_layer=2)), Stack(NAAViT())], ids=str)
def test_bfloat16_stays_close_to_float32(family, attn, stack):
    exact, inputs = prepared(family, attn, "batch")
    text = inputs["attention_mask"].bool() & ~visual_mask(exact, inputs)
    half = tiny_model(family, attn, fresh=True).to(torch.bfloat16)
    with torch.no_grad(), stack(exact):
        wanted = exact(**inputs).logits[text]
    with torch.no_grad(), stack(half):
        found = half(**inputs.copy().to(torch.bfloat16)).logits[text]
        answer(half, inputs.copy().to(torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted).norm() < 0.1 * wanted.norm()


# --- branches ---------------------------------------------------------------------------------------------------------


class Beside(Technique):
    """Adds something beside the attention of a layer."""

    name: ClassVar[str] = "Beside"
    paper: ClassVar[str] = ""
    layers: tuple[int, ...] = (1,)

    def branch_layers(self, spec):
        return self.layers


def test_two_branches_in_one_layer_are_refused():
    with pytest.raises(ConflictError, match=r"both add something beside the attention of layer 1\. Give them"):
        Stack(Beside(), Beside(layers=(0, 1))).attach(tiny_model("llava", "sdpa"))
    Stack(Beside(), Beside(layers=(0, 2))).attach(tiny_model("llava", "sdpa")).detach()


@given(masks, st.data())
def test_a_branch_layer_knows_its_tokens(first, data):
    """Keys that are their own column's number: after any extensions, crops and choices they are the wanted ones."""
    first = torch.tensor(first)
    batch = first.shape[0]
    layer = BranchLayer((0, "0.Beside", "memory"))
    wanted = torch.zeros(batch, 0, dtype=torch.bool)
    for number in range(data.draw(st.integers(1, 3))):
        if number:
            width = data.draw(st.integers(1, 4))
            rows = st.lists(st.booleans(), min_size=width, max_size=width)
            new = torch.tensor(data.draw(st.lists(rows, min_size=batch, max_size=batch)))
        else:
            new = first
        before = wanted.shape[1]
        wanted = torch.cat([wanted, new], dim=1)
        chosen = Rows.select(new, new.sum(dim=1).tolist())
        columns = chosen.index + before
        keys = columns[:, None, :, None].float()
        if chosen.valid is not None:
            columns = columns.masked_fill(~chosen.valid, -1)
        old = columns[:, :0] if layer.columns is None else layer.columns
        layer.length = wanted.shape[1]
        layer.extend(keys, keys, torch.cat([old, columns], dim=1), layer.whole and chosen.valid is None)
        cut = data.draw(st.integers(0, wanted.shape[1]))
        layer.crop(-cut)
        wanted = wanted[:, : wanted.shape[1] - cut]
        order = torch.tensor(data.draw(st.lists(st.integers(0, batch - 1), min_size=batch, max_size=batch)))
        layer.reorder_cache(order)
        wanted = wanted[order]
        assert layer.length == wanted.shape[1]
        real = layer.columns >= 0
        assert bool(real.all()) or not layer.whole
        for number in range(batch):
            assert layer.columns[number][real[number]].tolist() == wanted[number].nonzero()[:, 0].tolist()
            assert torch.equal(layer.keys[number, 0, :, 0][real[number]].long(), layer.columns[number][real[number]])


# --- attaching --------------------------------------------------------------------------------------------------------


def test_one_attachment_at_a_time():
    model, _ = prepared()
    with NAAViT()(model), pytest.raises(ConflictError, match=r"NAAViT.*is attached to this model already.*one Stack"):
        DyVTE(exit_layer=2).attach(model)
    DyVTE(exit_layer=2).attach(model).detach()


@pytest.mark.parametrize("technique", [DyVTE(exit_layer=6), NAAViT(layers=[6])], ids=repr)
def test_layers_beyond_the_model(technique):
    with pytest.raises(ConfigError, match="6 layers"):
        technique.attach(tiny_model("llava", "sdpa"))


def test_other_models_are_named():
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(UnsupportedModelError, match=r"'llama'.*llava, llava_next, llava_onevision, qwen2_5_vl"):
        NAAViT().attach(model)


def test_layers_built_differently_are_refused():
    model = tiny_model("llava", "sdpa", fresh=True)
    for layer in model.model.language_model.layers:
        layer.self_attn.q_norm = torch.nn.Identity()
    with pytest.raises(UnsupportedModelError, match="LlamaDecoderLayer is not built of"):
        NAAViT().attach(model)
    DyVTE(exit_layer=2).attach(model).detach()  # needs only the rows
    Beside().attach(model).detach()  # and this where the residual stream is
    for layer in model.model.language_model.layers:
        layer.post_feedforward_layernorm = torch.nn.Identity()
    with pytest.raises(UnsupportedModelError, match="Beside cannot be exact in it"):
        Beside().attach(model)


def test_layers_replaced_after_attaching_are_noticed():
    model = tiny_model("llava", "sdpa", fresh=True)
    inputs = tiny_inputs(model, tiny_processor("llava"), "one")
    with DyVTE(exit_layer=2)(model):
        layers = model.model.language_model.layers
        layers[3] = copy.deepcopy(layers[2])
        layers[3]._forward_pre_hooks.clear()
        with pytest.raises(DidNotFireError, match="5 of 6 decoder layers"), torch.no_grad():
            model(**inputs)


def test_a_peft_model_is_looked_through():
    peft = pytest.importorskip("peft", reason="needs peft: pip install -e '.[all,dev]'")
    model = tiny_model("llava", "sdpa", fresh=True)
    inputs = tiny_inputs(model, tiny_processor("llava"), "one")
    targets = r".*language_model.*(k_proj|up_proj)"
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    with NAAViT()(wrapped) as run:
        wrapped(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert run.visual_steps == 1
    grads = {name: p.grad for name, p in wrapped.named_parameters() if p.requires_grad}
    assert grads
    assert all(grad is not None for grad in grads.values())
    assert all("lora" in name for name in grads)


def test_run_reset_and_report_text():
    model, inputs = prepared()
    count = int(visual_mask(model, inputs).sum())
    with DyVTE(exit_layer=2)(model) as run, torch.no_grad():
        assert str(run.report()) == "no visual tokens, FLOPs 1.00x, KV 1.00x"
        model(**inputs)
        report = run.report()
        assert str(report).startswith(f"visual {count} -> 0 after layer 2, FLOPs 0.")
        assert report.exit_layer == [2]
        assert report.to_dict()["flops_ratio"] == report.flops / report.dense_flops
        run.reset()
        assert (run.flops, run.steps) == (0, 0)


def test_exit_layer_per_row_in_the_report():
    model, inputs = prepared(kind="batch")
    with DyVTE(exit_layer=2)(model) as run, torch.no_grad():
        model(**inputs)
    assert run.report().exit_layer == [2, 2, 2, None]
