"""Where a model looks, and which layers still change its answer: the measurements behind exits and frozen layers.

Three curves over the layers, after DyVTE (https://arxiv.org/abs/2411.19628) and ShortV
(https://arxiv.org/abs/2504.00502):

* **attention flow**: of the attention that rows of one kind pay, the share that goes to rows of another kind:
  text to image, image to image, text to text, image to text (mean over heads and rows);
* **layer contribution** of layer l: KL(plain || visual rows frozen in layer l alone) of the next token;
* **exit effect** of layer l: KL(plain || no visual rows after layer l), and whether the greedy answer stays.

Layers below the one that a measurement changes give what they gave in the plain pass, so they are not run again; that
keeps one (B, S, D) tensor a layer in memory.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from mllm.config import Config, save_config
from mllm.cost import ModelSpec
from mllm.errors import ConfigError, EvalError, InputError
from mllm.eval import results
from mllm.eval.attention_flow import CHUNK_BYTES, QUERIES, Flow, FlowMeter, check_plain, layout_of, without_cache
from mllm.eval.runner import source_digest
from mllm.eval.stats import interval
from mllm.inputs import chat_inputs, open_image
from mllm.layout import TokenLayout
from mllm.loading import load
from mllm.technique import Stack, Technique, get_technique, load_all
from mllm.token_pruning import DyVTE, FreezeVisual

#: samples below which no interval is given: resampling so few says too little
FEWEST = 5

# --- layer effects ----------------------------------------------------------------------------------------------------


#: what is recorded of every change
FIELDS = ("next_kl", "next_kl_reverse", "answer_kl", "next_stays", "answer_stays")


@dataclass(frozen=True)
class Change:
    """How far the answer's distribution moved from the plain model's, per batch row.

    Attributes:
        next_kl: (...) KL(plain || changed) of the first answer token, in nats.
        next_kl_reverse: (...) KL(changed || plain) of it, the direction that ShortV's released code takes.
        answer_kl: (...) the same, mean over the tokens of the plain greedy answer.
        next_stays: (...) bool, the most likely first token is the same.
        answer_stays: (...) bool, the most likely token is the same all along, so that the greedy answer is.
    """

    next_kl: Tensor
    next_kl_reverse: Tensor
    answer_kl: Tensor
    next_stays: Tensor
    answer_stays: Tensor

    @classmethod
    def stack(cls, changes: Sequence[Change]) -> Change:
        """One more dimension, the second: (B,) becomes (B, len(changes))."""
        return cls(*(torch.stack([getattr(change, name) for change in changes], dim=1) for name in FIELDS))


@dataclass(frozen=True)
class Effects:
    """What one batch showed.

    Attributes:
        flow: attention of the prompt's rows in the plain model.
        frozen: (B, layers) visual rows frozen in one layer: the layer's contribution.
        exits: (B, layers) visual rows gone after one layer.
        answer_tokens: (B,) tokens of the plain greedy answer that are compared.
    """

    flow: Flow
    frozen: Change
    exits: Change
    answer_tokens: Tensor


class Probe:
    """The plain model's answer to one batch, and what changes move it.

    Args:
        model: stock, nothing attached.
        inputs: of one prefill, left-padded.
        answer_tokens: at most so many tokens of the greedy answer are compared; 1 is the next token alone.
        chunk_bytes: see :func:`attention_flow`.

    Raises:
        UnsupportedModelError, ConflictError: see :func:`attention_flow`.
        ConfigError: ``answer_tokens`` below 1.
    """

    def __init__(
        self, model: nn.Module, inputs: Mapping[str, Any], answer_tokens: int = 1, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        if answer_tokens < 1:
            raise ConfigError(f"answer_tokens={answer_tokens} must be at least 1, the next token.")
        self.parts = check_plain(model)
        self.model = self.parts.model
        answer = self._answer(inputs, answer_tokens)  # (B, T - 1)
        self.inputs = _extend(inputs, answer)
        self.positions = answer.shape[1] + 1
        self.counted = self._counted(answer)  # (B, T) bool
        layout = layout_of(self.parts, inputs)
        padded = nn.functional.pad(torch.stack([layout.visual, layout.valid]), (0, answer.shape[1]))
        meter = FlowMeter(self.parts, TokenLayout(padded[0], padded[1]), chunk_bytes)  # answer rows do not ask
        self.states: list[Tensor] = []  # what each layer returned, (B, S, D)
        self._encoded: dict[str, Any] = {}
        hooks = [layer.register_forward_hook(lambda *call: self.states.append(call[2])) for layer in self.parts.layers]
        try:
            with meter.attached(self.parts.layers):
                self.plain = self._run()  # (B, T, V)
        finally:
            for hook in hooks:
                hook.remove()
        self.flow = meter.flow()

    def _answer(self, inputs: Mapping[str, Any], tokens: int) -> Tensor:
        """(B, T - 1) the greedy answer without its last token, which nothing is predicted from."""
        if tokens == 1:
            return inputs["input_ids"][:, :0]
        with torch.no_grad():
            # a repetition penalty in the checkpoint's settings would make the answer something else than the argmax
            output = self.model.generate(
                **inputs, max_new_tokens=tokens, do_sample=False, num_beams=1, repetition_penalty=1.0
            )
        return output[:, inputs["input_ids"].shape[1] : -1]

    def _counted(self, answer: Tensor) -> Tensor:
        """(B, T) bool: predictions up to and with the end-of-text token; what generate pads after it is not answer."""
        ends = self.model.generation_config.eos_token_id
        ends = torch.tensor([ends] if isinstance(ends, int) else ends or [], device=answer.device, dtype=answer.dtype)
        ended = torch.isin(answer, ends).cumsum(dim=1) > 0  # (B, T - 1)
        return nn.functional.pad(~ended, (1, 0), value=True)

    def _run(self, inputs: Mapping[str, Any] | None = None) -> Tensor:
        """(B, T, V) log-probabilities at the last prompt token and the answer tokens."""
        base = self.parts.base
        encoded = self._encoded if inputs is None else {}
        with torch.no_grad(), ExitStack() as undo:
            for name in ("get_image_features", "get_video_features"):  # the tower's part is the same each time
                if hasattr(base, name):
                    undo.enter_context(_replaced(base, name, _once(getattr(base, name), encoded, name)))
            given = without_cache(self.inputs if inputs is None else inputs)
            logits = self.model(**given, logits_to_keep=self.positions).logits  # (B, T, V)
            return logits.double().log_softmax(dim=-1)

    def compare(self, changed: Tensor) -> Change:
        """How far ``changed`` (B, T, V) is from the plain log-probabilities."""
        gap = self.plain - changed  # (B, T, V)
        kl = (self.plain.exp() * gap).sum(dim=-1).clamp(min=0)  # (B, T)
        reverse = -(changed[:, 0].exp() * gap[:, 0]).sum(dim=-1).clamp(max=0)  # (B,)
        same = self.plain.argmax(dim=-1) == changed.argmax(dim=-1)  # (B, T)
        answer_kl = (kl * self.counted).sum(dim=1) / self.counted.sum(dim=1)  # (B,)
        stays = (same | ~self.counted).all(dim=1)  # (B,)
        return Change(kl[:, 0].cpu(), reverse.cpu(), answer_kl.cpu(), same[:, 0].cpu(), stays.cpu())

    def under(self, technique: Technique | Stack, unchanged_layers: int = 0) -> Change:
        """The model with ``technique`` attached; its first ``unchanged_layers`` return what they did in the plain pass.

        The caller must know that the technique leaves these layers alone.
        """
        with technique(self.model), ExitStack() as undo:
            for layer, state in zip(self.parts.layers[:unchanged_layers], self.states, strict=False):
                undo.enter_context(_replaced(layer, "forward", lambda *a, state=state, **k: state))
            return self.compare(self._run())

    def with_inputs(self, inputs: Mapping[str, Any]) -> Change:
        """The plain model with other pictures in the same prompt; all lengths must be those of the probe's inputs."""
        length = self.inputs["input_ids"].shape[1] - self.positions + 1
        if inputs["input_ids"].shape[1] != length:
            raise InputError(f"The other inputs have {inputs['input_ids'].shape[1]} tokens; {length} are compared.")
        return self.compare(self._run(_extend(inputs, self.inputs["input_ids"][:, length:])))

    def effects(self, progress: Callable[[], Any] = lambda: None) -> Effects:
        """Contribution and exit effect of every layer; ``progress`` is called after each of the 2 x layers passes."""
        frozen, exits = [], []
        layers = len(self.parts.layers)
        for layer in range(layers):
            frozen.append(self.under(FreezeVisual(layers=[layer]), layer))
            progress()
            exits.append(self.under(DyVTE(exit_layer=layer), layer + 1) if layer < layers - 1 else self._same())
            progress()
        return Effects(self.flow, Change.stack(frozen), Change.stack(exits), self.counted.sum(dim=1).cpu())

    def _same(self) -> Change:
        return self.compare(self.plain)


