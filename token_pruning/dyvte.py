"""DyVTE: all visual tokens leave the decoder after one layer (https://arxiv.org/abs/2411.19628).

The paper's observation: in deeper layers the text rows have already taken what they need from the image, so every
visual row can leave at once. Layers up to the exit ``e`` run on text and visual rows; the layers above run on text rows
alone, at their original positions, and cache no visual keys or values:

    rows of layer l  =  text + visual   for l <= e
                        text            for l >  e

Who chooses e:

* ``DyVTE(exit_layer=15)``: you, for all rows (Visual Tokens Withdrawal, https://arxiv.org/abs/2405.05803), or with a
  list one for each row of the batch, such as an oracle's;
* ``DyVTE(gate="light")``: a small learned gate for each row, from what its text rows have become;
* ``DyVTE(histogram=[...])``: chance, as often in each layer as the histogram says: what a gate must beat.

The gate of layer l reads the residual stream H after that layer, in a row whose question follows its last image:

    a = mean of H over the text after the image, the prompt's last token left out    (none: a = z)
    z = H of the prompt's last token
    p = softmax(W2 GELU(W1 [a, z]))[1]         visual rows leave after layer l, the first one where p > threshold

``gate="paper"`` has 2048 hidden units, no bias, and reads H as it is: 17 M numbers a layer at width 4096, and the keys
``model.visual_gates_router.{l}.w{1,2}.weight`` of the authors' code load (:meth:`DyVTE.from_checkpoint`).
``gate="light"`` has at most 256 and reads a and z divided by their root mean square, since the stream grows with depth.

What the original gets wrong and is mended here: the question is found by the chat template instead of at tokens 35 to
611; each row of a batch has its own exit, whatever the padding; a row that never exits decodes; answer tokens that
stand in the same call (training, scoring, no cache) are not read; one wait for the device per candidate layer, none
while decoding. A prompt without the template's answer header has no gate: its rows stay up to ``max_exit_layer``.

With ``recoverable=True`` visual rows are kept as they left: in the next turn of the conversation they go on from their
exit layer until its question lets them go. Without, later questions see the image up to the first question's exit.

When not to use it: open captioning and reading tasks lose far more than multiple choice does; measure those.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import reduce
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, Strict, model_validator
from torch import Tensor, nn

from mllm.cost import ModelSpec
from mllm.errors import ConfigError, InputError
from mllm.layout import TokenLayout
from mllm.ragged import Stash
from mllm.run import Report, Run
from mllm.technique import Layers, LayerView, Revived, Technique, TrainedTechnique, check_layers, register
from mllm.token_pruning.dyvte_gates import (
    Gates,
    gate_features,
    last_header,
    last_marked,
    load_gates,
    logit,
    read_prompts,
    sigmoid,
)

_HIDDEN = {"light": 128, "paper": 2048}
_MODES: dict[str, tuple[str, ...]] = {  # what chooses the exit, and the arguments that belong to it
    "exit_layer": (),
    "histogram": ("seed",),
    "gate": ("weights", "hidden", "threshold", "min_exit_layer", "max_exit_layer", "candidate_layers", "recoverable"),
}

Layer = Annotated[int, Strict(), Field(ge=0)]


@register
class DyVTE(TrainedTechnique):
    """Visual tokens leave after a layer that you, a learned gate or chance chooses. Learned and random exits are
    attached with the processor.

    Args:
        weights: folder with trained gates; see :meth:`from_pretrained`.
        exit_layer: last layer that sees visual tokens, counted from 0; or a fraction of the depth between 0 and 1: 0.5
            on 32 layers is the end of the 16th, layer 15; or a list of layers, one for each row of the batch, None
            where nothing leaves. The model's last layer changes nothing.
        gate: ``"light"`` or ``"paper"``, see above.
        hidden: units of a gate: 128 for light ones, which have 256 at most, 2048 as in the paper.
        threshold: probability of leaving above which rows leave, 0 (always) to 1 (never).
        min_exit_layer: first layer that rows may leave after.
        max_exit_layer: rows that are still there leave after it, whatever gates say; None: they may stay to the end.
        candidate_layers: layers with a gate: ``"all"``, a list, or ``"start:stop"``. The last layer never is one: an
            exit there saves nothing.
        recoverable: let a later question have the visual rows back. An exit that does not depend on the question has
            nothing to give back.
        histogram: one weight per layer, how often rows leave after it; the last one is for rows that stay. A row's
            draw depends on its prompt and its images alone.
        seed: of the draws.

    Raises:
        ConfigError: arguments that exclude each other or do not fit the model; attached without the processor.
        LoadError: gates that were trained for another model.
    """

    name: ClassVar[str] = "DyVTE"
    paper: ClassVar[str] = "https://arxiv.org/abs/2411.19628"
    training: ClassVar[str | None] = "mllm.token_pruning.dyvte_training:recipe"

    exit_layer: Layer | Annotated[float, Strict(), Field(gt=0, lt=1)] | tuple[Layer | None, ...] | None = None
    gate: Literal["light", "paper"] | None = None
    hidden: Annotated[int, Field(ge=1)] | None = None
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    min_exit_layer: Layer = 0
    max_exit_layer: Layer | None = None
    candidate_layers: Layers = "all"
    recoverable: bool = False
    histogram: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] | None = None
    seed: int = 0

    # --- arguments ---------------------------------------------------------------------------------------------------

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("hidden") is None and str(given.get("gate")) in _HIDDEN:
            return {**given, "hidden": _HIDDEN[given["gate"]]}
        return given

    @model_validator(mode="after")
    def _check_mode(self) -> DyVTE:
        chosen = [mode for mode in _MODES if getattr(self, mode) is not None]
        if len(chosen) != 1:
            trained = ", or weights, a folder with trained gates" if not chosen else ""
            raise ValueError(
                f"give one of {', '.join(_MODES)}, which choose the exit{trained}; {len(chosen)} were given"
            )
        for mode, arguments in _MODES.items():
            for name in arguments:
                if mode != chosen[0] and getattr(self, name) != type(self).model_fields[name].default:
                    why = ": without a gate no later question can let visual rows go on" * (name == "recoverable")
                    raise ValueError(f"{name} belongs to {mode}, and {chosen[0]} was given{why}")
        if self.gate == "light" and self.hidden > 256:
            raise ValueError(f'hidden={self.hidden}: a light gate has at most 256 units. Use gate="paper" for more')
        if self.max_exit_layer is not None and self.max_exit_layer < self.min_exit_layer:
            raise ValueError(f"max_exit_layer={self.max_exit_layer} lies before min_exit_layer={self.min_exit_layer}")
        if self.histogram is not None and not sum(self.histogram) > 0:
            raise ValueError("histogram needs a weight above 0")
        return self

    @property
    def _used(self) -> tuple[str, ...]:
        """The arguments that mean something in this mode, and those of classes that derive from this one."""
        mode = next(mode for mode in _MODES if getattr(self, mode) is not None)
        return (mode, *_MODES[mode], *(name for name in type(self).model_fields if name not in DyVTE.model_fields))

    def describe(self) -> dict[str, Any]:
        told = super().describe()
        return {"technique": self.name, **{name: told[name] for name in self._used}}

    @classmethod
    def from_checkpoint(
        cls, source: str | Path | Mapping[str, Tensor], model: nn.Module | None = None, **arguments: Any
    ) -> DyVTE:
        """Gates of the authors' code, as they were published: ``gate="paper"``.

        Args:
            source: a safetensors file, a folder of them, or a state dict; other parts of a whole LLaVA are left alone.
            model: the model that they belong to, where it is there already: they are checked against it.
            arguments: of the technique.

        Raises:
            LoadError: no such file, gates missing, unknown or of the wrong shape.
        """
        hidden, learned = load_gates(source, model)
        return cls(gate="paper", hidden=hidden, **arguments).with_learned(learned)

    # --- what the engine asks before running -------------------------------------------------------------------------

    @property
    def learns(self) -> bool:
        return self.gate is not None

    @property
    def by_input(self) -> bool:
        return not isinstance(self.exit_layer, (int, float))

    @property
    def needs_roles(self) -> bool:
        return self.exit_layer is None

    def candidates(self, spec: ModelSpec) -> tuple[int, ...]:
        """The layers whose gates are asked on a model of this shape."""
        stop = spec.layers - 1 if self.max_exit_layer is None else self.max_exit_layer
        chosen = range(spec.layers) if self.candidate_layers == "all" else self.candidate_layers
        return tuple(layer for layer in chosen if self.min_exit_layer <= layer < stop)

    def last_visual_layer(self, spec: ModelSpec) -> int:
        if isinstance(self.exit_layer, int):
            return self.exit_layer
        if isinstance(self.exit_layer, float):
            return max(math.floor(self.exit_layer * spec.layers + 0.5), 1) - 1
        if self.exit_layer is not None:
            return max((spec.layers - 1 if layer is None else layer for layer in self.exit_layer), default=0)
        if self.histogram is not None:
            return max(layer for layer, weight in enumerate(self.histogram) if weight > 0)
        return spec.layers - 1 if self.max_exit_layer is None else self.max_exit_layer

    def check(self, spec: ModelSpec) -> None:
        if self.histogram is not None and len(self.histogram) != spec.layers:
            raise ConfigError(
                f"DyVTE: histogram has {len(self.histogram)} weights, but this model has {spec.layers} layers. Give "
                "one for each, the last for rows that never leave."
            )
        for name in ("exit_layer", "max_exit_layer", "min_exit_layer"):
            value = getattr(self, name)
            layers = [layer for layer in (value if isinstance(value, tuple) else (value,)) if layer is not None]
            if layers and max(layers) >= spec.layers:
                raise ConfigError(
                    f"DyVTE: {name}={value}, but this model has {spec.layers} layers (0 to {spec.layers - 1}). Give "
                    f"one of these{', or a fraction of the depth such as 0.5' * (name == 'exit_layer')}."
                )
        check_layers(self.candidate_layers, spec, "DyVTE: candidate_layers")

    def is_neutral(self, spec: ModelSpec) -> bool:
        if self.gate is not None:
            return not self.candidates(spec) and self.last_visual_layer(spec) == spec.layers - 1
        if isinstance(self.exit_layer, tuple):
            return all(layer is None or layer == spec.layers - 1 for layer in self.exit_layer)
        if self.histogram is not None:
            return len(self.histogram) == spec.layers and not any(self.histogram[:-1])
        return self.last_visual_layer(spec) == spec.layers - 1

    def excludes(self, other: Technique) -> str | None:
        if isinstance(other, DyVTE):
            return "both remove all visual tokens; the earlier one decides. Keep one."
        if self.recoverable and getattr(other, "recoverable", False):
            return "both bring rows of an earlier turn back. Use recoverable=False in one of them."
        return None

    def build(self, spec: ModelSpec) -> Gates | None:
        if self.gate is None:
            return None
        if self.gate == "paper":  # the original has them all
            return Gates(range(spec.layers), spec.hidden, self.hidden, light=False)
        chosen = range(spec.layers - 1) if self.candidate_layers == "all" else self.candidate_layers
        return Gates([layer for layer in chosen if layer < spec.layers - 1], spec.hidden, self.hidden, light=True)

    def gate_flops(self, spec: ModelSpec) -> int:
        """FLOPs of one gate for one row."""
        return 2 * (2 * spec.hidden * self.hidden + self.hidden * 2)

    def extra_flops(self, spec: ModelSpec, text_tokens: int, visual_tokens: int) -> int:
        if self.gate is None or not visual_tokens:
            return 0
        return len(self.candidates(spec)) * self.gate_flops(spec)

    def check_labels(self, labels: Tensor, layout: TokenLayout) -> None:
        if self.gate is None:
            return
        _, last, asked = read_prompts(layout)
        columns = torch.arange(labels.shape[1], device=labels.device)
        between = (layout.visual.cumsum(dim=1) > 0) & (columns <= last[:, None]) & asked[:, None]  # (B, S)
        wrong = between & ~layout.visual & (labels != -100)
        if bool(wrong.any()):
            row, column = wrong.nonzero()[0].tolist()
            raise InputError(
                f"DyVTE: {int(wrong.sum())} training labels, the first at row {row}, token {column}, lie on text that "
                "the gate reads before it decides what this text sees. Label the last answer only (-100 elsewhere)."
            )

    # --- what it does in a call --------------------------------------------------------------------------------------

    def keep(self, view: LayerView) -> Tensor | None:
        if self.gate is not None:
            return self._ask(view)
        if isinstance(self.exit_layer, (int, float)):
            if view.layer != self.last_visual_layer(view.spec) + 1:
                return None
            return view.alive & ~view.layout.visual  # (B, S)
        if view.layer == 0:
            view.scratch["exits"] = self._given(view) if self.histogram is None else self._drawn(view)
            return view.alive
        gone = [e is not None and e < view.layer for e in view.scratch["exits"]]
        # rows of an earlier turn that another technique brings back may enter behind the exit: looked for everywhere
        if not any(gone) or not (view.layer - 1 in view.scratch["exits"] or view.layout.revived):
            return None
        return view.alive & ~(view.layout.visual & _mask(gone, view))  # (B, S)

    def _given(self, view: LayerView) -> list[int | None]:
        batch = view.layout.visual.shape[0]
        if len(self.exit_layer) != batch:
            raise InputError(
                f"DyVTE: exit_layer has {len(self.exit_layer)} entries, but the batch has {batch} rows. Give one entry "
                "per row (with beams or several sequences, one for each of them)."
            )
        return list(self.exit_layer)

    def _drawn(self, view: LayerView) -> list[int | None]:
        """An exit for each row: its prompt's token ids and marks of its images, hashed to a number between 0 and 1."""
        layout, ends = view.layout, list(accumulate(self.histogram))
        if layout.ids is None:
            raise InputError("DyVTE: histogram draws by token ids. Call the model with input_ids, not inputs_embeds.")
        image = last_marked(layout.visual)  # (B,)
        last = torch.maximum(last_header(layout), image)  # (B,) what comes later is an answer
        width = layout.visual.shape[1]
        read = layout.valid & (torch.arange(width, device=image.device) <= last[:, None])  # (B, S)
        facts = torch.cat([layout.ids, read.long(), image[:, None], image_marks(view.states(), layout.visual)], dim=1)
        exits: list[int | None] = []
        for row in facts.tolist():  # a gate's only wait for the device
            ids = [token for token, counts in zip(row[:width], row[width : 2 * width], strict=True) if counts]
            image, *marks = row[2 * width :]
            digest = hashlib.blake2b(repr((self.seed, ids, marks)).encode(), digest_size=8).digest()
            number = int.from_bytes(digest, "big") / 2**64 * ends[-1]
            drawn = next((layer for layer, end in enumerate(ends) if number < end), self.last_visual_layer(view.spec))
            exits.append(None if image < 0 else drawn)
        view.output["exit_layer"] = [None if e == view.spec.layers - 1 else e for e in exits]
        return exits

    def _ask(self, view: LayerView) -> Tensor | None:
        """Let rows go by their gates, and by ``max_exit_layer``; keep them where a later question may want them."""
        if view.layer == 0:
            view.output.update(exit_layer=[None] * view.layout.visual.shape[0], probabilities={})
            before = view.store.get("stash")  # its rows are the first ones of the call, where they came back
            view.scratch["stashes"] = [] if before is None else [before]
            if view.layout.revived and self.recoverable:
                view.scratch["entering"] = set(before.layer[before.valid].tolist())
            return view.alive
        going = self._decide(view)
        gone = [layer is not None for layer in view.output["exit_layer"]]
        # where rows of an earlier turn enter: its own, or at any layer those that another technique brings back
        entering = view.layer in view.scratch["entering"] if "entering" in view.scratch else any(gone)
        if not any(going) and not (view.layout.revived and entering):
            return None
        keep = view.alive & ~(view.layout.visual & _mask(gone, view))  # (B, S)
        if self.recoverable:
            self._remember(view, keep)
        return keep

    def _decide(self, view: LayerView) -> list[bool]:
        """For each row, whether it leaves after the layer that has run."""
        done, told, layout = view.layer - 1, view.output["exit_layer"], view.layout
        limit = done == self.max_exit_layer
        staying = view.scratch.get("staying")  # rows with visual tokens that have not gone; None: not known yet
        nobody = [False] * len(told)
        if not (limit or done in self.candidates(view.spec)) or (staying is not None and not any(staying)):
            return nobody
        if layout.roles is None and layout.visual.shape[1] > 1:
            raise InputError("DyVTE: gates find the question by token ids. Call with input_ids, not inputs_embeds.")
        if "prompts" not in view.scratch:
            averaged, last, asked = read_prompts(layout)
            view.scratch["prompts"] = averaged, last, asked, averaged.any(dim=0).nonzero()[:, 0]
        averaged, last, asked, columns = view.scratch["prompts"]
        facts = [layout.visual.any(dim=1).float(), asked.float()]
        if not limit:
            with torch.no_grad():
                facts.append(view.module(gate_features(view.states(), averaged, last, columns), done))
            view.spend(len(told) * self.gate_flops(view.spec))
        present, asked, *scores = torch.stack(facts).tolist()  # a gate's only wait for the device
        staying = [bool(p) and e is None for p, e in zip(present, told, strict=True)]
        going = staying
        if not limit:
            # p > threshold, compared where nothing is rounded to 0 or 1
            open_ = [stays and bool(a) for stays, a in zip(staying, asked, strict=True)]
            view.output["probabilities"][done] = [
                sigmoid(score) if o else None for o, score in zip(open_, scores[0], strict=True)
            ]
            going = [o and score > logit(self.threshold) for o, score in zip(open_, scores[0], strict=True)]
        for row, goes in enumerate(going):
            if goes:
                told[row] = done
        view.scratch["staying"] = [stays and not goes for stays, goes in zip(staying, going, strict=True)]
        return going

    # --- turns -------------------------------------------------------------------------------------------------------

    def revive(self, layout: TokenLayout, store: dict[str, Any]) -> Revived | None:
        stash = store.get("stash")
        if not self.recoverable or stash is None or layout.roles is None:
            return None
        asking = layout.roles.assistant_header.any(dim=1)  # (B,) a new question; not the guesses of assisted decoding
        valid = stash.valid & asking[:, None]  # (B, R)
        if not bool(valid.any()):
            return None
        return Revived(replace(stash, valid=valid), stash.layer)

    def _remember(self, view: LayerView, keep: Tensor) -> None:
        """Keep the rows that leave here; forget those of an earlier turn that went on."""
        stashes, count = view.scratch["stashes"], view.layout.revived
        leaving = view.alive & ~keep  # (B, S)
        if count:
            before = stashes[0]
            entering = (before.layer == view.layer) & view.alive[:, :count]  # (B, revived)
            stashes[0] = replace(before, valid=before.valid & ~(entering & keep[:, :count]))
            leaving = leaving & ~nn.functional.pad(entering, (0, leaving.shape[1] - count), value=False)
        stashes.append(view.stash(leaving))
        view.store["stash"] = reduce(Stash.joined, stashes)


