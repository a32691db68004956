"""LoRRA by its formulas: token by token, head by head, for one row without a cache."""

from __future__ import annotations

from typing import Any

import torch
from reference import Extras, Prompt
from reference import _rotate as rotate
from tiny import tiny_processor
from torch import Tensor

from mllm import Stack
from mllm.adapters import LoRRA

_USER = ("USER: ", "<|im_start|>user\n")


def lorra_options(model, stack: Stack) -> dict[str, Any]:
    """Learners and router of one row, from the formulas, with whichever switches of the original are on."""
    (technique,) = (t for t in stack.techniques if isinstance(t, LoRRA))
    return {"extras": lorra_extras(model, technique, technique.learned.tensors)}


def lorra_extras(model, technique: LoRRA, tensors: dict[str, Tensor]):
    """``tensors`` are the learned parts; gradients flow into them."""
    tokenizer = tiny_processor(model.config.model_type).tokenizer

    def start_of_memory(ids: Tensor) -> int:
        """The first token behind the header of the first user turn."""
        for header in _USER:
            spelled = tokenizer(header, add_special_tokens=False)["input_ids"]
            for place in range(len(ids)):
                if ids[place : place + len(spelled)].tolist() == spelled:
                    return place + len(spelled)
        raise ValueError("the prompt has no user turn")

    def extras(prompt: Prompt) -> Extras:
        count = len(prompt.visual)
        first = start_of_memory(prompt.ids) if technique.skip_system else 0
        text = [n for n in range(count) if not prompt.visual[n] and n >= first]
        images = [n for n in range(count) if prompt.visual[n]]

        def sees(part: str, row: int, token: int) -> bool:
            if part == "visual":
                return technique.visual_memory == "all" or token <= row
            if technique.text_mask == "legacy_compressed":
                return text.index(token) <= row
            return token <= row

        def norm(x: Tensor) -> Tensor:
            if not technique.normalise:
                return x
            return x / (x.pow(2).mean(dim=-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()

        def learner(layer: int, part: str, states: Tensor, memory: list[int], cos: Tensor, sin: Tensor) -> Tensor:
            def project(name: str, x: Tensor) -> Tensor:
                down, up = (tensors[f"{layer}.{part}.{name}.{way}.weight"] for way in ("down", "up"))
                return x @ down.T @ up.T

            h, f = norm(states), norm(prompt.embeds[memory])  # (S, D), (M, D)
            q, k, v = h + project("q", h), f + project("k", f), f + project("v", f)
            width, parts = cos.shape[-1], []
            for head in range(q.shape[1] // width):
                some = slice(head * width, (head + 1) * width)
                turned, keys = rotate(q[:, some], cos, sin), rotate(k[:, some], cos[memory], sin[memory])
                rows = []
                for place in range(len(q)):
                    seen = [n for n, token in enumerate(memory) if sees(part, place, token)]
                    weights = (turned[place] @ keys[seen].T / width**0.5).softmax(dim=-1)
                    rows.append(weights @ v[seen][:, some] if seen else torch.zeros(width))
                parts.append(torch.stack(rows))
            return project("o", torch.cat(parts, dim=-1))

        def branch(layer: int, states: Tensor, weights: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            if technique.layers != "all" and layer not in technique.layers:
                return torch.zeros_like(states)
            texts = learner(layer, "text", states, text, cos, sin)
            visuals = learner(layer, "visual", states, images, cos, sin) if images else torch.zeros_like(texts)
            if not technique.router:
                return texts + visuals
            table, bias = tensors[f"{layer}.table"], tensors[f"{layer}.bias"]
            mixed = weights @ table[:, :count].T + bias  # (S, 2)
            share = (mixed * mixed.sigmoid()).softmax(dim=-1) * (2 if technique.double_add else 1)
            rows = []
            for row in range(count):
                if technique.text_only == "bypass" and not any(sees("visual", row, token) for token in images):
                    rows.append(texts[row])
                else:
                    rows.append(share[row, 0] * visuals[row] + share[row, 1] * texts[row])
            return torch.stack(rows)

        return Extras(branch=branch)

    return extras