def layer_effects(
    model: nn.Module,
    inputs: Mapping[str, Any],
    answer_tokens: int = 1,
    progress: Callable[[], Any] = lambda: None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Effects:
    """Attention flow, contribution and exit effect of every layer for one batch.

    Contribution: ShortV (https://arxiv.org/abs/2504.00502). Rows without a picture give zeros.

    Args:
        model: stock, nothing attached.
        inputs: of one prefill, left-padded.
        answer_tokens: at most so many tokens of the plain greedy answer are compared.
        progress: called after each of the 2 x layers passes.
        chunk_bytes: see :func:`attention_flow`.

    Raises:
        see :class:`Probe`.
    """
    return Probe(model, inputs, answer_tokens, chunk_bytes).effects(progress)


def _extend(inputs: Mapping[str, Any], answer: Tensor) -> dict[str, Any]:
    """The inputs with answer tokens after them."""
    more, ones = dict(inputs), torch.ones_like(answer)
    for name, tail in (("input_ids", answer), ("attention_mask", ones), ("mm_token_type_ids", 0 * ones)):
        if inputs.get(name) is not None:
            more[name] = torch.cat([inputs[name], tail.to(inputs[name].dtype)], dim=1)
    return more


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of one object, for the length of the block."""
    had = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def _once(function: Callable[..., Any], store: dict[str, Any], name: str) -> Callable[..., Any]:
    """``function`` that is called the first time only."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if name not in store:
            store[name] = function(*args, **kwargs)
        return store[name]

    return call


# --- samples ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A question about pictures, which are opened when they are needed."""

    name: str
    question: str
    pictures: Callable[[], list[Image.Image]]
    digest: str  # of question and pictures: two samples with the same one give the same numbers


def task_samples(task: str, count: int) -> list[Sample]:
    """``count`` documents of an offline task, picked at random but always the same.

    Raises:
        EvalError: an unknown task, one without pictures, or damaged data.
    """
    import pyarrow.parquet

    from mllm.eval.tasks import manifest, task_folder, verify_data
    from mllm.eval.tasks.utils import doc_to_text

    verify_data(task)
    docs = pyarrow.parquet.read_table(task_folder() / "data" / f"{task}.parquet").to_pylist()
    with_pictures = [doc for doc in docs if doc["images"]]
    if not with_pictures:
        others = ", ".join(name for name in manifest() if name != task)
        raise EvalError(f"The task {task} has no pictures: there is nothing to analyze. Try one of: {others}.")
    return [
        Sample(
            f"{task} {doc['id']}",
            doc_to_text(doc),
            lambda doc=doc: [open_image(io.BytesIO(image["bytes"])) for image in doc["images"]],
            _digest(doc_to_text(doc), *(image["bytes"] for image in doc["images"])),
        )
        for doc in _some(with_pictures, count)
    ]


_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def folder_samples(folder: str | Path, question: str, count: int) -> list[Sample]:
    """The same question about up to ``count`` pictures of a folder, picked at random but always the same.

    Subfolders are not searched.

    Raises:
        EvalError: no folder, or no pictures in it.
        InputError: the question is empty.
    """
    folder = Path(folder)
    if not question.strip():
        raise InputError("The question is empty. Ask something, such as 'What is in the picture?'.")
    if not folder.is_dir():
        raise EvalError(f"{folder} is not a folder. Give a folder with pictures.")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES and path.is_file())
    if not paths:
        raise EvalError(f"No pictures found in {folder}; looked for {', '.join(sorted(_SUFFIXES))}.")
    return [
        Sample(path.name, question, lambda path=path: [open_image(path)], _digest(question, path.read_bytes()))
        for path in _some(paths, count)
    ]