# --- helpers ----------------------------------------------------------------------------------------------------------


def exit_histogram(runs: Iterable[Run | Report]) -> list[float]:
    """Share of rows with images that left after each layer, for ``DyVTE(histogram=...)``; the last stayed to the end.

    Args:
        runs: what ``with technique(model) as run`` gave, or their reports. A run knows its last call with images alone:
            take ``run.report()`` after each batch.

    Raises:
        ConfigError: none of them saw an image.
    """
    reports = [run.report() if isinstance(run, Run) else run for run in runs]
    exits = [layer for report in reports for layer in report.exit_layer if layer is not None]
    if not exits:
        raise ConfigError("exit_histogram: no run saw an image. Give reports taken after calls with images.")
    layers = max(len(report.visual_per_layer) for report in reports)
    return [exits.count(layer) / len(exits) for layer in range(layers)]


def image_marks(states: Tensor, visual: Tensor, count: int = 8) -> Tensor:
    """(B, count) long, in some dimensions the visual token of the largest value: tells images apart, and stays the same
    where a batch of another size rounds differently."""
    dimensions = torch.arange(count, device=states.device) * states.shape[2] // count
    values = states[:, :, dimensions].float().masked_fill(~visual[:, :, None], -torch.inf)  # (B, S, count)
    largest = (values == values.amax(dim=1, keepdim=True)) & visual[:, :, None]
    number = visual.long().cumsum(dim=1)[:, :, None].expand_as(largest)  # (B, S, count) counted among visual tokens
    return number.masked_fill(~largest, visual.shape[1] + 1).amin(dim=1)  # the first of equal ones


def _mask(rows: list[bool], view: LayerView) -> Tensor:
    """(B, 1) bool."""
    return torch.tensor(rows, device=view.alive.device)[:, None]
