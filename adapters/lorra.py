"""LoRRA (Wings): low-rank attention beside each layer, one learner for images and one for text, and a router.

https://arxiv.org/abs/2406.03496. Let h be the residual stream after a layer's own attention, f a memory: the image
features (visual learner) or the embeddings of text tokens (textual learner), as they entered layer 0. Per learner

    Q = h + Bq Aq h      K = f + Bk Ak f      V = f + Bv Av f            (rank r, no bias)
    L(h, f) = Bo Ao softmax(RoPE(Q) RoPE(K)^T / sqrt(d) + causal) V      (heads of the model's width d)

    r = softmax(SiLU(sum_j sum_heads W_h[i, j] U[:, pos_j] + b))         (W: the layer's own attention weights)
    h <- h + r_v L_v(h, image) + r_t L_t(h, text)

Bo starts at zero: attaching changes nothing. The router is linear in W, so its sums are attention with two more value
channels; no weights are materialised. Each learner has its own keys and values in the cache object.

Defects of the original that are mended, and can be switched on for its released weights: text masks indexed by the
wrong coordinate, which shows answers to their own predictors (``text_mask="legacy_compressed"``); both learners added
twice (``double_add``); visual memory seen from before the image (``visual_memory="all"``). And without a switch:
batches equal their rows, several images, any system prompt, a cache (the original recomputes everything per token).

A row that no image precedes has r_t = 1 and no visual part, so that text-only prompts and the text before an image are
computed alike. When not to use it: it adds compute, it saves none; without training it does nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, Strict
from torch import Tensor, nn

from mllm.cost import ModelSpec
from mllm.errors import CacheError, ConfigError, InputError, LoadError
from mllm.rows import Rows
from mllm.saving import LearnedWeights, read_tensors
from mllm.technique import BranchView, Layers, Technique, TrainedTechnique, check_layers, register


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

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """(B, S, D); ``mask`` (B, 1, S, N) bool, None where every key is seen or, with ``causal``, the earlier ones."""
        out = nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=causal)
        return self.o(out.transpose(1, 2).flatten(2))


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
        double_add: add both learners twice, as the original.
        normalise: RMS-normalise what the learners read.
        skip_system: the system prompt is no memory; needs the processor.
        weights: see :class:`~mllm.technique.TrainedTechnique`.

    Raises:
        ConfigError: layers that the model does not have, or a hidden size that is no multiple of the head's width.
        InputError: a prompt longer than the router's table.
        CacheError: the legacy mask with a cache.
    """

    name: ClassVar[str] = "LoRRA"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.03496"
    training: ClassVar[str | None] = "mllm.adapters.lorra_training:recipe"
    acts_on_text: ClassVar[bool] = True
    wants_roles: ClassVar[bool] = True

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

    # --- one layer -------------------------------------------------------------------------------------------------

    def channels(self, layer: int, positions: Tensor, module: nn.Module) -> Tensor | None:
        if not self.router:
            return None
        if positions.shape[1] > self.router_length and (longest := int(positions.max()) + 1) > self.router_length:
            raise InputError(
                f"LoRRA: a row of {longest} tokens is longer than the router's table, router_length="
                f"{self.router_length}. Shorten the prompt, or train with a longer table."
            )
        return module[str(layer)].table.T[positions]  # (B, K, 2)

    def branch(self, view: BranchView) -> Tensor:
        learners: LayerLearners = view.module[str(view.layer)]
        if not view.scratch:
            view.scratch.update(self._memories(view))
        batch, length, width = view.states.shape
        view.spend(2 * 2 * 2 * batch * length * self.rank * width * self._learners(view))  # queries and outputs
        text = self._learner(view, "text", learners.text)  # (B, S, D)
        visual = self._learner(view, "visual", learners.visual)
        sees_image = view.scratch["visual"]["some"]  # (B, S, 1) or a bool
        if visual is None:
            visual = torch.zeros_like(text)
        if self.router:
            weights = torch.softmax(nn.functional.silu(view.mixed + learners.bias), dim=-1)  # (B, S, 2)
            for_visual, for_text = weights[..., :1], weights[..., 1:]
            if self.text_only == "bypass":
                for_text = torch.where(torch.as_tensor(sees_image, device=text.device), for_text, 1.0)
            view.report("router", view.layer, weights.detach())
            visual, text = visual * for_visual, text * for_text
        added = visual + text
        return 2 * added if self.double_add else added

    def _learners(self, view: BranchView) -> int:
        return 2 if view.scratch["visual"]["there"] else 1

    def _learner(self, view: BranchView, name: str, learner: Learner) -> Tensor | None:
        """(B, S, D) one learner's part, zero where a row sees nothing of the memory; None without any memory."""
        memory = view.scratch[name]
        if not memory["there"]:
            return None
        batch, length, width = view.states.shape
        rows: Rows = memory["rows"]
        queries = learner.heads(learner.q, view.states)  # (B, H, S, d)
        states = rows.take(view.embeddings, batch) if memory["new"] else view.embeddings[:, :0]  # (B, M, D)
        keys, values = (learner.heads(projection, states) for projection in (learner.k, learner.v))
        view.spend(2 * 2 * 2 * states.shape[0] * states.shape[1] * self.rank * width)
        cos, sin = view.rotary
        queries, _ = view.rotate(queries, queries[:, :0], cos, sin)
        if memory["new"]:
            tables = (rows.take(table, batch) for table in view.rotary)
            _, keys = view.rotate(keys[:, :0], keys, *tables)
        keys, values = view.extend(name, keys, values)
        if keys.shape[2] != memory["held"]:
            raise CacheError(
                f"LoRRA: the cache holds {keys.shape[2]} keys of {name} tokens where {memory['held']} are expected: it "
                "was cropped, as assisted decoding does. Generate without an assistant, or start with an empty cache."
            )
        view.spend(4 * batch * length * keys.shape[2] * width)
        out = learner.attend(queries, keys, values, memory["mask"], memory["causal"])
        # a row without visible keys was given all of them, and gets nothing
        return out if memory["some"] is True else out * memory["some"]

    def _memories(self, view: BranchView) -> dict[str, dict[str, Any]]:
        """Which tokens are in each memory, and which of them every row sees; once a call, for all layers."""
        layout = view.layout
        if self.text_mask == "legacy_compressed" and view.cached:
            raise CacheError(
                'LoRRA: text_mask="legacy_compressed" lets rows see later text, which a cache cannot repeat. Call with '
                "use_cache=False."
            )
        text = layout.text
        if self.skip_system:
            if layout.roles is None:
                raise InputError("LoRRA: skip_system=True needs input_ids, and the processor when it is attached.")
            text = text & ~layout.roles.system
        return {"text": self._memory(view, "text", text), "visual": self._memory(view, "visual", layout.visual)}

    def _memory(self, view: BranchView, name: str, wanted: Tensor) -> dict[str, Any]:
        batch, length = wanted.shape
        counts = [1] * batch if length == 1 and name == "text" else wanted.sum(dim=1).tolist()
        new = any(counts)
        before: Tensor | None = view.store.get(name)  # (B, P) bool, which of the earlier keys are real
        if not new and before is None:
            return {"there": False, "some": False}
        columns = torch.arange(length, device=wanted.device)
        rows = Rows.select(wanted, counts)
        valid = wanted[:, :0]
        if new:
            valid = torch.ones_like(rows.index, dtype=torch.bool) if rows.valid is None else rows.valid  # (B, M)
        held = valid if before is None else torch.cat([before, valid], dim=1)  # (B, P + M)
        view.store[name] = held
        memory = {"there": True, "rows": rows, "new": new, "held": held.shape[1], "mask": None, "causal": False}
        plain = rows.valid is None and length == rows.length and before is None
        if plain and name == "text" and self.text_mask == "causal":  # text alone, without padding
            return {**memory, "causal": length > 1, "some": True}
        seen = rows.index[:, None, :] <= columns[:, None]  # (B, S, M) key at or before the query
        if name == "visual" and self.visual_memory == "all":
            seen = torch.ones_like(seen)
        if name == "text" and self.text_mask == "legacy_compressed":
            place = rows.length - held.sum(dim=1, keepdim=True)  # fillers in front
            seen = (torch.arange(rows.length, device=wanted.device) - place)[:, None, :] <= columns[:, None]
        seen = (seen if new else seen[..., :0]) & valid[:, None]
        if before is not None:
            seen = torch.cat([before[:, None].expand(-1, length, -1), seen], dim=2)  # (B, S, P + M)
        some = seen.any(dim=2, keepdim=True)  # (B, S, 1)
        return {**memory, "mask": (seen | ~some)[:, None], "some": some}

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

    @classmethod
    def from_released(cls, source: str | Path | Mapping[str, Tensor], **arguments: Any) -> LoRRA:
        """LoRRA with the learners and routers of a checkpoint in the authors' layout.

        Keys ``model.layers.{i}.{attn_pool,attn_t_pool}.{q,k,v,o}_proj.{0,1}.weight`` and
        ``model.layers.{i}.reweight_module.linear.{weight,bias}``; other tensors beside them are left alone. To compute
        what the authors' code does, pass ``double_add=True, visual_memory="all", text_mask="legacy_compressed"``.

        Args:
            source: a state dict, a ``.safetensors`` file, or a folder with such files.
            arguments: of LoRRA; ``rank``, ``layers``, ``router`` and ``router_length`` are read off the tensors.

        Raises:
            LoadError: a tensor is missing, unexpected or of another shape, or nothing can be read.
        """
        where = "the state dict" if isinstance(source, Mapping) else str(source)
        parts = {"attn_pool": "visual", "attn_t_pool": "text"}
        tensors: dict[str, Tensor] = {}
        unknown = []
        for key, value in read_tensors(source).items():
            pieces = key.split(".")
            if not any(name in pieces for name in (*parts, "reweight_module")):
                continue
            name = None
            if (
                pieces[:2] == ["model", "layers"]
                and len(pieces) == 7
                and pieces[3] in parts
                and pieces[5] in ("0", "1")
            ):
                name = f"{pieces[2]}.{parts[pieces[3]]}.{pieces[4][0]}.{('down', 'up')[int(pieces[5])]}.weight"
            elif pieces[3:5] == ["reweight_module", "linear"]:
                name = f"{pieces[2]}.{'table' if pieces[5] == 'weight' else 'bias'}"
            if name is None:
                unknown.append(key)
            else:
                tensors[name] = value
        if not tensors:
            raise LoadError(f"{where} holds no learners (model.layers.*.attn_pool.*): it is no Wings checkpoint.")
        layers = sorted({int(name.split(".")[0]) for name in tensors})
        tables = [value for name, value in tensors.items() if name.endswith(".table")]
        first = next(value for name, value in tensors.items() if name.endswith(".down.weight"))
        rank, width = first.shape
        shapes = {}
        for layer in layers:
            for part in parts.values():
                for projection in "qkvo":
                    shapes[f"{layer}.{part}.{projection}.down.weight"] = (rank, width)
                    shapes[f"{layer}.{part}.{projection}.up.weight"] = (width, rank)
            if tables:
                shapes |= {f"{layer}.table": tuple(tables[0].shape), f"{layer}.bias": (2,)}
        missing = sorted(set(shapes) - set(tensors))
        unknown += sorted(set(tensors) - set(shapes))
        wrong = [
            f"{n} {tuple(tensors[n].shape)}, not {s}"
            for n, s in shapes.items()
            if n in tensors and tensors[n].shape != s
        ]
        if missing or unknown or wrong:
            raise LoadError(
                f"{where}: missing {', '.join(missing[:3]) or 'nothing'}; unexpected "
                f"{', '.join(unknown[:3]) or 'nothing'}; of another shape: {'; '.join(wrong[:3]) or 'none'}."
            )
        own = {"rank": rank, "layers": layers, "router": bool(tables)}
        if tables:
            own["router_length"] = tables[0].shape[1]
        learned = LearnedWeights(tensors, {}, where)
        return cls(**{**own, **arguments}).with_learned(learned)
