"""One training loop for all techniques: one process, several on a CPU, or several GPUs.

A technique is trained by naming a function in its class, ``training: ClassVar[str] = "module:function"``; ``mllm train
NAME`` (:func:`train_technique`) imports it only then and calls

.. code-block:: python

    def recipe(model: nn.Module, processor: Any, options: Options) -> Recipe: ...

* ``model``, ``processor`` are what :func:`mllm.load` returns, ready on their device. The function freezes the model
  (``model.requires_grad_(False)``), attaches the technique or injects LoRA, and sets the modes of the modules
  (``train()``, ``eval()``): the loop changes neither.
* ``options`` says what the user asked for (:class:`Options`). ``options.read(Schema)`` checks the recipe's own options
  against a pydantic model and refuses unknown ones.
* The :class:`Recipe` that it returns holds the trainable parameters, the loss and the way to save.

For LoRA there is :func:`mllm.finetuning.add_lora`, which freezes the model and adds the trainable part; ``find_parts``
looks through the wrapper.

Several processes are started by torch's or accelerate's launcher, ``torchrun --nproc-per-node 2 -m mllm.cli train``.
Only gradients travel between them, so the frozen model is not wrapped. Micro-batch ``k`` of process ``r`` is a function
of the seed, ``k`` and ``r`` alone, and random numbers are seeded anew for each: a run that was killed goes on from its
last checkpoint and ends with the same weights, bit for bit on a CPU, as one that was not.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import broadcast, gather_object, reduce
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from mllm.chats import IGNORED, Chats, open_chats
from mllm.engine import _LABELS, Engine
from mllm.errors import ConfigError, LoadError, TrainingError
from mllm.families import find_parts
from mllm.technique import Technique, explain, load_all

RUN_NAME, LOG_NAME, CURVE_NAME, CHECKPOINTS = "training.json", "log.jsonl", "loss.png", "checkpoints"
_BUCKET = 1 << 25  # gradient values that travel in one message

Schema = TypeVar("Schema", bound=BaseModel)


class TrainingConfig(BaseModel):
    """How to train; the same for all techniques.

    Attributes:
        steps: optimizer steps in all.
        batch_size: chats in a micro-batch of one process.
        accumulation: micro-batches of a process in one step.
        lr: peak learning rate of parameter groups that have none of their own.
        warmup: share of the steps in which the rate grows to its peak.
        schedule: what follows: ``"cosine"`` down to 0, or ``"constant"``.
        weight_decay: of parameter groups that have none of their own.
        clip: largest norm of the gradient; None: not clipped.
        seed: of the data and of random numbers.
        save_seconds: time between checkpoints; 0: after each step.
        save_steps: steps between checkpoints, beside the time.
        keep: checkpoints that are kept.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(100, ge=1)
    batch_size: int = Field(4, ge=1)
    accumulation: int = Field(1, ge=1)
    lr: float = Field(1e-4, gt=0, allow_inf_nan=False)
    warmup: float = Field(0.03, ge=0, le=1)
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    clip: float | None = Field(1.0, gt=0)
    seed: int = 0
    save_seconds: float = Field(60.0, ge=0)
    save_steps: int | None = Field(None, ge=1)
    keep: int = Field(2, ge=1)

    def __init__(self, **arguments: Any) -> None:
        try:
            super().__init__(**arguments)
        except ValidationError as error:
            allowed = ", ".join(type(self).model_fields)
            raise ConfigError(f"{explain(error, 'training')} Settings of training: {allowed}.") from None

    def rate(self, step: int) -> float:
        """Share of the peak learning rate in ``step``, counted from 0."""
        rising = math.ceil(self.warmup * self.steps)
        if step < rising:
            return (step + 1) / rising
        if self.schedule == "constant":
            return 1.0
        return 0.5 + 0.5 * math.cos(math.pi * (step - rising) / max(1, self.steps - rising))


#: settings that may change when a run goes on: they change nothing in the result
_FREE = ("save_seconds", "save_steps", "keep")


