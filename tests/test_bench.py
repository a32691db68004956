"""The bench at a toy size: hand-written loops do the techniques' work, decoded tokens cost nothing, and the command."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from mllm.cli import app
from mllm.cost import ARCHITECTURES, ModelSpec
from mllm.errors import ConfigError, EvalError
from mllm.eval import bench
from mllm.eval.bench import Row, read_rows, run_bench
from mllm.eval.bench_model import CHAT, SETTINGS, build_model, make_prompt, prepare, twin
from mllm.eval.bench_oracle import Bare
from mllm.eval.bench_report import targets
from mllm.versions import CACHE

SPEC = ModelSpec(8, 64, 128, 4, 2, 16)
VISUAL, TEXT = 160, 40


@pytest.fixture(scope="module", params=["llava-1.5-7b", "llava-onevision-0.5b"])
def model(request):
    torch.manual_seed(0)
    return build_model(request.param, SPEC, 8, "sdpa", torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", SETTINGS)
@torch.inference_mode()
def test_the_oracle_does_the_same_work(model, name, batch):
    """Prefill and a further token leave the same keys and values: nothing is spared, nothing is done twice."""
    setting = SETTINGS[name]
    prompt, token = make_prompt(model, VISUAL, TEXT, batch, setting.pages), torch.full((batch, 1), 30)
    stack = prepare(setting, model, prompt.length)
    handle = stack.attach(model, CHAT)
    try:
        bare = Bare(twin(model), prompt, stack, setting.work, handle.modules)
        bare.prefill()
        made = bare.prefill()
        model.model(**prompt.inputs())
        cache = model.model(**prompt.inputs())[CACHE]
        bare.step(token, prompt.length, made)
        model.model(input_ids=token, use_cache=True, **{CACHE: cache})
    finally:
        handle.detach()
    for mine, theirs in zip(cache.layers[:8], made.layers[:8], strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(mine.values, theirs.values, atol=2e-5, rtol=1e-4)


class Operations(TorchDispatchMode):
    """What is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "lorra"])
@torch.inference_mode()
def test_a_decoded_token_costs_nothing(model, name):
    """Techniques that act on the prompt dispatch nothing once an answer is written."""
    setting = SETTINGS[name]
    prompt, token = make_prompt(model, VISUAL, TEXT, 1, setting.pages), torch.tensor([[30]])
    stack = prepare(setting, model, prompt.length)

    def decode() -> list[str]:
        cache = model.model(**prompt.inputs())[CACHE]
        model.model(input_ids=token, use_cache=True, **{CACHE: cache})  # the first one may settle something
        with Operations() as counted:
            model.model(input_ids=token, use_cache=True, **{CACHE: cache})
        return counted.found

    plain = decode()
    with stack(model, CHAT):
        found = decode()
    assert found == plain


