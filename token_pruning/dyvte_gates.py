"""DyVTE's gates: the learned module, what it reads of a prompt, and the checkpoints of the authors' code."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mllm.cost import ModelSpec
from mllm.errors import LoadError
from mllm.families import find_parts
from mllm.layout import TokenLayout
from mllm.saving import LearnedWeights, fingerprint

PREFIX = "model.visual_gates_router."  # of the gates in the authors' checkpoints


class Gate(nn.Module):
    """W2 GELU(W1 f): (..., 2D) features to (..., 2) scores of staying and of leaving."""

    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.w1 = nn.Linear(2 * width, hidden, bias=bias)
        self.w2 = nn.Linear(hidden, 2, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.w2(nn.functional.gelu(self.w1(features)))


class Gates(nn.Module):
    """The gates of some layers; fresh light ones let nobody go.

    Args:
        layers: which layers have one.
        width: of the residual stream.
        hidden: units.
        light: normalised features and biases; otherwise as in the paper.
    """

    def __init__(self, layers: Iterable[int], width: int, hidden: int, light: bool) -> None:
        super().__init__()
        self.light = light
        self.visual_gates_router = nn.ModuleDict({str(layer): Gate(width, hidden, light) for layer in layers})
        for gate in self.visual_gates_router.values():
            if light:
                nn.init.zeros_(gate.w2.weight)
                nn.init.zeros_(gate.w2.bias)
            else:
                nn.init.xavier_uniform_(gate.w1.weight)
                nn.init.xavier_uniform_(gate.w2.weight)

    def forward(self, features: Tensor, layer: int) -> Tensor:
        """(...) score of leaving minus score of staying after ``layer``, from (..., 2, D) features [a, z]."""
        gate = self.visual_gates_router[str(layer)]
        if self.light:
            features = features * (features.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()  # (..., 2, D)
        stay, leave = gate(features.flatten(-2).to(gate.w1.weight.dtype)).float().unbind(dim=-1)
        return leave - stay


def read_prompts(layout: TokenLayout) -> tuple[Tensor, Tensor, Tensor]:
    """What gates read of each row, wherever its padding stands.

    Returns:
        (B, S) bool, the text that is averaged; (B,) long, the prompt's last token; (B,) bool, whether there is
        anything to ask: the header of an answer behind the last image.
    """
    columns = torch.arange(layout.visual.shape[1], device=layout.visual.device)
    last, image = last_header(layout), last_marked(layout.visual)  # (B,)
    averaged = layout.text & (columns > image[:, None]) & (columns < last[:, None])  # (B, S)
    return averaged, last.clamp(min=0), (last > image) & (image >= 0)


def gate_features(states: Tensor, averaged: Tensor, last: Tensor, columns: Tensor | None = None) -> Tensor:
    """(B, 2, D) float32 features [a, z] of a residual stream (B, S, D).

    Args:
        states: the stream.
        averaged, last: from :func:`read_prompts`.
        columns: (C,) long, the columns in which any row has averaged text: what need not be read is left alone.
    """
    rows = torch.arange(states.shape[0], device=states.device)
    last = states[rows, last].float()  # (B, D)
    if columns is not None:
        states, averaged = states[:, columns], averaged[:, columns]  # (B, C, D), (B, C)
    count = averaged.sum(dim=1, keepdim=True)  # (B, 1)
    total = states.float().masked_fill(~averaged[:, :, None], 0.0).sum(dim=1)  # (B, D)
    return torch.stack([torch.where(count > 0, total / count.clamp(min=1), last), last], dim=1)


def last_marked(marked: Tensor) -> Tensor:
    """(B,) long, column of the last marked token of (B, S); -1 without any."""
    return torch.arange(marked.shape[1], device=marked.device).where(marked, -1).amax(dim=1)


def last_header(layout: TokenLayout) -> Tensor:
    """(B,) long, column of the last token of the last answer's header; -1 without one."""
    return last_marked(torch.zeros_like(layout.visual) if layout.roles is None else layout.roles.assistant_header)


def sigmoid(score: float) -> float:
    """Probability of leaving, from :class:`Gates`' score."""
    small = math.exp(-abs(score))
    return (1.0 if score >= 0 else small) / (1.0 + small)


def logit(probability: float) -> float:
    """The score above which the probability is above this; infinite for 0 and 1, which no probability reaches."""
    if probability in (0.0, 1.0):
        return math.copysign(math.inf, probability - 0.5)
    return math.log(probability) - math.log1p(-probability)


# --- the authors' checkpoints -----------------------------------------------------------------------------------------


def load_gates(source: str | Path | Mapping[str, Tensor], model: nn.Module | None = None) -> tuple[int, LearnedWeights]:
    """Hidden units and weights of published gates; see :meth:`mllm.token_pruning.DyVTE.from_checkpoint`."""
    name = "the state dict" if isinstance(source, Mapping) else str(source)
    tensors = _read(source, name)
    hidden = _check({key: tuple(value.shape) for key, value in tensors.items()}, name, model)
    tensors = {key.removeprefix("model."): value for key, value in tensors.items()}
    return hidden, LearnedWeights(tensors, {} if model is None else fingerprint(model), name)


def _read(source: str | Path | Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """What a checkpoint holds of gates, by their full names; other tensors are not read."""
    if isinstance(source, Mapping):
        return {key: value.detach().cpu() for key, value in source.items() if "visual_gates" in key}
    from safetensors import SafetensorError, safe_open

    path, tensors = Path(source), {}
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    try:
        for file in files:
            with safe_open(file, framework="pt") as opened:
                keys = [key for key in opened.keys() if "visual_gates" in key]  # noqa: SIM118, not a dict
                tensors |= {key: opened.get_tensor(key) for key in keys}
    except (OSError, SafetensorError) as error:
        raise LoadError(f"{name} cannot be read as safetensors: {error}. Give a .safetensors file.") from error
    return tensors


def _check(shapes: dict[str, tuple[int, ...]], name: str, model: nn.Module | None) -> int:
    """Raise LoadError where these are not the paper's gates, of ``model`` where it is given; their hidden units."""
    pattern = re.compile(re.escape(PREFIX) + r"(\d+)\.w[12]\.weight")
    depth = 1 + max((int(found[1]) for key in shapes if (found := pattern.fullmatch(key))), default=0)
    depth = min(depth, len(shapes) + 1)  # more can only be missing
    first = shapes.get(f"{PREFIX}0.w1.weight", ())
    hidden, double = first if len(first) == 2 else (0, 0)
    if model is not None:
        spec = ModelSpec.from_config(find_parts(model).text_config)
        depth, double = spec.layers, 2 * spec.hidden
    wanted = {}
    for layer in range(depth):
        wanted |= {f"{PREFIX}{layer}.w1.weight": (hidden, double), f"{PREFIX}{layer}.w2.weight": (2, hidden)}
    faults = {
        "lacks": [key for key in wanted if key not in shapes],
        "holds what is no gate of this model:": [key for key in shapes if key not in wanted],
        "holds gates of the wrong shape:": [
            f"{key}, {shapes[key]} instead of {shape}"
            for key, shape in wanted.items()
            if key in shapes and shapes[key] != shape
        ],
    }
    for fault, keys in faults.items():
        if keys:
            raise LoadError(
                f"{name} {fault} {'; '.join(keys[:4])}{'; ...' if len(keys) > 4 else ''}. Gates are "
                f"{PREFIX}{{layer}}.w1.weight (hidden, 2 * width) and .w2.weight (2, hidden), for each layer."
            )
    return hidden
