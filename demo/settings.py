"""Techniques as controls: arguments from their schema, values to a stack, and the YAML that ``mllm eval`` reads."""

from __future__ import annotations

import contextlib
import json
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mllm.config import parse_config
from mllm.cost import ModelSpec
from mllm.errors import ConfigError, MllmError
from mllm.saving import locate
from mllm.technique import Stack, Technique, get_technique, load_all

MAX_CONFIG_BYTES = 64_000
MAX_LAYER = 10_000  # no decoder has as many; a longer range would only fill memory
MAX_PARAMETERS = 500_000_000  # learned by freshly initialised techniques
_EMPTY = "(none)"


@dataclass(frozen=True)
class Argument:
    """One argument of a technique, and how to ask for it.

    Attributes:
        name: as in Python and YAML.
        kind: ``"switch"``, ``"choice"``, ``"whole"``, ``"number"``, ``"folder"`` (trained weights) or ``"text"``: what
            stands in YAML, empty for the default.
        default: its default; None where there is none.
        choices: of a choice.
        low, high: bounds of a number.
        help: what the technique's docstring says.
    """

    name: str
    kind: str
    default: Any
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    help: str = ""

    @property
    def first(self) -> Any:
        """The value before anybody chose one: trained weights where there are any, else the default."""
        return self.choices[1] if self.kind == "folder" and len(self.choices) > 1 else self.default

    def show(self, value: Any) -> Any:
        """A value as the control shows it."""
        if self.kind in ("choice", "folder"):
            return _EMPTY if value is None else str(value)
        if self.kind == "text":
            return "" if value is None else value if isinstance(value, str) else json.dumps(value)
        return value

    def read(self, shown: Any) -> Any:
        """The value that a control shows; the default where it is left empty."""
        if self.kind in ("choice", "folder"):
            return None if shown in (None, _EMPTY) else shown
        if shown is None or (isinstance(shown, str) and not shown.strip()):
            return self.default
        if self.kind == "whole" and isinstance(shown, float) and shown.is_integer():
            return int(shown)
        if self.kind == "text":
            try:
                return json.loads(shown)
            except ValueError:  # "all", "0:8": no quotes needed
                return shown.strip()
        return shown


def arguments(cls: type[Technique], folders: Sequence[str] = ()) -> list[Argument]:
    """The arguments of a technique, read from its pydantic schema and its docstring.

    Args:
        cls: the technique.
        folders: trained weights that may be chosen.
    """
    schema = cls.model_json_schema()
    explained = _explanations(cls)
    found = []
    for name, entry in schema.get("properties", {}).items():
        common = {"name": name, "default": _plain(entry.get("default")), "help": explained.get(name, "")}
        options = [option for option in entry.get("anyOf", [entry]) if option.get("type") != "null"]
        optional = len(options) < len(entry.get("anyOf", [entry]))
        kind = options[0].get("type") if len(options) == 1 else None
        if name == "weights" and cls.trained:
            found.append(Argument(kind="folder", choices=(_EMPTY, *folders), **common))
        elif kind == "string" and ("enum" in options[0] or "const" in options[0]):
            choices = options[0].get("enum") or [options[0]["const"]]
            found.append(Argument(kind="choice", choices=(*([_EMPTY] if optional else []), *choices), **common))
        elif kind == "boolean" and not optional:
            found.append(Argument(kind="switch", **common))
        elif kind in ("integer", "number") and not optional and "default" in entry:
            low, high = options[0].get("minimum"), options[0].get("maximum")
            found.append(Argument(kind="whole" if kind == "integer" else "number", low=low, high=high, **common))
        else:
            found.append(Argument(kind="text", **common))
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _explanations(cls: type[Technique]) -> dict[str, str]:
    """What docstrings say of each argument under ``Args:``, those of base classes where the class repeats nothing."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not issubclass(base, Technique):
            continue
        _, _, rest = textwrap.dedent("    " + (base.__doc__ or "")).partition("Args:\n")
        section = re.split(r"\n\s*\n", rest)[0]
        for match in re.finditer(r"^ {4,8}([\w, ]+): (.+?)(?=^ {4,8}[\w, ]+: |\Z)", section, re.MULTILINE | re.DOTALL):
            text = " ".join(match[2].split()).replace("`", "")
            text = re.sub(r":\w+:|mllm\.\w+\.", "", text)
            for name in match[1].split(","):
                if not (name.strip() in found and text.startswith(("as above", "see "))):
                    found[name.strip()] = text[0].upper() + text[1:]
    return found


def summary(cls: type[Technique]) -> str:
    """The first sentence of a technique's docstring."""
    paragraph = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
    return re.split(r"(?<=\.) ", paragraph)[0].replace("``", "")


