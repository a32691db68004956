"""URaG: the decoder's first layers find the pages that answer the question; only these pages go on.

https://arxiv.org/abs/2511.10552. After the first K layers a small head maps the residual stream h of page and question
tokens to unit vectors, and pages are ranked by late interaction (MaxSim), in float32:

    z = W2 GELU(W1 h + b1) + b2,   u = z / |z|
    s_p = sum over question tokens q of max over tokens v of page p of <u_q, u_v>

The best pages enter layer K and those above; the tokens of the others leave physically. What stays keeps its original
(M-RoPE) positions. Layers below K cache every page, layers from K on the kept ones. Nothing is scored while an answer
is written, and the choice itself passes no gradient.

A page is a block of visual tokens with text (or the model's own markers) around it: text between pages, system prompts
and several tiles of one image are fine; images side by side with nothing between them are one page. The question is
the last user turn's text, told by the processor's chat template, without labels between pages and without end tokens;
without a processor (or template marks in the prompt) it is all text behind the last page.

With ``recoverable=True`` the head's vectors of all pages and the states of dropped ones stay with the cache. A later
turn's question ranks all pages again: those that are chosen now enter the layers from K on as they were left, pages
that are there stay. Layers below K are causal, so their states do not depend on the question and are read only once.

Traps of the original that are avoided: it crashes on SDPA and eager once a page is dropped; batch 1 only; pages must
touch each other; text-only prompts and second turns crash; ties keep more than k pages; question offsets and K are not
saved with the weights.

When not to use it: few pages (the head and K layers are spent for nothing), questions that need most pages, or an
untrained head, whose order is arbitrary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, Strict
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.cost import ModelSpec
from mllm.errors import ConfigError, InputError, LoadError
from mllm.layout import TokenLayout
from mllm.rows import Rows
from mllm.saving import LearnedWeights, read_tensors
from mllm.technique import LayerView, Revived, Technique, TrainedTechnique, register

_SCORES = 1 << 24  # similarities that are held at a time
_MODEL = ("model", "visual", "lm_head")  # how names of the language model begin in the authors' checkpoints


class RetrievalHead(nn.Module):
    """(..., D) states to (..., width) vectors, not normalised."""

    def __init__(self, states: int, hidden: int, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(states, hidden)
        self.second = nn.Linear(hidden, width)

    def forward(self, states: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(states.to(self.first.weight.dtype))))


def maxsim(question: Tensor, asked: Tensor, vectors: Tensor, page: Tensor, pages: int) -> Tensor:
    """(B, pages) float32: for each page, the sum over question tokens of the best similarity with one of its tokens.

    Similarities are computed for some page tokens at a time; only (B, Q, pages) numbers are kept. A page without tokens
    has minus infinity.

    Args:
        question: (B, Q, W) vectors of any length.
        asked: (B, Q) bool, False for fillers.
        vectors: (B, V, W) of page tokens.
        page: (B, V) long, page of each; -1 for fillers.
    """
    question, vectors = (F.normalize(part.float(), dim=-1) for part in (question, vectors))
    batch, length = asked.shape
    page = page.masked_fill(page < 0, pages)  # fillers fall into a bin
    best = question.new_full((batch, length, pages + 1), -torch.inf)
    chunk = max(1, _SCORES // (batch * length))
    for start in range(0, page.shape[1], chunk):
        some = slice(start, start + chunk)
        with torch.autocast(question.device.type, enabled=False):  # scores stay float32
            similar = question @ vectors[:, some].transpose(1, 2)  # (B, Q, chunk)
        best = best.scatter_reduce(2, page[:, None, some].expand_as(similar), similar, "amax")
    return best[..., :pages].masked_fill(~asked[:, :, None], 0.0).sum(dim=1)


@register
class URaG(TrainedTechnique):
    """Only the pages that fit the question stay after the first layers. Attach it with the processor.

    Args:
        layer: layers that all pages run (K); or a fraction of the depth between 0 and 1.
        policy: which pages stay: ``"topk"``: the ``keep_pages`` best; ``"threshold"``: those that score at least
            ``threshold``; ``"budget"``: from the best down, each that fits into ``budget`` visual tokens; ``"all"``:
            all of them, which only scores. Of equal pages the earlier one is better.
        keep_pages: pages that stay under ``"topk"``. With no more pages than that nothing is scored or dropped.
        threshold: for that policy; with ``normalise=True`` a mean cosine between -1 and 1.
        budget: for that policy; visual tokens of a row.
        always_keep: page numbers that stay whatever they score, counted from 0, or from the end: -1 is the last page.
            They count towards ``keep_pages`` and ``budget``.
        hidden: width of the head's hidden layer.
        width: length of its vectors.
        normalise: scores are means over question tokens, not sums, which grow with the question's length.
        page_markers: ``"keep"`` all text; or ``"drop"`` the model's start and end tokens around a dropped page, too, as
            the original does. Families without such tokens have nothing to drop.
        recoverable: a later turn on the same cache ranks all pages again; needs the processor.
        evict_early: forget the keys of dropped pages in layers 1 to K - 1 as well, once the prompt is read (layer 0
            keeps the sequence's length): answers no longer see these pages there, an approximation that saves cache.
        weights: see :class:`~mllm.technique.TrainedTechnique`.

    Raises:
        ConfigError: arguments that do not fit each other, or a layer that the model does not have.
        InputError: pages must be chosen, but the prompt holds no question, or pictures with nothing between them.
    """

    name: ClassVar[str] = "URaG"
    paper: ClassVar[str] = "https://arxiv.org/abs/2511.10552"
    training: ClassVar[str | None] = "mllm.token_pruning.urag_training:recipe"
    training_data: ClassVar[str] = "pages"
    wants_roles: ClassVar[bool] = True

    layer: Annotated[int, Strict(), Field(ge=1)] | Annotated[float, Strict(), Field(gt=0, lt=1)] = 6
    policy: Literal["topk", "threshold", "budget", "all"] = "topk"
    keep_pages: Annotated[int, Strict(), Field(ge=1)] = 5
    threshold: float | None = Field(None, allow_inf_nan=False)
    budget: Annotated[int, Strict(), Field(ge=1)] | None = None
    always_keep: tuple[Annotated[int, Strict()], ...] = ()
    hidden: Annotated[int, Strict(), Field(ge=1)] = 1024
    width: Annotated[int, Strict(), Field(ge=1)] = 512
    normalise: bool = False
    page_markers: Literal["keep", "drop"] = "keep"
    recoverable: bool = False
    evict_early: bool = False

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        for name in ("threshold", "budget"):
            if (getattr(self, name) is None) == (self.policy == name):
                raise ConfigError(
                    f"URaG: policy={self.policy!r} with {name}={getattr(self, name)}: the policy {name!r} needs a "
                    f"{name}, and no other policy takes one."
                )
        if self.recoverable and self.evict_early:
            raise ConfigError(
                "URaG: evict_early=True forgets the pages in the early layers, in which recoverable=True lets the next "
                "question see all of them. Switch one of them off."
            )

    @property
    def by_input(self) -> bool:
        return True

    @property
    def needs_roles(self) -> bool:
        return self.recoverable  # a later turn's question must be told from the rest of the answer before it

    def first_visual_layer(self, spec: ModelSpec) -> int:
        """K, the layer before which pages are chosen."""
        return self.layer if isinstance(self.layer, int) else max(math.floor(self.layer * spec.layers + 0.5), 1)

    def check(self, spec: ModelSpec) -> None:
        if self.first_visual_layer(spec) >= spec.layers:
            raise ConfigError(
                f"URaG: layer={self.layer}, but this model has {spec.layers} layers, and at least one must be left for "
                f"the pages that stay. Give 1 to {spec.layers - 1}, or a fraction of the depth such as 0.2."
            )

    def excludes(self, other: Technique) -> str | None:
        if isinstance(other, URaG):
            return "both choose the pages. Keep one."
        if self.recoverable and type(other).opens is not Technique.opens:
            return (
                f"under {other.name} pages see the question, so that pages kept for a later question would answer the "
                "first one. Use recoverable=False, which reads the pages again."
            )
        if self.recoverable and getattr(other, "recoverable", False):
            return "both bring rows of an earlier turn back. Use recoverable=False in one of them."
        return None

    def build(self, spec: ModelSpec) -> RetrievalHead:
        return RetrievalHead(spec.hidden, self.hidden, self.width)

    # --- choosing pages --------------------------------------------------------------------------------------------

    def decides(self, sizes: Sequence[int]) -> bool:
        """Whether pages of these numbers of visual tokens must be scored; a page without tokens is none."""
        pages = [page for page, size in enumerate(sizes) if size]
        if self.policy == "topk":
            return len(pages) > self.keep_pages
        if self.policy == "budget":
            return sum(sizes) > self.budget
        return bool(pages)

    def choose(self, scores: Sequence[float], sizes: Sequence[int], wanted: Set[int] = frozenset()) -> set[int]:
        """Pages that stay, of one row, from their scores and numbers of visual tokens; ``wanted`` ones in any case."""
        count = len(sizes)
        pages = [page for page in range(count) if sizes[page]]
        kept = ({page % count for page in self.always_keep if -count <= page < count} | wanted) & set(pages)
        ranked = sorted((page for page in pages if page not in kept), key=lambda page: -scores[page])  # stable
        if self.policy == "all":
            return set(pages)
        if self.policy == "topk":
            return kept | set(ranked[: max(0, self.keep_pages - len(kept))])
        if self.policy == "threshold":
            return kept | {page for page in ranked if scores[page] >= self.threshold}
        left = self.budget - sum(sizes[page] for page in kept)
        for page in ranked:
            if sizes[page] <= left:
                kept.add(page)
                left -= sizes[page]
        return kept

    def select(self, scores: Sequence[Sequence[float] | None], sizes: Sequence[Sequence[int]]) -> list[set[int]]:
        """Pages that stay, per row; a row that was not scored keeps all."""
        return [
            {page for page, size in enumerate(row_sizes) if size} if row is None else self.choose(row, row_sizes)
            for row, row_sizes in zip(scores, sizes, strict=True)
        ]

    # --- in the decoder --------------------------------------------------------------------------------------------

    def keep(self, view: LayerView) -> Tensor | None:
        if view.layer != self.first_visual_layer(view.spec):
            return None
        layout, store = view.layout, view.store
        batch = layout.visual.shape[0]
        page = self._pages(layout, store.get("seen"))  # (B, S)
        rows, numbers = _take(page, (page >= 0) & layout.visual & view.alive & ~_came_back(layout))  # (B, V)
        # (B, V) those of earlier turns too
        every = torch.cat([store["page"], numbers], dim=1) if "page" in store else numbers
        sizes = _sizes(every)
        self._check_pictures(layout)
        decides = [self.decides(row) for row in sizes]
        vectors = None
        if self.recoverable or any(decides):
            vectors = self._embed(view, rows)  # (B, V, W)
            vectors = torch.cat([store["vectors"], vectors], dim=1) if "vectors" in store else vectors
        scores: list[Tensor | None] = [None] * batch
        asked = [0] * batch
        if any(decides):
            found, asked = self._score(view, page, vectors, every, decides, max(map(len, sizes)))  # (B, pages)
            scores = [found[row, : len(sizes[row])] if decides[row] else None for row in range(batch)]
        kept = self.select([None if row is None else row.tolist() for row in scores], sizes)
        kept = [now | before for now, before in zip(kept, store.get("kept", kept), strict=True)]
        view.output.update(scores=scores, kept=[sorted(pages) for pages in kept], question_tokens=asked)
        gone = self._gone(page, kept) & view.alive  # (B, S)
        dropped = any(len(stay) < sum(map(bool, row)) for stay, row in zip(kept, sizes, strict=True))
        if self.recoverable:
            seen = [len(row) for row in sizes]
            store.update(seen=seen, page=every, vectors=vectors, kept=kept)
            store["stash"] = None
            if dropped:
                # pages are counted over the whole conversation
                store["stash"] = replace(view.stash(gone), image=_take(page, gone)[1])
        if not dropped:
            return view.alive
        if self.evict_early:
            view.evict(gone)
        return view.alive & ~gone

    def revive(self, layout: TokenLayout, store: dict[str, Any]) -> Revived | None:
        stash = store.get("stash")
        # without a user's header it is no question, but the rest of an answer
        if stash is None or (layout.roles is not None and not bool(layout.roles.user_header.any())):
            return None
        return Revived(stash, stash.layer)

    def _pages(self, layout: TokenLayout, seen: list[int] | None) -> Tensor:
        """(B, S) long, page that a row belongs to, counted over the conversation where it is recoverable; -1: none."""
        page = layout.image_index[:, layout.revived :]  # of this call
        if self.page_markers == "drop" and layout.markers is not None:
            near = torch.maximum(F.pad(page, (1, 0), value=-1)[:, :-1], F.pad(page, (0, 1), value=-1)[:, 1:])
            page = torch.where(layout.markers[:, layout.revived :], near, page)
        if seen is not None:
            page = torch.where(page >= 0, page + torch.tensor(seen, device=page.device)[:, None], page)
        return page if layout.revived_images is None else torch.cat([layout.revived_images, page], dim=1)

    def _check_pictures(self, layout: TokenLayout) -> None:
        """Refuse pictures that are one page because nothing stands between them, where it makes a difference."""
        if layout.pictures <= (self.keep_pages if self.policy == "topk" else 1):
            return
        own = layout.image_index[:, layout.revived :]
        pages = int((own.amax(dim=1) + 1).sum())
        if pages < layout.pictures:
            raise InputError(
                f"URaG: {layout.pictures} pictures make {pages} pages: pictures side by side are one page, since "
                "nothing tells where one ends. Put text between them, such as 'Page 2:'."
            )

    def _question(self, layout: TokenLayout, page: Tensor) -> Tensor:
        """(B, S) bool, tokens of the question."""
        text, visual = layout.text, page >= 0
        if layout.markers is not None:
            text = text & ~layout.markers
        behind = text & _none_from_here(visual)
        roles = layout.roles
        if roles is None:
            return behind
        last = roles.turn.amax(dim=1, keepdim=True)  # (B, 1) the last user turn; -1 without template marks
        inside = roles.turn == last
        asked = text & roles.question & inside
        if roles.closing is not None:
            asked = asked & ~roles.closing
        images = visual & inside
        between = (images.cumsum(dim=1) > 0) & ~_none_from_here(images)  # labels such as "page 2:"
        return torch.where(last >= 0, asked & ~between, behind)

    def _embed(self, view: LayerView, rows: Rows) -> Tensor:
        """(B, N, W) the head's vectors of some rows."""
        states = rows.take(view.states(), view.alive.shape[0])  # (B, N, D)
        view.spend(2 * states.shape[0] * rows.length * (view.spec.hidden + self.width) * self.hidden)
        return view.module(states)

    def _score(
        self, view: LayerView, page: Tensor, vectors: Tensor, every: Tensor, decides: list[bool], pages: int
    ) -> tuple[Tensor, list[int]]:
        """(B, pages) float32 scores, without a meaning in rows that decide nothing; and tokens of each question."""
        deciding = torch.tensor(decides, device=page.device)  # (B,)
        question = self._question(view.layout, page) & view.alive & deciding[:, None]
        counts = question.sum(dim=1).tolist()
        for row, count in enumerate(counts):
            if decides[row] and not count:
                raise InputError(
                    f"URaG: row {row} has pages to choose from but no question: no text stands behind its last page"
                    f"{'' if view.layout.roles is None else ', and its last user turn holds none'}. Ask something "
                    "behind the pages, as chat_inputs() and chat templates place it; where the question stands "
                    "before them, attach with the processor."
                )
        rows = Rows.select(question, counts)
        asked = torch.ones_like(rows.index, dtype=torch.bool) if rows.valid is None else rows.valid  # (B, Q)
        asking = self._embed(view, rows)  # (B, Q, W)
        view.spend(2 * every.shape[0] * rows.length * every.shape[1] * self.width)
        scores = maxsim(asking, asked, vectors, every, pages)
        return scores / asked.sum(dim=1, keepdim=True).clamp(min=1) if self.normalise else scores, counts

    @staticmethod
    def _gone(page: Tensor, kept: list[set[int]]) -> Tensor:
        """(B, S) bool, rows of pages that do not stay."""
        count = 1 + max((max(pages, default=-1) for pages in kept), default=-1)
        stays = torch.tensor([[number in pages for number in range(count)] + [False] for pages in kept])
        stays = stays.to(page.device)  # (B, count + 1), the last one for pages behind all that stay
        return (page >= 0) & ~stays.gather(1, page.clamp(min=0, max=count))

    # --- costs -----------------------------------------------------------------------------------------------------

    def visual_left(self, layer: int, spec: ModelSpec, visual_tokens: int, images: int) -> int:
        if layer < self.first_visual_layer(spec):
            return visual_tokens
        if self.policy == "topk":
            return min(visual_tokens, self.keep_pages * math.ceil(visual_tokens / images))
        return visual_tokens if self.policy != "budget" else min(visual_tokens, self.budget)

    def extra_flops(self, spec: ModelSpec, text_tokens: int, visual_tokens: int) -> int:
        """Head and MaxSim, as if all text were the question: the most that it can be."""
        head = (text_tokens + visual_tokens) * (spec.hidden + self.width) * self.hidden
        return 2 * (head + text_tokens * visual_tokens * self.width)

    # --- the authors' weights --------------------------------------------------------------------------------------

    @classmethod
    def from_released(cls, source: str | Path | Mapping[str, Tensor], **arguments: Any) -> URaG:
        """URaG with the head of a checkpoint in the authors' layout, ``proj_layer.{0,2}.{weight,bias}``.

        Tensors of the language model beside it (``model.``, ``visual.``, ``lm_head.``) are left alone: load the same
        folder as a model with :func:`mllm.load`, since the authors trained both together.

        Args:
            source: a state dict, a ``.safetensors`` file, or a folder with such files.
            arguments: of URaG; ``hidden`` and ``width`` are read off the tensors.

        Raises:
            LoadError: a tensor of the head is missing, of another shape or too many; or nothing can be read.
        """
        from transformers.core_model_loading import WeightRenaming

        renamings = [WeightRenaming(f"proj_layer.{old}", new) for old, new in (("0", "first"), ("2", "second"))]
        names = [f"{part}.{kind}" for part in ("first", "second") for kind in ("weight", "bias")]
        tensors, given = {}, {}
        for key, value in read_tensors(source, lambda key: key.split(".")[0] not in _MODEL).items():
            name = key
            for renaming in renamings:
                name, _ = renaming.rename_source_key(name)
            tensors[name], given[name] = value, key
        originals = dict(zip(names, (f"proj_layer.{n}.{k}" for n in (0, 2) for k in ("weight", "bias")), strict=True))
        missing = [originals[name] for name in names if name not in tensors]
        unknown = [given[name] for name in tensors if name not in names]
        where = "the state dict" if isinstance(source, Mapping) else str(source)
        if missing or unknown:
            raise LoadError(
                f"{where} is not a URaG head: missing {', '.join(missing) or 'nothing'}; unexpected "
                f"{', '.join(unknown[:4]) or 'nothing'}. It must hold {', '.join(originals.values())}; merge LoRA "
                "weights into them first."
            )
        first, second = tensors["first.weight"], tensors["second.weight"]
        hidden, width = first.shape[0] if first.ndim else 0, second.shape[0] if second.ndim else 0
        wanted = {
            "first.weight": (hidden, first.shape[-1] if first.ndim else 0),
            "first.bias": (hidden,),
            "second.weight": (width, hidden),
            "second.bias": (width,),
        }
        wrong = [originals[name] for name, shape in wanted.items() if tuple(tensors[name].shape) != shape]
        if wrong:
            shapes = ", ".join(f"{originals[name]} {tuple(tensors[name].shape)}" for name in names)
            raise LoadError(
                f"{where}: {wrong[0]} has another shape than the rest of the "
                f"head: {shapes}. Needed: (hidden, states), (hidden,), (width, hidden), (width,)."
            )
        shape = {"hidden": hidden, "width": width}
        if wrong := {name: value for name, value in arguments.items() if shape.get(name, value) != value}:
            raise LoadError(f"{where} has a head of {shape}; {wrong} were asked for. Leave them out.")
        tensors = {name: tensors[name].detach().cpu() for name in names}
        return cls(**{**arguments, **shape}).with_learned(LearnedWeights(tensors, {}, where))


def _came_back(layout: TokenLayout) -> Tensor:
    """(S,) bool, rows of an earlier turn."""
    return torch.arange(layout.visual.shape[1], device=layout.visual.device) < layout.revived


def _none_from_here(marks: Tensor) -> Tensor:
    """(B, S) bool, whether neither this token nor one behind it is marked."""
    return marks.flip(1).cumsum(dim=1).flip(1) == 0


def _take(page: Tensor, wanted: Tensor) -> tuple[Rows, Tensor]:
    """The rows where ``wanted`` (B, S) is True, and their pages, (B, N) long, -1 for fillers."""
    rows = Rows.select(wanted, wanted.sum(dim=1).tolist())
    numbers = rows.take(page, page.shape[0])
    valid = wanted.gather(1, rows.index)
    return rows, numbers.masked_fill(~valid, -1)


def _sizes(numbers: Tensor) -> list[list[int]]:
    """Tokens of each page, per row, from the pages of tokens (B, V); up to the last page of the row."""
    count = int(numbers.max()) + 1
    sizes = torch.zeros(numbers.shape[0], count + 1, dtype=torch.long, device=numbers.device)
    sizes.scatter_add_(1, numbers.masked_fill(numbers < 0, count), torch.ones_like(numbers))
    rows = sizes[:, :count].tolist()
    return [row[: max((page + 1 for page, size in enumerate(row) if size), default=0)] for row in rows]
