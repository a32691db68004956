"""Models x configs x tasks through lmms-eval, one resumable result file a cell."""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import json
import os
import re
import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from mllm.config import Config, load_config
from mllm.cost import ModelSpec
from mllm.errors import EvalError, MllmError, UnsupportedModelError
from mllm.eval import results
from mllm.eval.stats import interval
from mllm.eval.tasks import manifest, task_folder
from mllm.inputs import chat_inputs
from mllm.loading import check_attention, load, model_config, pick_device, pick_dtype
from mllm.saving import check_base, config_fingerprint, locate
from mllm.timing import PeakMemory, percentile


def run_grid(
    models: Sequence[str] | Mapping[str, str | Path],
    configs: Sequence[str | Path | Config],
    tasks: Sequence[str],
    out_dir: str | Path,
    limit: int | Mapping[str, int] | None = None,
    batch_size: int = 1,
    attn: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    include_path: str | Path | None = None,
    fresh: bool = False,
    retry: bool = False,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Evaluate every model under every config on every task; finished cells of an earlier run are reused.

    Under ``accelerate launch`` the samples are shared out between processes; the first one writes.

    Args:
        models: names for :func:`mllm.load`; or a mapping to them from the names that the results shall have.
        configs: config files, or configs in memory.
        tasks: lmms-eval task names, ours or built-in ones.
        out_dir: gets ``cells/*.json`` and ``results.json``.
        limit: samples per task, or of each task by its name; all without.
        batch_size, attn, dtype, device: as for :class:`mllm.eval.lmms_model.MllmLmms`.
        include_path: a folder with further tasks.
        fresh: run finished cells again.
        retry: run finished cells again in which samples failed.
        progress: show bars on stderr.

    Returns:
        The cells, as in ``results.json``; an empty list in processes other than the first.

    Raises:
        EvalError: an unknown task, a folder that cannot be written or holds results of another backend.
        ConfigError, ConflictError, LoadError, UnsupportedModelError: a config, or a technique's weights, that do not
            fit one of the models: told before the first cell, as far as the models' configs show it.
    """
    if not models or not configs or not tasks:
        raise EvalError(
            f"{len(models)} models, {len(configs)} configs, {len(tasks)} tasks: at least one of each is needed."
        )
    limits = dict(limit) if isinstance(limit, Mapping) else dict.fromkeys(tasks, limit)
    if unknown := [task for task in limits if task not in tasks]:
        raise EvalError(f"limit is given for {', '.join(unknown)}, but the tasks are: {', '.join(tasks)}.")
    for number in limits.values():
        if number is not None and number < 1:
            raise EvalError(f"limit={number}: at least one sample per task is needed. Leave it out for all.")
    out = Path(out_dir)
    sources = dict(models) if isinstance(models, Mapping) else {name: name for name in models}
    loaded_configs = [config if isinstance(config, Config) else load_config(config) for config in configs]
    origins = {
        loaded.name: f"The config {loaded.name}" if isinstance(config, Config) else str(config)
        for loaded, config in zip(loaded_configs, configs, strict=True)
    }
    loaded_configs.sort(key=lambda config: bool(config.stack.describe()))  # the plain model first
    names = [config.name for config in loaded_configs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise EvalError(f"Several configs are named {', '.join(sorted(twice))}. Give each its own name.")
    check_attention(attn)
    target = pick_device(device)
    for name, source in sources.items():
        _check_fit(name, source, loaded_configs, origins, attn or "sdpa")
    identities = {source: source_digest(str(source)) for source in sources.values()}
    data = {task: _task_digest(task, include_path) for task in tasks}
    first = int(os.environ.get("RANK", 0)) == 0
    shared = {
        "backend": attn or "sdpa",
        "dtype": str(pick_dtype(dtype, target)).removeprefix("torch."),
        "device": target.type,
    }
    if first:
        results.check_writable(out / "cells")
        if fresh:
            shutil.rmtree(out / "cells")
        found = [results.read_cell(path) for path in sorted((out / "cells").glob("*.json"))]
        results.check_shared([cell for cell in found if cell is not None], shared, out)
    with _quiet():
        manager = _task_manager(tasks, include_path)
    cells = []
    total = len(sources) * len(loaded_configs) * len(tasks)
    # a bar that is closed leaves its line to an error's message
    with tqdm(total=total, desc="cells", disable=not (first and progress), file=sys.stderr) as bar:
        for name, source in sources.items():
            model = None  # loaded when the first cell needs it
            # configs of a task follow each other, so that their times are taken under the same conditions
            for task in tasks:
                for config in loaded_configs:
                    samples = limits.get(task)
                    belongs = {"weights": identities[source], "data": data[task]}
                    parts = [str(source), config.digest, task, samples, batch_size, shared, belongs]
                    key = _digest(json.dumps(parts, sort_keys=True).encode())
                    path = results.cell_path(out, name, config.name, task)
                    bar.set_postfix_str(f"{config.name}, {task}")
                    cell = _agree(results.read_cell(path) if first else None)
                    if cell is None or cell["key"] != key or (retry and cell["errors"]):
                        if model is None:
                            model = load(source, attn=attn, dtype=dtype, device=_local(device))
                            _warm_up(*model)
                        cell = _run_cell(model, name, config, task, samples, batch_size, shared, manager, progress)
                        if first:
                            cell |= {**belongs, "key": key}
                            results.write_json(path, cell)
                    cells.append(cell)
                    bar.update()
    if not first:
        return []
    summary = [{name: value for name, value in cell.items() if name not in ("samples", "key")} for cell in cells]
    results.write_json(out / "results.json", summary)
    return summary


def _check_fit(
    name: str, source: str | Path, configs: Sequence[Config], origins: Mapping[str, str], attention: str
) -> None:
    """Refuse a config that cannot be attached to a model, as far as the model's own config tells, by where it is from.

    The weights are not needed: one misfit would end a long run in the middle otherwise.
    """
    found = model_config(source)
    if found is None:
        return
    spec, base = ModelSpec.from_config(found.get_text_config(decoder=True)), config_fingerprint(found)
    for config in configs:
        try:
            for technique in config.stack.techniques:
                if (learned := getattr(technique, "learned", None)) is not None:
                    check_base(learned.base_model, base, learned.source)
            config.stack.check(spec)
            for technique in config.stack.active(spec):
                if attention not in technique.backends:
                    raise UnsupportedModelError(
                        f"{technique!r} is not exact with attn={attention!r}. Use {' or '.join(technique.backends)}."
                    )
        except MllmError as error:
            raise type(error)(f"{origins[config.name]} does not fit the model {name}: {error}") from error


def _digest(*contents: bytes) -> str:
    return hashlib.sha256(b"\0".join(contents)).hexdigest()[:16]


def source_digest(source: str) -> str | None:
    """What a model is made of: a folder that is trained again in place holds another one under the same name.

    Weights count by size and time, small files by content, a LoRA with what it was trained on. None of a hub name.
    """
    if source == "default":
        from mllm.default_model import weights_digest

        return weights_digest()
    folder = locate(source)
    if not folder.is_dir():
        return None
    parts = []
    for file in sorted(file for file in folder.iterdir() if file.is_file()):
        if file.suffix in (".safetensors", ".bin"):
            parts.append(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
        elif file.suffix in (".json", ".jinja", ".txt", ".model"):
            parts += [file.name.encode(), file.read_bytes()]
    adapter = folder / "adapter_config.json"
    if adapter.exists():
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        parts.append(str(base and source_digest(base)).encode())
    return _digest(*parts)


def _task_digest(task: str, include_path: str | Path | None) -> str:
    """What a task asks and how it is scored: lmms-eval's version, the files of ours, those of the user's folder."""
    ours, files = task_folder(), []
    if (yaml := ours / f"{task}.yaml").exists():
        files = [yaml, ours / "_offline", *sorted(ours.glob("*.py"))]
        files += [ours / name for name in re.findall(r"data/\S+\.parquet", yaml.read_text(encoding="utf-8"))]
    if include_path:
        files += sorted(file for file in Path(include_path).rglob("*") if file.is_file() and file.suffix != ".pyc")
    parts = (part for file in files for part in (file.name.encode(), file.read_bytes()))
    return _digest(version("lmms_eval").encode(), *parts)


def _local(device: str) -> str:
    """This process's GPU, where several processes share the work."""
    if device in ("auto", "cuda") and torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return device


def _warm_up(model: Any, processor: Any) -> None:
    """Answer once before anything is timed: first calls choose kernels and fill caches."""
    inputs = chat_inputs(processor, ["What is it?"], [[Image.new("RGB", (224, 224))]])
    model.generate(**inputs.to(model.device, model.dtype), max_new_tokens=2, do_sample=False)


def _agree(cell: dict[str, Any] | None) -> dict[str, Any] | None:
    """The first process's finding, in all processes."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return cell
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState(cpu=not torch.cuda.is_available())
    return broadcast_object_list([cell])[0]


def _task_manager(tasks: Sequence[str], include_path: str | Path | None) -> Any:
    """Index of our tasks, and of lmms-eval's own only where one of them is asked for: that takes long."""
    from lmms_eval.tasks import TaskManager

    folders = [str(task_folder()), *([str(include_path)] if include_path else [])]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if all(task in manager.all_tasks for task in tasks):
        return manager
    ours = manager.all_tasks
    manager = TaskManager(include_path=folders, include_defaults=True)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise EvalError(
            f"Unknown task {', '.join(unknown)}. Offline tasks: {', '.join(sorted(ours))}; besides, the "
            f"{len(manager.all_tasks) - len(ours)} of lmms-eval (`lmms-eval --tasks list`), which need their data."
        )
    return manager


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lmms-eval's log lines and the bars of its inner loops would bury our progress: warnings only."""
    import datasets
    import lmms_eval.api.task
    import lmms_eval.evaluator
    from loguru import logger

    logger.remove()
    handler = logger.add(sys.stderr, level="WARNING")
    datasets.disable_progress_bars()
    bars = [(module, module.tqdm) for module in (lmms_eval.api.task, lmms_eval.evaluator)]
    for module, original in bars:
        module.tqdm = functools.partial(_hidden_bar, original)
    try:
        yield
    finally:
        for module, original in bars:
            module.tqdm = original
        logger.remove(handler)
        datasets.enable_progress_bars()


def _hidden_bar(bar: Any, *arguments: Any, **options: Any) -> Any:
    """A progress bar that shows nothing, whatever its caller asks for."""
    return bar(*arguments, **{**options, "disable": True})


def _run_cell(
    model: tuple[Any, Any],
    name: str,
    config: Config,
    task: str,
    limit: int | None,
    batch_size: int,
    shared: dict[str, str],
    manager: Any,
    progress: bool,
) -> dict[str, Any]:
    """Evaluate one cell; complete in the first process only."""
    from lmms_eval.evaluator import simple_evaluate

    from mllm.eval.lmms_model import MllmLmms

    lm = MllmLmms(loaded=model, stack=config.stack, batch_size=batch_size, on_error="record", progress=progress)
    memory = PeakMemory(lm.device)
    started = datetime.datetime.now(datetime.timezone.utc)
    memory.reset()
    with _quiet():
        output = simple_evaluate(
            model=lm,
            tasks=[task],
            task_manager=manager,
            limit=limit,
            batch_size=batch_size,
            bootstrap_iters=0,
            log_samples=True,
            process_docs_parallel=1,
        )
    records = {f"{doc_id}": asdict(record) for (_, doc_id), record in lm.records.items()}
    everywhere = _gather((records, memory.read()))
    if output is None:
        return {}
    records = {doc: record for part, _ in everywhere for doc, record in part.items()}
    peaks = [peak for _, peak in everywhere]
    metric, samples, score, spread = _score(output, task, records)
    answered = [record for record in records.values() if record["error"] is None]
    times = [record["ttft_ms"] for record in answered if record["ttft_ms"] is not None]
    further = sum(max(record["new_tokens"] - 1, 0) for record in answered)
    seconds = sum(record["decode_s"] for record in answered)
    reasons = [record["error"] for record in records.values() if record["error"] is not None]
    return {
        "model": name,
        "config": config.name,
        "task": task,
        "metric": metric,
        "n": len(samples) - len(reasons),
        "score": score,
        "ci95": spread,
        "errors": len(reasons),
        "error_reasons": sorted(set(reasons))[:5],
        "techniques": config.stack.describe(),
        **{field: _mean(answered, field) for field in ("flops", "dense_flops", "kv_bytes", "dense_kv_bytes")},
        "ttft_ms_median": statistics.median(times) if times else None,
        "ttft_ms_p90": percentile(times, 0.9) if times else None,
        "tokens_per_s": further / seconds if further and seconds else None,
        "peak_bytes": None if None in peaks else max(peaks),
        "env": results.environment(),
        **shared,
        "batch_size": batch_size,
        "limit": limit,
        "config_digest": config.digest,
        "higher_is_better": output["configs"][task]["metric_list"][0].get("higher_is_better", True) is not False,
        "constant_reply": manifest().get(task, {}).get("constant_reply"),
        "started": started.isoformat(timespec="seconds"),
        "seconds": round((datetime.datetime.now(datetime.timezone.utc) - started).total_seconds(), 1),
        "samples": samples,
    }


def _score(
    output: dict[str, Any], task: str, records: dict[str, dict[str, Any]]
) -> tuple[str, list[dict[str, Any]], float | None, list[float] | None]:
    """Metric, per-sample rows, score and 95 % interval over the samples that were answered."""
    settings = output["configs"][task]["metric_list"][0]
    metric, aggregate = settings["metric"], settings["aggregation"]
    samples, values = [], []
    for sample in sorted(output["samples"][task], key=lambda sample: sample["doc_id"]):
        record = records[str(sample["doc_id"])]
        value = sample.get(metric)
        samples.append(
            {
                "id": sample["doc_id"],
                "target": str(sample["target"]),
                "answer": record["text"],
                "score": value if record["error"] is None and isinstance(value, (int, float)) else None,
                "error": record["error"],
                **({"decisions": record["decisions"]} if record["decisions"] else {}),
                "flops": record["flops"],
            }
        )
        if record["error"] is None:
            values.append(value)
    if not values:
        return metric, samples, None, None
    if all(isinstance(value, (int, float)) for value in values):
        numbers = [float(value) for value in values]
        mean = sum(numbers) / len(numbers)
        score = float(aggregate(values)) if callable(aggregate) else mean
        # an interval of the mean says something about the score only where the score is the mean
        return metric, samples, score, list(interval(numbers)) if abs(score - mean) < 1e-9 else None
    return metric, samples, float(aggregate(values)) if callable(aggregate) else None, None


def _gather(value: Any) -> list[Any]:
    """One value from each process."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])


def _mean(records: list[dict[str, Any]], field: str) -> float | None:
    return sum(record[field] for record in records) / len(records) if records else None
