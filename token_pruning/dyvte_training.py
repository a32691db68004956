"""How DyVTE's gates are trained: labels for every exit, a fit that takes seconds, thresholds from a curve.

1. **Labels.** One pass of the plain model over a chat with its answer gives, after each layer, the states of the text
   rows. From each of them the text rows alone run the layers above: what an exit there would have made of the answer.
   All exits of a chat run as one batch that grows by a row in each layer: with 64 text and 576 visual tokens they cost
   one and a half plain passes, where the original spends two on the label of one layer. Kept are the features that
   gates read, and of every exit the answer's cross-entropy, how many of its tokens are right, how many are those of
   the plain model, and the divergence: the rule that makes labels of them can be changed without a new pass. They lie
   in shards in the run's folder, so a pass that was killed goes on.
2. **Fit.** Each gate learns from its layer's features whether leaving there was right (by default the original's rule:
   more than 99 % of the answer's tokens as the plain model's, and a cross-entropy below 1.03 times its own).
3. **Threshold.** On held-out chats, the cheapest one that loses no more than ``target_drop``. ``exits.json`` and
   ``exits.png`` hold the whole curve, beside fixed exits, chance with the same histogram, and an oracle.

    mllm train dyvte --model default --data scenes --out runs/dyvte
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import PartialState
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from mllm.attention import additive
from mllm.chats import IGNORED, Chat, Chats, ShuffledChats, collate
from mllm.cost import LayerWork, ModelSpec
from mllm.errors import ConfigError, InputError, LoadError, UnsupportedModelError
from mllm.families import Parts, find_parts
from mllm.layout import TokenLayout
from mllm.roles import ChatFormat
from mllm.saving import fingerprint, model_digest, save_techniques
from mllm.technique import Stack
from mllm.token_pruning.dyvte import DyVTE
from mllm.token_pruning.dyvte_gates import Gates, logit, read_prompts
from mllm.training import Options, Recipe, data_digests
from mllm.versions import CACHE

CURVE, PICTURE = "exits.json", "exits.png"


# --- labels -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ExitLabels:
    """What each exit would have made of some answers; the last layer's exit is the plain model.

    Attributes:
        features: (n, L - 1, 2, D) what the gates read after each layer.
        ce: (n, L) mean cross-entropy of the answer's tokens if visual rows leave after each layer.
        right: (n, L) share of the answer's tokens that are the most likely ones.
        agreement: (n, L) share of tokens whose most likely one is the plain model's.
        kl: (n, L) mean divergence from the plain model's distribution.
        text, visual: (n,) long, tokens of the prompt.
        number: (n,) long, which chats these are: those without a picture are left out.
    """

    features: Tensor
    ce: Tensor
    right: Tensor
    agreement: Tensor
    kl: Tensor
    text: Tensor
    visual: Tensor
    number: Tensor

    def __len__(self) -> int:
        return self.number.shape[0]

    @property
    def layers(self) -> int:
        return self.ce.shape[1]

    @classmethod
    def joined(cls, parts: Sequence[ExitLabels]) -> ExitLabels:
        return cls(**{item.name: torch.cat([getattr(part, item.name) for part in parts]) for item in fields(cls)})


@dataclass(frozen=True)
class LabelRule:
    """When leaving after a layer counts as right; the defaults are the original's.

    Attributes:
        agreement: more than this share of the answer's tokens are those of the plain model.
        ce_ratio: the cross-entropy is below this multiple of the plain model's.
        max_kl: the divergence is at most this, where given.
    """

    agreement: float = 0.99
    ce_ratio: float = 1.03
    max_kl: float | None = None

    def __call__(self, labels: ExitLabels) -> Tensor:
        """(n, L) bool."""
        right = (labels.agreement > self.agreement) & (labels.ce < self.ce_ratio * labels.ce[:, -1:])
        return right if self.max_kl is None else right & (labels.kl <= self.max_kl)


def oracle_exits(
    labels: ExitLabels, rule: LabelRule | None = None, candidates: Sequence[int] | None = None
) -> list[int | None]:
    """The earliest exit that was right, for each answer: what ``DyVTE(exit_layer=[...])`` needs to be an oracle.

    Args:
        labels: of :func:`label_exits`, one row for each row of the batch.
        rule: what counts as right.
        candidates: layers to choose from; all without.

    Returns:
        one entry per row; None where no exit was right.
    """
    right = (rule or LabelRule())(labels).tolist()
    layers = sorted(range(labels.layers - 1) if candidates is None else candidates)
    return [next((layer for layer in layers if row[layer]), None) for row in right]


@torch.no_grad()
def label_exits(
    model: nn.Module, processor: Any, chats: Sequence[Chat], first: int = 0, chat_format: ChatFormat | None = None
) -> ExitLabels | None:
    """Labels of all exits for the last answer of each chat; chats without a picture before it are left out.

    Args:
        model: a stock model in eval mode, nothing attached.
        processor: its processor.
        chats: any number.
        first: number of the first chat.
        chat_format: of the processor, where it is known already.

    Returns:
        None where no chat has a picture.

    Raises:
        UnsupportedModelError: an attention backend other than sdpa and eager.
    """
    parts = find_parts(model)
    if parts.attention not in DyVTE.backends:
        raise UnsupportedModelError(
            f"Labels are made with the attention backends {', '.join(DyVTE.backends)}, not {parts.attention!r}. "
            'Load the model with attn="sdpa".'
        )
    chat_format = chat_format or ChatFormat.from_processor(processor)
    found = []
    for number, chat in enumerate(chats, first):
        if not chat.images:
            continue
        inputs = collate(processor, chat_format, [chat]).to(parts.model.device, parts.model.dtype)
        labels = inputs.pop("labels")
        ids, valid = inputs["input_ids"], inputs["attention_mask"].bool()
        layout = TokenLayout.from_inputs(parts.token_ids, ids, inputs["attention_mask"])
        layout = TokenLayout(layout.visual, layout.valid, roles=chat_format.roles(ids, valid))
        averaged, last, asked = read_prompts(layout)
        if bool(asked):
            facts = _label(parts, inputs, labels[0], layout.visual[0], averaged[0], int(last))
            found.append(ExitLabels(**facts, number=torch.tensor([number])))
    return ExitLabels.joined(found) if found else None


def _label(parts: Parts, inputs: Any, labels: Tensor, visual: Tensor, averaged: Tensor, last: int) -> dict[str, Tensor]:
    """One row of :class:`ExitLabels`, on the CPU."""
    text = ~visual  # (S,) one chat alone has no padding
    states, calls = _plain_states(parts, inputs, text)  # L + 1 x (t, D), L x what each layer was called with
    branches = states[0].new_zeros(0, *states[0].shape)  # (exits so far, t, D)
    for number, layer in enumerate(parts.layers[1:], 1):
        branches = torch.cat([branches, states[number][None]])  # visual rows leave after the layer before
        branches = _run(layer, branches, calls[number], text, parts.attention)
    finals = torch.cat([branches, states[-1][None]])  # (L, t, D)

    place = text.cumsum(dim=0) - 1  # (S,) where a token stands among the text rows
    columns = torch.arange(labels.shape[0], device=labels.device)
    answer = columns[(labels != IGNORED) & (columns > last)]  # (a,)
    targets = labels[answer]
    finals = parts.text.norm(finals[:, place[answer - 1]])  # (L, a, D)
    plain = parts.model.lm_head(finals[-1]).float().log_softmax(dim=-1)  # (a, V)
    facts: dict[str, list[Tensor]] = {"ce": [], "right": [], "agreement": [], "kl": []}
    for final in finals:  # one at a time: vocabularies are large
        chances = parts.model.lm_head(final).float().log_softmax(dim=-1)  # (a, V)
        facts["ce"].append(nn.functional.nll_loss(chances, targets))
        facts["right"].append((chances.argmax(dim=-1) == targets).float().mean())
        facts["agreement"].append((chances.argmax(dim=-1) == plain.argmax(dim=-1)).float().mean())
        facts["kl"].append((plain.exp() * (plain - chances)).sum(dim=-1).mean().clamp(min=0))
    after = torch.stack(states[:-1])[1:]  # (L - 1, t, D) after each layer
    end = after[:, place[last]].float()  # (L - 1, D)
    mean = after[:, averaged[text]].float().mean(dim=1) if bool(averaged.any()) else end
    features = torch.stack([mean, end], dim=1).to(states[0].dtype)  # (L - 1, 2, D)
    told = {name: torch.stack(values)[None].cpu() for name, values in facts.items()}
    counts = {"text": text[: last + 1].sum()[None].cpu(), "visual": visual.sum()[None].cpu()}
    return {"features": features[None].cpu(), **told, **counts}


def _plain_states(parts: Parts, inputs: Any, text: Tensor) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Of the plain model: text rows (t, D) before each layer and after the last, and the layers' keyword arguments."""
    states: list[Tensor] = []
    calls: list[dict[str, Any]] = []

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        states.append(args[0][0, text])
        calls.append(kwargs)

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        states.append((output[0] if isinstance(output, tuple) else output)[0, text])

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in parts.layers]
    hooks.append(parts.layers[-1].register_forward_hook(after))
    try:
        parts.base(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return states, calls


def _run(layer: nn.Module, states: Tensor, call: dict[str, Any], text: Tensor, backend: str) -> Tensor:
    """(n, t, D) text rows alone after one layer, at their own positions."""
    mask = None  # sdpa: a square block is causal
    if backend == "eager":
        length = states.shape[1]
        allowed = torch.ones(length, length, dtype=torch.bool, device=states.device).tril()
        mask = additive(allowed, states.dtype)[None, None]
    tables = tuple(table[:, text] for table in call["position_embeddings"])
    rest = {"attention_mask": mask, "position_embeddings": tables, "position_ids": None, CACHE: None}
    output = layer(states, **{**call, **rest, "use_cache": False})
    return output[0] if isinstance(output, tuple) else output


# --- shards -----------------------------------------------------------------------------------------------------------


def collect_labels(
    model: nn.Module,
    processor: Any,
    chats: Chats,
    count: int,
    folder: Path,
    about: dict[str, Any] | None = None,
    shard: int = 32,
) -> ExitLabels:
    """Labels of the first ``count`` chats, from the shards in ``folder`` and a pass over those that are missing.

    Args:
        model, processor: see :func:`label_exits`; several processes share the work.
        chats: by number.
        count: how many.
        folder: for the shards.
        about: whatever else the labels depend on, such as the data's name.
        shard: chats in a shard.

    Raises:
        ConfigError: the folder holds labels of another model or other data.
        LoadError: a shard is broken.
        InputError: no chat has a picture.
    """
    state = PartialState(cpu=model.device.type == "cpu")
    facts = json.loads(json.dumps({**(about or {}), "model": fingerprint(model), "weights": model_digest(model)}))
    _check_about(folder, facts, state)
    chat_format = ChatFormat.from_processor(processor)
    spans = [(start, min(start + shard, count)) for start in range(0, count, shard)]
    files = [folder / f"{start:06d}-{stop:06d}.safetensors" for start, stop in spans]
    mine = list(zip(spans, files, strict=True))[state.process_index :: state.num_processes]
    for (start, stop), file in tqdm(mine, desc=f"labels {folder.name}", disable=not state.is_main_process):
        if not file.exists():
            found = label_exits(model, processor, [chats[n] for n in range(start, stop)], start, chat_format)
            tensors = {} if found is None else {item.name: getattr(found, item.name) for item in fields(found)}
            unfinished = file.with_name(f".{file.name}")
            save_file({name: value.contiguous() for name, value in tensors.items()}, unfinished)
            os.replace(unfinished, file)
    state.wait_for_everyone()
    parts = []
    for file in files:
        try:
            tensors = load_file(file)
            parts += [ExitLabels(**tensors)] if tensors else []
        except (OSError, SafetensorError, TypeError) as error:
            raise LoadError(f"{file} cannot be read: {error}. Delete it; the next run makes it again.") from error
    if not parts:
        raise InputError(f"None of {count} chats has a picture before its last answer: there is no exit to learn.")
    return ExitLabels.joined(parts)


def _check_about(folder: Path, facts: dict[str, Any], state: PartialState) -> None:
    path = folder / "about.json"
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise LoadError(f"{path} cannot be read: {error}. Delete {folder}.") from error
        for name in (*facts, *before):
            if facts.get(name) != before.get(name):
                raise ConfigError(
                    f"{folder} holds labels with {name}={before.get(name)!r}, this run has {name}={facts.get(name)!r}. "
                    "Use another folder, or delete this one."
                )
    state.wait_for_everyone()  # all have looked before one writes
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    state.wait_for_everyone()


# --- thresholds -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Curves:
    """Accuracy against FLOPs of the exits that gates choose on some answers, and what they must beat.

    Args:
        technique: its candidates and limits.
        spec: the decoder's shape.
        labels: of answers that the gates have not learned from.
        scores: (n, candidates) score of leaving minus score of staying.
        rule: what counts as right, for the oracle.
    """

    technique: DyVTE
    spec: ModelSpec
    labels: ExitLabels
    scores: Tensor
    rule: LabelRule

    def exits(self, threshold: float) -> Tensor:
        """(n,) long, the layer after which visual rows leave; the model's last one: never."""
        candidates = self.technique.candidates(self.spec)
        last = self.technique.last_visual_layer(self.spec)
        layers = torch.tensor([*candidates, last])
        leaves = torch.nn.functional.pad(self.scores > logit(threshold), (0, 1), value=True)  # (n, candidates + 1)
        return layers[leaves.long().argmax(dim=1)]  # the first one

    def flops(self, exits: Tensor, gates: bool) -> Tensor:
        """(n,) FLOPs of prefills that leave after ``exits``, over those of the plain model."""
        spec, ratios = self.spec, []
        candidates = self.technique.candidates(spec)
        for layer, text, visual in zip(
            *(x.tolist() for x in (exits, self.labels.text, self.labels.visual)), strict=True
        ):
            small, large = (LayerWork(rows, rows * rows).flops(spec) for rows in (text, text + visual))
            asked = gates * sum(candidate <= layer for candidate in candidates) * self.technique.gate_flops(spec)
            spent = (layer + 1) * large + (spec.layers - layer - 1) * small + asked
            ratios.append(spent / (spec.layers * large))
        return torch.tensor(ratios)

    def point(self, exits: Tensor, gates: bool = False) -> dict[str, Any]:
        """What leaving after ``exits`` (n,) costs and keeps, on average."""
        rows, labels = torch.arange(len(self.labels)), self.labels
        never = exits == self.spec.layers - 1
        return {
            "flops_ratio": float(self.flops(exits, gates).mean()),
            "accuracy": float((labels.right[rows, exits] == 1).float().mean()),
            "agreement": float((labels.agreement[rows, exits] == 1).float().mean()),
            "cross_entropy": float(labels.ce[rows, exits].mean()),
            "mean_exit_layer": float(exits.float().mean()),
            "never": float(never.float().mean()),
        }

    def thresholds(self) -> list[float]:
        """Where the curve is measured: evenly, and where the gates' probabilities are."""
        chances = self.scores.sigmoid().flatten()
        even = torch.linspace(0, 1, 21)
        return sorted({round(float(p), 6) for p in torch.cat([even, chances.quantile(even)])})

    def report(self, target_drop: float, measure: str) -> dict[str, Any]:
        """Everything: curves of the gates, of fixed exits and of chance, the oracle, and the chosen threshold."""
        spec, count = self.spec, len(self.labels)
        fixed = [{"exit_layer": e, **self.point(torch.full((count,), e))} for e in range(spec.layers)]
        dense, gate, chance = fixed[-1], [], []
        for threshold in self.thresholds():
            exits = self.exits(threshold)
            gate.append({"threshold": threshold, **self.point(exits, gates=True)})
            histogram = (torch.bincount(exits, minlength=spec.layers) / count).tolist()
            expected = {
                name: sum(weight * one[name] for weight, one in zip(histogram, fixed, strict=True))
                for name in fixed[0]
                if name != "exit_layer"
            }
            chance.append({"threshold": threshold, **expected})
        allowed = [one for one in gate if dense[measure] - one[measure] <= target_drop + 1e-9]
        best = min(allowed, key=lambda one: (one["flops_ratio"], -one["threshold"]), default=None)
        chosen = best or max(gate, key=lambda one: (one[measure], one["threshold"]))
        oracle = [
            e if e is not None else spec.layers - 1
            for e in oracle_exits(self.labels, self.rule, self.technique.candidates(spec))
        ]
        return {
            "samples": count,
            "measure": measure,
            "target_drop": target_drop,
            "reached": best is not None,
            "chosen": {**chosen, "drop": dense[measure] - chosen[measure]},
            "dense": dense,
            "gate": gate,
            "fixed": fixed,
            "chance": chance,
            "oracle": self.point(torch.tensor(oracle)),
            "right_to_leave": self.rule(self.labels).float().mean(dim=0).tolist(),
        }


def draw_curves(report: dict[str, Any], picture: Path) -> None:
    """Draw a report of :class:`Curves`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measure = report["measure"]
    figure = Figure(figsize=(6, 4), dpi=120, layout="tight")
    axes = figure.add_subplot()
    for name, label, style in (
        ("fixed", "fixed exit", {"color": "#999999", "marker": "."}),
        ("chance", "chance, same histogram", {"color": "#e69f00", "linestyle": "--"}),
        ("gate", "gates", {"color": "#0072b2", "marker": "."}),
    ):
        points = sorted((one["flops_ratio"], one[measure]) for one in report[name])
        axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2, **style)
    for name, label, marker in (
        ("oracle", "oracle", "*"),
        ("chosen", "chosen threshold", "o"),
        ("dense", "plain", "s"),
    ):
        one = report[name]
        axes.plot(
            one["flops_ratio"], one[measure], marker, color="#000000", label=label, markersize=7, fillstyle="none"
        )
    axes.axhline(report["dense"][measure] - report["target_drop"], color="#cc79a7", linewidth=0.7)
    axes.set(
        xlabel="prefill FLOPs over the plain model's", ylabel=measure, title=f"{report['samples']} held-out answers"
    )
    axes.legend(fontsize=7)
    FigureCanvasAgg(figure).print_png(picture)


# --- the recipe -------------------------------------------------------------------------------------------------------


class GateOptions(BaseModel):
    """Options of ``mllm train dyvte``, as ``--option KEY=VALUE``.

    Attributes:
        samples: chats that labels are made of.
        held_out: chats for the threshold.
        agreement, ce_ratio, max_kl: see :class:`LabelRule`.
        target_drop: what the threshold may cost, in shares of the held-out answers.
        measure: ``"accuracy"``: answers whose tokens are all right; ``"agreement"``: those as the plain model's.
        shard: chats in a shard of labels.
    """

    model_config = ConfigDict(extra="forbid")

    samples: int = Field(512, ge=1)
    held_out: int = Field(128, ge=1)
    agreement: float = Field(0.99, ge=0, lt=1)
    ce_ratio: float = Field(1.03, gt=0)
    max_kl: float | None = Field(None, ge=0)
    target_drop: float = Field(0.01, ge=0, le=1)
    measure: Literal["accuracy", "agreement"] = "accuracy"
    shard: int = Field(32, ge=1)


class GateRecipe(Recipe):
    """Labels, fit, threshold."""

    defaults: ClassVar[dict[str, Any]] = {"steps": 400, "batch_size": 64, "lr": 1e-3}
    split = "train"

    def __init__(self, model: Any, processor: Any, options: Options) -> None:
        self.model, self.processor, self.options = model, processor, options
        self.own = options.read(GateOptions)
        if options.smoke:
            small = {"samples": 4, "held_out": 4, "shard": 2}
            self.own = self.own.model_copy(update={k: v for k, v in small.items() if k not in options.own})
        self.rule = LabelRule(self.own.agreement, self.own.ce_ratio, self.own.max_kl)
        given = options.arguments
        chosen = {"exit_layer", "histogram"} & set(given)
        if chosen:
            raise ConfigError(f"DyVTE: with {', '.join(sorted(chosen))} there is nothing to train. Leave it out.")
        self.technique = DyVTE(**(given if "weights" in given else {"gate": "light", **given}))
        self.spec = ModelSpec.from_config(find_parts(model).text_config)
        self.technique.check(self.spec)
        if not self.technique.candidates(self.spec):
            raise ConfigError(f"{self.technique!r} has no gate to train on a model with {self.spec.layers} layers.")
        model.requires_grad_(False).eval()
        self.gates: Gates = self.technique.build(self.spec)
        if self.technique.learned is not None:
            self.technique.learned.load_into(self.gates, model)
        self.gates.to(model.device).requires_grad_(False)

    def parameter_groups(self) -> list[dict[str, Any]]:
        router = self.gates.visual_gates_router
        chosen = [router[str(layer)] for layer in self.technique.candidates(self.spec)]
        return [{"params": [p.requires_grad_(True) for gate in chosen for p in gate.parameters()]}]

    def examples(self, chats: Chats, folder: Path) -> Any:
        self.labels = self._collect(chats, "train", self.own.samples, folder)
        self.held_out = self._collect(self.options.chats("test"), "test", self.own.held_out, folder)
        self.right = self.rule(self.labels)
        return ShuffledChats(tuple(range(len(self.labels))), self.options.seed)  # numbers of answers, in a new order

    def _collect(self, chats: Chats, side: str, count: int, folder: Path) -> ExitLabels:
        data = data_digests(self.options.data)
        about = {"data": data, "seed": self.options.seed, "images": self.options.images, "side": side}
        return collect_labels(self.model, self.processor, chats, count, folder / "labels" / side, about, self.own.shard)

    def scores(self, labels: ExitLabels, rows: Sequence[int]) -> Tensor:
        """(n, candidates) what the gates make of some answers."""
        features = labels.features[list(rows)].to(self.model.device).float()  # (n, L - 1, 2, D)
        candidates = self.technique.candidates(self.spec)
        return torch.stack([self.gates(features[:, layer], layer) for layer in candidates], dim=1)

    def loss(self, batch: list[Any], step: int) -> tuple[Tensor, dict[str, float]]:
        scores = self.scores(self.labels, batch)
        right = self.right[batch][:, list(self.technique.candidates(self.spec))].to(scores)
        loss = nn.functional.binary_cross_entropy_with_logits(scores, right)  # two classes, of one weight
        return loss, {"told_right": float(((scores > 0) == (right > 0)).float().mean())}

    @torch.no_grad()
    def save(self, folder: Path) -> None:
        rows = range(len(self.held_out))
        scores = torch.cat([self.scores(self.held_out, rows[n : n + 64]).cpu() for n in range(0, len(rows), 64)])
        curves = Curves(self.technique, self.spec, self.held_out, scores, self.rule)
        report = curves.report(self.own.target_drop, self.own.measure)
        technique = self.technique
        if "threshold" not in self.options.arguments:
            technique = technique.model_copy(update={"threshold": report["chosen"]["threshold"]})
        (folder / CURVE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        draw_curves(report, folder / PICTURE)
        save_techniques(Stack(technique), folder, self.model, [self.gates])


def recipe(model: Any, processor: Any, options: Options) -> GateRecipe:
    """What ``mllm train dyvte`` runs; see :mod:`mllm.training`."""
    return GateRecipe(model, processor, options)