@dataclass(frozen=True)
class Options:
    """What a technique's recipe is told.

    Attributes:
        technique: the class that is trained.
        arguments: the technique's arguments, for its constructor.
        own: the recipe's own options.
        smoke: whether to do as little as possible, to see that everything runs.
        seed: of everything random that the recipe does; torch is seeded with it already.
        data: what to learn from, as :func:`mllm.chats.open_chats` takes it.
        images: folder that the pictures of files are relative to.
        model: the name under which the model was loaded.
    """

    technique: type[Technique] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    smoke: bool = False
    seed: int = 0
    data: str = "scenes"
    images: str | None = None
    model: str = "default"

    def chats(self, split: str | None = None) -> Chats:
        """The data, or one side of it; a recipe that uses ``"test"`` sets ``Recipe.split`` to ``"train"``."""
        return open_chats(self.data, self.seed, split, self.images)

    def read(self, schema: type[Schema]) -> Schema:
        """The recipe's own options, checked by a pydantic model.

        Raises:
            ConfigError: an option that the schema does not have or allow.
        """
        if unknown := sorted(set(self.own) - set(schema.model_fields)):
            raise ConfigError(
                f"Unknown option {unknown[0]}={self.own[unknown[0]]!r}. Options of this recipe: "
                f"{', '.join(schema.model_fields) or 'none'}."
            )
        try:
            return schema(**self.own)
        except ValidationError as error:
            raise ConfigError(explain(error, "option")) from None


