"""LoRRA: learners, router, their caches, the legacy switches, and training."""

from __future__ import annotations

import copy
import itertools
import re

import pytest
import torch
from contract import close, extend, logits, reference_loss, text_rows, with_random_weights
from lorra_reference import lorra_extras, lorra_options
from reference import reference_logits
from safetensors.torch import load_file, save_file
from test_engine import pad_right
from test_mma import Largest
from tiny import FAMILIES, row, save_tiny, tiny_image, tiny_inputs, tiny_model, tiny_processor, visual_mask

from mllm import Stack, load, load_techniques
from mllm.adapters import LoRRA, ModalityMutualAttention
from mllm.adapters.lorra_training import LoRRATraining
from mllm.cost import ARCHITECTURES, ModelSpec, predict
from mllm.engine import Step
from mllm.errors import CacheError, ConfigError, ConflictError, InputError, LoadError
from mllm.token_pruning import DyVTE, NAAViT, URaG
from mllm.training import Options, read_log, train_technique


def trained(model, **arguments) -> LoRRA:
    """LoRRA with random learned parts that show."""
    options = {"rank": 3, "router_length": 512, **arguments}
    return with_random_weights(Stack(LoRRA(**options)), model, scale=0.15).techniques[0]


def test_parameters_equal_the_formula():
    spec = ARCHITECTURES["llava-1.5-7b"]
    # 2 learners x 4 projections x 2 x r x D, and a router of 2 x length + 2, in 32 layers
    assert Stack(LoRRA()).parameter_count(spec) == 134_217_728 + 32 * (2 * 4096 + 2)
    assert Stack(LoRRA(router=False, layers=[0])).parameter_count(spec) == 134_217_728 // 32


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["batch", "two_images", "text"])
def test_no_row_sees_a_later_token(family, kind):
    """Another last token changes no earlier row, bit for bit, text-only rows and image rows included."""
    model = tiny_model(family, "sdpa")
    inputs = tiny_inputs(model, tiny_processor(family), kind)
    other = dict(inputs)
    other["input_ids"] = inputs["input_ids"].clone()
    other["input_ids"][:, -1] = torch.where(inputs["input_ids"][:, -1] == 40, 41, 40)
    with trained(model)(model, tiny_processor(family)):
        first, second = logits(model, inputs), logits(model, other)
    valid = inputs["attention_mask"].bool()[:, :-1]
    assert torch.equal(first[:, :-1][valid], second[:, :-1][valid])
    assert not torch.allclose(first[:, -1], second[:, -1], atol=1e-3)


# Qwen makes positions from the whole prompt: it is cut in test_engine.py, with positions given
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen2_5_vl"])
def test_several_turns_on_one_cache_equal_one_prompt(family):
    """A text-only turn, an answer, a turn with an image: each learner's cache grows as if all were read at once."""
    model, processor = tiny_model(family, "sdpa"), tiny_processor(family)
    one = tiny_inputs(model, processor, "two_images")
    whole = row(one, 0)
    first_image = int(visual_mask(model, whole)[0].nonzero()[0])
    length = whole["input_ids"].shape[1]
    with trained(model)(model, processor) as run, torch.no_grad():
        expected = logits(model, whole)
        cuts = [0, first_image - 2, length - 3, length]
        cache, found = None, []
        for start, stop in itertools.pairwise(cuts):
            part = {"input_ids": whole["input_ids"][:, start:stop], "attention_mask": whole["attention_mask"][:, :stop]}
            if bool(visual_mask(model, whole)[0, start:stop].any()):
                part |= {
                    k: v for k, v in whole.items() if k not in ("input_ids", "attention_mask", "mm_token_type_ids")
                }
            if "mm_token_type_ids" in whole:
                part["mm_token_type_ids"] = whole["mm_token_type_ids"][:, start:stop]
            output = model(**part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits)
        lengths = run.report().cache_lengths
        assert [layer.get_seq_length() for layer in cache.layers] == lengths
        visual = int(visual_mask(model, whole).sum())
        assert set(lengths[6:]) == {visual, length - visual}
        assert run.kv_bytes > run.dense_kv_bytes  # the learners' caches are counted
    close(torch.cat(found, dim=1), expected)


