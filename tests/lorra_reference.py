"""LoRRA by its formulas: token by token, head by head, for one row without a cache."""

from __future__ import annotations

from typing import Any

import torch
from reference import Extras, Prompt
from reference import _rotate as rotate

from mllm import Stack
from mllm.adapters import LoRRA


def lorra_options(model, stack: Stack) -> dict[str, Any]:
    """Learners and router of one row, token by token and head by head, from the formulas."""
    (technique,) = (t for t in stack.techniques if isinstance(t, LoRRA))
    tensors = technique.learned.tensors

    def extras(prompt: Prompt) -> Extras:
        text = (~prompt.visual).nonzero()[:, 0].tolist()
        images = prompt.visual.nonzero()[:, 0].tolist()

        def learner(layer: int, part: str, states, memory: list[int], cos, sin) -> torch.Tensor:
            def project(name: str, x: torch.Tensor) -> torch.Tensor:
                down, up = (tensors[f"{layer}.{part}.{name}.{way}.weight"] for way in ("down", "up"))
                return x @ down.T @ up.T

            f = prompt.embeds[memory]  # (M, D)
            q, k, v = states + project("q", states), f + project("k", f), f + project("v", f)
            width, parts = cos.shape[-1], []
            for head in range(q.shape[1] // width):
                some = slice(head * width, (head + 1) * width)
                turned, keys = rotate(q[:, some], cos, sin), rotate(k[:, some], cos[memory], sin[memory])
                rows = []
                for place in range(len(q)):
                    seen = [n for n, token in enumerate(memory) if token <= place]
                    weights = (turned[place] @ keys[seen].T / width**0.5).softmax(dim=-1)
                    rows.append(weights @ v[seen][:, some] if seen else torch.zeros(width))
                parts.append(torch.stack(rows))
            return project("o", torch.cat(parts, dim=-1))

        def branch(layer: int, states, weights, cos, sin) -> torch.Tensor:
            table, bias = tensors[f"{layer}.table"], tensors[f"{layer}.bias"]
            mixed = weights @ table[:, : len(states)].T + bias  # (S, 2)
            router = (mixed * mixed.sigmoid()).softmax(dim=-1)
            part = learner(layer, "text", states, text, cos, sin)
            if not images:
                return part
            before = (torch.arange(len(states)) < images[0])[:, None]
            visual = learner(layer, "visual", states, images, cos, sin)
            return router[:, :1] * visual + torch.where(before, 1.0, router[:, 1:]) * part

        return Extras(branch=branch)

    return {"extras": extras}