class Recipe(ABC):
    """What a technique gives to be trained.

    Whatever changes in training must be a parameter in a group, or a function of the seed: it is all that checkpoints
    hold.
    """

    #: the model that is trained or trained around; its number format decides about mixed precision
    model: nn.Module
    #: settings of training where the user gives none, such as ``{"lr": 1e-3}``
    defaults: ClassVar[dict[str, Any]] = {}
    #: side of the data to train on: None: all of it; ``"train"`` leaves out what ``Options.chats("test")`` gives
    split: str | None = None

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups of parameters for AdamW: ``params``, and where they differ ``lr`` (the peak) or ``weight_decay``.

        Keep trainable parameters in float32 beside a bfloat16 model; the loss runs under autocast then. A technique's
        learned parts are attached in the model's format: ``module.float()`` for each of ``handle.modules``, then
        ``list(handle.parameters())``.
        """

    @abstractmethod
    def loss(self, batch: list[Any], step: int) -> Tensor | tuple[Tensor, dict[str, float]]:
        """Mean loss of some chats (or of what :meth:`examples` made of them), and numbers to log.

        The key ``"weight"`` says what the loss is a mean over, such as the answer tokens of :func:`answer_loss`; it is
        the number of chats without. Micro-batches and processes are averaged by it, so that two processes learn what
        one learns from twice the batch.
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what was learned, as ``Handle.save_pretrained`` does. Called once, at the end, in one process."""

    def examples(self, chats: Chats, folder: Path) -> Any:
        """What batches are drawn from, by number: the chats, or what the recipe computed from them once.

        Called in each process, also when a run goes on: the result must not depend on what is trained.

        Args:
            chats: the training data.
            folder: where the recipe may cache it; a run that goes on finds it again.
        """
        return chats


def answer_loss(model: nn.Module, inputs: Any) -> tuple[Tensor, dict[str, float]]:
    """Mean cross-entropy of the answer tokens, with their number as the weight; what most recipes return.

    Vocabulary scores are computed for the labelled tokens alone, which saves most of their memory. Techniques check the
    labels as they do when the model computes its own loss.

    Args:
        model: a stock model, with or without techniques, or in a peft wrapper.
        inputs: of :func:`mllm.chats.collate`, on the model's device; ``labels`` (B, S) among them.
    """
    parts = find_parts(model)
    labels = inputs["labels"][:, 1:]  # (B, S - 1) what each token should say next
    arguments = {name: value for name, value in inputs.items() if name != "labels"}
    if any(isinstance(getattr(hook, "__self__", None), Engine) for hook in parts.base._forward_pre_hooks.values()):
        arguments[_LABELS] = inputs["labels"]
    hidden = parts.base(**arguments, use_cache=False).last_hidden_state[:, :-1]  # (B, S - 1, D)
    learned = labels != IGNORED
    logits = parts.model.lm_head(hidden[learned]).float()  # (answer tokens, V)
    loss = nn.functional.cross_entropy(logits, labels[learned])
    return loss, {"weight": float(logits.shape[0])}


# --- by name ----------------------------------------------------------------------------------------------------------

_SECTIONS = {"model": str, "data": str, "images": str, "arguments": dict, "options": dict, "training": dict}
_SMOKE = {"steps": 3, "batch_size": 1, "accumulation": 1}


def trainable() -> dict[str, type[Technique]]:
    """The techniques that name a recipe, by their names in lower case."""
    return {cls.name.lower(): cls for cls in load_all().values() if getattr(cls, "training", None)}


def read_settings(path: str | Path) -> dict[str, Any]:
    """Read a YAML file for ``mllm train``: model, data, images, and the mappings arguments, options, training.

    Raises:
        ConfigError: it cannot be read, or a key or its type is wrong.
    """
    try:
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(given, dict):
        raise ConfigError(
            f"{path}: a training config is a mapping with the keys {', '.join(_SECTIONS)}, not {given!r}."
        )
    for key, value in given.items():
        if key not in _SECTIONS:
            hint = f" Did you mean training: {{{key}: {value}}}?" if key in TrainingConfig.model_fields else ""
            raise ConfigError(f"{path}: unknown key {key!r} = {value!r}. Allowed keys: {', '.join(_SECTIONS)}.{hint}")
        if not isinstance(value, _SECTIONS[key]):
            kind = "a mapping" if _SECTIONS[key] is dict else "a text"
            raise ConfigError(f"{path}: {key} = {value!r} must be {kind}.")
    return given


def train_technique(
    name: str,
    model: str = "default",
    data: str | None = None,
    out: str | Path | None = None,
    training: dict[str, Any] | None = None,
    arguments: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    images: str | None = None,
    smoke: bool = False,
    attn: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
) -> Path:
    """Train a technique by its name, as ``mllm train`` does.

    Args:
        name: of the technique or of its class, in any case.
        model: a model folder, a hub name, or ``"default"``.
        data: see :func:`mllm.chats.open_chats`; without, what the technique names.
        out: folder of the run; ``runs/train-NAME`` without, ``runs/smoke-NAME`` where ``smoke`` is set. A run that is
            in it goes on.
        training: settings of :class:`TrainingConfig`, in place of the recipe's own defaults.
        arguments: of the technique.
        options: of its recipe.
        images: folder that the pictures of data files are relative to.
        smoke: do a few steps only, to see that everything runs.
        attn, dtype, device: see :func:`mllm.load`.

    Returns:
        The folder, with the trained technique in it.

    Raises:
        ConfigError: an unknown technique, argument, option, setting or device, or a technique without a recipe.
    """
    from mllm.loading import load, pick_device
    from mllm.saving import model_digest

    known = trainable()
    cls = ({cls.__name__.lower(): cls for cls in known.values()} | known).get(name.lower())
    if cls is None:
        raise ConfigError(
            f"There is nothing to train under the name {name!r}. Trainable: {', '.join(sorted(known)) or 'none'}."
        )
    arguments, options = arguments or {}, options or {}
    if unknown := sorted(set(arguments) - set(cls.model_fields)):
        raise ConfigError(
            f"Unknown argument {unknown[0]}={arguments[unknown[0]]!r} of {cls.name}. Its arguments: "
            f"{', '.join(cls.model_fields) or 'none'}."
        )
    folder = Path(out or Path("runs") / f"{'smoke' if smoke else 'train'}-{cls.name.lower()}")
    if folder.is_file():
        raise ConfigError(f"{folder} is a file. Give a folder for the run.")
    pick_device(device)
    given = dict(training or {})
    data = data or cls.training_data
    seed = TrainingConfig(**given).seed  # all are checked before the model is loaded
    told = Options(cls, arguments, options, smoke, seed, data, images, str(model))
    chats = told.chats()
    make = _recipe_function(cls)
    if device in ("auto", "cuda") and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        device = str(PartialState(cpu=not torch.cuda.is_available()).device)  # each process has its own
    loaded, processor = load(model, attn=attn, dtype=dtype, device=device)
    torch.manual_seed(seed)
    recipe = make(loaded, processor, told)
    config = TrainingConfig(**{**recipe.defaults, **(_SMOKE if smoke else {}), **given})
    settings = {
        "technique": cls.name,
        "model": str(model),
        "data": str(data),
        "contents": {name: digest for name, digest in data_digests(str(data)).items() if digest},
        "weights": model_digest(loaded),
        "images": images,
        "arguments": arguments,
        "options": options,
        "smoke": smoke,
        "attn": attn,
        "dtype": dtype,
    }
    chats = chats if recipe.split is None else told.chats(recipe.split)
    return train(recipe, chats, folder, config, settings)


def _recipe_function(cls: type[Technique]) -> Callable[[nn.Module, Any, Options], Recipe]:
    """Import what a technique's ``training`` names, only now: it may need packages that the technique does not."""
    module, _, function = cls.training.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"Training {cls.name} needs the package {error.name}. Install it: pip install 'mllm-efficiency[train]'."
        ) from error