def test_the_router_equals_materialised_weights():
    """Sums over eager attention weights, times the table: what channels mix without weights."""
    eager, fused = tiny_model("llava", "eager"), tiny_model("llava", "sdpa")
    inputs = tiny_inputs(eager, tiny_processor("llava"), "one")
    with torch.no_grad():
        weights = eager(**inputs, output_attentions=True, use_cache=False).attentions[0]  # (1, heads, S, S)
    technique = trained(fused)
    with technique(fused, tiny_processor("llava")) as run:
        logits(fused, inputs)
    table, bias = (technique.learned.tensors[f"0.{name}"] for name in ("table", "bias"))
    mixed = weights[0].sum(dim=0) @ table[:, : weights.shape[-1]].T + bias
    close(run.outputs["LoRRA"]["router"][0][0], torch.nn.functional.silu(mixed).softmax(dim=-1))


def test_beams_keep_their_own_caches():
    """Beam search reorders the learners' caches too: scores equal those of a run without any cache."""
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    inputs = tiny_inputs(model, processor, "batch")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 3, "do_sample": False}
    with trained(model)(model, processor):
        found = model.generate(**inputs, **options)
        for number in range(found.shape[0]):
            alone = row(inputs, number)
            free = model.generate(**alone, **options, use_cache=False)
            assert torch.equal(found[number, -4:], free[0, -4:])


def test_a_row_longer_than_the_table_is_refused_before_computing():
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    inputs = tiny_inputs(model, processor, "one")
    length = inputs["input_ids"].shape[1]
    began = []
    with trained(model, router_length=length, layers=[4])(model, processor), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        hook = model.model.language_model.layers[0].register_forward_pre_hook(lambda *_: began.append(1))
        try:
            with pytest.raises(InputError, match=rf"a row of {length + 1} tokens.*router_length={length}"):
                model(input_ids=torch.tensor([[30]]), past_key_values=cache)
        finally:
            hook.remove()
        assert not began
        assert [layer.get_seq_length() for layer in cache.layers[:6]] == [length] * 6  # as it was
        with pytest.raises(InputError, match="Shorten the prompt"):
            model.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
    ragged = tiny_inputs(model, processor, "batch")
    longest = int(ragged["attention_mask"].sum(dim=1).max())
    wider = {name: torch.nn.functional.pad(ragged[name], (9, 0)) for name in ("input_ids", "attention_mask")}
    with trained(model, router_length=longest)(model, processor):
        text = text_rows(model, ragged)
        close(logits(model, {**ragged, **wider})[:, 9:][text], logits(model, ragged)[text])  # padding is no position


def test_text_before_an_image_is_what_it_is_without():
    """Rows that no image precedes bypass the router, whatever follows them."""
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    inputs = tiny_inputs(model, processor, "one")
    first = int(visual_mask(model, inputs)[0].nonzero()[0])
    text = {name: inputs[name][:, :first] for name in ("input_ids", "attention_mask")}
    with trained(model)(model, processor):
        close(logits(model, inputs)[:, :first], logits(model, text))


def test_it_stacks_with_modality_mutual_attention():
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    inputs = tiny_inputs(model, processor, "batch")
    lorra = trained(model)
    outputs = {}
    for name, stack in {
        "both": Stack(ModalityMutualAttention(), lorra),
        "mma": Stack(ModalityMutualAttention()),
        "lorra": Stack(lorra),
    }.items():
        with stack(model, processor):
            outputs[name] = logits(model, inputs)
            if name == "both":
                cached = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
                length = inputs["input_ids"].shape[1]
                free = logits(model, extend(inputs, cached[:, length:-1]))[:, length - 1 :]
                assert torch.equal(free.argmax(dim=-1), cached[:, length:])
    assert not torch.allclose(outputs["both"], outputs["mma"], atol=1e-3)
    assert not torch.allclose(outputs["both"], outputs["lorra"], atol=1e-3)
    fresh = Stack(ModalityMutualAttention(), LoRRA(rank=2))
    with fresh(model, processor):  # untrained learners add nothing
        assert torch.equal(logits(model, inputs), outputs["mma"])


