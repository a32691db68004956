"""The work of each setting written out by hand: what a careful person would get without the toolkit.

Each loop runs the model's own layers, or their projections, on the rows that the technique leaves, knows the prompt's
layout beforehand, and keeps nothing but the cache: no hooks, no layouts, no bookkeeping. One shape for all rows of the
batch is assumed, as the bench's prompts have it. These are limits of the machine for *this* way to compute; a technique
that beats them shows that they can be written better.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, normalize, pad, scaled_dot_product_attention, silu
from transformers import DynamicCache

from mllm.cost import ModelSpec
from mllm.eval.bench_model import KEPT_PAGES, Prompt
from mllm.technique import Stack
from mllm.versions import CACHE

Tables = tuple[Tensor, Tensor]


class Bare:
    """One setting's loop on one prompt.

    Args:
        model: a model that nothing is attached to.
        prompt: what is read.
        stack: what it stands for.
        work: which loop, see :class:`mllm.eval.bench_model.Setting`.
        modules: learned parts of each technique.
    """

    def __init__(self, model: nn.Module, prompt: Prompt, stack: Stack, work: str, modules: list[Any]) -> None:
        self.text, self.layers = model.model.language_model, model.model.language_model.layers
        self.prompt, self.stack, self.module = prompt, stack, next((m for m in modules if m is not None), None)
        self.spec = ModelSpec.from_config(model.config.text_config)
        self.start, self.stop = prompt.pages[0][0], prompt.pages[-1][1]
        attention = self.layers[0].self_attn
        self.groups, self.rotate = attention.num_key_value_groups, _rotation(attention)
        self.config = model.config
        self._prefill: Callable[[Tensor, Tables, DynamicCache], Tensor] = getattr(self, f"_{work}")
        self._has_learners = work == "learners"
        self._kept: list[tuple[Tensor, Tensor]] = []  # per layer, keys and values of the picture
        self.memory: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def prefill(self) -> DynamicCache:
        """Read the prompt."""
        prompt, cache = self.prompt, DynamicCache(config=self.config)
        hidden = self.text.embed_tokens(prompt.ids)  # (B, S, D)
        done = 0
        for start, stop in prompt.pages:
            hidden[:, start:stop] = prompt.features[:, done : done + stop - start]
            done += stop - start
        self.text.norm(self._prefill(hidden, self._tables(0, prompt.length, hidden), cache))
        return cache

    def step(self, token: Tensor, position: int, cache: DynamicCache) -> None:
        """Write one further token, on a cache whose layers may differ in length."""
        hidden = self.text.embed_tokens(token)  # (B, 1, D)
        tables = self._tables(position, position + 1, hidden)
        if self._has_learners:
            hidden = self._learners_step(hidden, tables, cache)
        else:
            for layer in self.layers:
                hidden = self._run(layer, hidden, tables, cache)
        self.text.norm(hidden)

    def _tables(self, start: int, stop: int, like: Tensor) -> Tables:
        return self.text.rotary_emb(like, torch.arange(start, stop, device=like.device)[None])

    @staticmethod
    def _run(layer: nn.Module, hidden: Tensor, tables: Tables, cache: DynamicCache) -> Tensor:
        return layer(hidden, attention_mask=None, position_embeddings=tables, use_cache=True, **{CACHE: cache})

    def _without(self, states: Tensor) -> Tensor:
        """All rows but the picture's."""
        return torch.cat([states[:, : self.start], states[:, self.stop :]], dim=1)

    def _heads(self, layer: nn.Module, name: str, states: Tensor) -> Tensor:
        projected = getattr(layer.self_attn, name)(states)
        return projected.unflatten(-1, (-1, layer.self_attn.head_dim)).transpose(1, 2)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, causal: bool = False) -> Tensor:
        """(B, S, heads * head_dim); ``causal``: the rows are the last keys."""
        rows, length = queries.shape[2], keys.shape[2]
        mask = None
        if causal and rows not in (1, length):
            mask = torch.ones(rows, length, dtype=torch.bool, device=queries.device).tril(length - rows)
        gqa = queries.shape[1] != keys.shape[1]
        square = causal and rows == length and rows > 1
        out = scaled_dot_product_attention(queries, keys, values, mask, is_causal=square, enable_gqa=gqa)
        return out.transpose(1, 2).flatten(2)

    # --- exits: some layers on all rows, the others on text -----------------------------------------------------------

    def _dense(self, hidden: Tensor, tables: Tables, cache: DynamicCache) -> Tensor:
        last = self.stack.last_visual_layer(self.spec)
        gates = self.module  # a learned exit: ask each gate, wait for its answer
        for number, layer in enumerate(self.layers):
            if number == last + 1:
                hidden, tables = self._without(hidden), tuple(self._without(table) for table in tables)
            hidden = self._run(layer, hidden, tables, cache)
            if gates is not None and number < last and self._leaves(hidden, gates, number):
                last = number
        return hidden

    def _leaves(self, hidden: Tensor, gates: nn.Module, number: int) -> bool:
        mean = hidden[:, self.stop : -1].float().mean(dim=1)
        return bool((gates(torch.stack([mean, hidden[:, -1].float()], dim=1), number) > 0).all())

    # --- NAAViT and its kin: picture rows offer keys and values, and run what the policy leaves -----------------------

    def _policy(self, hidden: Tensor, tables: Tables, cache: DynamicCache) -> Tensor:
        last = self.stack.last_visual_layer(self.spec)
        start, stop = self.start, self.stop
        text_tables = tuple(self._without(table) for table in tables)
        for number, layer in enumerate(self.layers):
            if number > last:
                hidden = self._without(hidden) if number == last + 1 else hidden
                hidden = self._run(layer, hidden, text_tables, cache)
                continue
            policy = self.stack.visual_policy(number, self.spec)
            attention, normed = layer.self_attn, layer.input_layernorm(hidden)
            keys, values = self._heads(layer, "k_proj", normed), self._heads(layer, "v_proj", normed)
            queries = self._heads(layer, "q_proj", self._without(normed))
            _, keys = self.rotate(keys[:, :0], keys, *tables)
            queries, _ = self.rotate(queries, queries[:, :0], *text_tables)
            keys, values = cache.update(keys, values, number)
            first = self._attend(queries[:, :, :start], keys[:, :, :start], values[:, :, :start], causal=True)
            rest = self._attend(queries[:, :, start:], keys, values, causal=True)
            out = attention.o_proj(torch.cat([first, rest], dim=1))  # (B, T, D)
            hidden[:, :start] += out[:, :start]
            hidden[:, stop:] += out[:, start:]
            if policy.own_value:
                own = values[:, :, start:stop].repeat_interleave(self.groups, dim=1)
                hidden[:, start:stop] += attention.o_proj(own.transpose(1, 2).flatten(2))
            if policy.ffn:
                hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            else:
                text = self._without(hidden)
                text = layer.mlp(layer.post_attention_layernorm(text))
                hidden[:, :start] += text[:, :start]
                hidden[:, stop:] += text[:, start:]
        return hidden

    # --- a second question: the picture's keys and values are there ---------------------------------------------------

    def _reuse(self, hidden: Tensor, tables: Tables, cache: DynamicCache) -> Tensor:
        if not self._kept:
            self._policy(hidden.clone(), tables, cache)
            for layer in cache.layers:
                kept = (layer.keys, layer.values)
                self._kept.append(tuple(part[:, :, self.start : self.stop].contiguous() for part in kept))
                layer.reset()
        start = self.start
        hidden, tables = self._without(hidden), tuple(self._without(table) for table in tables)
        for number, layer in enumerate(self.layers):
            normed = layer.input_layernorm(hidden)
            queries, keys, values = (self._heads(layer, name, normed) for name in ("q_proj", "k_proj", "v_proj"))
            queries, keys = self.rotate(queries, keys, *tables)
            kept = self._kept[number]
            keys, values = (
                torch.cat([new[:, :, :start], old, new[:, :, start:]], dim=2)
                for new, old in zip((keys, values), kept, strict=True)
            )
            keys, values = cache.update(keys, values, number)
            first = self._attend(queries[:, :, :start], keys[:, :, :start], values[:, :, :start], causal=True)
            rest = self._attend(queries[:, :, start:], keys, values, causal=True)
            hidden = hidden + layer.self_attn.o_proj(torch.cat([first, rest], dim=1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return hidden

    # --- URaG: score the pages, keep the best -------------------------------------------------------------------------

    def _pages(self, hidden: Tensor, tables: Tables, cache: DynamicCache) -> Tensor:
        (technique,) = self.stack.techniques
        cut = technique.first_visual_layer(self.spec)
        for layer in self.layers[:cut]:
            hidden = self._run(layer, hidden, tables, cache)
        batch, pages = hidden.shape[0], self.prompt.pages
        asked = [
            hidden[:, 1 : self.start],
            hidden[:, self.stop : -1],
        ]  # in the user's turn
        rows = torch.cat([*(hidden[:, a:b] for a, b in pages), *asked], dim=1)  # (B, V + Q, D)
        head = self.module
        vectors = normalize(head.second(gelu(head.first(rows))).float(), dim=-1)  # (B, V + Q, W)
        visual = self.prompt.visual
        similar = vectors[:, visual:] @ vectors[:, :visual].transpose(1, 2)  # (B, Q, V)
        scores = similar.unflatten(2, (len(pages), -1)).amax(dim=3).sum(dim=1)  # (B, pages)
        best = scores.topk(KEPT_PAGES, dim=1).indices.sort(dim=1).values.tolist()
        columns = []
        for chosen in best:
            gone = {n for page, (a, b) in enumerate(pages) if page not in chosen for n in range(a, b)}
            columns.append([n for n in range(hidden.shape[1]) if n not in gone])
        index = torch.tensor(columns, device=hidden.device)[:, :, None]  # (B, N, 1)
        hidden = hidden.gather(1, index.expand(-1, -1, hidden.shape[2]))
        tables = tuple(table.expand(batch, -1, -1).gather(1, index.expand(-1, -1, table.shape[2])) for table in tables)
        for layer in self.layers[cut:]:
            hidden = self._run(layer, hidden, tables, cache)
        return hidden

    # --- MMA: picture rows see [text before | question | picture so far] ----------------------------------------------

    def _opened(self, hidden: Tensor, tables: Tables, cache: DynamicCache) -> Tensor:
        start, stop, length = self.start, self.stop, hidden.shape[1]
        asked = length - stop  # the question and the answer's header

        def turned(states: Tensor) -> Tensor:
            return torch.cat([states[:, :, :start], states[:, :, stop:], states[:, :, start:stop]], dim=2)

        for number, layer in enumerate(self.layers):
            normed = layer.input_layernorm(hidden)
            queries, keys, values = (self._heads(layer, name, normed) for name in ("q_proj", "k_proj", "v_proj"))
            queries, keys = self.rotate(queries, keys, *tables)
            keys, values = cache.update(keys, values, number)
            # causal in this order is right for the text before and the picture, and square; the question comes apart
            most = self._attend(turned(queries), turned(keys), turned(values), causal=True)
            question = self._attend(queries[:, :, stop:], keys, values, causal=True)
            out = torch.cat([most[:, :start], most[:, start + asked :], question], dim=1)
            hidden = hidden + layer.self_attn.o_proj(out)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return hidden

    # --- LoRRA: two low-rank attentions and a router beside each layer ------------------------------------------------

    def _learners_layer(
        self, number: int, hidden: Tensor, tables: Tables, cache: DynamicCache, beside: Callable[..., tuple]
    ) -> Tensor:
        layer, own = self.layers[number], self.module[str(number)]
        normed = layer.input_layernorm(hidden)
        queries, keys, values = (self._heads(layer, name, normed) for name in ("q_proj", "k_proj", "v_proj"))
        queries, keys = self.rotate(queries, keys, *tables)
        keys, values = cache.update(keys, values, number)
        out = self._attend(queries, keys, values, causal=True)
        channels = pad(own.table[:, : keys.shape[2]].T, (0, keys.shape[3] - 2))  # (K, head_dim)
        mixed = self._attend(queries, keys, channels.expand_as(keys), causal=True)
        mixed = mixed.unflatten(-1, (-1, keys.shape[3]))[..., :2].sum(dim=2)  # (B, S, 2)
        weights = torch.softmax(silu(mixed + own.bias), dim=-1)
        after = hidden + layer.self_attn.o_proj(out)
        text, visual, alone = beside(number, own, after)
        for_text = weights[..., 1:]
        for_text[:, :alone] = 1.0  # rows that no picture precedes
        hidden = after + for_text * text + weights[..., :1] * visual
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    def _learners(self, hidden: Tensor, tables: Tables, cache: DynamicCache) -> Tensor:
        start, stop = self.start, self.stop
        embeddings = hidden
        memories = [
            (self._without(embeddings), tuple(self._without(table) for table in tables)),
            (embeddings[:, start:stop], tuple(table[:, start:stop] for table in tables)),
        ]

        def beside(number: int, own: nn.Module, states: Tensor) -> tuple[Tensor, Tensor, int]:
            held, queries = [], []
            for learner, (rows, rotary) in zip((own.text, own.visual), memories, strict=True):
                keys, values = learner.heads(learner.k, rows), learner.heads(learner.v, rows)
                held.append((self.rotate(keys[:, :0], keys, *rotary)[1], values))
                asked = learner.heads(learner.q, states)
                queries.append(self.rotate(asked, asked[:, :0], *tables)[0])
            self.memory[number] = held
            (keys, values), (image_keys, image_values) = held
            texts, images = queries
            first = self._attend(texts[:, :, :start], keys[:, :, :start], values[:, :, :start], causal=True)
            middle = self._attend(texts[:, :, start:stop], keys[:, :, :start], values[:, :, :start])
            last = self._attend(texts[:, :, stop:], keys, values, causal=True)
            text = own.text.o(torch.cat([first, middle, last], dim=1))
            middle = self._attend(images[:, :, start:stop], image_keys, image_values, causal=True)
            last = self._attend(images[:, :, stop:], image_keys, image_values)
            visual = own.visual.o(torch.cat([torch.zeros_like(first), middle, last], dim=1))
            return text, visual, start

        for number in range(self.spec.layers):
            hidden = self._learners_layer(number, hidden, tables, cache, beside)
        return hidden

    def _learners_step(self, hidden: Tensor, tables: Tables, cache: DynamicCache) -> Tensor:
        embeddings = hidden

        def beside(number: int, own: nn.Module, states: Tensor) -> tuple[Tensor, Tensor, int]:
            learner, (keys, values) = own.text, self.memory[number][0]
            new = learner.heads(learner.k, embeddings)
            new = self.rotate(new[:, :0], new, *tables)[1]
            keys = torch.cat([keys, new], dim=2)
            values = torch.cat([values, learner.heads(learner.v, embeddings)], dim=2)
            self.memory[number][0] = keys, values
            outputs = []
            for learner, (keys, values) in zip((own.text, own.visual), self.memory[number], strict=True):
                asked = learner.heads(learner.q, states)
                asked = self.rotate(asked, asked[:, :0], *tables)[0]
                outputs.append(learner.o(self._attend(asked, keys, values)))
            return (*outputs, 0)

        for number in range(self.spec.layers):
            hidden = self._learners_layer(number, hidden, tables, cache, beside)
        return hidden


def _rotation(attention: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    return sys.modules[type(attention).__module__].apply_rotary_pos_emb
