"""Result files: one JSON file a cell (model x config x task), written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mllm.errors import EvalError

#: what must be the same for two cells to stand in one report
SHARED = ("backend", "dtype", "device")


def write_json(path: Path, data: Any) -> None:
    """Write atomically: a reader, or a kill, sees the old file or the new one.

    Raises:
        EvalError: the disk is full or the folder cannot be written; nothing that was there is lost.
    """
    scratch = path.with_suffix(f".tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # no such folder, or one that lets nothing be changed
            scratch.unlink(missing_ok=True)
        raise EvalError(f"{path.parent} cannot be written: {_reason(error, path.parent)}") from error


def _reason(error: OSError, folder: Path) -> str:
    """Why nothing can be written into a folder, and what to do."""
    if error.errno == errno.ENOSPC:
        return "the disk is full. Finished results are kept; free some space or give another --out."
    files = [place for place in (folder, *folder.parents) if place.exists() and not place.is_dir()]
    return f"{f'{files[0]} is a file' if files else error.strerror or error}. Give another --out, a folder."


def check_writable(folder: Path) -> None:
    """Find out before the work, not after it, that results could not be stored."""
    probe = folder / f".probe-{os.getpid()}"
    write_json(probe, {})
    probe.unlink()


def cell_path(folder: Path, model: str, config: str, task: str) -> Path:
    """File of one cell."""
    safe = ["".join(c if c.isalnum() or c in "-_." else "-" for c in part) for part in (model, config, task)]
    return folder / "cells" / f"{'__'.join(safe)}.json"


def read_cell(path: Path) -> dict[str, Any] | None:
    """A finished cell; None where there is none. A file that cannot be read is kept aside, and said so."""
    if not path.exists():
        return None
    try:
        cell = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(cell, dict) or "key" not in cell or "score" not in cell:
            raise ValueError("it is not a result cell")
        return cell
    except ValueError as error:  # JSON and Unicode errors are ValueErrors
        number = 1
        while (aside := path.with_suffix(f".corrupt-{number}")).exists():
            number += 1
        os.replace(path, aside)
        print(f"mllm: {path.name} is damaged ({error}); kept as {aside.name}, the cell runs again.", file=sys.stderr)
        return None


def check_shared(cells: list[dict[str, Any]], wanted: dict[str, Any], folder: Path) -> None:
    """Refuse to mix backends, number formats or devices in one report: their times and scores do not compare."""
    for cell in cells:
        for name in SHARED:
            if cell[name] != wanted[name]:
                raise EvalError(
                    f"{folder} holds results with {name}={cell[name]!r} ({cell['config']}, {cell['task']}); this run "
                    f"uses {wanted[name]!r}. Give another --out, or --fresh to start over."
                )


def environment() -> dict[str, Any]:
    """Versions and machine, as they belong beside a measurement."""
    packages = {}
    for name in ("torch", "transformers", "lmms_eval", "accelerate", "datasets", "mllm-efficiency"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": _commit(),
        **packages,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() or None
