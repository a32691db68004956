"""What DyVTE's gates and draws should decide, written down once more: one row at a time, in plain loops."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from reference import Extras, Prompt, _attention, _linear, _mlp, _rms_norm, _rotary
from tiny import tiny_processor

HEADERS = ("ASSISTANT:", "<|im_start|>assistant\n")  # how the tiny models' templates open an answer


def last_header(model: Any, prompt: Prompt) -> int | None:
    """Index of the last token of the last header in a row."""
    tokenizer = tiny_processor(model.config.model_type).tokenizer
    tokens = [tokenizer.decode([token]) if token >= 0 else "?" for token in prompt.ids.tolist()]
    ends = []
    for header in HEADERS:
        spelled = [tokenizer.decode([t]) for t in tokenizer(header, add_special_tokens=False)["input_ids"]]
        ends += [n + len(spelled) - 1 for n in range(len(tokens)) if tokens[n : n + len(spelled)] == spelled]
    return max(ends, default=None)


def probability(technique: Any, layer: int, states: torch.Tensor, visual: torch.Tensor, end: int) -> float:
    """Of leaving after ``layer``, from the states (S, D) behind it."""
    image = max(n for n, is_visual in enumerate(visual.tolist()) if is_visual)
    last = states[end]
    mean = states[image + 1 : end].mean(dim=0) if end > image + 1 else last
    if technique.gate == "light":
        mean, last = (part / (part.pow(2).mean() + 1e-6).sqrt() for part in (mean, last))
    weights = {
        name.removeprefix(f"visual_gates_router.{layer}."): value for name, value in technique.learned.tensors.items()
    }
    hidden = weights["w1.weight"] @ torch.cat([mean, last]) + weights.get("w1.bias", 0)
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    scores = weights["w2.weight"] @ hidden + weights.get("w2.bias", 0)
    return float(scores.softmax(dim=0)[1])


def gate_extras(model: Any, technique: Any, candidates: list[int], limit: int | None = None) -> Any:
    """Extras for the reference decoder: visual rows leave after the first candidate whose gate says so."""

    def extras(prompt: Prompt) -> Extras:
        visual = prompt.visual
        end = last_header(model, prompt)
        asked = bool(visual.any()) and end is not None and end > int(visual.nonzero()[-1, 0])
        gone = []

        def keep(layer: int, states: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
            done = layer - 1
            if not gone and done == limit:
                gone.append(done)
            if not gone and asked and done in candidates:
                with torch.no_grad():
                    if probability(technique, done, states, visual, end) > technique.threshold:
                        gone.append(done)
            return ~visual if gone else torch.ones_like(visual)

        return Extras(keep=keep)

    return extras


def drawn_exit(model: Any, technique: Any, prompt: Prompt) -> int | None:
    """The layer that a histogram draws for a row."""
    visual = prompt.visual.nonzero()[:, 0].tolist()
    if not visual:
        return None
    end = last_header(model, prompt)
    ids = prompt.ids.tolist()[: max(visual[-1], -1 if end is None else end) + 1]
    width = prompt.embeds.shape[1]
    marks = [int(prompt.embeds[visual, n * width // 8].argmax()) + 1 for n in range(8)]
    digest = hashlib.blake2b(repr((technique.seed, ids, marks)).encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "big") / 2**64 * sum(technique.histogram)
    total = 0.0
    for layer, weight in enumerate(technique.histogram):
        total += weight
        if number < total:
            return layer
    raise AssertionError(number)


def draw_extras(model: Any, technique: Any) -> Any:
    """Extras for the reference decoder: visual rows leave after the layer that was drawn."""

    def extras(prompt: Prompt) -> Extras:
        drawn = drawn_exit(model, technique, prompt)
        gone = drawn if drawn is not None else math.inf
        return Extras(keep=lambda layer, states, alive: ~prompt.visual if layer > gone else prompt.visual | True)

    return extras


def several_turns(
    model: Any, prompt: Prompt, starts: list[int], exits: list[int | None], policy: str | None = None
) -> torch.Tensor:
    """(S, V) logits of a conversation in which visual rows go on from where they left, turn by turn.

    Visual rows are the plain model's in every layer: all that they see came before them. What a turn's text sees of
    them ends with the latest exit since their own turn.

    Args:
        prompt: all turns.
        starts: index of the first token of each turn.
        exits: last layer in which each turn's text sees its own images; None: all layers.
        policy: None or ``"naavit"``, what visual rows do.
    """
    text_model, config = model.model.language_model, model.config.get_text_config()
    cos, sin = _rotary(model, prompt)
    length, visual = prompt.embeds.shape[0], prompt.visual
    turn = torch.tensor([sum(start <= n for start in starts) - 1 for n in range(length)])
    last = len(text_model.layers) - 1
    exits = [last if e is None else e for e in exits]
    states = prompt.embeds
    for number, layer in enumerate(text_model.layers):
        allowed = torch.ones(length, length, dtype=torch.bool).tril()
        for query in range(length):
            for key in range(query) if not visual[query] else ():
                if visual[key] and number > max(exits[turn[key] : turn[query] + 1]):
                    allowed[query, key] = False
        normed = _rms_norm(layer.input_layernorm, states)
        added, _ = _attention(layer.self_attn, config, normed, cos, sin, allowed)
        if policy == "naavit":
            added = added.masked_fill(visual[:, None], 0.0)
        states = states + added
        states = states + _mlp(layer.mlp, _rms_norm(layer.post_attention_layernorm, states))
    return _linear(model.lm_head, _rms_norm(text_model.norm, states))
