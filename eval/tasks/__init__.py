"""Offline lmms-eval tasks: data, YAML and scoring. ``task_folder()`` is what ``--include_path`` takes."""

from __future__ import annotations

from pathlib import Path


def task_folder() -> Path:
    """Folder with the task YAML files, for ``lmms-eval --include_path``."""
    return Path(__file__).parent
