"""A naive reference of URaG, token by token, from the text of the prompt and the numbers of the head alone."""

from __future__ import annotations

from typing import Any

import torch
from reference import Extras, Prompt
from tiny import tiny_processor

from mllm import Stack
from mllm.token_pruning import DyVTE, URaG

_MARKERS = ("<|vision_start|>", "<|vision_end|>")


def pages_of(prompt: Prompt) -> list[list[int]]:
    """Tokens of each page: visual tokens that follow each other."""
    pages: list[list[int]] = []
    for token, visual in enumerate(prompt.visual.tolist()):
        if visual and (token == 0 or not prompt.visual[token - 1]):
            pages.append([])
        if visual:
            pages[-1].append(token)
    return pages


def question_tokens(model, prompt: Prompt, turn: int = -1) -> list[int]:
    """What stands in a user turn, up to its end, without what stands between its pages."""
    tokenizer = tiny_processor(model.config.model_type).tokenizer
    tokens = [tokenizer.decode([token]) if token >= 0 else "?" for token in prompt.ids.tolist()]
    pages = prompt.visual.nonzero()[:, 0].tolist()

    def find(*spelled: str) -> list[int]:
        return [n for n in range(len(tokens)) if tokens[n : n + len(spelled)] == list(spelled)]

    if "<|im_start|>" in tokens:
        headers, ends = find("<|im_start|>", *"user\n"), find("<|im_end|>")
    else:
        headers, ends = find(*"USER: "), find(*"ASSISTANT:")
    start = headers[turn] + 6
    stop = next((end for end in ends if end >= start), len(tokens))
    inner = [n for n in range(start, stop) if n in pages]
    inside = [n for n in range(start, stop) if not (inner and inner[0] <= n <= inner[-1])]
    return [n for n in inside if tokens[n] not in _MARKERS]


def page_scores(urag: URaG, states: torch.Tensor, pages: list[list[int]], question: list[int]) -> list[float]:
    """The score of each page, from the states (S, D) that enter layer K."""
    weights, states = urag.learned.tensors, states.detach()

    def embed(token: int) -> torch.Tensor:
        inner = weights["first.weight"] @ states[token] + weights["first.bias"]
        inner = 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
        vector = weights["second.weight"] @ inner + weights["second.bias"]
        return vector / vector.norm()

    vectors = {token: embed(token) for token in [*question, *(v for page in pages for v in page)]}
    return [sum(max(float(vectors[q] @ vectors[v]) for v in page) for q in question) for page in pages]


def urag_options(model, stack: Stack) -> dict[str, Any]:
    """Options of the reference decoder: the best pages of each row stay."""
    (urag,) = (technique for technique in stack.techniques if isinstance(technique, URaG))
    exits = [technique.exit_layer for technique in stack.techniques if isinstance(technique, DyVTE)]

    def extras(prompt: Prompt) -> Extras:
        pages = pages_of(prompt)

        def keep(layer: int, states: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
            kept = torch.ones_like(alive)
            if layer == urag.layer and len(pages) > urag.keep_pages:
                scores = page_scores(urag, states, pages, question_tokens(model, prompt))
                best = sorted(range(len(pages)), key=lambda page: (-scores[page], page))[: urag.keep_pages]
                for number, page in enumerate(pages):
                    kept[page] = number in best
            return kept

        return Extras(keep=keep)

    return {"extras": extras, **({"exit_after": exits[0]} if exits else {})}
