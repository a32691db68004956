"""LoRRA: learners, router, their caches, the legacy switches, and training."""

from __future__ import annotations

import itertools

import pytest
import torch
from contract import CASES, close, extend, logits
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, row, save_tiny, tiny_image, tiny_inputs, tiny_model, tiny_processor, visual_mask

from mllm import Stack, load, load_techniques
from mllm.adapters import LoRRA, ModalityMutualAttention
from mllm.cost import ARCHITECTURES, ModelSpec, predict
from mllm.errors import CacheError, ConfigError, ConflictError, InputError, LoadError
from mllm.token_pruning import DyVTE, NAAViT, URaG
from mllm.training import read_log, train_technique

CASE = CASES["LoRRA"]


def trained(model, **arguments) -> LoRRA:
    """LoRRA with random learned parts that show."""
    from contract import with_random_weights

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


def test_a_row_longer_than_the_table_is_refused():
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    inputs = tiny_inputs(model, processor, "one")
    length = inputs["input_ids"].shape[1]
    with trained(model, router_length=length)(model, processor):
        logits(model, inputs)
        with pytest.raises(InputError, match=rf"a row of {length + 1} tokens.*router_length={length}"):
            model.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
    ragged = tiny_inputs(model, processor, "batch")
    short = tiny_inputs(model, processor, "batch")["attention_mask"].sum(dim=1).max()
    with trained(model, router_length=int(short))(model, processor):
        logits(model, ragged)  # padding is no position


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


def test_the_system_prompt_can_be_left_out():
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    prompts = [f"{system} USER: <image> why? ASSISTANT:" for system in ("Be kind.", "Be rude.")]
    batch = [processor(text=[p], images=[[tiny_image()]], return_tensors="pt") for p in prompts]
    only = {"layers": [0], "skip_system": True}
    with trained(model, **only)(model, processor) as run:
        for inputs in batch:
            logits(model, inputs)
    assert run.steps == 2
    with trained(model, **only)(model), pytest.raises(InputError, match="skip_system"):
        logits(model, batch[0])


def test_prediction_equals_the_run():
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    inputs = tiny_inputs(model, processor, "one")
    visual = int(visual_mask(model, inputs).sum())
    spec = ModelSpec.from_config(model.config.text_config)
    lorra = trained(model)
    with lorra(model, processor) as run:
        logits(model, inputs)
    predicted = predict(Stack(lorra), spec, inputs["input_ids"].shape[1] - visual, visual, bytes_per_value=4)
    assert run.flops == predicted.flops


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


def test_released_weights_load_strictly(tmp_path):
    model = tiny_model("llava", "sdpa")
    tensors = released(model)
    save_file(tensors, tmp_path / "wings.safetensors")
    technique = LoRRA.from_released(tmp_path / "wings.safetensors")
    assert (technique.rank, technique.router_length, len(technique.layers)) == (3, 64, 6)
    learned = technique.learned.tensors
    assert torch.equal(learned["2.visual.k.up.weight"], tensors["model.layers.2.attn_pool.k_proj.1.weight"])
    assert torch.equal(learned["2.text.o.down.weight"], tensors["model.layers.2.attn_t_pool.o_proj.0.weight"])
    assert torch.equal(learned["5.table"], tensors["model.layers.5.reweight_module.linear.weight"])
    with technique(model):
        logits(model, tiny_inputs(model, tiny_processor("llava"), "one"))
    name = "model.layers.3.attn_t_pool.v_proj.0.weight"
    with pytest.raises(LoadError, match=r"missing 3.text.v.down.weight"):
        LoRRA.from_released({k: v for k, v in tensors.items() if k != name})
    with pytest.raises(LoadError, match=r"3.text.v.down.weight \(4, 48\), not \(3, 48\)"):
        LoRRA.from_released({**tensors, name: torch.zeros(4, 48)})
    with pytest.raises(LoadError, match=r"unexpected model.layers.0.attn_pool.q_proj.2.weight"):
        LoRRA.from_released({**tensors, "model.layers.0.attn_pool.q_proj.2.weight": torch.zeros(1)})
    with pytest.raises(LoadError, match="no Wings checkpoint"):
        LoRRA.from_released({"model.embed_tokens.weight": torch.zeros(1)})
    with pytest.raises(LoadError, match="Pickled checkpoints are refused"):
        LoRRA.from_released(tmp_path / "model.bin")


def test_double_add_doubles_what_is_added():
    """In one layer, the residual stream moves twice as far."""
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    inputs = tiny_inputs(model, processor, "one")
    moved = {}
    for double in (None, False, True):
        seen = []
        hook = model.model.language_model.layers[2].mlp.register_forward_pre_hook(lambda *a, seen=seen: seen.append(1))
        inner = model.model.language_model.layers[2].self_attn
        out = []
        after = inner.register_forward_hook(lambda m, a, o, out=out: out.append(o[0].clone()))
        if double is None:
            logits(model, inputs)
        else:
            with trained(model, layers=[2], double_add=double)(model, processor):
                # the branch's hook came first when it attached: measure behind it
                after.remove()
                after = inner.register_forward_hook(lambda m, a, o, out=out: out.append(o[0].clone()))
                logits(model, inputs)
        hook.remove()
        after.remove()
        moved[double] = out[-1]
    close(moved[True] - moved[None], 2 * (moved[False] - moved[None]), tolerance=1e-4)


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


def test_a_cropped_cache_is_refused():
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    inputs = tiny_inputs(model, processor, "one")
    with trained(model)(model, processor), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        cache.crop(-2)
        mask = inputs["attention_mask"][:, :-1]
        with pytest.raises(CacheError, match="cropped"):
            model(input_ids=inputs["input_ids"][:, -1:], attention_mask=mask, past_key_values=cache, use_cache=True)


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


def test_stages_that_do_not_fit_are_refused(tmp_path):
    folder = save_tiny("llava", tmp_path / "tiny", layers=3)
    common = {"dtype": "float32", "device": "cpu"}
    with pytest.raises(ConfigError, match="Use stage=2"):
        train_technique("lorra", str(folder), out=tmp_path / "x", options={"stage": 1, "start": "y"}, **common)
    with pytest.raises(LoadError, match="not a technique folder"):
        train_technique("lorra", str(folder), out=tmp_path / "x", options={"start": str(tmp_path / "y")}, **common)
