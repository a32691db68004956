"""Techniques as small folders: ``technique_config.json``, and ``technique.safetensors`` where something was learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from mllm.errors import LoadError
from mllm.families import find_parts
from mllm.technique import Stack, get_technique

CONFIG_NAME = "technique_config.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What a technique's base model is told by: its family and the shape of its decoder."""
    parts = find_parts(model)
    config = parts.text_config
    return {
        "model_type": parts.family.model_type,
        "text_model_type": config.model_type,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_attention_heads,
        "vocabulary": config.vocab_size,
    }


def save_techniques(stack: Stack, folder: str | Path, model: nn.Module) -> None:
    """Write ``stack`` with the fingerprint of the model it belongs to."""
    from mllm import __version__

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = {"mllm_version": __version__, "base_model": fingerprint(model), "techniques": stack.describe()}
    (folder / CONFIG_NAME).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def load_techniques(folder: str | Path, model: nn.Module) -> Stack:
    """Read a folder that ``Handle.save_pretrained`` wrote, for a model like the one it was saved from.

    Raises:
        LoadError: no such folder, a broken or pickled file in it, or a model of another shape.
        ConfigError: it names a technique or an argument that this version does not know.
    """
    folder = Path(folder)
    path = folder / CONFIG_NAME
    if not path.exists():
        pickled = [p.name for p in sorted(folder.glob("*")) if p.suffix in _PICKLES]
        why = f"it holds {pickled[0]}, a pickle, which is refused" if pickled else "no such file"
        raise LoadError(f"{folder} is not a technique folder ({CONFIG_NAME}: {why}). Save one with save_pretrained.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        entries, saved = data["techniques"], data["base_model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{path} cannot be read: {error!r}. Save the technique again.") from error
    found = fingerprint(model)
    if different := {key: value for key, value in saved.items() if found.get(key) != value}:
        asked = ", ".join(f"{key} {value}" for key, value in different.items())
        here = ", ".join(f"{key} {found.get(key)}" for key in different)
        raise LoadError(
            f"{folder} was saved for another model: it asks for {asked}; this model has {here}. "
            "Load the model that it was saved from."
        )
    return Stack(*(get_technique(entry.pop("technique"))(**entry) for entry in entries))
