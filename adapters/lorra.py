"""LoRRA (Wings): low-rank attention beside each layer, one learner for images and one for text, and a router.

https://arxiv.org/abs/2406.03496. Let h be the residual stream after a layer's own attention, f a memory: the image
features (visual learner) or the embeddings of text tokens (textual learner), as they entered layer 0. Per learner

    Q = h + Bq Aq h      K = f + Bk Ak f      V = f + Bv Av f            (rank r, no bias)
    L(h, f) = Bo Ao softmax(RoPE(Q) RoPE(K)^T / sqrt(d) + causal) V      (heads of the model's width d)

    r = softmax(SiLU(sum_j sum_heads W_h[i, j] U[:, pos_j] + b))         (W: the layer's own attention weights)
    h <- h + r_v L_v(h, image) + r_t L_t(h, text)

Bo starts at zero: attaching changes nothing. The router is linear in W, so its sums are attention with two more value
channels; no weights are materialised. Each learner has its own keys and values in the cache object. It has as many
heads as the model's hidden size holds (with most models: as many as the model's queries), each with its own keys.

Defects of the original that are mended, and can be switched on for its released weights: text masks indexed by the
wrong coordinate, which shows answers to their own predictors (``text_mask="legacy_compressed"``); both learners added
twice (``double_add``); visual memory seen from before the image (``visual_memory="all"``). And without a switch:
batches equal their rows, several images, any system prompt, a cache (the original recomputes everything per token).

A row that no image precedes has r_t = 1 and no visual part, so that text-only prompts and the text before an image are
computed alike. When not to use it: it adds compute, it saves none; without training it does nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, Strict
from torch import Tensor, nn

from mllm.cost import ModelSpec
from mllm.errors import CacheError, ConfigError, InputError, LoadError
from mllm.layout import TokenLayout
from mllm.rows import Rows
from mllm.saving import LearnedWeights, read_tensors
from mllm.technique import BranchView, Layers, Memory, Technique, TrainedTechnique, check_layers, register


class LowRank(nn.Module):
    """(..., D) -> (..., D): down to the rank and up again, the way up starting at zero."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)
        nn.init.trunc_normal_(self.down.weight, std=0.02)
        nn.init.zeros_(self.up.weight)

    def forward(self, states: Tensor) -> Tensor:
        return self.up(self.down(states))