# --- the loop ---------------------------------------------------------------------------------------------------------


def train(
    recipe: Recipe, chats: Chats, out: str | Path, config: TrainingConfig, settings: dict[str, Any] | None = None
) -> Path:
    """Train, or go on where the run in ``out`` was stopped.

    Args:
        recipe: what to train.
        chats: what to learn from.
        out: folder for the result, ``log.jsonl``, ``loss.png`` and ``checkpoints``.
        config: how to train.
        settings: whatever else decides about the result (model, data, arguments); kept, and compared when the run goes
            on.

    Returns:
        ``out``, with what :meth:`Recipe.save` wrote.

    Raises:
        ConfigError: ``out`` holds a run with other settings, or the recipe does not fit the loop.
        LoadError: the checkpoint in ``out`` cannot be read.
        TrainingError: the loss is no longer finite; the last checkpoint is kept.
    """
    _need_matplotlib()
    groups = recipe.parameter_groups()
    parameters = [parameter for group in groups for parameter in group["params"]]
    dtype = _check(recipe, parameters)
    state = PartialState(cpu=parameters[0].device.type == "cpu")
    run = _Run(Path(out), config, settings or {}, state)
    run.check()
    peaks = [group.get("lr", config.lr) for group in groups]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
    first = run.restore(parameters, optimizer)
    examples = recipe.examples(chats, run.folder)
    if state.num_processes > 1:
        for parameter in parameters:  # whatever a recipe does differently in each process
            parameter.data.copy_(broadcast(parameter.detach().clone()))
    device = parameters[0].device
    with run.logging(first) as log, _own_random_numbers(device):
        for step in log.bar:
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * config.rate(step)
            facts, scale = [], 1.0
            for micro in range(config.accumulation):
                number = (step * config.accumulation + micro) * state.num_processes + state.process_index
                batch = [examples[number * config.batch_size + k] for k in range(config.batch_size)]
                torch.manual_seed(_seed(config.seed, step, micro, state.process_index))
                with _precision(device, dtype):
                    loss, numbers = _loss(recipe, batch, step)
                weight = numbers.pop("weight", float(len(batch)))
                scale = scale if facts else weight
                (loss if weight == scale else loss * (weight / scale)).backward()
                facts.append((weight, {"loss": float(loss.detach()), **numbers}))
            facts = gather_object(facts)
            means = _means(facts)
            if not math.isfinite(means["loss"]):
                log.stop(step, f"the loss is {means['loss']}")
            _average_gradients(parameters, scale / sum(weight for weight, _ in facts), state.num_processes)
            norm = float(nn.utils.clip_grad_norm_(parameters, config.clip or math.inf))
            if not math.isfinite(norm):
                log.stop(step, f"the norm of the gradient is {norm}")
            optimizer.step()
            optimizer.zero_grad()
            log.write(step, means | {"norm": norm, "lr": optimizer.param_groups[0]["lr"]})
            run.checkpoint(step + 1, parameters, optimizer)
    if state.is_main_process:
        recipe.save(run.folder)
        draw_curve(run.folder / LOG_NAME, run.folder / CURVE_NAME)
    state.wait_for_everyone()
    return run.folder


def _check(recipe: Recipe, parameters: list[nn.Parameter]) -> torch.dtype:
    """Refuse a recipe that would train something else than it says; the number format to compute in."""
    who = type(recipe).__name__
    if not parameters:
        raise ConfigError(f"{who} has nothing to train: parameter_groups() gives no parameters.")
    if len({id(parameter) for parameter in parameters}) < len(parameters):
        raise ConfigError(f"{who} gives a parameter twice: each belongs to one group.")
    if frozen := sum(not parameter.requires_grad for parameter in parameters):
        raise ConfigError(f"{who}: {frozen} of {len(parameters)} parameters are frozen. Set requires_grad on them.")
    chosen = {id(parameter) for parameter in parameters}
    for name, parameter in recipe.model.named_parameters():
        if parameter.requires_grad and id(parameter) not in chosen:
            raise ConfigError(
                f"{who}: {name} requires gradients but is in no group. Freeze it (model.requires_grad_(False) before "
                "the technique is attached), or train it."
            )
    sizes: Counter[torch.dtype] = Counter()
    for parameter in recipe.model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] += parameter.numel()
    dtype = sizes.most_common(1)[0][0] if sizes else torch.float32
    if dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"The model is in {dtype}, which loses small gradients. Load it in bfloat16 or float32.")
    return dtype