class Panel:
    """All techniques with their arguments, in the order of the controls: per technique a switch, then its arguments.

    Args:
        weights: folders with trained techniques that may be chosen, as ``mllm train`` writes them, or names of packaged
            parts; the first one of a technique is what is chosen at first.
    """

    def __init__(self, weights: Iterable[str | Path] = ()) -> None:
        by_name: dict[str, list[str]] = {}
        for folder in weights:
            for name in _names_in(locate(folder)):
                by_name.setdefault(name, []).append(str(folder))
        classes = sorted(
            load_all().values(), key=lambda cls: (cls.__module__.split(".")[1] != "token_pruning", cls.name)
        )
        self.techniques = [(cls, arguments(cls, by_name.get(cls.name, ()))) for cls in classes]
        self.folders = {name: set(folders) for name, folders in by_name.items()}

    def entries(self, values: Sequence[Any]) -> list[dict[str, Any]]:
        """What is switched on, as it stands in YAML; arguments at their default are left out."""
        entries, place = [], 0
        for cls, args in self.techniques:
            on, shown = values[place], values[place + 1 : place + 1 + len(args)]
            place += 1 + len(args)
            if not on:
                continue
            read = {a.name: a.read(value) for a, value in zip(args, shown, strict=True)}
            given = {a.name: read[a.name] for a in args if read[a.name] != a.default}
            entries.append({"technique": cls.name, **given})
        return entries

    def values(self, entries: Iterable[Mapping[str, Any]]) -> list[Any]:
        """What the controls show for entries of a config; the others are off, with trained weights if there are any."""
        given = {entry["technique"]: entry for entry in entries}
        shown: list[Any] = []
        for cls, args in self.techniques:
            entry = given.get(cls.name)
            shown.append(entry is not None and entry.get("enabled", True))
            shown += [a.show(a.first if entry is None else entry.get(a.name, a.default)) for a in args]
        return shown

    def stack(self, entries: Iterable[Mapping[str, Any]], spec: ModelSpec) -> Stack:
        """The techniques, checked against each other and the model.

        Raises:
            ConfigError, ConflictError, LoadError: what does not fit, in words for the person who chose it.
        """
        techniques = []
        entries = [entry for entry in entries if entry.get("enabled", True)]
        for entry in entries:
            self._check_entry(entry)
            given = {key: value for key, value in entry.items() if key not in ("technique", "enabled")}
            techniques.append(get_technique(entry["technique"])(**given))
        stack = Stack(*techniques)
        stack.check(spec)
        try:
            size = stack.parameter_count(spec)
        except (RuntimeError, TypeError) as error:  # more numbers than torch can count
            raise ConfigError("The techniques' learned parts would be too large for any memory.") from error
        if size > MAX_PARAMETERS:
            raise ConfigError(
                f"The techniques' learned parts would have {size:,} parameters; at most {MAX_PARAMETERS:,} are made."
            )
        return stack

    def _check_entry(self, entry: Mapping[str, Any]) -> None:
        """A visitor may not make the server read any folder on its disk, nor fill its memory with a range."""
        for key, value in entry.items():
            if isinstance(value, str) and (len(value) > 2000 or any(int(n[:9]) > MAX_LAYER for n in _digits(value))):
                raise ConfigError(f"{entry['technique']}: {key}: {value[:40]!r}... is out of any range.")
        folder = entry.get("weights")
        if folder is not None and folder not in self.folders.get(entry["technique"], ()):
            raise ConfigError(
                f"{entry['technique']}: the folder {folder!r} is not among those that this server offers. "
                "Start it with `mllm demo --weights FOLDER` to use it."
            )

    def untrained(self, stack: Stack, spec: ModelSpec) -> list[str]:
        """Names of techniques whose learned parts are freshly initialised."""
        names = []
        for technique in stack.active(spec):
            if technique.trained and getattr(technique, "learned", None) is None and technique.build(spec) is not None:
                names.append(technique.name)
        return names

    def read_yaml(self, text: str, where: str = "the config") -> tuple[str, list[dict[str, Any]]]:
        """Name and entries of a config file.

        Raises:
            ConfigError: it is no config, or holds a technique twice, for which there is one set of controls.
        """
        if len(text.encode()) > MAX_CONFIG_BYTES:
            raise ConfigError(f"{where} is larger than {MAX_CONFIG_BYTES // 1000} kB: it is no config of techniques.")
        try:
            # a few aliases can stand for a text of any size
            if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
                raise ConfigError(f"{where} uses YAML aliases (*name), which are not read here. Write them out.")
            data = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            if isinstance(error, MllmError):
                raise
            raise ConfigError(f"{where} is not valid YAML: {error}") from error
        listed = data.get("techniques") if isinstance(data, dict) else None
        for entry in listed if isinstance(listed, list) else []:
            if isinstance(entry, dict) and isinstance(entry.get("technique"), str):
                with contextlib.suppress(ConfigError):  # told below, with its place
                    entry["technique"] = get_technique(entry["technique"]).name  # controls go by it
                self._check_entry(entry)
        config = parse_config(data, where)
        entries = data["techniques"]
        names = [entry["technique"] for entry in entries]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"{where} holds {', '.join(twice)} more than once; here each technique has one place.")
        return config.name, entries


def to_yaml(entries: Sequence[Mapping[str, Any]], name: str = "demo") -> str:
    """A config file for ``mllm eval --configs``."""
    return yaml.safe_dump({"name": name, "techniques": [dict(entry) for entry in entries]}, sort_keys=False)


def label(entries: Sequence[Mapping[str, Any]]) -> str:
    """The settings in one line."""
    parts = []
    for entry in entries:
        given = ", ".join(f"{key}={value}" for key, value in entry.items() if key not in ("technique", "enabled"))
        parts.append(f"{entry['technique']}({given})" if given else entry["technique"])
    return " + ".join(parts) or "full model"


def _digits(text: str) -> list[str]:
    """The numbers of a range such as ``0:8``; a folder's name has none."""
    return re.findall(r"\d+", text) if re.fullmatch(r"[\s\d:]+", text) else []


def _names_in(folder: Path) -> list[str]:
    """Techniques whose trained parts a folder holds.

    Raises:
        ConfigError: it is no folder of trained techniques.
    """
    try:
        saved = json.loads((folder / "technique_config.json").read_text(encoding="utf-8"))
        return [str(entry["technique"]) for entry in saved["techniques"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder} holds no trained technique (technique_config.json). Give folders that `mllm train` wrote."
        ) from error