class Learner(nn.Module):
    """Low-rank attention over a memory."""

    def __init__(self, width: int, rank: int, head_dim: int, normalise: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (LowRank(width, rank) for _ in range(4))
        self.head_dim, self.width, self.normalise = head_dim, width, normalise

    def heads(self, projection: LowRank, states: Tensor) -> Tensor:
        """(B, heads, N, head_dim) ``states`` (B, N, D) with their low-rank update."""
        if self.normalise:
            states = nn.functional.rms_norm(states, (self.width,))
        states = states + projection(states)
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class LayerLearners(nn.Module):
    """What one layer learns."""

    def __init__(self, spec: ModelSpec, rank: int, router_length: int | None, normalise: bool) -> None:
        super().__init__()
        self.visual = Learner(spec.hidden, rank, spec.head_dim, normalise)
        self.text = Learner(spec.hidden, rank, spec.head_dim, normalise)
        if router_length is not None:
            self.table = nn.Parameter(torch.zeros(2, router_length))  # U, per position of the row
            self.bias = nn.Parameter(torch.zeros(2))


@register
class LoRRA(TrainedTechnique):
    """Learners and router beside the layers. Changes text-only prompts too, once trained.

    Args:
        rank: of all projections.
        layers: ``"all"``, a list of layer numbers from 0, or ``"start:stop"``.
        router: mixes the learners per row; without, both are added with weight 1 (the first training stage).
        router_length: positions in the router's table: no row may be longer.
        visual_memory: which image tokens a row sees: ``"causal"``: those at or before it; ``"all"``: every one of the
            prompt, as the original.
        text_mask: ``"causal"``; or ``"legacy_compressed"``, the original's mask, which leaks later tokens and cannot be
            cached.
        text_only: rows that no image precedes: ``"bypass"`` the router (weight 1 for the textual learner), or
            ``"router"``: its weight as for other rows.
        double_add: add what the router mixes twice, as the original; rows that bypass it are added once.
        normalise: RMS-normalise what the learners read.
        skip_system: the system prompt and the header of the first user turn are no memory; needs the processor.
        weights: see :class:`~mllm.technique.TrainedTechnique`.

    Raises:
        ConfigError: layers that the model does not have, a hidden size that is no multiple of the head's width,
            ``double_add`` without a router, ``skip_system`` without the processor.
        InputError: a row longer than the router's table; no user turn in a prompt with ``skip_system``.
        CacheError: the legacy mask with a cache; ``visual_memory="all"`` with an image in a later turn.
    """

    name: ClassVar[str] = "LoRRA"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.03496"
    training: ClassVar[str | None] = "mllm.adapters.lorra_training:recipe"
    acts_on_text: ClassVar[bool] = True

    rank: Annotated[int, Strict(), Field(ge=1)] = 64
    layers: Layers = "all"
    router: bool = True
    router_length: Annotated[int, Strict(), Field(ge=1)] = 4096
    visual_memory: Literal["causal", "all"] = "causal"
    text_mask: Literal["causal", "legacy_compressed"] = "causal"
    text_only: Literal["bypass", "router"] = "bypass"
    double_add: bool = False
    normalise: bool = False
    skip_system: bool = False

    def check(self, spec: ModelSpec) -> None:
        check_layers(self.layers, spec, self.name)
        if self.double_add and not self.router:
            raise ConfigError(
                "LoRRA: double_add=True doubles what the router mixes, and router=False has no router. Leave one out."
            )
        if spec.hidden % spec.head_dim:
            raise ConfigError(
                f"LoRRA: this model's hidden size {spec.hidden} is no multiple of its heads' width {spec.head_dim}, "
                "which its learners' heads would have. It cannot be used with this model."
            )

    def is_neutral(self, spec: ModelSpec) -> bool:
        return not self.layers

    def excludes(self, other: Technique) -> str | None:
        if isinstance(other, LoRRA):
            return "both add learners. Keep one."
        if type(other).keep is not Technique.keep:
            return "LoRRA's learners and router read all rows in every layer, also those that the other removes."
        if type(other).visual_policy is not Technique.visual_policy:
            return "visual rows skip the attention that LoRRA's learners and router stand beside."
        return None

    def branch_layers(self, spec: ModelSpec) -> tuple[int, ...]:
        return tuple(range(spec.layers)) if self.layers == "all" else self.layers

    def build(self, spec: ModelSpec) -> nn.Module:
        length = self.router_length if self.router else None
        return nn.ModuleDict(
            {str(n): LayerLearners(spec, self.rank, length, self.normalise) for n in self.branch_layers(spec)}
        )

    @property
    def needs_roles(self) -> bool:
        """The system prompt is told by the processor's chat template."""
        return self.skip_system

    def check_call(self, layout: TokenLayout, lengths: Callable[[], Tensor], cached: bool) -> None:
        most = layout.past_length + layout.valid.shape[1]
        if self.router and most > self.router_length and (longest := int(lengths().max())) > self.router_length:
            raise InputError(
                f"LoRRA: a row of {longest} tokens is longer than the router's table, router_length="
                f"{self.router_length}. Shorten the prompt, or train with a longer table."
            )
        if self.text_mask == "legacy_compressed" and cached:
            raise CacheError(
                'LoRRA: text_mask="legacy_compressed" lets rows see later text, which a cache cannot repeat. Call with '
                "use_cache=False."
            )
        if self.visual_memory == "all" and layout.past_length and bool(layout.visual.any()):
            raise CacheError(
                'LoRRA: visual_memory="all" shows this image to the tokens in the cache too, which are not computed '
                'again. Start with an empty cache, or use visual_memory="causal".'
            )
        if self.skip_system and not layout.past_length:
            headers = None if layout.roles is None else layout.roles.user_header.any(dim=1)  # (B,)
            if headers is None or not bool(headers.all()):
                row = "" if headers is None else f" of row {int(headers.int().argmin())}"
                raise InputError(
                    f"LoRRA: skip_system=True finds no header of a user turn in the prompt{row}. Call with input_ids "
                    "that hold one, as chat_inputs() and chat templates write it."
                )

    # --- one layer -------------------------------------------------------------------------------------------------

    def channels(self, layer: int, positions: Tensor, module: nn.Module) -> Tensor | None:
        return module[str(layer)].table.T[positions] if self.router else None  # (B, K, 2)

    def branch(self, view: BranchView) -> Tensor:
        learners: LayerLearners = view.module[str(view.layer)]
        if not view.scratch:
            view.scratch.update(self._call(view))
        text = self._learner(view, "text", learners.text)  # (B, S, D)
        visual = self._learner(view, "visual", learners.visual)
        if not self.router:
            return text + visual
        weights = torch.softmax(nn.functional.silu(view.mixed + learners.bias), dim=-1)  # (B, S, 2)
        view.report("router", view.layer, weights.detach())
        if self.double_add:
            weights = 2 * weights
        for_visual, for_text = weights[..., :1], weights[..., 1:]
        if self.text_only == "bypass":
            blind = view.scratch["blind"]
            for_text = torch.ones_like(for_text) if blind is None else for_text.masked_fill(blind, 1.0)
        return for_text * text + for_visual * visual

    def _learner(self, view: BranchView, name: str, learner: Learner) -> Tensor:
        """(B, S, D) what one learner makes of its memory; 0 for rows that see nothing of it."""
        batch, length, width = view.states.shape
        rows: Rows | None = view.scratch[name]
        keys = values = None
        if rows is not None:
            new = rows.take(view.embeddings, batch)  # (B, n, D)
            keys, values = (learner.heads(projection, new) for projection in (learner.k, learner.v))
            _, keys = view.rotate(keys[:, :0], keys, *(rows.take(table, batch) for table in view.rotary))
            view.spend(2 * 2 * 2 * batch * rows.length * self.rank * width)
        memory = view.extend(name, rows, keys, values)
        if memory is None:
            return torch.zeros_like(view.states)
        if name == "visual" and view.scratch["blind"] is None:
            view.scratch["blind"] = self._blind(view, memory)
        queries = learner.heads(learner.q, view.states)  # (B, H, S, d)
        queries, _ = view.rotate(queries, queries[:, :0], *view.rotary)
        out = view.attend(queries, memory, view.scratch[f"{name}_last"])  # (B, S, H, d)
        view.spend(2 * 2 * 2 * batch * length * self.rank * width)
        return learner.o(out.flatten(2))

    def _call(self, view: BranchView) -> dict[str, Any]:
        """What all layers of a call share: rows that enter each memory, and how far rows see where it is unusual."""
        layout = view.layout
        text = layout.text
        if self.skip_system and not layout.past_length:
            roles = layout.roles
            text = text & ~roles.system & ~(roles.user_header & (roles.turn <= 0))
        wanted = {"text": text, "visual": layout.visual & layout.valid}
        counts = torch.stack([mask.sum(dim=1) for mask in wanted.values()]).tolist()
        call: dict[str, Any] = {"blind": None, "text_last": None, "visual_last": None}
        for (name, mask), number in zip(wanted.items(), counts, strict=True):
            call[name] = Rows.select(mask, number) if any(number) else None
        if self.visual_memory == "all":
            call["visual_last"] = view.columns[:, -1:].expand(-1, view.columns.shape[1])
        if self.text_mask == "legacy_compressed":
            # the row at position p sees the first p + 1 texts of the memory, wherever they stand
            last = text.sum(dim=1, keepdim=True)  # (B, 1)
            last = torch.minimum(layout.positions + 1, last)  # (B, S)
            place = text.long().cumsum(dim=1)  # (B, S) ascending
            call["text_last"] = torch.searchsorted(place, last).masked_fill(last == 0, -1)
        return call

    def _blind(self, view: BranchView, memory: Memory) -> Tensor:
        """(B, S, 1) bool, rows that see no image."""
        last = view.columns if view.scratch["visual_last"] is None else view.scratch["visual_last"]  # (1, S)
        beyond = int(view.columns.shape[1]) + view.layout.past_length
        first = memory.columns.masked_fill(memory.columns < 0, beyond).amin(dim=1, keepdim=True)  # (B, 1)
        return (last < first)[..., None]

    # --- cost and released weights ---------------------------------------------------------------------------------

    def extra_flops(self, spec: ModelSpec, text_tokens: int, visual_tokens: int) -> int:
        rows = text_tokens + visual_tokens
        total = 0
        for memory in (text_tokens, visual_tokens):
            if memory:
                total += 2 * 2 * 2 * (rows + memory) * self.rank * spec.hidden + 4 * rows * memory * spec.hidden
        if self.router:
            total += 4 * rows * rows * spec.q_width
        return total * len(self.branch_layers(spec))

    def extra_cache(self, spec: ModelSpec, text_tokens: int, visual_tokens: int) -> int:
        return 2 * spec.hidden * (text_tokens + visual_tokens) * len(self.branch_layers(spec))

    @classmethod
    def from_released(cls, source: str | Path | Mapping[str, Tensor], **arguments: Any) -> LoRRA:
        """LoRRA with the learners and routers of a checkpoint in the authors' layout, computing what their code does.

        Keys ``model.layers.{i}.{attn_pool,attn_t_pool}.{q,k,v,o}_proj.{0,1}.weight`` and
        ``model.layers.{i}.reweight_module.linear.{weight,bias}``; other tensors beside them are left alone.

        Args:
            source: a state dict, a ``.safetensors`` file, or a folder with such files.
            arguments: of LoRRA, instead of the authors' ``double_add=True``, ``visual_memory="all"``,
                ``text_mask="legacy_compressed"`` and ``skip_system=True``, under which such weights were trained;
                ``rank``, ``layers``, ``router`` and ``router_length`` are read off the tensors.

        Raises:
            LoadError: a tensor is missing, unexpected or of another shape, or nothing can be read.
        """
        where = "the state dict" if isinstance(source, Mapping) else str(source)
        ours = re.compile(r"(^|\.)(attn_pool|attn_t_pool|reweight_module)\.")
        given = read_tensors(source, lambda name: ours.search(name) is not None)
        layers = sorted({int(found[1]) for name in given if (found := re.match(r"model\.layers\.(\d+)\.", name))})
        if not layers:
            raise LoadError(f"{where} holds no learners (model.layers.*.attn_pool.*): it is no Wings checkpoint.")
        rank, width = _usual_shape(given, "_proj.0.weight")
        router = any("reweight_module" in name for name in given)
        _, length = _usual_shape(given, "linear.weight")
        names: dict[str, tuple[str, tuple[int, ...]]] = {}  # ours and the shape, by theirs
        for layer in layers:
            start = f"model.layers.{layer}."
            for pool, part in (("attn_pool", "visual"), ("attn_t_pool", "text")):
                for p in "qkvo":
                    for number, (way, shape) in enumerate((("down", (rank, width)), ("up", (width, rank)))):
                        names[f"{start}{pool}.{p}_proj.{number}.weight"] = f"{layer}.{part}.{p}.{way}.weight", shape
            if router:
                names[start + "reweight_module.linear.weight"] = f"{layer}.table", (2, length)
                names[start + "reweight_module.linear.bias"] = f"{layer}.bias", (2,)
        missing, unexpected = sorted(set(names) - set(given)), sorted(set(given) - set(names))
        wrong = [
            f"{name} {tuple(value.shape)}, not {names[name][1]}"
            for name, value in given.items()
            if name in names and tuple(value.shape) != names[name][1]
        ]
        if missing or unexpected or wrong:
            raise LoadError(
                f"{where}: missing {', '.join(missing[:3]) or 'nothing'}; unexpected "
                f"{', '.join(unexpected[:3]) or 'nothing'}; of another shape: {'; '.join(wrong[:3]) or 'none'}."
            )
        own: dict[str, Any] = {"rank": rank, "layers": layers, "router": router, "double_add": router}
        own |= {"visual_memory": "all", "text_mask": "legacy_compressed", "skip_system": True}
        if router:
            own["router_length"] = length
        tensors = {names[name][0]: value for name, value in given.items()}
        return cls(**{**own, **arguments}).with_learned(LearnedWeights(tensors, {}, where))


def _usual_shape(tensors: Mapping[str, Tensor], ending: str) -> tuple[int, int]:
    """The shape that most matrices of this kind have, which those of others are told by."""
    shapes = Counter(value.shape for name, value in tensors.items() if name.endswith(ending) and value.ndim == 2)
    return tuple(shapes.most_common(1)[0][0]) if shapes else (1, 1)