def data_digests(data: str) -> dict[str, str | None]:
    """Hash of each data file among names with commas, as ``--data`` takes them; None for data that are drawn."""
    files = {name: Path(name.strip()) for name in data.split(",")}
    return {
        name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else None
        for name, file in files.items()
    }


def _loss(recipe: Recipe, batch: list[Any], step: int) -> tuple[Tensor, dict[str, float]]:
    result = recipe.loss(batch, step)
    loss, numbers = result if isinstance(result, tuple) else (result, {})
    if loss.ndim or not loss.requires_grad:
        raise ConfigError(
            f"{type(recipe).__name__}.loss() must give one number that depends on the trainable parameters; it has the "
            f"shape {tuple(loss.shape)}{'' if loss.requires_grad else ' and no gradient'}."
        )
    numbers = {name: float(value) for name, value in numbers.items()}
    if not numbers.get("weight", 1.0) > 0:
        raise ConfigError(f"{type(recipe).__name__}.loss() gives weight={numbers['weight']}; it must be above 0.")
    return loss, numbers


def _means(facts: Sequence[tuple[float, dict[str, float]]]) -> dict[str, float]:
    """Each logged number, averaged by weight over the micro-batches that gave it."""
    means = {}
    for name in dict.fromkeys(name for _, numbers in facts for name in numbers):
        given = [(weight, numbers[name]) for weight, numbers in facts if name in numbers]
        means[name] = sum(weight * value for weight, value in given) / sum(weight for weight, _ in given)
    return means


@torch.no_grad()
def _average_gradients(parameters: list[nn.Parameter], factor: float, processes: int) -> None:
    """Replace each gradient by its sum over processes times ``factor``; a missing one is 0."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if factor != 1.0:
            parameter.grad.mul_(factor)
    if processes == 1:
        return
    for bucket in _buckets(parameters):
        summed = reduce(torch.cat([parameter.grad.flatten().float() for parameter in bucket]), "sum")
        for parameter, grad in zip(bucket, summed.split([p.numel() for p in bucket]), strict=True):
            parameter.grad.copy_(grad.view_as(parameter))


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket, size = [], 0
    for parameter in parameters:
        if bucket and size + parameter.numel() > _BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel()
    yield bucket


def _seed(*parts: int) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:7], "big")


def _precision(device: torch.device, dtype: torch.dtype) -> Any:
    # no cache: a weight that is first used without gradients would have none later
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype, cache_enabled=False)


@contextmanager
def _own_random_numbers(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


# --- the run's folder -------------------------------------------------------------------------------------------------


class _Run:
    """What a run leaves on disk."""

    def __init__(self, folder: Path, config: TrainingConfig, settings: dict[str, Any], state: PartialState) -> None:
        self.folder, self.config, self.state = folder, config, state
        self.facts = json.loads(
            json.dumps({**config.model_dump(), "processes": state.num_processes, **settings}, default=str)
        )
        self.saved = time.monotonic()

    def check(self) -> None:
        """Prepare the folder; refuse one where another run was begun."""
        path = self.folder / RUN_NAME
        if path.exists() and self.checkpoints():
            try:
                before = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise LoadError(f"{path} cannot be read: {error}. Use another folder, or delete this one.") from error
            for name in (*self.facts, *before):
                if name not in _FREE and before.get(name) != self.facts.get(name):
                    raise ConfigError(
                        f"{self.folder} holds a run with {name}={before.get(name)!r}, this one has "
                        f"{name}={self.facts.get(name)!r}. Go on with the same, use another folder, or delete this one."
                    )
        self.state.wait_for_everyone()  # all have looked before one writes
        if self.state.is_main_process:
            try:
                (self.folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
                for left in (self.folder / CHECKPOINTS).glob(".step-*"):
                    shutil.rmtree(left)
                _write(path, json.dumps(self.facts, indent=2) + "\n")
            except OSError as error:
                raise ConfigError(f"{self.folder} cannot be written: {error}. Give another folder.") from error
        self.state.wait_for_everyone()

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted((self.folder / CHECKPOINTS).glob("step-*"))

    def checkpoint(self, step: int, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Write a checkpoint after ``step`` steps if it is time for one; a kill leaves it whole or leaves none."""
        config = self.config
        by_steps = config.save_steps is not None and step % config.save_steps == 0
        by_time = time.monotonic() - self.saved >= config.save_seconds
        if not self.state.is_main_process or not (by_steps or by_time or step == config.steps):
            return
        folder = self.folder / CHECKPOINTS / f"step-{step:08d}"
        unfinished = folder.with_name(f".{folder.name}")
        unfinished.mkdir()
        saved = optimizer.state_dict()
        tensors = {f"parameter.{number}": parameter.detach() for number, parameter in enumerate(parameters)}
        for number, values in saved["state"].items():
            tensors |= {f"optimizer.{number}.{name}": value for name, value in values.items()}
        tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
        save_file(tensors, unfinished / "state.safetensors")
        (unfinished / "state.json").write_text(json.dumps({"step": step}), encoding="utf-8")
        os.replace(unfinished, folder)
        for old in self.checkpoints()[: -config.keep]:
            shutil.rmtree(old)
        self.saved = time.monotonic()

    def restore(self, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
        """Load the newest checkpoint; the number of steps done."""
        found = self.checkpoints()
        if not found:
            return 0
        try:
            step = int(json.loads((found[-1] / "state.json").read_text(encoding="utf-8"))["step"])
            tensors = load_file(found[-1] / "state.safetensors")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise LoadError(f"{found[-1]} cannot be read: {error}. Delete it to go on from an older one.") from error
        wanted = {f"parameter.{number}": parameter.shape for number, parameter in enumerate(parameters)}
        given = {name: value.shape for name, value in tensors.items() if name.startswith("parameter.")}
        if wanted != given:
            raise LoadError(f"{found[-1]} holds other parameters than this recipe trains. Use another folder.")
        with torch.no_grad():
            for number, parameter in enumerate(parameters):
                parameter.copy_(tensors[f"parameter.{number}"])
        states: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".", 2)
                states.setdefault(int(number), {})[key] = value
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
        return step

    @contextmanager
    def logging(self, first: int) -> Iterator[_Log]:
        """The log and the progress bar, from step ``first`` on."""
        path, main = self.folder / LOG_NAME, self.state.is_main_process
        if main:  # steps that will be done again are forgotten
            _write(path, "".join(json.dumps(row) + "\n" for row in read_log(path) if row["step"] < first))
        bar = tqdm(
            range(first, self.config.steps),
            initial=first,
            total=self.config.steps,
            desc=self.folder.name,
            disable=not main,
            mininterval=1,
        )
        with bar, path.open("a", encoding="utf-8") if main else open(os.devnull, "a") as file:
            yield _Log(self, bar, file)


