"""Techniques as small folders: ``technique_config.json``, and ``technique.safetensors`` where something was learned."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mllm.errors import LoadError
from mllm.families import find_parts
from mllm.technique import Stack, Technique, TrainedTechnique, get_technique

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG_NAME = "technique_config.json"
WEIGHTS_NAME = "technique.safetensors"
#: what comes with this package; its parts go by their place in it, such as "default/gates"
PACKAGED = Path(__file__).parent / "weights"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True, eq=False)
class LearnedWeights:
    """Trained parts of a technique; two are equal if every number is.

    Attributes:
        tensors: by name, on the CPU.
        base_model: :func:`fingerprint` of the model they were trained for; empty where that is not known.
        source: where they came from, for errors.
    """

    tensors: Mapping[str, Tensor]
    base_model: Mapping[str, Any]
    source: str

    @property
    def digest(self) -> str:
        """Hash of names, types, shapes and numbers."""
        digest = hashlib.sha256()
        for name, value in sorted(self.tensors.items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LearnedWeights) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def load_into(self, module: nn.Module, model: nn.Module) -> None:
        """Fill ``module`` for ``model``.

        Raises:
            LoadError: they were trained for another model, or names or shapes do not fit.
        """
        check_base(self.base_model, model, self.source)
        wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        given = {name: tuple(value.shape) for name, value in self.tensors.items()}
        if wanted != given:
            names = sorted(set(wanted) ^ set(given)) or sorted(n for n in wanted if wanted[n] != given[n])
            raise LoadError(
                f"{self.source}: the weights do not fit this model and these arguments at {', '.join(names[:3])}"
                f"{'...' if len(names) > 3 else ''}: given {given.get(names[0], 'nothing')}, needed "
                f"{wanted.get(names[0], 'nothing')}. Use the model and the arguments that they were trained with."
            )
        module.load_state_dict(dict(self.tensors))


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What a technique's base model is told by: its family and the shape of its decoder."""
    return config_fingerprint(find_parts(model).model.config)


def config_fingerprint(config: Any) -> dict[str, Any]:
    """:func:`fingerprint` of the model that a transformers config describes."""
    text = config.get_text_config(decoder=True)
    return {
        "model_type": config.model_type,
        "text_model_type": text.model_type,
        "layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "heads": text.num_attention_heads,
        "vocabulary": text.vocab_size,
    }


def model_digest(model: nn.Module) -> str:
    """Hash of a few numbers of each of the model's parameters: tells a model from the same one trained on."""
    digest = hashlib.sha256()
    for name, value in find_parts(model).model.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.flatten()[:4].float().tolist()}".encode())
    return digest.hexdigest()[:16]


def check_base(saved: Mapping[str, Any], model: nn.Module | Mapping[str, Any], source: str) -> None:
    """Raise LoadError where ``model``, or what has this fingerprint, is not like the one ``saved`` was taken from."""
    found = model if isinstance(model, Mapping) else fingerprint(model)
    if different := {key: value for key, value in saved.items() if found.get(key) != value}:
        asked = ", ".join(f"{key} {value}" for key, value in different.items())
        here = ", ".join(f"{key} {found.get(key)}" for key in different)
        raise LoadError(
            f"{source} was saved for another model: it asks for {asked}; this model has {here}. "
            "Load the model that it was saved from."
        )


_CARD = """---
library_name: mllm-efficiency
---

# {names}

Saved by mllm-efficiency {version} for a `{model_type}` model with {layers} layers of width {hidden_size}
({parameters:,} learned parameters). Papers: {papers}.

```python
from mllm import load, load_techniques

model, processor = load("...")  # the model it was saved for; another one is refused
with load_techniques("...")(model, processor) as run:
    model.generate(**inputs)
print(run.report())
```

```json
{config}
```
"""


