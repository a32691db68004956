"""Who says what in a chat, read from token ids on the device: system text, questions, answers, and their turns."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mllm.errors import ConfigError


@dataclass(frozen=True)
class Roles:
    """The part that each token plays; every valid token has exactly one, padding has none.

    Attributes:
        turn: (B, S) long, number of the user turn that a token belongs to, counted from 0; -1 before the first.
        system: (B, S) bool, what stands before the first header: start tokens and the system prompt with its marks.
        user_header: (B, S) bool, what opens a user turn.
        question: (B, S) bool, what the user gives, visual placeholders and the end token behind it included.
        assistant_header: (B, S) bool, what opens an answer.
        answer: (B, S) bool, the answer with the end token behind it.
        closing: (B, S) bool, the end tokens among these, and what the template writes between them and the next header.
    """

    turn: Tensor
    system: Tensor
    user_header: Tensor
    question: Tensor
    assistant_header: Tensor
    answer: Tensor
    closing: Tensor | None = None

    def padded(self, count: int) -> Roles:
        """With ``count`` tokens in front that play no part and belong to no turn."""
        turn = torch.nn.functional.pad(self.turn, (count, 0), value=-1)  # (B, count + S)
        masks = (self.system, self.user_header, self.question, self.assistant_header, self.answer, self.closing)
        return Roles(
            turn,
            *(None if mask is None else torch.nn.functional.pad(mask, (count, 0), value=False) for mask in masks),
        )


@dataclass(frozen=True)
class ChatFormat:
    """How a processor's chat template marks turns, as token ids.

    A tokenizer may join the edge of a header with the text beside it, so each header has several spellings; all of
    them hold the header's visible text. A user who writes a header into a question in plain text opens a turn.

    Attributes:
        user: spellings of what opens a user turn.
        assistant: spellings of what opens an answer.
        end: special tokens that the template writes behind an answer; empty where it writes none.
    """

    user: tuple[tuple[int, ...], ...]
    assistant: tuple[tuple[int, ...], ...]
    end: tuple[int, ...] = ()

    @classmethod
    def from_processor(cls, processor: Any) -> ChatFormat:
        """Read the format off the processor's own chat template, by rendering it and tokenizing the result.

        Args:
            processor: a processor or a tokenizer with a chat template, backed by a fast tokenizer.

        Raises:
            ConfigError: no fast tokenizer, no chat template, or one whose turns cannot be told apart.
        """
        tokenizer = getattr(processor, "tokenizer", processor)
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(
                f"{type(tokenizer).__name__} cannot tell which characters a token stands for. "
                "Load a fast tokenizer (use_fast=True, or a folder with tokenizer.json)."
            )
        template = _Template(processor, tokenizer)
        user, assistant = template.spell(template.user_headers()), template.spell(template.assistant_headers())
        if not user or not assistant or user & assistant:
            raise ConfigError(
                "The chat template writes nothing of its own before questions and answers that would tell them apart. "
                "Set processor.chat_template to the one that the model was trained with."
            )
        return cls(tuple(sorted(user)), tuple(sorted(assistant)), template.end_tokens())

    def roles(self, input_ids: Tensor, valid: Tensor) -> Roles:
        """Which part each token plays. Nothing waits for the device.

        Args:
            input_ids: (B, S) long.
            valid: (B, S) bool, False for padding, on either side.
        """
        ids = input_ids.masked_fill(~valid, -1)  # (B, S)
        user_header, user_starts = _find(self.user, ids)
        assistant_header, assistant_starts = _find(self.assistant, ids)
        assistant_header = assistant_header & ~user_header
        last_user, last_assistant = _last(user_starts), _last(assistant_starts)  # (B, S)
        content = valid & ~user_header & ~assistant_header
        turn = user_starts.long().cumsum(dim=1) - 1  # (B, S)
        ends = torch.zeros_like(content)
        for token in self.end:
            ends = ends | (ids == token)
        return Roles(
            turn=turn.masked_fill(~valid, -1),
            system=content & (last_user < 0) & (last_assistant < 0),
            user_header=user_header,
            question=content & (last_user > last_assistant),
            assistant_header=assistant_header,
            answer=content & (last_assistant > last_user),
            closing=content & (_last(ends) > torch.maximum(last_user, last_assistant)),
        )


def _find(spellings: Sequence[Sequence[int]], ids: Tensor) -> tuple[Tensor, Tensor]:
    """(B, S) bool twice: tokens of any spelling in ``ids`` (B, S), and the first token of each find."""
    found, first, inner = (torch.zeros_like(ids, dtype=torch.bool) for _ in range(3))
    for spelling in spellings:
        width = ids.shape[1] - len(spelling) + 1
        if width < 1:
            continue
        # plain numbers, not a tensor of them: nothing has to be copied to the device
        hit = ids[:, :width] == spelling[0]  # (B, width)
        for offset, token in enumerate(spelling[1:], 1):
            hit = hit & (ids[:, offset : offset + width] == token)
        first[:, :width] |= hit
        for offset in range(len(spelling)):
            found[:, offset : offset + width] |= hit
            if offset:
                inner[:, offset : offset + width] |= hit
    return found, first & ~inner


def _last(marks: Tensor) -> Tensor:
    """(B, S) long, column of the last mark up to each token; -1 before the first."""
    columns = torch.arange(marks.shape[1], device=marks.device).expand_as(marks)
    return columns.masked_fill(~marks, -1).cummax(dim=1).values


# --- reading a chat template ------------------------------------------------------------------------------------------

# what stands in for contents; no template holds such words
_SYSTEM, _QUESTIONS, _ANSWERS = "qzvxs", ("qzvxa", "qzvxb"), ("qzvxc", "qzvxd")
# what contents may begin or end with: tokenizers join such characters with a header's edge in different ways
_EDGES = ("", "W", "7", "?", ".", ":", ")", "(", '"', "\n", "\n\n", " ", "  ", " 7", " (", "é", "中")


@dataclass(frozen=True)
class _Header:
    """Where a header stands in a rendered chat.

    Attributes:
        pieces: the text around the contents: ``pieces[0] + content + pieces[1] + content ...``.
        gap: index of the piece that holds the header.
        start, stop: the header's characters in that piece.
    """

    pieces: tuple[str, ...]
    gap: int
    start: int
    stop: int


class _Template:
    """A processor's chat template, taken apart by rendering it."""

    def __init__(self, processor: Any, tokenizer: Any) -> None:
        self.source = processor if getattr(processor, "chat_template", None) else tokenizer
        self.tokenizer = tokenizer
        if not getattr(self.source, "chat_template", None):
            raise ConfigError(
                "The processor has no chat template, so questions and answers cannot be told apart. Set "
                "processor.chat_template to the one that the model was trained with."
            )
        (first, second), (answer, last) = _QUESTIONS, _ANSWERS
        asked = [("user", first)]
        told = [*asked, ("assistant", answer)]
        both = [*told, ("user", second), ("assistant", last)]
        self.plain = self._render(both)
        self.generating = self._render(asked, generation=True)
        ends = [self._render(asked), self._render(told)]
        if self.plain is None or self.generating is None or None in ends:
            raise ConfigError(
                "The chat template does not render a question, an answer and another question, each once and in this "
                "order. Set processor.chat_template to one that takes messages with the roles user and assistant."
            )
        self.after_question, self.after_answer = (pieces[-1] for pieces in ends)
        system = [("system", _SYSTEM), *both]
        others = [self._render(both, image=True), self._render(system), self._render(system, image=True)]
        self.chats = [self.plain, *(pieces for pieces in others if pieces is not None)]
        # where in plain[2], the text between an answer and the next question, the user's header begins
        self.user_start = _skip(self.plain[2], self.after_answer)
        header = self.plain[2][self.user_start :]
        if not self.plain[0].endswith(header):  # what a first turn lacks closes the answer
            self.user_start += len(header) - _shared(header[::-1], self.plain[0][::-1])

    def _render(
        self, said: list[tuple[str, str]], *, image: bool = False, generation: bool = False
    ) -> tuple[str, ...] | None:
        """The text around the contents of a chat; None where the template does not write such a chat."""
        picture = [{"type": "image"}] if image else []
        for as_parts in (True,) if image else (True, False):  # processors want lists of parts, tokenizers strings
            chat = []
            for role, text in said:
                parts = [*(picture if role == "user" else []), {"type": "text", "text": text}]
                chat.append({"role": role, "content": parts if as_parts else text})
            try:
                rest = self.source.apply_chat_template(chat, add_generation_prompt=generation, tokenize=False)
            except Exception:  # a template raises what it likes at what it does not write
                continue
            pieces = []
            for _, content in said:
                piece, found, rest = rest.partition(content)
                if not found:
                    break
                pieces.append(piece)
            else:
                return (*pieces, rest)
        return None

    def user_headers(self) -> list[_Header]:
        """Each place where a user turn opens: first in a chat, after a system prompt, after an answer."""
        header, found = self.plain[2][self.user_start :], []
        for pieces in self.chats:
            first = len(pieces) - len(self.plain)  # a system prompt makes one piece more
            for gap in (first, first + 2):
                start = pieces[gap].rfind(header)  # an image may stand behind it
                if start >= 0:
                    found.append(_Header(pieces, gap, start, start + len(header)))
        return found

    def assistant_headers(self) -> list[_Header]:
        """Each place where an answer opens: before one that is there, and before one to be generated."""
        places = [(pieces, len(pieces) - back) for pieces in self.chats for back in (4, 2)]
        return [
            _Header(pieces, gap, _skip(pieces[gap], self.after_question), len(pieces[gap]))
            for pieces, gap in (*places, (self.generating, 1))
        ]

    def spell(self, headers: list[_Header]) -> set[tuple[int, ...]]:
        """Token ids of headers, beside contents with all kinds of edges; those that show all visible text of them."""
        texts, spans = [], []
        visible = [header for header in headers if header.pieces[header.gap][header.start : header.stop].strip()]
        distinct = {(h.pieces[h.gap], h.start, h.stop, h.gap == 0): h for h in visible}
        # behind a special token some tokenizers begin as at the start of a text
        edges = (*_EDGES, self.tokenizer.eos_token or "")
        for header, begin, end in itertools.product(distinct.values(), edges, edges):
            content = f"{begin}a{end}"
            gap = sum(map(len, header.pieces[: header.gap])) + header.gap * len(content)
            texts.append(content.join(header.pieces))
            spans.append((gap, gap + header.start, gap + header.stop))
        if not texts:
            return set()
        encoded = self.tokenizer(texts, return_offsets_mapping=True)
        spellings = set()
        for text, (gap, start, stop), ids, offsets in zip(
            texts, spans, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            # wholly in the text between two contents, and not wholly in what closes the one before
            places = [
                place
                for place, (left, right) in enumerate(offsets)
                if gap <= left and start < right <= stop and not text[left:start].strip()
            ]
            shown = text[start:stop]
            begin, end = stop - len(shown.lstrip()), start + len(shown.rstrip())  # the visible text
            if not places or offsets[places[0]][0] > begin or offsets[places[-1]][1] < end:
                continue
            # blanks at its edges may be joined to any contents: with and without them
            shows = [place for place in places if text[slice(*offsets[place])].strip()]
            firsts = [place for place in places if place <= shows[0]]
            if len(firsts) > 1 and offsets[firsts[0]] == offsets[firsts[1]]:
                del firsts[0]  # put in by the tokenizer, stands for nothing in the text
            lasts = [place for place in places if place >= shows[-1]]
            spellings |= {tuple(ids[first : last + 1]) for first in firsts for last in lasts}
        return spellings

    def end_tokens(self) -> tuple[int, ...]:
        """Special tokens between an answer and what opens the next turn, or at the end of a chat."""
        special = {id_ for id_, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        closings = (self.after_answer, self.plain[2][: self.user_start])
        found = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in closings if text]
        return tuple(sorted({id_ for ids in found for id_ in ids if id_ in special}))


def _skip(gap: str, closing: str) -> int:
    """Characters at the start of ``gap`` that close what came before; 0 where nothing visible would be left."""
    length = _shared(gap, closing)
    return length if gap[length:].strip() else 0


def _shared(one: str, other: str) -> int:
    """Length of the beginning that two texts have in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((number for number, (a, b) in pairs if a != b), min(len(one), len(other)))