def _some(items: list[Any], count: int) -> list[Any]:
    """``count`` of the items, or all if there are fewer, in a fixed random order: more start with the same ones."""
    if count < 1:
        raise EvalError(f"samples={count}: at least one is needed.")
    return random.Random(0).sample(items, len(items))[:count]


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:16]


# --- a run ------------------------------------------------------------------------------------------------------------


def choose_layers(contributions: Sequence[float], n: int) -> list[int]:
    """The ``n`` layers that contribute least, in order: where NAAViT, EEMLLM or FreezeVisual cost the least.

    Of equal layers the deeper one is taken first. Contributions are measured one layer at a time and do not add up:
    measure the chosen layers together.

    Args:
        contributions: one a layer, as :func:`layer_effects` measures them.
        n: layers to choose.

    Raises:
        ConfigError: ``n`` is not between 1 and the number of layers, or a contribution is not a finite number.
    """
    layers = len(contributions)
    if not 1 <= n <= layers:
        raise ConfigError(f"{n} layers cannot be chosen: this model has {layers}. Give a number from 1 to {layers}.")
    if bad := [layer for layer, value in enumerate(contributions) if not math.isfinite(value)]:
        raise ConfigError(f"The contribution of layer {bad[0]} is {contributions[bad[0]]}: measure the layers first.")
    return sorted(sorted(range(layers), key=lambda layer: (contributions[layer], -layer))[:n])


