"""Offline lmms-eval tasks: data, YAML and scoring. ``task_folder()`` is what ``--include_path`` takes."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from mllm.errors import EvalError


def task_folder() -> Path:
    """Folder with the task YAML files, for ``lmms-eval --include_path``."""
    return Path(__file__).parent


def task_include_path() -> str:
    """The same as text, after the data of every task was checked.

    Raises:
        EvalError: a data file is missing or is not the one that belongs to this version.
    """
    verify_data()
    return str(task_folder())


@cache
def manifest() -> dict[str, dict[str, Any]]:
    """What ``data.json`` says of each task: ``sha256``, ``n``, ``kinds``, ``constant_reply`` and ``chance`` (0 to 1).

    Raises:
        EvalError: the file is missing or damaged.
    """
    path = task_folder() / "data" / "data.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvalError(f"{path.name} cannot be read: {error}. {_REPAIR}") from error


_REPAIR = "Install mllm-efficiency again, or build the data with scripts/build_eval_data.py."


def verify_data(task: str | None = None) -> None:
    """Compare the data of one task, or of all, with the checksums: scores on other data could not be compared.

    Raises:
        EvalError: a data file is missing or has another SHA-256; the message names both sums.
    """
    if task is not None and task not in manifest():
        raise EvalError(f"There is no offline task {task!r}. Tasks: {', '.join(manifest())}.")
    for name in [task] if task else manifest():
        path = task_folder() / "data" / f"{name}.parquet"
        try:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise EvalError(f"The data of {name} cannot be read: {error}. {_REPAIR}") from error
        expected = manifest()[name]["sha256"]
        if found != expected:
            raise EvalError(
                f"{path.name} has the SHA-256 {found}, expected {expected}: the data of {name} was changed or damaged. "
                f"{_REPAIR}"
            )