@pytest.mark.parametrize("other", [DyVTE(exit_layer=2), URaG(layer=2), NAAViT(), LoRRA(rank=1)], ids=str)
def test_what_it_cannot_run_with_is_refused(other):
    with pytest.raises(ConflictError, match="cannot run together"):
        Stack(LoRRA(rank=2), other).attach(tiny_model("llava", "sdpa"), tiny_processor("llava"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("arguments", [{"skip_system": True}, {"visual_memory": "all"}], ids=str)
def test_cached_equals_cache_free_with_other_memories(family, arguments):
    model, processor = tiny_model(family, "sdpa"), tiny_processor(family)
    inputs = tiny_inputs(model, processor, "mixed")
    length = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with trained(model, **arguments)(model, processor):
        cached = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
        free = logits(model, extend(inputs, cached.sequences[:, length:-1]))[:, length - 1 :]
    close(torch.stack(cached.logits, dim=1), free)


def test_a_later_turn_is_no_system_prompt():
    """What a second call brings is all memory, though it begins before its first header."""
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    prompt = "Be kind. USER: <image> why? ASSISTANT:because USER: and now? ASSISTANT:"
    inputs = processor(text=[prompt], images=[[tiny_image()]], return_tensors="pt")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with trained(model, skip_system=True)(model, processor), torch.no_grad():
        whole = logits(model, inputs)
        first = {**inputs, "input_ids": ids[:, :-30], "attention_mask": mask[:, :-30]}
        cache = model(**first, use_cache=True).past_key_values
        second = model(input_ids=ids[:, -30:], attention_mask=mask, past_key_values=cache).logits
    close(second, whole[:, -30:])


def test_a_prompt_without_a_user_turn_has_no_system_prompt():
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    inputs = tiny_inputs(model, processor, "batch")  # rows 1 and 2 are no chats
    technique = trained(model, skip_system=True)
    with pytest.raises(ConfigError, match="Attach it with the processor"):
        technique.attach(model)
    with technique(model, processor), pytest.raises(InputError, match=r"no header of a user turn.*row 1"):
        logits(model, inputs)
    embeds = {"inputs_embeds": model.get_input_embeddings()(torch.tensor([[5, 6, 7]]))}
    with technique(model, processor), pytest.raises(InputError, match="Call with input_ids"):
        logits(model, embeds)


def test_prediction_equals_the_run():
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    inputs = tiny_inputs(model, processor, "one")
    visual = int(visual_mask(model, inputs).sum())
    spec = ModelSpec.from_config(model.config.text_config)
    lorra = trained(model, layers=[1, 4])
    with lorra(model, processor) as run, torch.no_grad():
        model(**inputs, use_cache=True)
    predicted = predict(Stack(lorra), spec, inputs["input_ids"].shape[1] - visual, visual, bytes_per_value=4)
    assert run.flops == predicted.flops
    assert run.kv_bytes == predicted.kv_bytes


# --- caches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["one", "text"])
def test_assisted_decoding_by_prompt_lookup(family, kind):
    """It crops the cache after every rejected guess: the learners' keys too, and only those of the guess."""
    model, processor = tiny_model(family, "sdpa"), tiny_processor(family)
    inputs = tiny_inputs(model, processor, kind)
    with trained(model)(model, processor):
        plain = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        guessed = model.generate(
            **inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3
        )
    assert torch.equal(plain, guessed)


@pytest.mark.parametrize("kind", ["one", "mixed"])
@pytest.mark.parametrize("cut", [2, 5, 12])
def test_a_cropped_cache_goes_on(kind, cut):
    """What was cut off, be it an answer or part of the question, is forgotten by each learner, and nothing else is."""
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    inputs = tiny_inputs(model, processor, kind)
    batch, length = inputs["input_ids"].shape
    tokens, other = torch.full((batch, 5), 30), torch.full((batch, 3), 40)
    with trained(model)(model, processor), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        mask = extend(inputs, tokens)["attention_mask"]
        model(input_ids=tokens, attention_mask=mask, past_key_values=cache)
        cache.crop(-cut)
        left = length + 5 - cut
        mask = torch.cat([mask[:, :left], torch.ones_like(other)], dim=1)
        found = model(input_ids=other, attention_mask=mask, past_key_values=cache).logits
        ids = torch.cat([extend(inputs, tokens)["input_ids"][:, :left], other], dim=1)
        expected = logits(model, {**inputs, "input_ids": ids, "attention_mask": mask})[:, left:]
    close(found, expected)


def test_a_cache_that_it_did_not_fill_is_refused():
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    inputs = tiny_inputs(model, processor, "one")
    token = torch.tensor([[30]])
    lorra = trained(model)
    with torch.no_grad():
        plain = model(**inputs, use_cache=True).past_key_values
        with lorra(model, processor):
            filled = model(**inputs, use_cache=True).past_key_values
            model(input_ids=token, past_key_values=copy.deepcopy(filled))
            with pytest.raises(CacheError, match="filled without"):
                model(input_ids=token, past_key_values=plain)
        with Stack(ModalityMutualAttention(), lorra)(model, processor), pytest.raises(CacheError, match="other stack"):
            model(input_ids=token, past_key_values=copy.deepcopy(filled))
        behind = copy.deepcopy(filled)
        model(input_ids=token, past_key_values=behind)  # detached: its learners do not see this token
        with lorra(model, processor), pytest.raises(CacheError, match="filled without"):
            model(input_ids=token, past_key_values=behind)


def test_copies_and_choices_of_a_cache_go_on():
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    inputs = tiny_inputs(model, processor, "one")
    token = torch.tensor([[30]])
    with trained(model)(model, processor), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        doubled = copy.deepcopy(cache)
        expected = model(input_ids=token, past_key_values=copy.deepcopy(cache)).logits
        doubled.batch_repeat_interleave(2)
        both = model(input_ids=token.expand(2, 1), past_key_values=doubled).logits
        close(both, expected.expand_as(both))
        doubled.batch_select_indices(torch.tensor([1]))
        doubled.crop(-1)
        close(model(input_ids=token, past_key_values=doubled).logits, expected)
        cache.reset()
        close(model(**inputs, past_key_values=cache).logits, logits(model, inputs))


def test_a_later_image_is_refused_where_all_rows_see_all_images():
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    inputs = tiny_inputs(model, processor, "one")
    with trained(model, visual_memory="all")(model, processor), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        model(input_ids=torch.tensor([[30, 31]]), past_key_values=cache)
        again = {**inputs, "attention_mask": torch.ones(1, 2 + 2 * inputs["input_ids"].shape[1], dtype=torch.long)}
        with pytest.raises(CacheError, match='visual_memory="causal"'):
            model(**again, past_key_values=cache)


# --- how it runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["one", "two_images", "text"])
@pytest.mark.parametrize("arguments", [{}, {"visual_memory": "all"}, {"text_mask": "legacy_compressed"}], ids=str)
def test_without_masks_equals_with_masks(family, kind, arguments, monkeypatch):
    """Rows of one shape need no mask: neither of the text memory nor of the images."""
    model, processor = tiny_model(family, "sdpa"), tiny_processor(family)
    inputs = row(tiny_inputs(model, processor, kind), 0)
    made = []
    make = Step._memory_segments

    def spy(step, *given):
        made.append(make(step, *given))
        return made[-1]

    monkeypatch.setattr(Step, "_memory_segments", spy)

    def run():
        with trained(model, **arguments)(model, processor), torch.no_grad():
            return model(**inputs, use_cache=False).logits

    fast = run()
    assert len(made) == (1 if kind == "text" else 2)  # once a memory, not once a layer
    assert all(segments is not None for segments in made)
    monkeypatch.setattr(Step, "_memory_segments", lambda *_: None)
    close(fast, run())


def test_no_tensor_of_length_by_length():
    """Neither scores nor masks of a long prompt are ever held."""
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    prompt = f"USER: <image> {'what is it, ' * 180} ASSISTANT:"
    inputs = processor(text=[prompt], images=[[tiny_image()]], return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    assert length > 2000
    with trained(model, router_length=4096)(model, processor), torch.no_grad(), Largest() as largest:
        model.model(**inputs, use_cache=False)
    assert largest.size < length * length / 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_gradients_of_its_own_parts(family, attn):
    """They are those of the formulas, with and without checkpointing, and nothing else gets any."""
    model, processor = tiny_model(family, attn, fresh=True), tiny_processor(family)
    inputs = tiny_inputs(model, processor, "batch")
    valid = inputs["attention_mask"].bool()
    labels = inputs["input_ids"].masked_fill(~text_rows(model, inputs) | (valid.cumsum(dim=1) == 1), -100)
    technique = trained(model, layers=[0, 3])
    found = []
    for checkpointing in (False, True):
        model.train(checkpointing)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        handle = technique.attach(model, processor)
        model(**inputs, labels=labels, use_cache=False).loss.backward()
        handle.detach()
        model.gradient_checkpointing_disable()
        assert all(parameter.grad is None for parameter in model.parameters())
        found.append({name: p.grad for name, p in handle.modules[0].named_parameters()})
    tensors = {name: value.clone().requires_grad_() for name, value in technique.learned.tensors.items()}
    model.eval().requires_grad_(False)
    reference_loss(model, inputs, labels, {"extras": lorra_extras(model, technique, tensors)}).backward()
    for name, parameter in tensors.items():
        for gradients in found:
            close(gradients[name], parameter.grad, tolerance=1e-4)
            assert bool(gradients[name].any())


def test_the_router_has_no_dropout():
    """Dropout of the layer's attention would give the router other numbers than the values."""
    model, processor = tiny_model("llava", "sdpa", fresh=True), tiny_processor("llava")
    inputs = tiny_inputs(model, processor, "one")
    shares = []
    for dropout in (0.0, 0.5):
        for layer in model.model.language_model.layers:
            layer.self_attn.attention_dropout = dropout
        model.train()
        with trained(model)(model, processor) as run:
            logits(model, inputs)
        shares.append(run.outputs["LoRRA"]["router"][0])
    close(*shares)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_the_right_equals_padding_on_the_left(family):
    model, processor = tiny_model(family, "sdpa"), tiny_processor(family)
    left = tiny_inputs(model, processor, "batch")
    right = pad_right(left)
    with trained(model)(model, processor):
        found = [logits(model, inputs)[text_rows(model, inputs)] for inputs in (left, right)]
    close(*found)


def test_bfloat16_stays_close_to_float32():
    exact, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    half = tiny_model("llava", "sdpa", fresh=True).to(torch.bfloat16)
    inputs = tiny_inputs(exact, processor, "mixed")
    text = text_rows(exact, inputs)
    lorra = trained(exact)
    with lorra(exact, processor):
        wanted = logits(exact, inputs)[text]
    with lorra(half, processor):
        found = logits(half, inputs.copy().to(torch.bfloat16))[text]
        half.generate(**inputs.copy().to(torch.bfloat16), max_new_tokens=3)
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted).norm() < 0.1 * wanted.norm()


# --- legacy -----------------------------------------------------------------------------------------------------------


def released(model, rank: int = 3, length: int = 64) -> dict[str, torch.Tensor]:
    """Random tensors under the names of the authors' checkpoint."""
    spec = ModelSpec.from_config(model.config.text_config)
    generator = torch.Generator().manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.zeros(2, 2)}
    for layer in range(spec.layers):
        for pool in ("attn_pool", "attn_t_pool"):
            for projection in "qkvo":
                start = f"model.layers.{layer}.{pool}.{projection}_proj"
                tensors[f"{start}.0.weight"] = torch.randn(rank, spec.hidden, generator=generator) * 0.15
                tensors[f"{start}.1.weight"] = torch.randn(spec.hidden, rank, generator=generator) * 0.15
        start = f"model.layers.{layer}.reweight_module.linear"
        tensors[f"{start}.weight"] = torch.randn(2, length, generator=generator) * 0.15
        tensors[f"{start}.bias"] = torch.randn(2, generator=generator) * 0.15
    return tensors


SWITCHES = {
    "no router": {"router": False},
    "all images": {"visual_memory": "all"},
    "legacy mask": {"text_mask": "legacy_compressed"},
    "router for text": {"text_only": "router"},
    "twice": {"double_add": True},
    "normalised": {"normalise": True},
    "no system": {"skip_system": True},
    "some layers": {"layers": [1, 4]},
    "as released": {
        "double_add": True,
        "visual_memory": "all",
        "text_mask": "legacy_compressed",
        "skip_system": True,
    },
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("arguments", SWITCHES.values(), ids=SWITCHES.keys())
def test_every_switch_equals_the_formulas(family, arguments):
    """On a batch of a text-only, a one-image, a five-image and a three-image row."""
    model, processor = tiny_model(family, "sdpa"), tiny_processor(family)
    inputs = tiny_inputs(model, processor, "mixed")
    technique = trained(model, **arguments)
    with technique(model, processor), torch.no_grad():
        found = model(**inputs, use_cache=False).logits
        alone = model(**row(inputs, 1), use_cache=False).logits[0]
    expected = reference_logits(model, inputs, **lorra_options(model, Stack(technique)))
    for number, one in enumerate(expected):
        close(found[number][inputs["attention_mask"][number].bool()], one)
    close(alone, expected[1])
    if "layers" not in arguments:  # the switch does something
        with trained(model)(model, processor):
            assert not torch.allclose(found, logits(model, inputs), atol=1e-3)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_released_weights_generate_without_a_cache(attn):
    model, processor = tiny_model("llava", attn), tiny_processor("llava")
    inputs = tiny_inputs(model, processor, "mixed")
    length = inputs["input_ids"].shape[1]
    technique = LoRRA.from_released(released(model, length=512))
    with technique(model, processor):
        with pytest.raises(CacheError, match="use_cache=False"):
            model.generate(**inputs, max_new_tokens=2)
        found = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, use_cache=False)
    tokens = extend(inputs, found[:, length:-1])
    expected = reference_logits(model, tokens, **lorra_options(model, Stack(technique)))
    assert [one[-1].argmax().item() for one in expected] == found[:, -1].tolist()


def test_released_weights_load_strictly(tmp_path):
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    tensors = released(model)
    save_file(tensors, tmp_path / "wings.safetensors")
    technique = LoRRA.from_released(tmp_path / "wings.safetensors")
    assert (technique.rank, technique.router_length, len(technique.layers)) == (3, 64, 6)
    assert technique.double_add
    assert technique.skip_system
    assert (technique.visual_memory, technique.text_mask) == ("all", "legacy_compressed")
    learned = technique.learned.tensors
    assert torch.equal(learned["2.visual.k.up.weight"], tensors["model.layers.2.attn_pool.k_proj.1.weight"])
    assert torch.equal(learned["2.text.o.down.weight"], tensors["model.layers.2.attn_t_pool.o_proj.0.weight"])
    assert torch.equal(learned["5.table"], tensors["model.layers.5.reweight_module.linear.weight"])
    with technique(model, processor), torch.no_grad():
        model(**tiny_inputs(model, processor, "one"), use_cache=False)
    causal = LoRRA.from_released(tensors, text_mask="causal", skip_system=False)
    with causal(model):
        model.generate(**tiny_inputs(model, processor, "one"), max_new_tokens=2)
    first_stage = LoRRA.from_released({k: v for k, v in tensors.items() if "reweight" not in k})
    assert (first_stage.router, first_stage.double_add) == (False, False)
    some = LoRRA.from_released({k: v for k, v in tensors.items() if ".layers.2." in k or ".layers.4." in k})
    assert some.layers == (2, 4)


_VALUE = "model.layers.3.attn_t_pool.v_proj.0.weight"
_TABLE = "model.layers.3.reweight_module.linear.weight"
_FIRST = "model.layers.0.attn_pool.q_proj.0.weight"


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (_VALUE, None, f"missing {_VALUE}; unexpected nothing"),
        (_VALUE, (4, 48), f"{_VALUE} (4, 48), not (3, 48)"),
        (_TABLE, (2, 63), f"{_TABLE} (2, 63), not (2, 64)"),
        (_TABLE, None, f"missing {_TABLE}"),
        (_FIRST, (3,), f"{_FIRST} (3,), not"),
        (_FIRST, None, f"missing {_FIRST}"),
        ("model.layers.0.attn_pool.q_proj.2.weight", (1,), "unexpected model.layers.0.attn_pool.q_proj.2.weight"),
        ("model.layers.0.attn_pool.query.0.weight", (1,), "unexpected model.layers.0.attn_pool.query.0.weight"),
        ("model.layers.0.reweight_module.linear", (1,), "unexpected model.layers.0.reweight_module.linear;"),
        ("base.attn_pool.q_proj.0.weight", (1,), "unexpected base.attn_pool.q_proj.0.weight"),
    ],
)
def test_broken_released_weights_are_named(name, shape, message):
    tensors = released(tiny_model("llava", "sdpa"))
    tensors.pop(name, None)
    if shape is not None:
        tensors[name] = torch.zeros(shape)
    with pytest.raises(LoadError, match=re.escape(message)):
        LoRRA.from_released(tensors)


