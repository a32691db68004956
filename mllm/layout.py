"""What the tokens of one forward call are: visual or text, padding or not, which image, which position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mllm.roles import Roles


@dataclass(frozen=True)
class TokenLayout:
    """The tokens of one forward call, read from what the processor made; nothing about lengths is assumed.

    Attributes:
        visual: (B, S) bool, tokens that carry image or video features.
        valid: (B, S) bool, tokens that are not padding.
        past_length: tokens already in the key/value cache before this call.
        roles: who says what, where a technique needs it and the token ids are known.
        revived: tokens of earlier calls that came back; they are the first ones.
        revived_images: (B, revived) long, which image each of those belongs to.
        markers: (B, S) bool, text tokens that open or close a visual block; None where the family has none.
        ids: (B, S) long, token ids where they are known; -1 for tokens of earlier calls.
        pictures: pictures in this call, all rows together; blocks that touch each other may be several pictures.
    """

    visual: Tensor
    valid: Tensor
    past_length: int = 0
    roles: Roles | None = None
    revived: int = 0
    revived_images: Tensor | None = None
    markers: Tensor | None = None
    ids: Tensor | None = None
    pictures: int = 0

    @property
    def text(self) -> Tensor:
        """(B, S) bool, tokens that are neither visual nor padding."""
        return self.valid & ~self.visual

    @property
    def image_index(self) -> Tensor:
        """(B, S) long, number of the contiguous visual block within its row, counted from 0; -1 for other tokens."""
        visual = self.visual[:, self.revived :].long()
        starts = visual - torch.nn.functional.pad(visual, (1, 0))[:, :-1]  # (B, S)
        index = (starts == 1).long().cumsum(dim=1) - 1  # (B, S)
        index = torch.where(visual.bool(), index, torch.full_like(index, -1))
        return index if self.revived_images is None else torch.cat([self.revived_images, index], dim=1)

    @property
    def positions(self) -> Tensor:
        """(B, S) long, number of real tokens of this call before each token, offset by ``past_length``."""
        return (self.valid.long().cumsum(dim=1) - 1).clamp(min=0) + self.past_length

    @property
    def visual_counts(self) -> Tensor:
        """(B,) long, visual tokens per row."""
        return self.visual.sum(dim=1)

    @classmethod
    def from_inputs(
        cls,
        token_ids: tuple[int, ...],
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_length: int = 0,
        has_visual: bool = True,
        marker_ids: tuple[int, ...] = (),
    ) -> TokenLayout:
        """Read the layout from token ids.

        Args:
            token_ids: ids of the visual placeholders.
            input_ids: (B, S) long.
            attention_mask: (B, past + S), 1 for real tokens, or None where there is no padding.
            past_length: tokens already cached.
            has_visual: False where the call carries no image: a placeholder id is then an ordinary token, as it is
                when a model happens to generate one.
            marker_ids: ids of the tokens that open and close visual blocks.
        """
        markers = None
        if has_visual:
            ids = torch.tensor(token_ids, device=input_ids.device, dtype=input_ids.dtype)
            visual = torch.isin(input_ids, ids)  # (B, S)
            if marker_ids:
                markers = torch.isin(input_ids, torch.tensor(marker_ids, device=ids.device, dtype=ids.dtype))  # (B, S)
        else:
            visual = torch.zeros_like(input_ids, dtype=torch.bool)
        return cls(visual, valid_tokens(attention_mask, visual), past_length, markers=markers)


def valid_tokens(attention_mask: Tensor | None, like: Tensor) -> Tensor:
    """(B, S) bool: the last S columns of a 2-D padding mask; all True for None and for masks of another rank."""
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return torch.ones_like(like, dtype=torch.bool)
    return attention_mask[:, -like.shape[1] :].bool().to(like.device)
