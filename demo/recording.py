"""What happened in the layers while a prompt was read: which visual tokens were there, and what techniques tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mllm.attention import STEP
from mllm.demo.uploads import Picture
from mllm.families import Parts
from mllm.run import Report, Run
from mllm.technique import Stack

_MOST = 4_000_000  # numbers that one output of a technique may have to be kept


@dataclass(frozen=True)
class Grid:
    """Where the visual tokens of one picture lie.

    Attributes:
        first: index of its first token that is drawn, among the picture's own tokens.
        height, width: of the grid.
        step: tokens from one grid row to the next.
        crop: the model sees the middle square of the picture only.
    """

    first: int
    height: int
    width: int
    step: int
    crop: bool = False


@dataclass(frozen=True)
class Inside:
    """One prompt, layer by layer; batch of one.

    Attributes:
        layers: how many there are.
        pictures: in the order of the prompt.
        blocks: per picture, (tokens,) long, where its tokens stand in the prompt; empty where that is not known.
        grids: per picture; None where the place of its tokens is not known.
        alive: per layer, (S,) bool, tokens that enter it; layers that share a state share an array.
        policies: per layer, what visual tokens that are there do: ``"full"`` or words for what they skip.
        report: the run's.
        outputs: what techniques told, as plain numbers and arrays.
        tokens: the prompt's tokens as text; visual ones are empty.
        visual: (S,) bool.
    """

    layers: int
    pictures: Sequence[Picture]
    blocks: list[np.ndarray]
    grids: list[Grid | None]
    alive: list[np.ndarray]
    policies: list[str]
    report: Report
    outputs: dict[str, dict[str, Any]]
    tokens: list[str]
    visual: np.ndarray

    @property
    def exit_layer(self) -> int | None:
        """Last layer with visual tokens, where they leave before the end."""
        layer = self.report.exit_layer[0] if self.report.exit_layer else None
        return None if layer is None or layer >= self.layers - 1 else layer

    @property
    def counts(self) -> list[int]:
        """Visual tokens per layer."""
        return [int((alive & self.visual).sum()) for alive in self.alive]


class Recorder:
    """Looks at which rows enter each layer, through hooks that are there inside the ``with`` block only."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._hooks: list[RemovableHandle] = []
        self._alive: dict[int, Tensor] = {}
        self._layout: Any = None

    def __enter__(self) -> Recorder:
        # registered after the techniques', and so called after them: the step knows the layer's rows by then
        for number, layer in enumerate(self.parts.layers):
            hook = partial(self._look, number)
            self._hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _look(self, number: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        step = kwargs.get(STEP)
        if step is None or not step.visual:
            return
        self._layout = step.layout
        # the tensors are kept and read later: no waiting for the device in between
        self._alive[number] = step.layout.valid if step.reduced is None else step.reduced  # (B, S)

    def finish(
        self, run: Run, stack: Stack, processor: Any, inputs: Mapping[str, Tensor], pictures: Sequence[Picture]
    ) -> Inside:
        """What was seen, off the device."""
        spec, report = run.spec, run.report()
        ids = inputs["input_ids"][0].tolist()
        visual, blocks = np.zeros(len(ids), dtype=bool), []
        alive = [np.ones(len(ids), dtype=bool)] * spec.layers
        if self._layout is not None:
            visual = self._layout.visual[0].cpu().numpy()
            index = self._layout.image_index[0].cpu().numpy()
            blocks = [np.flatnonzero(index == number) for number in range(index.max(initial=-1) + 1)]
            read: dict[int, np.ndarray] = {}
            for tensor in self._alive.values():
                if id(tensor) not in read:
                    read[id(tensor)] = tensor[0].cpu().numpy()
            alive = [read[id(self._alive[n])] if n in self._alive else alive[n] for n in range(spec.layers)]
        if len(blocks) != len(pictures):  # neighbours without text between them are one block
            blocks = [np.zeros(0, dtype=int) for _ in pictures]
        convert = processor.tokenizer.decode
        tokens = ["" if seen else convert([token]) for token, seen in zip(ids, visual.tolist(), strict=True)]
        thw = inputs.get("image_grid_thw")
        return Inside(
            spec.layers,
            list(pictures),
            blocks,
            [
                _grid(self.parts, processor, len(block), picture, None if thw is None else thw[number].tolist())
                for number, (block, picture) in enumerate(zip(blocks, pictures, strict=True))
            ],
            alive,
            [_words(stack.visual_policy(layer, spec)) for layer in range(spec.layers)],
            report,
            {name: _plain(output) for name, output in run.outputs.items()},
            tokens,
            visual,
        )


def _words(policy: Any) -> str:
    if policy is None:
        return "full"
    does = (["its own value"] if policy.own_value else []) + (["the FFN"] if policy.ffn else [])
    return f"keys and values only{', then ' + ' and '.join(does) if does else ''}"


def _plain(value: Any) -> Any:
    """Tensors as arrays, so that nothing holds on to the device."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", torch.float32).numpy() if value.numel() <= _MOST else None
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value


def _grid(parts: Parts, processor: Any, count: int, picture: Picture, thw: list[int] | None) -> Grid | None:
    """The grid that ``count`` tokens of a picture form; None where it cannot be told."""
    config, width_over_height = parts.model.config, picture.image.width / picture.image.height
    if thw is not None:  # Qwen: rows and columns of patches, some of which are merged into one token
        merge = config.vision_config.spatial_merge_size
        height, width = thw[1] // merge, thw[2] // merge
        return Grid(0, height, width, width) if height * width == count else None
    side = round(count**0.5)
    if count and side * side == count:
        crop = bool(getattr(processor.image_processor, "do_center_crop", False))
        return Grid(0, side, side, side, crop and parts.family.model_type == "llava")
    vision = config.vision_config
    base = (vision.image_size // vision.patch_size) ** 2 if hasattr(vision, "image_size") else 0
    rest = count - base
    if base <= 0 or rest <= 0:
        return None
    # tiles behind the small view: rows of tokens with one more at the end of each
    found = [Grid(base, rest // step, step - 1, step) for step in range(2, rest + 1) if rest % step == 0]
    return min(found, key=lambda grid: abs(grid.width / grid.height - width_over_height), default=None)
