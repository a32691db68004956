"""The ready commands for real benchmarks: every name in them exists."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
import real_benchmarks
import yaml
from tiny import FAMILIES

from mllm.config import load_config


def test_commands_name_models_tasks_and_configs(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["real_benchmarks.py", "--limit", "5"])
    real_benchmarks.main()
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [words[3] for words in lines] == [model.hub for model in real_benchmarks.MODELS.values()]
    for words in lines:
        assert words[:2] == ["mllm", "eval"]
        configs = words[words.index("--configs") + 1 : words.index("--tasks")]
        assert [load_config(path).name for path in configs]
        assert set(words[words.index("--tasks") + 1].split(",")) <= set(real_benchmarks.TASKS.values())
    assert {model.family for model in real_benchmarks.MODELS.values()} <= set(FAMILIES)


def test_it_works_from_any_folder(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["real_benchmarks.py", "--models", "llava-1.5-7b", "--tasks", "pope"])
    real_benchmarks.main()
    words = shlex.split(capsys.readouterr().out)
    configs = words[words.index("--configs") + 1 : words.index("--tasks")]
    assert "none" in [load_config(path).name for path in configs]


def test_a_check_that_fails_says_why(monkeypatch, tmp_path):
    pytest.importorskip("lmms_eval", reason="needs lmms_eval: pip install -e '.[all,dev]'")
    monkeypatch.setattr(real_benchmarks, "TASKS", {})
    with pytest.raises(SystemExit, match=r"llava: nowhere\.yaml cannot be read"):
        real_benchmarks.check(["nowhere.yaml"])
    monkeypatch.setitem(sys.modules, "lmms_eval.tasks", None)
    with pytest.raises(SystemExit, match="--check needs lmms_eval"):
        real_benchmarks.check([])


def test_lmms_eval_has_every_task():
    lmms_eval = pytest.importorskip("lmms_eval", reason="needs lmms_eval: pip install -e '.[all,dev]'")
    named = set()
    for file in (Path(lmms_eval.__file__).parent / "tasks").rglob("*.yaml"):
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith("task:") and isinstance(value := yaml.safe_load(line)["task"], str):
                named.add(value)
    assert set(real_benchmarks.TASKS.values()) <= named


def test_an_unknown_name_is_told(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["real_benchmarks.py", "--models", "gpt"])
    with pytest.raises(SystemExit):
        real_benchmarks.main()
    assert "unknown: gpt. Allowed: llava-1.5-7b" in capsys.readouterr().err
