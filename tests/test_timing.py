"""Measuring: the numbers are of the right things."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_inputs, tiny_model, tiny_processor

from mllm import Stack, measure
from mllm.errors import ConfigError
from mllm.timing import PeakMemory, TokenClock, percentile
from mllm.token_pruning import DyVTE, NAAViT


def test_measure_takes_turns_and_counts():
    model = tiny_model("llava")
    inputs = tiny_inputs(model, tiny_processor("llava"), "batch")
    results = measure(model, inputs, [None, DyVTE(exit_layer=2), Stack(NAAViT())], max_new_tokens=4, repeats=3)
    assert [r.name.split("(")[0] for r in results] == ["plain model", "DyVTE", "NAAViT"]
    plain, exited, naavit = results
    assert plain.flops == plain.dense_flops == exited.dense_flops
    assert exited.flops < naavit.flops < plain.flops
    assert exited.kv_bytes < plain.kv_bytes == naavit.kv_bytes
    for result in results:
        assert 0 < result.ttft_ms <= result.ttft_ms_p90
        assert 0 < result.token_ms <= result.token_ms_p90
        assert result.tokens_per_s == pytest.approx(4 * 1e3 / result.token_ms)
        assert result.repeats == 3
    lines = results.table().splitlines()
    assert len(lines) == 5
    assert len({line.count("|") for line in lines}) == 1
    assert not model.model._forward_pre_hooks


def test_one_token_has_no_decode_time():
    model = tiny_model("llava")
    results = measure(model, tiny_inputs(model, tiny_processor("llava"), "one"), [None], max_new_tokens=1, repeats=1)
    assert results[0].token_ms is None
    assert results[0].tokens_per_s is None
    assert "-" in results.table()


@pytest.mark.parametrize("options", [{"settings": []}, {"max_new_tokens": 0}, {"repeats": 0}, {"warmup": -1}])
def test_wrong_arguments(options):
    model = tiny_model("llava")
    with pytest.raises(ConfigError, match="measure"):
        measure(model, {}, **{"settings": [None], **options})


def test_the_clock_counts_steps_not_prompts():
    clock = TokenClock(torch.device("cpu"))
    clock.start()
    clock.put(torch.zeros(2, 5))
    clock.put(torch.zeros(2))
    clock.put(torch.zeros(2))
    clock.end()
    assert len(clock.times) == 2
    assert 0 < clock.times[0] < clock.times[1]


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1))
def test_percentile_is_a_value_with_enough_below_it(values, fraction):
    found = percentile(values, fraction)
    assert found in values
    assert sum(v <= found for v in values) >= fraction * len(values) - 1e-9


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells; lifted by another system's counter")
def test_peak_memory_sees_an_allocation():
    memory = PeakMemory(torch.device("cpu"))
    memory.reset()
    before = memory.read()
    if before is None:
        return  # the container forbids resetting the mark; then the answer is "unknown", as tested here
    with mmap.mmap(-1, 64_000_000) as block:  # pages of its own: the allocator may hold free ones already
        block.write(b"x" * 1_000_000 * 64)
    assert memory.read() - before > 50e6