class _Log:
    def __init__(self, run: _Run, bar: tqdm, file: Any) -> None:
        self.run, self.bar, self.file = run, bar, file

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self.bar.set_postfix(loss=f"{numbers['loss']:.3f}", refresh=False)
        self.file.write(json.dumps({"step": step, **{k: float(f"{v:.6g}") for k, v in numbers.items()}}) + "\n")
        self.file.flush()

    def stop(self, step: int, why: str) -> None:
        """Raise TrainingError, and say what is left."""
        self.bar.close()
        kept = self.run.checkpoints()
        left = f"{kept[-1]} is kept" if kept else "there is no checkpoint yet"
        raise TrainingError(
            f"In step {step} {why}; {left}. Look at {LOG_NAME}; try a lower lr or a longer warmup in another folder."
        )


def read_log(path: Path) -> list[dict[str, float]]:
    """Rows of a ``log.jsonl``; a line that a kill cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _write(path: Path, text: str) -> None:
    """Write a file so that a kill leaves the old or the new one."""
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def _need_matplotlib() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise ConfigError("Training draws its loss with matplotlib. Install it: pip install 'mllm-efficiency[train]'.")


def draw_curve(log: Path, picture: Path) -> None:
    """Draw the loss of a ``log.jsonl`` over the steps, with a running mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_log(log)
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    window = max(1, len(losses) // 20)
    smooth = [sum(part) / len(part) for part in (losses[max(0, k - window + 1) : k + 1] for k in range(len(losses)))]
    figure = Figure(figsize=(6, 3), dpi=120, layout="tight")  # no pyplot: it would keep the figure, and pick a screen
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="#bbbbbb", linewidth=0.7)
    axes.plot(steps, smooth, color="#0072b2", linewidth=1.5)
    axes.set(xlabel="step", ylabel="loss", title=picture.parent.name)
    FigureCanvasAgg(figure).print_png(picture)
