"""The grid runner: right cells, resumed after a kill, safe against a bad folder, equal on several processes."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import save_tiny

from mllm.config import load_config
from mllm.errors import ConfigError, ConflictError, EvalError, InputError, LoadError, UnsupportedModelError
from mllm.eval import results, runner, stats
from mllm.eval.runner import run_grid
from mllm.eval.tasks import task_folder

CONFIGS = Path(__file__).parent.parent / "configs"
PLAIN, EXIT = CONFIGS / "none.yaml", CONFIGS / "exit_half.yaml"
PROMISED = {
    "model",
    "config",
    "task",
    "n",
    "score",
    "ci95",
    "errors",
    "flops",
    "ttft_ms_median",
    "tokens_per_s",
    "kv_bytes",
    "peak_bytes",
    "env",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_tiny("llava", tmp_path_factory.mktemp("model")))


def grid(model, out, configs=(PLAIN,), tasks=("mllm_text",), **options):
    options = {"limit": 4, "batch_size": 2, "dtype": "float32", "device": "cpu", **options}
    return run_grid([model], configs, tasks, out, **options)


def test_cells_hold_what_is_promised(model, tmp_path, capsys):
    cells = grid(model, tmp_path, (EXIT, PLAIN), ("mllm_vqa", "mllm_caption"))
    assert cells == json.loads((tmp_path / "results.json").read_text())
    # what is compared runs side by side, the plain model first
    assert [(c["config"], c["task"]) for c in cells] == [
        (config, task) for task in ("mllm_vqa", "mllm_caption") for config in ("none", "exit_half")
    ]
    assert "Postprocessing" not in capsys.readouterr().err  # lmms-eval's own bars stay hidden
    for cell in cells:
        assert set(cell) >= PROMISED
        assert (cell["n"], cell["errors"], cell["backend"], cell["dtype"]) == (4, 0, "sdpa", "float32")
        assert cell["ci95"][0] <= cell["score"] <= cell["ci95"][1]
        assert cell["env"]["transformers"]
    plain, exited = cells[:2]
    assert plain["flops"] == plain["dense_flops"] == exited["dense_flops"] > exited["flops"]
    assert exited["kv_bytes"] < plain["kv_bytes"]
    samples = json.loads(results.cell_path(tmp_path, model, "none", "mllm_vqa").read_text())["samples"]
    assert [sample["id"] for sample in samples] == [0, 1, 2, 3]
    assert sum(sample["score"] for sample in samples) / 4 == plain["score"]


def test_each_task_can_have_its_own_number_of_samples(model, tmp_path):
    cells = grid(model, tmp_path, tasks=("mllm_text", "mllm_reading"), limit={"mllm_text": 3, "mllm_reading": 2})
    assert [(cell["task"], cell["n"], cell["limit"]) for cell in cells] == [("mllm_text", 3, 3), ("mllm_reading", 2, 2)]


def test_a_killed_run_goes_on_where_it_was(model, tmp_path, monkeypatch):
    run_cell, done = runner._run_cell, []

    def dies(*arguments):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(arguments[3])
        return run_cell(*arguments)

    monkeypatch.setattr(runner, "_run_cell", dies)
    tasks = ("mllm_text", "mllm_reading")
    with pytest.raises(KeyboardInterrupt):
        grid(model, tmp_path, tasks=tasks)
    first = results.cell_path(tmp_path, model, "none", "mllm_text")
    before = first.read_bytes()
    again = []
    monkeypatch.setattr(runner, "_run_cell", lambda *a: again.append(a[3]) or run_cell(*a))
    cells = grid(model, tmp_path, tasks=tasks)
    assert (done, again) == (["mllm_text"], ["mllm_reading"])
    assert first.read_bytes() == before
    assert [cell["task"] for cell in cells] == list(tasks)
    grid(model, tmp_path, tasks=tasks, limit=3)  # another setting: both cells again
    assert again == ["mllm_reading", *tasks]
    grid(model, tmp_path, tasks=tasks, limit=3, fresh=True)
    assert len(again) == 5


def test_what_a_result_belongs_to(model, tmp_path):
    """Whatever changes what a model or a task is makes another result of it."""
    seen = set()

    def new(digest):
        assert digest not in seen
        seen.add(digest)

    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    new(runner.source_digest(str(folder)))
    assert runner.source_digest(str(folder)) in seen
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    new(runner.source_digest(str(folder)))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "more": 1}))
    new(runner.source_digest(str(folder)))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    new(runner.source_digest(str(adapter)))
    weights = next(folder.glob("*.safetensors"))
    os.utime(weights, ns=(1, 1))  # trained again in place
    new(runner.source_digest(str(adapter)))

    tasks = shutil.copytree(task_folder(), tmp_path / "tasks")
    for task in ("mllm_caption", "mllm_caption_cider", "puzzle_pages5", "puzzle_pages5_gold"):
        new(runner._task_digest(task, None))
    new(runner._task_digest("mllm_text", tasks))
    (Path(tasks) / "scoring.py").write_text("")
    new(runner._task_digest("mllm_text", tasks))


def test_the_digest_of_a_task_follows_its_data(tmp_path, monkeypatch):
    tasks = Path(shutil.copytree(task_folder(), tmp_path / "tasks"))
    monkeypatch.setattr(runner, "task_folder", lambda: tasks)
    names = ("mllm_caption", "mllm_caption_cider", "mllm_text")
    before = [runner._task_digest(task, None) for task in names]
    (tasks / "data" / "mllm_caption.parquet").write_bytes(b"other")
    after = [runner._task_digest(task, None) for task in names]
    assert runner._task_digest("mllm_caption", tmp_path / "none") != before[0]  # a folder of one's own beside them
    assert [one == two for one, two in zip(before, after, strict=True)] == [False, False, True]


def test_failed_cells_run_again_if_asked(model, tmp_path, monkeypatch):
    from mllm.eval import lmms_model

    with monkeypatch.context() as patch:
        patch.setattr(lmms_model, "open_image", lambda image: (_ for _ in ()).throw(OSError("disk away")))
        tasks = ("puzzle_chat",)  # some with a picture, some without
        (cell,) = grid(model, tmp_path, tasks=tasks, limit=6)
    assert cell["errors"] > 0
    assert cell["weights"]
    assert cell["data"]
    assert cell["higher_is_better"] is True
    assert grid(model, tmp_path, tasks=tasks, limit=6)[0]["errors"] == cell["errors"]
    assert grid(model, tmp_path, tasks=tasks, limit=6, retry=True)[0]["errors"] == 0


def test_a_corrupt_cell_is_kept_aside_and_run_again(model, tmp_path, capsys):
    cells = grid(model, tmp_path)
    path = results.cell_path(tmp_path, model, "none", "mllm_text")
    for number in (1, 2):
        path.write_text("{ half a file")
        again = grid(model, tmp_path)
        assert (path.with_suffix(f".corrupt-{number}")).read_text() == "{ half a file"
        assert f"kept as {path.stem}.corrupt-{number}" in capsys.readouterr().err
    assert again[0]["score"] == cells[0]["score"]


def test_an_errors_message_has_a_line_of_its_own(model, tmp_path, capsys, monkeypatch):
    def fails(*_):
        raise ConfigError("it does not work")

    monkeypatch.setattr(runner, "_run_cell", fails)
    with pytest.raises(ConfigError, match="it does not work"):
        grid(model, tmp_path / "out", tasks=("mllm_vqa",))
    assert re.split(r"[\r\n]", capsys.readouterr().err)[-1].strip() == ""  # no bar is left open


def test_failed_samples_are_counted_and_left_out(model, tmp_path, monkeypatch):
    from mllm.eval import lmms_model

    seen = []

    def broken(image):
        seen.append(image)
        if len(seen) == 2:
            raise InputError("picture 2 is damaged")
        return image

    monkeypatch.setattr(lmms_model, "open_image", broken)
    (cell,) = grid(model, tmp_path, tasks=("mllm_reading",), batch_size=1)
    assert (cell["n"], cell["errors"]) == (3, 1)
    assert cell["error_reasons"] == ["InputError: picture 2 is damaged"]
    samples = json.loads(results.cell_path(tmp_path, model, "none", "mllm_reading").read_text())["samples"]
    assert [sample["score"] is None for sample in samples].count(True) == 1
    scores = [sample["score"] for sample in samples if sample["score"] is not None]
    assert cell["score"] == sum(scores) / 3


def test_backends_and_formats_are_not_mixed(model, tmp_path):
    grid(model, tmp_path)
    with pytest.raises(EvalError, match=r"backend='sdpa'.*this run uses 'eager'.*another --out"):
        grid(model, tmp_path, attn="eager")
    with pytest.raises(EvalError, match=r"dtype='float32'.*uses 'bfloat16'"):
        grid(model, tmp_path, dtype="bfloat16")
    assert grid(model, tmp_path, attn="eager", fresh=True)[0]["backend"] == "eager"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tasks": ("mllm_smell",)}, EvalError, "Unknown task mllm_smell. Offline tasks: mllm_caption, "),
        ({"tasks": ()}, EvalError, "0 tasks"),
        ({"limit": 0}, EvalError, "limit=0"),
        ({"limit": {"mllm_text": 0}}, EvalError, "limit=0"),
        ({"limit": {"mllm_vqa": 3}}, EvalError, "limit is given for mllm_vqa, but the tasks are: mllm_text"),
        ({"configs": (PLAIN, PLAIN)}, EvalError, "Several configs are named none"),
        ({"configs": ("nowhere.yaml",)}, ConfigError, "nowhere.yaml cannot be read"),
        ({"attn": "magic"}, ConfigError, "attn='magic' is not one of: sdpa, eager"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(tmp_path, monkeypatch, options, error, message):
    monkeypatch.setattr(runner, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(error, match=message):
        grid("default", tmp_path, **options)


@pytest.mark.parametrize(
    ("config", "options", "error", "message"),
    [
        ("techniques: [{technique: DyVTE, exit_layer: 99}]", {}, ConfigError, "exit_layer=99, but this model has 6"),
        ("techniques: [{technique: naavit}, {technique: EEMLLM}]", {}, ConflictError, "both decide what visual rows"),
        (
            "techniques: [{technique: DyVTE, weights: default/gates}]",
            {},
            LoadError,
            "default/gates was saved for anoth",
        ),
        ("techniques: [{technique: mma}]", {"attn": "flex_attention"}, UnsupportedModelError, "Mod.* is not exact"),
    ],
)
def test_a_config_that_fits_no_model_ends_the_run_before_it_begins(
    tmp_path, monkeypatch, config, options, error, message
):
    monkeypatch.setattr(runner, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "mine.yaml").write_text(config)
    with pytest.raises(error, match=rf"mine\.yaml does not fit the model tiny: .*{message}"):
        grid("tiny", tmp_path / "out", (PLAIN, tmp_path / "mine.yaml"), **options)
    with pytest.raises(error, match="The config mine does not fit the model tiny: "):
        grid("tiny", tmp_path / "out", (load_config(PLAIN), load_config(tmp_path / "mine.yaml")), **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("")
    with pytest.raises(EvalError, match=r"cannot be written: .*file is a file\. Give another --out") as caught:
        grid("default", tmp_path / "file" / "out")
    assert "free some space" not in str(caught.value)


def test_a_full_disk_loses_nothing(model, tmp_path, monkeypatch):
    grid(model, tmp_path)
    path = results.cell_path(tmp_path, model, "none", "mllm_text")
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EvalError, match=r"the disk is full\. Finished results are kept; free some space"):
        grid(model, tmp_path, limit=2)
    with pytest.raises(EvalError, match="the disk is full"):
        results.write_json(path, {"half": "a cell"})
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


# --- whole processes --------------------------------------------------------------------------------------------------


def process(*command: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, env=environment, timeout=300
    )


def test_two_processes_score_like_one(model, tmp_path):
    """Five samples do not divide by two: one process repeats a sample, which must not count twice."""
    alone = grid(model, tmp_path / "one", (EXIT,), ("mllm_reading", "mllm_caption"), limit=5, batch_size=1)
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        2,
        "--cpu",
        "--mixed_precision",
        "no",
    ]
    launch += ["--num_machines", 1, "--dynamo_backend", "no", "--main_process_port", 0, "-m", "mllm.cli", "eval"]
    options = ["--limit", 5, "--dtype", "float32", "--device", "cpu", "--out", tmp_path / "two"]
    tasks = ["--tasks", "mllm_reading,mllm_caption"]
    result = process(*launch, "--model", model, "--configs", EXIT, *tasks, *options)
    assert result.returncode == 0, result.stderr[-3000:]
    together = json.loads((tmp_path / "two" / "results.json").read_text())
    for field in ("task", "n", "score", "ci95", "errors", "flops", "dense_flops", "kv_bytes"):
        assert [cell[field] for cell in together] == [cell[field] for cell in alone], field
    for cell in alone:
        one, two = (
            json.loads(results.cell_path(tmp_path / n, model, "exit_half", cell["task"]).read_text())["samples"]
            for n in ("one", "two")
        )
        assert one == two
    assert (tmp_path / "two" / "report.md").exists()


def test_stock_lmms_eval_runs_our_model_and_tasks(model, tmp_path):
    arguments = f"pretrained={model},config={EXIT},dtype=float32,device=cpu"
    result = process(
        *[sys.executable, "-m", "lmms_eval", "--model", "mllm", "--model_args", arguments],
        *["--tasks", "mllm_reading", "--include_path", task_folder(), "--limit", 3, "--batch_size", 2],
        *["--output_path", tmp_path],
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "mllm_reading" in result.stdout
    files = list(tmp_path.rglob("*results.json"))
    assert files, result.stderr[-2000:]
    assert "accuracy,none" in json.loads(files[0].read_text())["results"]["mllm_reading"]


# --- statistics -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_contains_the_share(case):
    right, total = case
    low, high = stats.wilson(right, total)
    assert 0 <= low <= right / total + 1e-12
    assert right / total - 1e-12 <= high <= 1


def test_wilson_known_values():
    assert stats.wilson(0, 12)[0] == 0.0
    assert stats.wilson(12, 12)[1] == 1.0
    low, high = stats.wilson(81, 100)
    assert (round(low, 4), round(high, 4)) == (0.7222, 0.8749)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30))
def test_bootstrap_lies_within_the_values_and_repeats(values):
    low, high = stats.bootstrap(values, rounds=200)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert (low, high) == stats.bootstrap(values, rounds=200)


def test_bootstrap_covers_a_normal_mean():
    values = [0.5 + 0.1 * math.sin(n * 12.9898) for n in range(400)]
    low, high = stats.interval(values)
    assert low < 0.5 < high
    assert high - low < 0.03
