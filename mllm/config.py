"""YAML configs that switch techniques on: one schema for evaluation, demo and training.

.. code-block:: yaml

    name: naavit_then_exit        # optional, the file's name otherwise
    techniques:                   # in order; an empty list is the plain model
      - technique: NAAViT
        layers: "0:8"
      - technique: DyVTE
        exit_layer: 0.5
        enabled: false            # optional: kept in the file, not used
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mllm.errors import ConfigError
from mllm.saving import CONFIG_NAME
from mllm.technique import Stack, get_technique

_KEYS = ("name", "techniques")


@dataclass(frozen=True)
class Config:
    """A named stack of techniques.

    Attributes:
        name: short name, used in result files and tables.
        stack: the techniques that are switched on, in order.
        digest: hash of what the config does; the same for two files that mean the same.
    """

    name: str
    stack: Stack

    @property
    def digest(self) -> str:
        return hashlib.sha256(
            json.dumps([t.identity() for t in self.stack.techniques], sort_keys=True).encode()
        ).hexdigest()[:16]


def load_config(path: str | Path) -> Config:
    """Read and check a config file.

    Raises:
        ConfigError: the file cannot be read, or a key, a type or a value is wrong; the message names file, key, value
            and what is allowed.
    """
    path = Path(path)
    if path.is_dir():
        if (path / CONFIG_NAME).exists():
            raise ConfigError(
                f"{path} is a technique folder, not a config file. Write `weights: {path}` under its technique in a "
                "config file."
            )
        raise ConfigError(f"{path} is a folder. Give its config files, such as {path}/*.yaml.")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    return parse_config(data, str(path), default_name=path.stem)


def parse_config(data: Any, where: str, default_name: str = "config") -> Config:
    """Check config data that has been read already; ``where`` names its origin in errors."""
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: a config is a mapping with the keys {', '.join(_KEYS)}, not {data!r}.")
    for key in data:
        if key not in _KEYS:
            raise ConfigError(f"{where}: unknown key {key!r} = {data[key]!r}. Allowed keys: {', '.join(_KEYS)}.")
    name = data.get("name", default_name)
    if not isinstance(name, str) or not name or not all(c.isalnum() or c in "_-." for c in name):
        raise ConfigError(f"{where}: name = {name!r} must be made of letters, digits, '_', '-' and '.'.")
    if "techniques" not in data:
        raise ConfigError(f"{where}: the key 'techniques' is missing. Give a list; [] is the plain model.")
    entries = data["techniques"]
    if not isinstance(entries, list):
        raise ConfigError(f"{where}: techniques = {entries!r} must be a list of mappings with the key 'technique'.")
    techniques = [_parse_technique(entry, f"{where}: techniques[{number}]") for number, entry in enumerate(entries)]
    return Config(name, Stack(*(technique for technique in techniques if technique is not None)))


def _parse_technique(entry: Any, where: str) -> Any:
    if not isinstance(entry, dict) or not isinstance(entry.get("technique"), str):
        raise ConfigError(f"{where}: {entry!r} must be a mapping with the key 'technique', a name such as NAAViT.")
    arguments = {key: value for key, value in entry.items() if key not in ("technique", "enabled")}
    enabled = entry.get("enabled", True)
    if not isinstance(enabled, bool):
        raise ConfigError(f"{where}: enabled = {enabled!r} must be true or false.")
    if bad := [key for key in arguments if not isinstance(key, str)]:
        raise ConfigError(f"{where}: keys must be names, not {bad[0]!r}.")
    try:
        technique = get_technique(entry["technique"])(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return technique if enabled else None


def save_config(config: Config, path: str | Path) -> None:
    """Write a config that :func:`load_config` reads back."""
    data = {"name": config.name, "techniques": config.stack.describe()}
    Path(path).write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
