"""The real benchmarks on released checkpoints: the commands, ready to run where there are a network and a GPU.

    python scripts/real_benchmarks.py                                             # print them all
    python scripts/real_benchmarks.py --models llava-1.5-7b --tasks pope,gqa      # some of them
    python scripts/real_benchmarks.py --check                                     # what can be checked without either
    python scripts/real_benchmarks.py --models llava-1.5-7b --tasks pope --limit 100 | sh

Each line is one ``mllm eval`` of a model on its tasks, the plain model first, and can be stopped and repeated.
``--check`` finds every task in lmms-eval, reads every config, and answers one offline question per family and config on
random weights. No line has been run here: there is no hub and no GPU on the machine that this was written on.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: benchmark -> task of lmms-eval
TASKS = {
    "mme": "mme",
    "pope": "pope",
    "gqa": "gqa",
    "textvqa": "textvqa_val",
    "scienceqa": "scienceqa_img",
    "mmbench": "mmbench_en_dev",
    "seed": "seedbench",
    "vqav2": "vqav2_val",
    "coco": "coco2017_cap_val",
    "docvqa": "docvqa_val",
    "slidevqa": "slidevqa_val",
    "mmlongbench-doc": "mmlongbench_doc",
}
DOCUMENTS = ("docvqa", "slidevqa", "mmlongbench-doc")
PICTURES = tuple(name for name in TASKS if name not in DOCUMENTS)


@dataclass(frozen=True)
class Checkpoint:
    """A released model.

    Attributes:
        hub: its name on the hub.
        family: of the tiny random model that stands in for it in ``--check``.
        tasks: benchmarks that it is usually measured on.
    """

    hub: str
    family: str
    tasks: tuple[str, ...] = PICTURES


MODELS = {
    "llava-1.5-7b": Checkpoint("llava-hf/llava-1.5-7b-hf", "llava"),
    "llava-1.5-13b": Checkpoint("llava-hf/llava-1.5-13b-hf", "llava"),
    "llava-next-7b": Checkpoint("llava-hf/llava-v1.6-vicuna-7b-hf", "llava_next"),
    "llava-onevision-7b": Checkpoint("llava-hf/llava-onevision-qwen2-7b-ov-hf", "llava_onevision", tuple(TASKS)),
    "qwen2.5-vl-7b": Checkpoint("Qwen/Qwen2.5-VL-7B-Instruct", "qwen2_5_vl", tuple(TASKS)),
}


def command(name: str, tasks: list[str], configs: list[str], limit: int | None, batch_size: int) -> str:
    """The line that measures one model."""
    words = ["mllm", "eval", "--model", MODELS[name].hub, "--configs", *configs]
    words += ["--tasks", ",".join(TASKS[task] for task in tasks), "--batch-size", str(batch_size)]
    words += ["--limit", str(limit)] if limit else []
    return shlex.join([*words, "--out", f"runs/benchmarks/{name}"])


def default_configs() -> list[str]:
    """The configs beside this script, wherever it is started from; relative where they lie below."""
    here = Path.cwd()
    found = sorted((ROOT / "configs").glob("*.yaml"))
    return [str(path.relative_to(here) if path.is_relative_to(here) else path) for path in found]


def check(configs: list[str]) -> None:
    """Everything that needs neither a hub nor a GPU; stops at the first thing that is wrong."""
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        from lmms_eval.tasks import TaskManager
        from tiny import save_tiny

        from mllm.errors import MllmError
        from mllm.eval.runner import run_grid
    except ImportError as error:
        raise SystemExit(f"--check needs {error.name}: pip install -e '.[all,dev]' in a checkout, {ROOT}.") from error
    known = set(TaskManager(include_defaults=True).all_tasks)
    if missing := [task for task in TASKS.values() if task not in known]:
        raise SystemExit(f"lmms-eval does not know: {', '.join(missing)}")
    print(f"{len(TASKS)} tasks are known to lmms-eval")
    with tempfile.TemporaryDirectory() as folder:
        for family in sorted({model.family for model in MODELS.values()}):
            model = str(save_tiny(family, Path(folder) / family))
            try:
                cells = run_grid({family: model}, configs, ["mllm_vqa"], Path(folder) / "out", limit=1, dtype="float32")
            except MllmError as error:
                raise SystemExit(f"{family}: {error}") from error
            if errors := [reason for cell in cells for reason in cell["error_reasons"]]:
                raise SystemExit(f"{family}: {errors[0]}")
            print(f"{family}: {len(cells)} configs answered a question on random weights")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="", help=f"with commas, of {', '.join(MODELS)}; all without")
    parser.add_argument("--tasks", default="", help=f"with commas, of {', '.join(TASKS)}; each model's own without")
    parser.add_argument(
        "--configs", nargs="+", default=default_configs(), help="config files; those of configs/ without"
    )
    parser.add_argument("--limit", type=int, help="samples a task; all without")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts in a batch")
    parser.add_argument("--check", action="store_true", help="check what can be checked offline instead")
    arguments = parser.parse_args()
    models = [name for name in arguments.models.split(",") if name] or list(MODELS)
    tasks = [name for name in arguments.tasks.split(",") if name]
    for names, allowed in ((models, MODELS), (tasks, TASKS)):
        if unknown := [name for name in names if name not in allowed]:
            parser.error(f"unknown: {', '.join(unknown)}. Allowed: {', '.join(allowed)}.")
    if arguments.check:
        check(arguments.configs)
        return
    for name in models:
        print(
            command(name, tasks or list(MODELS[name].tasks), arguments.configs, arguments.limit, arguments.batch_size)
        )


if __name__ == "__main__":
    main()
