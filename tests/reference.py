"""A naive reference of the decoder and of what techniques do to its visual rows.

Written against the published formulas and the stock weights alone; nothing from ``mllm``. Each batch row is computed by
itself, without padding, without a cache, head by head, with a boolean mask. Nothing on the model is hooked or changed,
and gradients flow through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tiny import row, visual_mask
from torch import Tensor, nn
from transformers import PreTrainedModel

POLICIES = (None, "naavit", "ee", "freeze")
_INPUTS = {
    "input_ids",
    "attention_mask",
    "mm_token_type_ids",
    "pixel_values",
    "image_sizes",
    "image_grid_thw",
    "batch_num_images",
}


@dataclass(frozen=True)
class Prompt:
    """One row, ready for the decoder.

    Attributes:
        embeds: (S, D) text embeddings and image features.
        positions: (A, S) rotary positions; A is 3 (time, height, width) for M-RoPE and 1 otherwise.
        visual: (S,) bool.
        ids: (S,) token ids; -1 for appended tokens.
    """

    embeds: Tensor
    positions: Tensor
    visual: Tensor
    ids: Tensor

    def append(self, embed: Tensor) -> Prompt:
        """With one more text token, (D,), at the position after the largest so far."""
        following = (self.positions.max() + 1).expand(self.positions.shape[0], 1)  # (A, 1)
        return Prompt(
            torch.cat([self.embeds, embed[None]]),
            torch.cat([self.positions, following], dim=1),
            torch.cat([self.visual, self.visual.new_zeros(1)]),
            torch.cat([self.ids, self.ids.new_full((1,), -1)]),
        )


@dataclass(frozen=True)
class Extras:
    """What a technique does to one row, as plain functions.

    Attributes:
        opened: (S, S) bool, keys that a query sees besides the earlier ones, in every layer.
        closed: ``closed(layer)`` -> (S, S) bool, keys that a query does not see there.
        keep: ``keep(layer, states (S, D), alive (S,))`` -> (S,) bool, rows that enter ``layer``.
        branch: ``branch(layer, states (S, D) after the attention, weights (S, S) summed over heads, cos, sin)`` ->
            (S, D) that is added there; all rows are alive.
    """

    opened: Tensor | None = None
    closed: Callable[[int], Tensor] | None = None
    keep: Callable[[int, Tensor, Tensor], Tensor] | None = None
    branch: Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Result:
    """What the decoder made of one row.

    Attributes:
        logits: (S, V); rows that left early are read from the state they left with.
        states: (S, D) residual stream before layer 0 and after each layer; rows that left stay as they were.
        visual: (S,) bool.
    """

    logits: Tensor
    states: list[Tensor]
    visual: Tensor


def prompts(model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[Prompt]:
    """Every row of a batch as it would be alone."""
    if unknown := set(inputs) - _INPUTS:
        raise ValueError(f"the reference does not know the inputs {sorted(unknown)}")
    if model.dtype != torch.float32:
        raise ValueError(f"the reference is float32; this model is {model.dtype}")
    return [_prompt(model, row(inputs, i)) for i in range(inputs["input_ids"].shape[0])]


def _prompt(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Prompt:
    embeds = model.get_input_embeddings()(inputs["input_ids"])[0]  # (S, D)
    visual = visual_mask(model, inputs)[0]  # (S,)
    pixels = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask", "mm_token_type_ids")}
    if pixels:
        features = torch.cat(list(model.model.get_image_features(**pixels, return_dict=True).pooler_output))
        if features.shape[0] != int(visual.sum()):
            raise ValueError(f"{features.shape[0]} image features for {int(visual.sum())} placeholders")
        embeds = embeds.index_put((visual,), features)  # (S, D)
    elif bool(visual.any()):
        raise ValueError("placeholders without images")
    length = embeds.shape[0]
    if model.config.model_type != "qwen2_5_vl":
        positions = torch.arange(length)[None]  # (1, S)
    elif pixels:
        positions, _ = model.model.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
        )
        positions = positions[:, 0]  # (3, S)
    else:
        positions = torch.arange(length).expand(3, length)  # (3, S)
    return Prompt(embeds, positions, visual, inputs["input_ids"][0])


# --- the decoder ------------------------------------------------------------------------------------------------------


def _linear(module: nn.Linear, states: Tensor) -> Tensor:
    out = states @ module.weight.T
    return out if module.bias is None else out + module.bias


def _rms_norm(module: nn.Module, states: Tensor) -> Tensor:
    scale = (states.pow(2).mean(dim=-1, keepdim=True) + module.variance_epsilon).rsqrt()  # (S, 1)
    return module.weight * (states * scale)


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (S, head_dim): the first half is paired with the second."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin


def _rotary(model: PreTrainedModel, prompt: Prompt) -> tuple[Tensor, Tensor]:
    """(S, head_dim) cosines and sines. The tables are the model's own; M-RoPE mixes its three axes in there."""
    positions = prompt.positions[:, None]  # (A, 1, S)
    if positions.shape[0] == 1:
        positions = positions[0]  # (1, S)
    cos, sin = model.model.language_model.rotary_emb(prompt.embeds[None], positions)
    return cos[0], sin[0]