def choosing_stack(technique: str, layers: Sequence[int]) -> Stack:
    """The named technique on these layers.

    Raises:
        ConfigError: an unknown technique, or one that is not switched on layer by layer.
    """
    cls = get_technique(technique)
    if "layers" not in cls.model_fields:
        able = sorted(name for name, other in load_all().items() if "layers" in other.model_fields)
        raise ConfigError(f"{technique} has no layers to choose. Techniques that have: {', '.join(able)}.")
    return Stack(cls(layers=list(layers)))


def analyze(
    model: str,
    samples: Sequence[Sample],
    out_dir: str | Path,
    answer_tokens: int = 8,
    batch_size: int = 1,
    choose: int | None = None,
    technique: str = "NAAViT",
    write: str | Path | None = None,
    attn: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    fresh: bool = False,
) -> dict[str, Any]:
    """Measure all curves over ``samples`` and write ``analysis.json``, ``analysis.md`` and ``analysis.png``.

    Each finished sample is a file; the same call goes on where a stopped one was. A picture that cannot be read is
    left out and counted.

    Args:
        model: name for :func:`mllm.load`.
        samples: from :func:`task_samples` or :func:`folder_samples`.
        out_dir: gets the files.
        answer_tokens: at most so many tokens of the plain greedy answer are compared.
        batch_size: samples per batch.
        choose: also choose so many layers of least contribution, and measure ``technique`` on all of them together.
        technique: one that takes ``layers``.
        write: config file to write the choice to.
        attn, dtype, device: as for :func:`mllm.load`; float32, because rounding to 16 bits moves small contributions.
        fresh: measure finished samples again.

    Returns:
        What ``analysis.json`` holds.

    Raises:
        EvalError: no sample could be measured, or the folder cannot be written.
        ConfigError: a setting that is not allowed.
        UnsupportedModelError: see :func:`attention_flow`.
    """
    from mllm.eval.analyze_report import summarize, write_report

    out = Path(out_dir)
    _check_settings(answer_tokens, batch_size, choose, technique, write, out)
    results.check_writable(out)
    if fresh:
        shutil.rmtree(out / "samples", ignore_errors=True)
    loaded, processor = load(model, attn=attn, dtype=dtype, device=device)
    spec = ModelSpec.from_config(check_plain(loaded).text_config)
    if choose is not None:
        choose_layers([0.0] * spec.layers, choose)  # too many: say so before the work
    settings = {
        "model": model,
        "backend": attn or "sdpa",
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": loaded.device.type,
        "answer_tokens": answer_tokens,
    }
    lab = _Lab(loaded, processor, settings, out, spec.layers)
    records, failed = lab.measure(samples, batch_size)
    summary = summarize(records, settings, failed, [sample.name for sample in samples])
    if choose is not None:
        layers = choose_layers(summary["contribution"]["answer_kl"]["mean"], choose)
        stack = choosing_stack(technique, layers)
        together = lab.together(samples, batch_size, stack)
        summary["chosen"] = {"technique": technique, "layers": layers} | {
            name: _with_interval([record[name] for record in together]) for name in FIELDS
        }
        if write is not None:
            save_config(Config(Path(write).stem, stack), write)
            summary["chosen"]["config"] = Path(write).name
    summary["env"] = results.environment()
    write_report(summary, out)
    return summary


