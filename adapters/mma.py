"""Modality-mutual attention (AKI): image rows may see the question that is asked about them.

https://arxiv.org/abs/2503.02597. In a causal decoder an image that stands before its question is read without knowing
what is asked. Here, at prefill, query row i sees key row j if

    j <= i,   or   i is an image row and j belongs to the question of i's turn          (and j is not padding)

in every layer and head, with the positions as they are. Answers are never opened, so generated tokens change nothing
that came before, and decoding is causal as always. What the original gets wrong and is mended here: spans come from
the chat template (no token id is written down), several images and turns are told apart, batches may be padded.

Batches of one shape take the exact fast path: image rows attend to [text before | question | image so far], put in
this order, with the kernel's own causal flag. Others take a boolean mask.

When not to use it: on a model that was not trained with it; and keys of the image depend on the question, so that a
second question about the same image must read it again. A prompt without the template's answer header, such as a
caption to be continued, is left causal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mllm.errors import CacheError, InputError
from mllm.layout import TokenLayout
from mllm.technique import Opened, Technique, register


@register
class ModalityMutualAttention(Technique):
    """Image rows see the question of their turn. Attach it with the processor.

    Args:
        turns: ``"own"``: the question of the image's own turn; ``"first"``: the question of the first turn alone, as
            the original; ``"all_previous"``: a question is open to the images of its own and of all earlier turns. The
            last two need all turns in one call.
        include_assistant_header: the header that opens the answer counts as part of the question, as in the original.
        bidirectional_images: rows of one image see each other both ways; causal in the original.

    Raises:
        ConfigError: attached without a processor, or its chat template does not tell questions from answers.
        InputError: no image of a batch is followed by its question; training labels lie inside an opened question.
        CacheError: a later turn concerns what a cache holds: with ``"first"`` its images, with ``"all_previous"`` its
            question.
        ConflictError: beside a technique that lets image rows attend in no layer, or that brings them back.
    """

    name: ClassVar[str] = "MMA"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.02597"
    needs_roles: ClassVar[bool] = True
    training: ClassVar[str | None] = "mllm.finetuning:recipe"

    turns: Literal["own", "first", "all_previous"] = "own"
    include_assistant_header: bool = True
    bidirectional_images: bool = False

    def opens(self, layout: TokenLayout) -> tuple[Opened, ...]:
        question = self._question(layout)
        image = layout.image_index  # (B, S)
        opened = [question]
        if self.bidirectional_images:
            opened.append(Opened(image, image.masked_fill(~layout.visual, -2), image))
        elif bool((question.group >= 0).any()) and not bool(self._followed(question, layout).any()):
            raise InputError(
                "MMA: no image in this batch is followed by its question, so that nothing can be opened. Put images "
                "before the question, as chat_inputs() and chat templates do."
            )
        return tuple(opened)

    def excludes(self, other: Technique) -> str | None:
        if isinstance(other, ModalityMutualAttention):
            return "both open questions to images. Keep one."
        if getattr(other, "recoverable", False):
            return "rows of an earlier turn that come back have no question of their own. Use recoverable=False."
        return None

    @property
    def crosses_turns(self) -> bool:
        return self.turns != "own"

    def check_call(self, layout: TokenLayout, lengths: Callable[[], Tensor], cached: bool) -> None:
        if self.turns == "own" or not layout.past_length or layout.roles is None:
            return
        asked = layout.visual if self.turns == "first" else layout.visual | layout.roles.assistant_header  # (B, S)
        if bool(asked.any()):
            raise CacheError(
                f'MMA: turns="{self.turns}" lets images see questions of other turns, and a turn that is in the cache '
                'is not read again. Give all turns in one call, or use turns="own".'
            )

    def _question(self, layout: TokenLayout) -> Opened:
        """What the images of each turn see of the questions."""
        roles, visual = layout.roles, layout.visual
        if roles is None:
            raise InputError("MMA reads questions from token ids: call the model with input_ids, not inputs_embeds.")
        turn = roles.turn.clamp(min=0)  # (B, S), what stands before the first header belongs to the first turn
        asked = layout.text & ~roles.answer
        if not self.include_assistant_header:
            asked = asked & ~roles.assistant_header
        # without the answer's header a text may go on: it is no question, and its tokens must not be seen from before
        ends = torch.zeros_like(turn).scatter_reduce(1, turn, roles.assistant_header.long(), "amax")  # (B, S) per turn
        asked = asked & ends.gather(1, turn).bool()
        group = turn.masked_fill(~asked, -1)
        low, high = turn, turn
        if self.turns == "first":
            first = ends.argmax(dim=1, keepdim=True).expand_as(turn)  # (B, S)
            low, high, group = first, first, group.masked_fill(turn != first, -1)
        elif self.turns == "all_previous":
            high = torch.full_like(turn, turn.shape[1])
        nothing = torch.full_like(turn, -2)
        return Opened(torch.where(visual, low, 0), torch.where(visual, high, nothing), group)

    def _followed(self, question: Opened, layout: TokenLayout) -> Tensor:
        """(B, S) bool, opened keys that stand behind an image that sees them."""
        columns = torch.arange(layout.visual.shape[1], device=layout.visual.device).expand_as(layout.visual)
        images = columns.masked_fill(~layout.visual, layout.visual.shape[1])  # (B, S)
        if self.turns == "own":
            none = torch.full_like(images, layout.visual.shape[1])
            first = none.scatter_reduce(1, question.low, images, "amin")  # (B, S) per turn; text counts as none
            first = first.gather(1, question.group.clamp(min=0))
        else:
            first = images.min(dim=1, keepdim=True).values  # (B, 1)
        return (question.group >= 0) & (first < columns)

    def check_labels(self, labels: Tensor, layout: TokenLayout) -> None:
        inside = self._followed(self._question(layout), layout) & (labels != -100)  # (B, S)
        if bool(inside.any()):
            row, column = inside.nonzero()[0].tolist()
            raise InputError(
                f"MMA: {int(inside.sum())} training labels, the first at row {row}, token {column}, lie on questions "
                "that images see: they would be read off instead of predicted. Label answers only (-100 elsewhere)."
            )