def test_other_checkpoints_and_pickles_are_no_wings(tmp_path):
    with pytest.raises(LoadError, match="no Wings checkpoint"):
        LoRRA.from_released({"model.embed_tokens.weight": torch.zeros(1)})
    with pytest.raises(LoadError, match="Pickled checkpoints are refused"):
        LoRRA.from_released(tmp_path / "model.bin")
    other = LoRRA.from_released(released(tiny_model("llava", "sdpa")))
    with pytest.raises(LoadError, match="do not fit"):
        other.attach(tiny_model("llava_next", "sdpa"), tiny_processor("llava_next"))


def test_double_add_needs_a_router():
    with pytest.raises(ConfigError, match="double_add"):
        LoRRA(double_add=True, router=False).attach(tiny_model("llava", "sdpa"))


def test_the_legacy_mask_leaks_and_refuses_a_cache():
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    inputs = tiny_inputs(model, processor, "one")
    other = dict(inputs)
    other["input_ids"] = inputs["input_ids"].clone()
    other["input_ids"][:, -1] = torch.where(inputs["input_ids"][:, -1] == 40, 41, 40)
    with trained(model, text_mask="legacy_compressed")(model, processor), torch.no_grad():
        first, second = (model(**each, use_cache=False).logits for each in (inputs, other))
        assert not torch.allclose(first[:, -2], second[:, -2], atol=1e-4)
        with pytest.raises(CacheError, match="use_cache=False"):
            model(**inputs, use_cache=True)


