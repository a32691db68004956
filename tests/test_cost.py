"""The published figures, and the predictions against what a model really counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_inputs, tiny_model, tiny_processor, visual_mask

from mllm import Stack, load_config
from mllm.cost import ARCHITECTURES, LayerWork, ModelSpec, predict, resolve_architecture
from mllm.errors import ConfigError, LoadError
from mllm.token_pruning import EEMLLM, DyVTE, FreezeVisual, NAAViT

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.mark.parametrize(
    ("architecture", "config", "tflops"),
    [
        ("llava-1.5-7b", "none", 8.504),
        ("llava-1.5-7b", "exit_half", 4.668),
        ("llava-1.5-7b", "naavit_all", 7.074),
        ("llava-1.5-7b", "ee_all", 7.692),
        ("llava-1.5-7b", "freeze_all", 2.087),
        ("llava-1.5-13b", "none", 16.576),
    ],
)
def test_published_figures(architecture, config, tflops):
    stack = load_config(CONFIGS / f"{config}.yaml").stack
    cost = predict(stack, ARCHITECTURES[architecture], text_tokens=64, visual_tokens=576)
    assert round(cost.flops / 1e12, 3) == tflops


@pytest.mark.parametrize(
    ("exit_layer", "tflops"), [(9, 3.23), (11, 3.71), (13, 4.19), (15, 4.67), (17, 5.15), (19, 5.63)]
)
def test_published_exit_curve(exit_layer, tflops):
    cost = predict(Stack(DyVTE(exit_layer=exit_layer)), ARCHITECTURES["llava-1.5-7b"], 64, 576)
    assert cost.flops / 1e12 == pytest.approx(tflops, abs=0.006)


def test_key_value_bytes():
    spec = ARCHITECTURES["llava-1.5-7b"]
    cost = predict(Stack(DyVTE(exit_layer=15)), spec, 64, 576)
    assert cost.dense_kv_bytes == 32 * 640 * 2 * 4096 * 2
    assert cost.kv_bytes == (16 * 640 + 16 * 64) * 2 * 4096 * 2
    assert predict(Stack(NAAViT()), spec, 64, 576).kv_bytes == cost.dense_kv_bytes


@pytest.mark.parametrize(
    "stack",
    [
        Stack(),
        Stack(DyVTE(exit_layer=2)),
        Stack(NAAViT(layers="1:3")),
        Stack(EEMLLM()),
        Stack(FreezeVisual(layers=[0, 1]), DyVTE(exit_layer=3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_prediction_equals_the_run(stack, family):
    model = tiny_model(family, "sdpa")
    inputs = tiny_inputs(model, tiny_processor(family), "one")
    visual = int(visual_mask(model, inputs).sum())
    spec = ModelSpec.from_config(model.config.get_text_config())
    predicted = predict(stack, spec, inputs["input_ids"].shape[1] - visual, visual, bytes_per_value=4)
    with stack(model) as run, torch.no_grad():
        model(**inputs, use_cache=True)
    assert (run.flops, run.dense_flops) == (predicted.flops, predicted.dense_flops)
    assert (run.kv_bytes, run.dense_kv_bytes) == (predicted.kv_bytes, predicted.dense_kv_bytes)


sizes = st.integers(1, 64)


@given(sizes, sizes, sizes, st.booleans(), st.booleans())
def test_passive_rows_never_cost_more_than_active_ones(active, passive, past, output, ffn):
    spec = ModelSpec(layers=1, hidden=32, intermediate=64, heads=4, kv_heads=2, head_dim=8)
    keys = past + active + passive
    frozen = LayerWork(active, active * keys, passive, output, ffn).flops(spec)
    dense = LayerWork(active + passive, (active + passive) * keys).flops(spec)
    assert frozen < dense


def test_unknown_architecture_and_broken_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"Unknown architecture 'llava-2'.*llava-1\.5-7b"):
        resolve_architecture("llava-2")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(LoadError, match="no readable config"):
        resolve_architecture(str(tmp_path))
    with pytest.raises(ConfigError, match="text_tokens=0"):
        predict(Stack(), ARCHITECTURES["llava-1.5-7b"], 0, 576)
