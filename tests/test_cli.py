"""The command line: what others rely on, exit codes, and no traceback for a user's mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save_tiny, tiny_image

from mllm import cli
from mllm.errors import ConfigError
from mllm.technique import TrainedTechnique, get_technique

ROOT = Path(__file__).parent.parent
COMMANDS = ["list", "cost", "measure", "fetch-default", "eval", "report", "train", "analyze", "demo"]


def run(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``mllm ARGUMENTS``, in this process."""
    monkeypatch.setattr(sys, "argv", ["mllm", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as stopped:
        code = stopped.code or 0
    out, err = capsys.readouterr()
    return code, out, err


def test_list(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "list", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    assert set(rows) >= {"DyVTE", "EEMLLM", "FreezeVisual", "MMA", "NAAViT"}
    for row in rows.values():
        assert row["paper"].startswith("https://arxiv.org/abs/")
        assert row["folder"] in ("token_pruning", "adapters")
        assert row["trained"] == issubclass(get_technique(row["name"]), TrainedTechnique)
        assert row["backends"] == ["eager", "sdpa"]
    assert rows["NAAViT"]["arguments"]["layers"]["default"] == "all"
    code, out, _ = run(monkeypatch, capsys, "list")
    assert "layers='all', image_cache=0" in out


@pytest.mark.parametrize(
    ("architecture", "config", "tflops"),
    [("llava-1.5-7b", "exit_half", 4.668), ("llava-1.5-7b", "freeze_all", 2.087), ("llava-1.5-13b", "none", 16.576)],
)
def test_cost(monkeypatch, capsys, architecture, config, tflops):
    arguments = ["--arch", architecture, "--text-tokens", 64, "--visual-tokens", 576]
    path = ROOT / "configs" / f"{config}.yaml"
    code, out, _ = run(monkeypatch, capsys, "cost", *arguments, "--config", path, "--json")
    result = json.loads(out)
    assert code == 0
    assert round(result["tflops"], 3) == tflops
    assert {"dense_tflops", "kv_bytes"} <= set(result)
    code, out, _ = run(monkeypatch, capsys, "cost", *arguments, "--config", path)
    assert f"{tflops:.3f} TFLOPs" in out


def test_cost_of_a_model_folder(monkeypatch, capsys, tmp_path):
    code, out, _ = run(monkeypatch, capsys, "cost", "--arch", save_tiny("qwen2_5_vl", tmp_path), "--json")
    assert code == 0
    assert json.loads(out)["tflops"] > 0


def test_measure(monkeypatch, capsys, tmp_path):
    folder = save_tiny("llava", tmp_path / "model")
    tiny_image().save(tmp_path / "a.png")
    configs = [ROOT / "configs" / "none.yaml", ROOT / "configs" / "exit_half.yaml"]
    options = ["--model", folder, "--image", tmp_path / "a.png", "--repeats", 1, "--max-new-tokens", 2, "--json"]
    code, out, _ = run(monkeypatch, capsys, "measure", *configs, *options)
    assert code == 0
    plain, exited = json.loads(out)
    assert exited["flops"] < plain["flops"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cost", "--arch", "gpt-5"], "Unknown architecture 'gpt-5'"),
        (["cost", "--arch", "llava-1.5-7b", "--config", "nowhere.yaml"], "nowhere.yaml cannot be read"),
        (["cost", "--arch", "llava-1.5-7b", "--text-tokens", "0"], "text_tokens=0"),
        (["report", "nowhere"], "nowhere"),
        (["train", "nothing"], "There is nothing to train under the name 'nothing'. Trainable: "),
        (["train", "dyvte", "--option", "stage"], "--option 'stage' must have the form KEY=VALUE"),
        (["train", "dyvte", "--config", "nowhere.yaml"], "nowhere.yaml cannot be read"),
        (["measure", "nowhere.yaml", "--image", "x.png"], "nowhere.yaml cannot be read"),
        (["eval", "--tasks", "mllm_vqa", "--out", "runs/x", "nowhere.yaml"], "nowhere.yaml cannot be read"),
        (["eval", "--tasks", "mllm_vqa", "--out", "runs/x"], "Give --configs, such as configs/*.yaml."),
    ],
)
def test_mistakes_end_with_their_reason(monkeypatch, capsys, arguments, message):
    code, out, err = run(monkeypatch, capsys, *arguments)
    assert code == 1
    assert out == ""
    assert err.startswith("mllm: ")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "limit"), [(None, None), ("20", 20), ("mllm_vqa=30, mllm_text=6", {"mllm_vqa": 30, "mllm_text": 6})]
)
def test_limit_for_all_tasks_or_by_task(text, limit):
    assert cli._limit(text) == limit


@pytest.mark.parametrize("text", ["many", "mllm_vqa=", "=3", "mllm_vqa=3,4", "-1", "1.5"])
def test_limits_that_are_no_numbers(text):
    with pytest.raises(ConfigError, match="neither a number of samples nor TASK=SAMPLES"):
        cli._limit(text)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(monkeypatch, capsys, command):
    code, out, _ = run(monkeypatch, capsys, command, "--help")
    assert code == 0
    assert f"Example: mllm {command}" in out


def test_help_names_tasks_configs_and_folders(monkeypatch, capsys):
    _, out, _ = run(monkeypatch, capsys, "eval", "--help")
    told = " ".join(out.split())
    for part in ("mllm_vqa", "--tasks list", "Config files, required", "'default' (also without)"):
        assert part in told
    _, out, _ = run(monkeypatch, capsys, "train", "--help")
    told = " ".join(out.split())
    for part in ("runs/train-NAME", "runs/smoke-NAME", "training: {steps: .., lr: ..}"):
        assert part in told


def test_tasks_are_listed(monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, "eval", "--tasks", "list")
    assert code == 0
    assert {"mllm_vqa", "puzzle_scenes"} <= {line.split()[0] for line in out.splitlines()}
    assert "lmms-eval --tasks list" in err


def test_wrong_usage_has_another_exit_code(monkeypatch, capsys):
    code, _, err = run(monkeypatch, capsys, "cost", "--arch", "llava-1.5-7b", "--batch", "many")
    assert code == 2
    assert "--batch" in err


def test_help_is_quick():
    """No torch for a help text: it must not take seconds."""
    probe = "import sys; import mllm.cli; sys.exit('torch' in sys.modules or 'lmms_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0