def test_a_model_whose_heads_do_not_divide_it_is_refused():
    spec = ModelSpec(layers=2, hidden=50, intermediate=96, heads=4, kv_heads=2, head_dim=16)
    with pytest.raises(ConfigError, match="no multiple"):
        LoRRA().check(spec)


# --- training ---------------------------------------------------------------------------------------------------------


def test_two_stages(tmp_path):
    folder = save_tiny("llava", tmp_path / "tiny", layers=3)
    settings = {"steps": 8, "batch_size": 2, "accumulation": 1, "lr": 1e-2, "warmup": 0.0}
    common = {"dtype": "float32", "device": "cpu", "arguments": {"rank": 4}}
    first = train_technique("lorra", str(folder), "scenes", tmp_path / "one", settings, options={"stage": 1}, **common)
    tensors = load_file(first / "technique.safetensors")
    moved = {name for name, value in tensors.items() if ".up." in name and bool(value.any())}
    assert moved
    assert all(".visual." in name for name in moved)
    assert not any("table" in name for name in tensors)
    options = {"stage": 2, "start": str(first), "model_lr": 1e-3, "projector_lr": 1e-3}
    second = train_technique("lorra", str(folder), "scenes", tmp_path / "two", settings, options=options, **common)
    losses = [entry["loss"] for entry in read_log(second / "log.jsonl")]
    assert sum(losses[-3:]) < sum(losses[:3])
    tensors = load_file(second / "technique.safetensors")
    assert any(".text." in name and ".up." in name and bool(value.any()) for name, value in tensors.items())
    assert any(name.endswith("bias") and bool(value.any()) for name, value in tensors.items())
    base, _ = load(folder, dtype="float32", device="cpu")
    model, processor = load(second, dtype="float32", device="cpu")
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, base.get_parameter(name))}
    assert any("language_model" in name for name in changed)
    assert any("multi_modal_projector" in name for name in changed)
    with load_techniques(second, model)(model, processor) as run:
        logits(model, tiny_inputs(model, processor, "one"))
    assert run.outputs["LoRRA"]["router"]


