"""Training URaG (https://arxiv.org/abs/2511.10552): ``mllm train urag --stage retrieval``, then ``--stage joint``.

With s_p the score of page p, P the pages that hold the answer and m their number, a chat costs

    set_softplus   softplus(s- - s+),  s+ = sum of s_p over P,  s- = sum of the m largest scores of other pages
    per_token      the same with scores per question token, which do not grow with the question
    infonce        -log(sum over P of exp(s_p / t) / sum over all pages of exp(s_p / t)), per question token

Stage ``retrieval`` trains the head on the frozen model and runs its first K layers only, without gradients. Stage
``joint`` starts from that (``--argument weights=FOLDER``), trains head and LoRA together and adds the answer loss; the
deep layers see all pages that hold the answer and the best others, up to ``keep_pages``. The original trains LoRA on
the head instead of the head itself; it makes an unanswerable question's best page its answer, which confirms whatever
the head believes: here such chats count for the answer only, unless ``pseudo_positive`` is set.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.chats import PLACEHOLDER, Chat, Chats, collate
from mllm.errors import InputError
from mllm.families import find_parts
from mllm.finetuning import Finetuning, FinetuningOptions
from mllm.roles import ChatFormat
from mllm.saving import save_techniques
from mllm.technique import LayerView, Stack
from mllm.token_pruning.urag import URaG
from mllm.training import Options, Recipe, answer_loss

RESULT_NAME = "retrieval.json"
_LOOKED_AT = 64  # chats in which labels are looked for before training


class URaGOptions(FinetuningOptions):
    """Options of training URaG; those of fine-tuning are for the stage ``joint``.

    Attributes:
        stage: what is trained: ``"retrieval"``: the head; ``"joint"``: head and model.
        loss: see above.
        temperature: t of ``"infonce"``.
        pseudo_positive: a chat that says that no page holds its answer is trained on its best page, as in the original.
        held_out: chats of the test side on which page accuracy is measured at the end.
    """

    stage: Literal["retrieval", "joint"] = "retrieval"
    loss: Literal["set_softplus", "per_token", "infonce"] = "set_softplus"
    temperature: float = Field(0.05, gt=0)
    pseudo_positive: bool = False
    held_out: int = Field(100, ge=1)
    rank: int = Field(32, ge=1)
    alpha: float = Field(64.0, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)
    attach: Literal[True] = True


def retrieval_loss(
    scores: Tensor, positives: Sequence[int], kind: str = "set_softplus", tokens: int = 1, temperature: float = 0.05
) -> Tensor:
    """The loss of one chat.

    Args:
        scores: (pages,) sums over question tokens.
        positives: pages that hold the answer, at least one.
        kind: ``"set_softplus"``, ``"per_token"`` or ``"infonce"``.
        tokens: of the question.
        temperature: of ``"infonce"``.
    """
    right = torch.zeros_like(scores, dtype=torch.bool)
    right[list(positives)] = True
    if kind == "infonce":
        logits = scores / (tokens * temperature)
        return logits.logsumexp(dim=0) - logits[right].logsumexp(dim=0)
    if kind == "per_token":
        scores = scores / tokens
    wrong = scores[~right]
    hardest = wrong.topk(min(int(right.sum()), wrong.shape[0])).values
    return F.softplus(hardest.sum() - scores[right].sum())


@dataclass(frozen=True)
class _Lesson:
    """What the technique is told about one batch.

    Attributes:
        positives: per row, pages that hold the answer.
        only_scores: the deep layers are not needed.
    """

    positives: Sequence[Sequence[int]]
    only_scores: bool


class _Enough(Exception):
    """Ends a forward after the pages were scored."""

    def __init__(self, output: dict[str, Any]) -> None:
        self.output = output


class _Taught(URaG):
    """URaG that scores all pages and keeps those that hold the answer."""

    _lesson: _Lesson | None = PrivateAttr(default=None)

    def decides(self, sizes: Sequence[int]) -> bool:
        return any(sizes)

    def select(self, scores: Sequence[Sequence[float] | None], sizes: Sequence[Sequence[int]]) -> list[set[int]]:
        rows = zip(scores, sizes, self._lesson.positives, strict=True)
        return [set() if row is None else self.choose(row, pages, set(right)) for row, pages, right in rows]

    def keep(self, view: LayerView) -> Tensor | None:
        if not self._lesson.only_scores:
            return super().keep(view)
        # the frozen layers ran without gradients, the head needs them
        with torch.set_grad_enabled(torch.is_grad_enabled() or view.module.training):
            kept = super().keep(view)
        if kept is not None:
            raise _Enough(view.output)
        return None


class _Lessons:
    """What both stages share: scores and losses of a batch, and the held-out measurement."""

    def begin(self, options: Options) -> None:
        self.options, self.split = options, "train"
        (self.urag,), (self.head,) = self.handle.stack.techniques, self.handle.modules
        self.head.float()

    def examples(self, chats: Chats, folder: Path) -> Chats:
        if not any(chats[number].evidence for number in range(_LOOKED_AT)):
            raise InputError(
                f"None of the first {_LOOKED_AT} chats says which of its pictures hold the answer. Give "
                "'retrieval_labels' in each record, 0 or 1 for each picture, or train on --data pages."
            )
        return _Short(chats) if self.options.smoke else chats

    def inputs(self, batch: Sequence[Chat]) -> Any:
        model = find_parts(self.model).model
        inputs = collate(self.processor, self.chat_format, batch).to(model.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(next(model.parameters()).dtype)
        return inputs

    def scores(self, batch: Sequence[Chat]) -> dict[str, Any]:
        """Scores of all pages, from the first K layers alone."""
        inputs = {name: value for name, value in self.inputs(batch).items() if name != "labels"}
        self.urag._lesson = _Lesson([()] * len(batch), only_scores=True)
        try:
            with torch.no_grad():
                find_parts(self.model).base(**inputs, use_cache=False)
        except _Enough as enough:
            return enough.output
        return {"scores": [None] * len(batch), "question_tokens": [0] * len(batch)}  # no pictures at all

    def judge(self, batch: Sequence[Chat], output: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """Mean retrieval loss of a batch; a chat without labels adds nothing."""
        own: URaGOptions = self.own
        losses, hits = [], []
        for chat, scores, tokens in zip(batch, output["scores"], output["question_tokens"], strict=True):
            positives = _positives(chat, scores)
            if scores is None or positives is None:
                continue
            if not positives and own.pseudo_positive:
                positives = (int(scores.argmax()),)
            if positives:
                sums = scores * tokens if self.urag.normalise else scores
                losses.append(retrieval_loss(sums, positives, own.loss, tokens, own.temperature))
                hits.append(float(int(scores.argmax()) in positives))
        nothing = 0 * sum(parameter.sum() for parameter in self.head.parameters())
        loss = (nothing + sum(losses)) / len(batch)
        return loss, {"top1": sum(hits) / len(hits)} if hits else {}

    def measure(self, folder: Path) -> None:
        """Page accuracy on the test side: printed, and saved in ``retrieval.json``."""
        chats, count = self.options.chats("test"), self.own.held_out
        if self.options.smoke:
            chats, count = _Short(chats), 2
        modules = [module for module in (find_parts(self.model).text, self.head) if module.training]
        for module in modules:
            module.eval()
        ranks, pages = [], []
        for number in range(count):
            chat = chats[number]
            (scores,) = self.scores([chat])["scores"]
            positives = _positives(chat, scores)
            if scores is not None and positives:
                order = scores.argsort(descending=True, stable=True).tolist()
                ranks.append(min(order.index(page) for page in positives))
                pages.append(len(positives) / len(order))
        for module in modules:
            module.train()
        result = {"chats": len(ranks), "labelled_share": len(ranks) / count}
        if ranks:
            result |= {f"top{k}": sum(rank < k for rank in ranks) / len(ranks) for k in (1, 5)}
            result["chance_top1"] = sum(pages) / len(pages)
            print(
                f"Held-out pages: top-1 {result['top1']:.1%} (chance {result['chance_top1']:.1%}), "
                f"top-5 {result['top5']:.1%}, {len(ranks)} chats"
            )
        (folder / RESULT_NAME).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Short:
    """Chats of two pages at most, one that holds the answer among them, for a quick look."""

    chats: Chats

    def __getitem__(self, number: int) -> Chat:
        chat = self.chats[number]
        if len(chat.images) <= 2 or any(PLACEHOLDER in question for question, _ in chat.turns):
            return chat
        first = chat.evidence[0] if chat.evidence else 0
        pages = sorted({first, 0 if first else 1})
        evidence = None if chat.evidence is None else tuple(n for n, page in enumerate(pages) if page in chat.evidence)
        return replace(chat, images=tuple(chat.images[page] for page in pages), evidence=evidence)


def _positives(chat: Chat, scores: Tensor | None) -> tuple[int, ...] | None:
    """Pages that hold the answer; None where the chat does not say."""
    if scores is not None and len(scores) != len(chat.images):
        raise InputError(
            f"{chat}: its {len(chat.images)} pictures make {len(scores)} pages. Pictures side by side are one page: "
            "the chat template must write something between them."
        )
    return chat.evidence


class Retrieval(_Lessons, Recipe):
    """The head learns on the frozen model."""

    defaults: ClassVar[dict[str, Any]] = {"lr": 1e-3, "steps": 300, "batch_size": 4}

    def __init__(self, model: nn.Module, processor: Any, options: Options) -> None:
        self.own = options.read(URaGOptions)
        model.requires_grad_(False)
        self.model, self.processor = model, processor
        self.chat_format = ChatFormat.from_processor(processor)
        self.handle = Stack(_Taught(**options.arguments)).attach(model, processor, freeze=False)
        self.begin(options)
        self.head.train()

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.head.parameters())}]

    def loss(self, batch: list[Chat], step: int) -> tuple[Tensor, dict[str, float]]:
        return self.judge(batch, self.scores(batch))

    def save(self, folder: Path) -> None:
        self.measure(folder)
        save_techniques(self.handle.stack, folder, self.model, self.handle.modules)


class Joint(_Lessons, Finetuning):
    """Head and model learn together."""

    schema: ClassVar[type[FinetuningOptions]] = URaGOptions
    defaults: ClassVar[dict[str, Any]] = {"lr": 5e-5, "steps": 200, "batch_size": 1, "accumulation": 8}

    def __init__(self, model: nn.Module, processor: Any, options: Options) -> None:
        Finetuning.__init__(self, model, processor, replace(options, technique=_Taught))
        self.begin(options)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [*Finetuning.parameter_groups(self), {"params": list(self.head.parameters())}]

    def loss(self, batch: list[Chat], step: int) -> tuple[Tensor, dict[str, float]]:
        self.urag._lesson = _Lesson([chat.evidence or () for chat in batch], only_scores=False)
        self.handle.run.outputs = {}
        answers, numbers = answer_loss(find_parts(self.model).model, self.inputs(batch))
        output = self.handle.run.outputs.get("URaG")
        if output is None:  # no pictures in this batch
            output = {"scores": [None] * len(batch), "question_tokens": [0] * len(batch)}
        pages, found = self.judge(batch, output)
        return answers + pages, {**numbers, **found, "answers": float(answers.detach()), "pages": float(pages.detach())}

    def save(self, folder: Path) -> None:
        self.measure(folder)
        Finetuning.save(self, folder)


def recipe(model: nn.Module, processor: Any, options: Options) -> Recipe:
    """What ``URaG.training`` names, see :mod:`mllm.training`."""
    stage = options.read(URaGOptions).stage
    return (Retrieval if stage == "retrieval" else Joint)(model, processor, options)
