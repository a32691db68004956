"""The bench command at a toy size: its rows, its oracle, and what a decoded token costs beside techniques."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from mllm.cli import app
from mllm.cost import ModelSpec
from mllm.errors import ConfigError
from mllm.eval.bench import _CHAT, SETTINGS, Row, _dropped, build_model, oracle_prefill, prompt, read_rows, run_bench
from mllm.versions import CACHE

SPEC = ModelSpec(8, 64, 128, 4, 2, 16)
VISUAL, TEXT = 160, 40


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(SPEC, 8, "sdpa", torch.float32, torch.device("cpu"))


def run(model, inputs, **more):
    encoded = inputs.get("mm_encoder_outputs")
    encoded = {} if encoded is None else {"mm_encoder_outputs": dict(encoded)}
    return model.model(**{**inputs, **encoded, **more}, use_cache=True)


@pytest.mark.parametrize("name", [name for name, setting in SETTINGS.items() if setting.bare is not None])
@torch.inference_mode()
def test_the_oracle_does_the_same_work(model, name):
    """Its cache holds the same keys in every layer: nothing is left out that the technique computes."""
    setting = SETTINGS[name]
    stack, inputs = setting.stack(8), prompt(model, VISUAL, TEXT, 1, setting.pages)
    with stack(model, _CHAT) as told:
        ours = run(model, inputs)[CACHE]
    dropped = _dropped(stack, SPEC, inputs["input_ids"], told.outputs)
    assert (dropped is not None) == (setting.pages > 1)
    bare = oracle_prefill(model, setting.bare(8), inputs, dropped)
    assert [layer.keys.shape for layer in bare.layers] == [layer.keys.shape for layer in ours.layers]
    for mine, theirs in zip(ours.layers, bare.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(mine.values, theirs.values, atol=1e-5, rtol=1e-4)


class Operations(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "lorra"])
@torch.inference_mode()
def test_a_decoded_token_costs_nothing_in_the_layers(model, name):
    """Techniques that act on the prompt dispatch nothing in the layers once an answer is written."""
    setting = SETTINGS[name]
    inputs = prompt(model, VISUAL, TEXT, 1, setting.pages)
    token = torch.tensor([[20]])

    def decode(cache) -> list[str]:
        run(model, {"input_ids": token}, **{CACHE: cache})  # the first one may settle something
        with Operations() as counted:
            run(model, {"input_ids": token}, **{CACHE: cache})
        return counted.found

    plain = decode(run(model, inputs)[CACHE])
    with setting.stack(8)(model, _CHAT):
        found = decode(run(model, inputs)[CACHE])
    # once a call: which of its tokens are visual (none) or padding, and which keys a shortened cache holds
    assert len(found) <= len(plain) + 5, sorted(set(found) - set(plain))
    assert len(found) - len(plain) < 8  # layers


def test_the_command(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("mllm.cost").cost.ARCHITECTURES, "toy", SPEC)
    arguments = ["bench", "--arch", "toy", "--visual-tokens", "60", "--text-tokens", "30", "--rounds", "1"]
    result = CliRunner().invoke(app, [*arguments, "--dtype", "float32", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    rows = read_rows(tmp_path / "bench.json")
    assert {(row.setting, row.phase) for row in rows} == {(s, p) for s in SETTINGS for p in ("prefill", "decode")}
    by = {(row.setting, row.phase): row for row in rows}
    assert all(isinstance(row, Row) and row.plain_ms > 0 and row.technique_ms > 0 for row in rows)
    assert all(row.realised_over_oracle > 0 for row in rows if SETTINGS[row.setting].bare is not None)
    assert by["exit_half", "prefill"].predicted > 1.3
    assert by["exit_half", "prefill"].kv_bytes < by["exit_half", "prefill"].dense_kv_bytes
    assert by["neutral", "prefill"].predicted == 1
    assert by["lorra", "decode"].predicted is None
    assert (tmp_path / "bench.png").stat().st_size > 5_000
    assert "| toy | 1 | 60 | prefill | urag_20_to_5 |" in (tmp_path / "bench.md").read_text()
    assert json.loads((tmp_path / "bench.json").read_text())["machine"]["matmul_gflops"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["gpt"]}, "'gpt' is not one of: llava-1.5-7b"),
        ({"settings": ["magic"]}, "'magic' is not one of: neutral"),
        ({"visual_tokens": [7]}, "7 visual tokens do not fill the pages"),
        ({"rounds": 0}, "at least 1"),
        ({"text_tokens": 4}, "22"),
    ],
)
def test_mistakes(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run_bench(tmp_path / "out", **({"architectures": ["llava-onevision-0.5b"]} | changes))
    assert not (tmp_path / "out").exists()


def test_sizes_that_take_too_long_are_left_out_and_say_so(tmp_path):
    rows = run_bench(tmp_path, ["llava-1.5-13b"], [10_000], [8], settings=["exit_half"], seconds=0.001)
    assert [row.plain_ms for row in rows] == [None]
    assert "left out: about" in rows[0].note or "not enough memory" in rows[0].note