TRAINING = {"dtype": "float32", "device": "cpu", "arguments": {"rank": 4}}
FEW = {"steps": 2, "batch_size": 1, "accumulation": 1, "lr": 1e-2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny("llava", tmp_path_factory.mktemp("model") / "tiny", layers=3)


@pytest.fixture(scope="module")
def first_stage(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("first") / "run"
    return train_technique("lorra", str(folder), "scenes", out, FEW, options={"stage": 1}, **TRAINING)


def test_the_second_stage_begins_with_what_the_first_computed(folder, first_stage):
    model, processor = load(folder, dtype="float32", device="cpu")
    inputs = tiny_inputs(model, processor, "batch")
    with LoRRA.from_pretrained(first_stage)(model, processor):
        before = logits(model, inputs)
    recipe = LoRRATraining(model, processor, Options(LoRRA, own={"stage": 2, "start": str(first_stage)}))
    assert recipe.handle.stack.techniques[0].router
    close(logits(model, inputs), before)
    recipe.handle.detach()
    assert not torch.allclose(before, logits(model, inputs), atol=1e-4)


def test_parameter_groups_of_both_stages(folder):
    """What learns at which rate, and that nothing else does."""
    for stage, learners in ((1, {"visual"}), (2, {"visual", "text", "table", "bias"})):
        model, processor = load(folder, dtype="float32", device="cpu")
        own = {"stage": stage, "model_lr": 2e-6, "projector_lr": 1e-5}
        recipe = LoRRATraining(model, processor, Options(LoRRA, {"rank": 2, "router_length": 256}, own))
        groups = recipe.parameter_groups()
        assert [group.get("lr") for group in groups] == [None, 2e-6, 1e-5]
        chosen = {id(parameter): number for number, group in enumerate(groups) for parameter in group["params"]}
        named = dict(recipe.handle.modules[0].named_parameters())
        assert {name.split(".")[1] for name, p in named.items() if id(p) in chosen} == learners
        assert all((id(p) in chosen) == p.requires_grad for p in named.values())
        for name, parameter in recipe.model.named_parameters():
            group = 1 if ".language_model." in name else 2
            assert chosen.get(id(parameter)) == (group if "lora_" in name else None)
            assert "vision_tower" not in name or "lora_" not in name
        recipe.handle.detach()


def test_checkpointing_learns_the_same(folder, tmp_path):
    options = {"stage": 2, "model_lr": 1e-3, "projector_lr": 1e-3}
    runs = []
    for checkpointing in (False, True):
        own = {**options, "gradient_checkpointing": checkpointing}
        out = tmp_path / str(checkpointing)
        runs.append(train_technique("lorra", str(folder), "scenes", out, FEW, options=own, **TRAINING))
    one, two = (load_file(run / "technique.safetensors") for run in runs)
    assert any(bool(value.any()) for name, value in one.items() if ".up." in name)
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


def test_text_alone_teaches_the_first_stage_nothing_and_the_second_the_textual_learner(folder, tmp_path):
    runs = [
        train_technique("lorra", str(folder), "text", tmp_path / f"{n}", FEW, options={"stage": n}, **TRAINING)
        for n in (1, 2)
    ]
    one, two = (load_file(run / "technique.safetensors") for run in runs)
    assert not any(bool(value.any()) for name, value in one.items() if ".up." in name)
    moved = {name.split(".")[2] for name, value in two.items() if ".up." in name and bool(value.any())}
    assert moved == {"text"}


def test_the_projector_of_the_first_stage_goes_along(folder, tmp_path):
    own = {"stage": 1, "projector_lr": 1e-3}
    first = train_technique("lorra", str(folder), "scenes", tmp_path / "one", FEW, options=own, **TRAINING)
    own = {"stage": 2, "start": str(first)}
    with pytest.raises(ConfigError, match=f"give --model {first} instead of {folder}"):
        train_technique("lorra", str(folder), "scenes", tmp_path / "x", FEW, options=own, **TRAINING)
    second = train_technique("lorra", str(first), "scenes", tmp_path / "two", FEW, options=own, **TRAINING)
    model, processor = load(first, dtype="float32", device="cpu")
    base, _ = load(folder, dtype="float32", device="cpu")
    assert any(not torch.equal(p, base.get_parameter(name)) for name, p in model.named_parameters())
    with LoRRA.from_pretrained(second)(model, processor) as run:
        model.generate(**tiny_inputs(model, processor, "one"), max_new_tokens=2)
    assert run.outputs["LoRRA"]["router"]


def test_stages_that_do_not_fit_are_refused(folder, first_stage, tmp_path):
    common = {"out": tmp_path / "x", "training": FEW, "dtype": "float32", "device": "cpu"}
    with pytest.raises(ConfigError, match="Use stage=2"):
        train_technique("lorra", str(folder), options={"stage": 1, "start": "y"}, **common)
    with pytest.raises(LoadError, match="not a technique folder"):
        train_technique("lorra", str(folder), options={"start": str(tmp_path / "y")}, **common)
    for arguments, message in (
        ({"rank": 3}, r"0\.text\.k\.down\.weight is \(4, 48\), needed is \(3, 48\)"),
        ({"layers": [1]}, r"is \(4, 48\), needed is none"),
    ):
        with pytest.raises(ConfigError, match=message):
            train_technique("lorra", str(folder), arguments=arguments, options={"start": str(first_stage)}, **common)
    other = save_tiny("llava", tmp_path / "other", layers=2)
    with pytest.raises(LoadError, match="asks for layers 3"):
        train_technique("lorra", str(other), options={"start": str(first_stage)}, **common)


def test_smoke(folder, tmp_path):
    out = train_technique("lorra", str(folder), out=tmp_path / "smoke", smoke=True, dtype="float32", device="cpu")
    assert len(read_log(out / "log.jsonl")) == 3
    assert (out / "loss.png").stat().st_size > 1000
    loaded = LoRRA.from_pretrained(out)
    assert (loaded.rank, loaded.router) == (64, True)