def _check_settings(
    answer_tokens: int, batch_size: int, choose: int | None, technique: str, write: str | Path | None, out: Path
) -> None:
    """Everything that can be refused before a model is loaded."""
    if answer_tokens < 1 or batch_size < 1:
        raise ConfigError(f"answer_tokens={answer_tokens} and batch_size={batch_size} must be at least 1.")
    if choose is None:
        if write is not None:
            raise ConfigError(f"{write} cannot be written without a choice of layers. Add --choose N.")
        return
    if choose < 1:
        raise ConfigError(f"choose={choose}: at least 1 layer. Leave it out to choose none.")
    choosing_stack(technique, [])
    if write is None:
        return
    path = Path(write)
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{path} must end in .yaml: it is a config file.")
    there = path.parent.is_dir() and os.access(path if path.exists() else path.parent, os.W_OK)
    if not there and path.parent.absolute() != out.absolute():  # the result folder is made soon
        raise ConfigError(f"{path} cannot be written: its folder does not exist or is not writable.")
    if not path.stem or not all(c.isalnum() or c in "_-." for c in path.stem):
        raise ConfigError(f"{path}: the file's name becomes the config's; use letters, digits, '_', '-' and '.'.")


def _with_interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean, 95 % interval (none for too few samples) and count."""
    values = [float(value) for value in values]
    low, high = interval(values) if len(values) >= FEWEST else (None, None)
    return {"mean": sum(values) / len(values), "low": low, "high": high, "n": len(values)}


class _Lab:
    """One model, and the folder that finished samples go to."""

    def __init__(self, model: nn.Module, processor: Any, settings: dict[str, Any], out: Path, layers: int) -> None:
        self.model, self.processor, self.settings, self.out, self.layers = model, processor, settings, out, layers

    def measure(self, samples: Sequence[Sample], batch_size: int) -> tuple[list[dict[str, Any]], list[str]]:
        """A record a sample, finished ones from their files, and why others failed."""
        records: dict[int, dict[str, Any]] = {}
        about = json.dumps([self.settings, source_digest(self.settings["model"])], sort_keys=True)
        keys = [_digest(about, sample.digest) for sample in samples]
        for number, key in enumerate(keys):
            if (record := _read_sample(self._path(number))) is not None and record["key"] == key:
                records[number] = record
        todo = [number for number in range(len(samples)) if number not in records]
        failed = []
        passes = 2 * self.layers
        # one unit is a batch row in one pass: a sample takes a while, and the bar should move
        with tqdm(total=len(samples) * passes, desc="analyze", file=sys.stderr, unit="pass") as bar:
            bar.update(len(records) * passes)
            for numbers, batch, pictures in self._batches(samples, todo, batch_size, failed, bar, passes):
                bar.set_postfix_str(batch[0].name)
                measured = self._measure(batch, pictures, partial(bar.update, len(batch)))
                for number, record in zip(numbers, measured, strict=True):
                    records[number] = {"key": keys[number], **record}
                    results.write_json(self._path(number), records[number])
        if not records:
            raise EvalError(f"None of {len(samples)} samples could be measured. The first one: {failed[0]}")
        return [records[number] for number in sorted(records)], failed

    def together(self, samples: Sequence[Sample], batch_size: int, stack: Stack) -> list[dict[str, float]]:
        """How far ``stack`` moves each sample's answer."""
        changes: list[dict[str, float]] = []
        numbers = list(range(len(samples)))
        with tqdm(total=len(samples), desc="chosen layers", file=sys.stderr, unit="sample") as bar:
            for _, batch, pictures in self._batches(samples, numbers, batch_size, [], bar, 1):
                inputs = self._inputs(batch, pictures)
                change = Probe(self.model, inputs, self.settings["answer_tokens"]).under(stack)
                for row in range(len(batch)):
                    changes.append({name: float(getattr(change, name)[row]) for name in FIELDS})
                bar.update(len(batch))
        return changes

    def _batches(
        self, samples: Sequence[Sample], numbers: list[int], size: int, failed: list[str], bar: Any, skip: int
    ) -> Iterator[tuple[list[int], list[Sample], list[list[Image.Image]]]]:
        """Batches with their pictures opened; those that cannot be are left out."""
        for start in range(0, len(numbers), size):
            ready, pictures = [], []
            for number in numbers[start : start + size]:
                try:
                    pictures.append(samples[number].pictures())
                    ready.append(number)
                except InputError as error:
                    failed.append(f"{samples[number].name}: {error}")
                    bar.update(skip)
            if ready:
                yield ready, [samples[number] for number in ready], pictures

    def _measure(
        self, batch: list[Sample], pictures: list[list[Image.Image]], progress: Callable[[], Any]
    ) -> list[dict[str, Any]]:
        probe = Probe(self.model, self._inputs(batch, pictures), self.settings["answer_tokens"])
        effects = probe.effects(progress)
        grey = [[Image.new("RGB", picture.size, (127, 127, 127)) for picture in row] for row in pictures]
        blank = probe.with_inputs(self._inputs(batch, grey))
        said = probe.plain.argmax(dim=-1)  # (B, T)
        return [
            {
                "name": sample.name,
                "question": sample.question,
                "answer": self.processor.decode(said[row][probe.counted[row]], skip_special_tokens=True).strip(),
                "answer_tokens": int(effects.answer_tokens[row]),
                "tokens": dict(zip(QUERIES, effects.flow.counts[row].tolist(), strict=True)),
                "mass": _plain(effects.flow.mass[row]),
                "uniform": _plain(effects.flow.uniform[row]),
                "contribution": {name: getattr(effects.frozen, name)[row].tolist() for name in FIELDS},
                "exit": {name: getattr(effects.exits, name)[row].tolist() for name in FIELDS},
                "blank": {name: getattr(blank, name)[row].item() for name in FIELDS},
            }
            for row, sample in enumerate(batch)
        ]

    def _inputs(self, batch: list[Sample], pictures: list[list[Image.Image]]) -> Any:
        inputs = chat_inputs(self.processor, [sample.question for sample in batch], pictures)
        return inputs.to(self.model.device, self.model.dtype)

    def _path(self, number: int) -> Path:
        return self.out / "samples" / f"{number:05}.json"


def _plain(values: Tensor) -> Any:
    """Nested lists with None for NaN, which JSON does not know."""
    if values.dim() == 0:
        return None if math.isnan(value := values.item()) else value
    return [_plain(value) for value in values]


def _read_sample(path: Path) -> dict[str, Any] | None:
    """A finished sample; None where there is none or its file is damaged, so that it is measured again."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return (
        record if isinstance(record, dict) and "key" in record and set(record.get("blank", ())) == set(FIELDS) else None
    )