def save_techniques(
    stack: Stack, folder: str | Path, model: PreTrainedModel, modules: Sequence[nn.Module | None] = ()
) -> None:
    """Write ``stack`` with the learned parts in ``modules`` and the fingerprint of the model it belongs to."""
    from safetensors.torch import save_file

    from mllm import __version__

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    entries = [
        {key: value for key, value in entry.items() if key != "weights"} for entry in stack.describe()
    ]  # they lie beside the config now
    data = {"mllm_version": __version__, "base_model": fingerprint(model), "techniques": entries}
    tensors = {
        f"{number}.{name}": value.detach().to("cpu").contiguous()
        for number, module in enumerate(modules)
        if module is not None
        for name, value in module.state_dict().items()
    }
    if tensors:
        save_file(tensors, folder / WEIGHTS_NAME)
    text = json.dumps(data, indent=2)
    (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
    card = _CARD.format(
        names=" + ".join(technique.name for technique in stack.techniques),
        version=__version__,
        parameters=sum(value.numel() for value in tensors.values()),
        papers=", ".join(dict.fromkeys(technique.paper for technique in stack.techniques)),
        config=text,
        **data["base_model"],
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def packaged_parts(model: str) -> list[str]:
    """Names of the trained parts that come with this package for one of its models, such as ``"default"``."""
    folder = PACKAGED / model
    if folder.parent != PACKAGED:  # a path or a hub name
        return []
    return sorted(f"{model}/{path.parent.name}" for path in folder.glob(f"*/{CONFIG_NAME}"))


def locate(source: str | Path) -> Path:
    """The folder of a trained technique, or the packaged part of that name where there is no such folder."""
    folder = Path(source)
    return PACKAGED / folder if not folder.exists() and (PACKAGED / folder).is_dir() else folder


def _read_folder(source: str | Path) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Tensor]]:
    """Entries, fingerprint of the base model, and tensors under their full names."""
    folder = locate(source)
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
    tensors: dict[str, Tensor] = {}
    if (folder / WEIGHTS_NAME).exists():
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(folder / WEIGHTS_NAME)
        except (OSError, SafetensorError) as error:
            raise LoadError(f"{folder / WEIGHTS_NAME} cannot be read: {error}. Save the technique again.") from error
    return entries, saved, tensors


def _learned(folder: Path, number: int, saved: dict[str, Any], tensors: dict[str, Tensor]) -> LearnedWeights | None:
    prefix = f"{number}."
    own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return LearnedWeights(own, saved, str(folder)) if own else None


def no_weights(folder: str | Path) -> LoadError:
    """What is wrong with a folder whose technique has learned parts, but none are in it."""
    return LoadError(f"{folder} holds no learned weights ({WEIGHTS_NAME}) for its technique. Save it again.")


def read_tensors(
    source: str | Path | Mapping[str, Tensor], wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor]:
    """Tensors of a state dict, a ``.safetensors`` file or a folder of such files, those whose names are wanted.

    Raises:
        LoadError: nothing like that is there, or it cannot be read; pickled checkpoints are refused.
    """
    if isinstance(source, Mapping):
        return {name: value for name, value in source.items() if wanted(name)}
    from safetensors import SafetensorError, safe_open

    path = Path(source)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or any(file.suffix != ".safetensors" or not file.exists() for file in files):
        raise LoadError(f"{source} is no .safetensors file and no folder with one. Pickled checkpoints are refused.")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in opened.keys() if wanted(name)}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise LoadError(f"{file} cannot be read: {error}") from error
    return tensors


def read_learned(folder: str | Path, name: str) -> tuple[dict[str, Any], LearnedWeights | None]:
    """Arguments and weights of the technique ``name`` in a folder or a packaged part; None: no weights for it there.

    Raises:
        LoadError: no such folder, a broken or pickled file in it, or no such technique.
    """
    folder = Path(folder)
    entries, saved, tensors = _read_folder(folder)
    for number, entry in enumerate(entries):
        if entry.get("technique") == name:
            arguments = {key: value for key, value in entry.items() if key != "technique"}
            return arguments, _learned(folder, number, saved, tensors)
    names = ", ".join(str(entry.get("technique")) for entry in entries) or "nothing"
    raise LoadError(f"{folder} holds {names}, not {name}.")


def load_techniques(folder: str | Path, model: nn.Module | None = None) -> Stack:
    """Read a folder that ``Handle.save_pretrained`` wrote.

    Args:
        folder: what was written, or the name of a part that comes with this package, such as ``"default/gates"``.
        model: checked to be like the one it was saved from, where given; learned weights are checked again when they
            are attached.

    Raises:
        LoadError: no such folder, a broken or pickled file in it, or a model of another shape.
        ConfigError: it names a technique or an argument that this version does not know.
    """
    folder = Path(folder)
    entries, saved, tensors = _read_folder(folder)
    if model is not None:
        check_base(saved, model, str(folder))
    techniques: list[Technique] = []
    for number, entry in enumerate(entries):
        arguments = {key: value for key, value in entry.items() if key != "technique"}
        technique = get_technique(entry["technique"])(**arguments)
        if isinstance(technique, TrainedTechnique) and technique.learns:
            learned = _learned(folder, number, saved, tensors)
            if learned is None:
                raise no_weights(folder)
            technique = technique.with_learned(learned)
        techniques.append(technique)
    return Stack(*techniques)