def _attention(
    attention: nn.Module, config: Any, normed: Tensor, cos: Tensor, sin: Tensor, allowed: Tensor
) -> tuple[Tensor, Tensor]:
    """(S, D) attention output and (S, S) weights summed over heads, one head after the other.

    ``allowed`` (S, S) is True where a query sees a key.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    queries = _linear(attention.q_proj, normed).chunk(heads, dim=-1)  # heads x (S, head_dim)
    keys = _linear(attention.k_proj, normed).chunk(kv_heads, dim=-1)  # kv_heads x (S, head_dim)
    values = _linear(attention.v_proj, normed).chunk(kv_heads, dim=-1)
    outputs, total = [], 0
    for head, query in enumerate(queries):
        shared = head // (heads // kv_heads)
        query, key = _rotate(query, cos, sin), _rotate(keys[shared], cos, sin)
        scores = query @ key.T / query.shape[-1] ** 0.5  # (S, S)
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1)  # (S, S)
        outputs.append(weights @ values[shared])
        total = total + weights
    return _linear(attention.o_proj, torch.cat(outputs, dim=-1)), total


def _mlp(mlp: nn.Module, states: Tensor) -> Tensor:
    gate = torch.nn.functional.silu(_linear(mlp.gate_proj, states))
    return _linear(mlp.down_proj, gate * _linear(mlp.up_proj, states))


def _layer(
    layer: nn.Module,
    config: Any,
    states: Tensor,
    visual: Tensor,
    cos: Tensor,
    sin: Tensor,
    policy: str | None,
    opened: Tensor | None = None,
    closed: Tensor | None = None,
    branch: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """(S, D) after one decoder layer.

    Keys and values of visual rows always come from their current state. Under a policy, text rows still see them:

    ========  ======================  ===
    policy    attention adds          FFN
    ========  ======================  ===
    naavit    nothing                 yes
    ee        ``O(V(x))`` of the row  yes
    freeze    nothing                 no
    ========  ======================  ===
    """
    length = states.shape[0]
    allowed = torch.ones(length, length, dtype=torch.bool).tril()  # (S, S)
    if opened is not None:
        allowed = allowed | opened
    if closed is not None:
        allowed = allowed & ~closed
    if policy == "ee":
        allowed = torch.where(visual[:, None], torch.eye(length, dtype=torch.bool), allowed)
    skip_attention = visual if policy in ("naavit", "freeze") else torch.zeros_like(visual)
    skip_ffn = visual if policy == "freeze" else torch.zeros_like(visual)
    added, weights = _attention(layer.self_attn, config, _rms_norm(layer.input_layernorm, states), cos, sin, allowed)
    states = states + added.masked_fill(skip_attention[:, None], 0.0)
    if branch is not None:
        states = states + branch(states, weights, cos, sin)
    added = _mlp(layer.mlp, _rms_norm(layer.post_attention_layernorm, states))
    return states + added.masked_fill(skip_ffn[:, None], 0.0)


def decode(
    model: PreTrainedModel,
    prompt: Prompt,
    policy: str | None = None,
    policy_layers: Iterable[int] | None = None,
    exit_after: int | None = None,
    extras: Extras | None = None,
) -> Result:
    """Run the decoder on one row; arguments as in :func:`reference_logits`."""
    text_model, config = model.model.language_model, model.config.get_text_config()
    if policy not in POLICIES:
        raise ValueError(f"policy={policy!r} is unknown; one of {POLICIES}")
    if config.hidden_act != "silu" or "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError("the reference knows SiLU and full attention only")
    count = len(text_model.layers)
    chosen = set(range(count)) if policy_layers is None else set(policy_layers)
    if not chosen <= set(range(count)) or (exit_after is not None and not -1 <= exit_after < count):
        raise ValueError(f"policy_layers={sorted(chosen)}, exit_after={exit_after} with {count} layers")

    cos, sin = _rotary(model, prompt)  # (S, head_dim)
    alive = torch.ones_like(prompt.visual)  # (S,)
    whole = prompt.embeds  # (S, D)
    states = [whole]
    extras = extras or Extras()
    for index, layer in enumerate(text_model.layers):
        if exit_after is not None and index > exit_after:
            alive = ~prompt.visual
        if extras.keep is not None:
            alive = alive & extras.keep(index, whole, alive)
        opened = None if extras.opened is None else extras.opened[alive][:, alive]
        # text keeps its original positions: the tables are cut, not counted again
        after = _layer(
            layer,
            config,
            whole[alive],
            prompt.visual[alive],
            cos[alive],
            sin[alive],
            policy if index in chosen else None,
            opened,
            None if extras.closed is None else extras.closed(index)[alive][:, alive],
            None if extras.branch is None else partial(extras.branch, index),
        )
        whole = whole.index_put((alive,), after)
        states.append(whole)
    return Result(_linear(model.lm_head, _rms_norm(text_model.norm, whole)), states, prompt.visual)


def reference_states(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    policy: str | None = None,
    policy_layers: Iterable[int] | None = None,
    exit_after: int | Sequence[int | None] | None = None,
    extras: Callable[[Prompt], Extras] | None = None,
) -> list[Result]:
    """As :func:`reference_logits`, with the residual stream after each layer."""
    rows = prompts(model, inputs)
    exits = [exit_after] * len(rows) if exit_after is None or isinstance(exit_after, int) else list(exit_after)
    if len(exits) != len(rows):
        raise ValueError(f"exit_after has {len(exits)} entries for {len(rows)} rows")
    layers = None if policy_layers is None else tuple(policy_layers)
    return [
        decode(model, prompt, policy, layers, after, None if extras is None else extras(prompt))
        for prompt, after in zip(rows, exits, strict=True)
    ]


def reference_logits(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    policy: str | None = None,
    policy_layers: Iterable[int] | None = None,
    exit_after: int | Sequence[int | None] | None = None,
    extras: Callable[[Prompt], Extras] | None = None,
) -> list[Tensor]:
    """The logits of every row over its real tokens, one (S_i, V) tensor a row.

    Args:
        model: a stock float32 model of one of the four families.
        inputs: what its processor made; padding anywhere.
        policy: what visual rows do: None (dense), ``"naavit"``, ``"ee"`` or ``"freeze"``.
        policy_layers: where they do it; None: in all layers.
        exit_after: last layer that visual tokens are present in, one for all rows or one a row; -1 is before layer 0,
            None never.
        extras: what else a technique does to a row.
    """
    results = reference_states(model, inputs, policy, policy_layers, exit_after, extras)
    return [result.logits for result in results]


@torch.no_grad()
def reference_generate(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    n: int,
    policy: str | None = None,
    policy_layers: Iterable[int] | None = None,
    exit_after: int | Sequence[int | None] | None = None,
) -> tuple[list[list[int]], list[Tensor]]:
    """Greedy generation of ``n`` tokens a row, computing everything again at each step; end tokens do not stop it.

    A generated token is text, whatever its id.

    Returns:
        token ids and (n, V) logits of each row.
    """
    rows = prompts(model, inputs)
    exits = [exit_after] * len(rows) if exit_after is None or isinstance(exit_after, int) else list(exit_after)
    layers = None if policy_layers is None else tuple(policy_layers)
    tokens, logits = [], []
    for prompt, after in zip(rows, exits, strict=True):
        ids, steps = [], []
        for _ in range(n):
            steps.append(decode(model, prompt, policy, layers, after).logits[-1])  # (V,)
            ids.append(int(steps[-1].argmax()))
            prompt = prompt.append(model.get_input_embeddings().weight[ids[-1]])
        tokens.append(ids)
        logits.append(torch.stack(steps))
    return tokens, logits


# --- cost -------------------------------------------------------------------------------------------------------------


def decoder_shape(model: PreTrainedModel) -> dict[str, int]:
    """What :func:`reference_flops` must know about a model."""
    config = model.config.get_text_config()
    attention = model.model.language_model.layers[0].self_attn
    return {
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": attention.q_proj.out_features // config.num_attention_heads,
    }


def reference_flops(
    *,
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    n_text: int,
    n_visual: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    policy: str | None = None,
    policy_layers: Iterable[int] | None = None,
    exit_after: int | None = None,
) -> int:
    """FLOPs of the decoder layers in one prefill of one row, 2 a multiply-add.

    Attention is counted as the full rectangle of queries and keys, as the publications do: not halved for causality.
    Norms, rotary tables, softmax, gates, the vision tower and the LM head are left out.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy={policy!r} is unknown; one of {POLICIES}")
    kv_heads = heads if kv_heads is None else kv_heads
    head_dim = hidden // heads if head_dim is None else head_dim
    chosen = set(range(layers)) if policy_layers is None else set(policy_layers)
    total = 0
    for index in range(layers):
        visual = 0 if exit_after is not None and index > exit_after else n_visual
        here = policy if index in chosen else None
        keys = n_text + visual
        queries = n_text if here else keys  # rows that ask other rows
        outputs = n_text if here in ("naavit", "freeze") else keys  # rows that run the output projection
        ffn = n_text if here == "freeze" else keys  # rows that run the FFN
        total += 2 * queries * hidden * heads * head_dim  # q_proj
        total += 2 * 2 * keys * hidden * kv_heads * head_dim  # k_proj and v_proj
        total += 2 * 2 * queries * keys * heads * head_dim  # scores, and weighted values
        total += 2 * outputs * heads * head_dim * hidden  # o_proj
        total += 2 * 3 * ffn * hidden * intermediate  # gate, up and down
    return total