def test_the_command(monkeypatch, tmp_path):
    monkeypatch.setitem(ARCHITECTURES, "toy", SPEC)
    arguments = ["bench", "--arch", "toy", "--visual-tokens", "60", "--text-tokens", "30", "--rounds", "1"]
    result = CliRunner().invoke(app, [*arguments, "--batch", "1", "--dtype", "float32", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    rows = read_rows(tmp_path / "bench.json")
    by = {(row.setting, row.phase): row for row in rows}
    assert set(by) == {(setting, phase) for setting in SETTINGS for phase in ("prefill", "decode")}
    assert all(min(row.plain_ms, row.technique_ms, row.oracle_ms, row.text_only_ms) > 0 for row in rows)
    assert all(row.realised_over_oracle > 0 and row.realised_over_predicted > 0 for row in rows)
    half = by["exit_half", "prefill"]
    assert half.predicted > 1.3
    assert half.kv_bytes < half.dense_kv_bytes
    assert by["neutral", "prefill"].predicted == 1
    assert (tmp_path / "bench.png").stat().st_size > 5_000
    assert "| toy | 1 | 60 | prefill | urag_20_to_5 |" in (tmp_path / "bench.md").read_text()
    document = json.loads((tmp_path / "bench.json").read_text())
    assert document["matmul_gflops"] > 0


def test_targets_name_the_rows_that_miss_them():
    def row(setting: str, visual: int, phase: str = "prefill", **measured) -> Row:
        common = {"technique_ms": 50.0, "plain_ms": 100.0, "text_only_ms": 40.0, "speedup": 2.0, "predicted": 2.0}
        measured = common | {"realised_over_oracle": 1.0, "realised_over_predicted": 1.0} | measured
        return Row("toy", 8, "sdpa", "float32", "cpu", setting, phase, visual, 80, 1, **measured)

    rows = [
        row("exit_half", 2880, realised_over_predicted=0.949),
        row("exit_half", 576, realised_over_predicted=0.5),  # no target there
        row("mma", 2880, realised_over_oracle=0.9, predicted=1.0, realised_over_predicted=0.8),  # saves nothing
        row("neutral", 576, speedup=0.98, predicted=1.0),
        row("naavit_reuse", 576, technique_ms=45.0),
        # three quarters of the pictures' 60 ms are gone, and half of their 9,920 of 10,000 tokens' bytes
        row("exit_half", 9920, "decode", technique_ms=55.0, dense_kv_bytes=10_000, kv_bytes=10_000 - 4960),
        row("exit_half", 10_000, "decode", plain_ms=None, technique_ms=None, speedup=None),  # left out
    ]
    lines = targets(rows).splitlines()
    found = {line.split(" | ")[0].lstrip("| "): line.split(" | ")[1:] for line in lines[2:]}
    assert found["realised / oracle, prefill"][1:] == ["1.00", "0.90", "mma at 2880: 0.90 |"]
    assert found["realised / predicted, prefill, 2,880 visual tokens and more"][3] == "- |"  # 0.949 is shown as 0.95
    assert found["realised / predicted, prefill, fewer"] == ["-", "0.75", "0.50", "- |"]
    assert found["a neutral technique: plain / its time"][3] == "neutral at 576: 0.98 |"
    assert found["a second question on kept pictures: text alone / its time"][3] == "naavit_reuse at 576: 0.89 |"
    (decode,) = (cells for what, cells in found.items() if what.startswith("decode, 10,000"))
    assert decode == [">= 1.00", "1.50", "1.50", "- |"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["gpt"]}, "'gpt' is not one of: llava-1.5-7b"),
        ({"settings": ["magic"]}, "'magic' is not one of: neutral"),
        ({"visual_tokens": [7]}, "do not fill the 20 pages"),
        ({"rounds": 0}, "at least one of each"),
        ({"text_tokens": 4}, "text tokens are needed"),
        ({"attn": "flex_attention"}, "attn='flex_attention' is not one of: sdpa, eager"),
    ],
)
def test_mistakes(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run_bench(tmp_path / "out", **({"architectures": ["llava-onevision-0.5b"]} | changes))
    assert not (tmp_path / "out" / "bench.json").exists()


def test_a_folder_that_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "_speed", lambda *_: pytest.fail("something was timed"))
    (tmp_path / "file").write_text("")
    with pytest.raises(EvalError, match=r"file is a file\. Give another --out"):
        run_bench(tmp_path / "file", ["llava-onevision-0.5b"])


def test_sizes_that_take_too_long_are_left_out_and_say_so(tmp_path):
    (row,) = run_bench(tmp_path, ["llava-1.5-13b"], [10_000], [8], settings=["exit_half"], seconds=0.001)
    assert row.plain_ms is None
    (row,) = run_bench(tmp_path, ["llava-1.5-7b"], [10_000], [1], settings=["exit_half"], seconds=1e9, within=0.001)
    assert row.plain_ms is None
    assert "left out: about" in row.note or "not enough memory" in row.note
