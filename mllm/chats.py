"""Training conversations: read from LLaVA-style files or drawn, and turned into batches with labels on the answers."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from mllm import drawn, puzzles
from mllm.errors import ConfigError, InputError
from mllm.inputs import encode, open_image
from mllm.roles import ChatFormat

#: where a picture stands in a question of a LLaVA-style file, whatever the model's own token is
PLACEHOLDER = "<image>"
#: what can be drawn, by name: generators of samples, see :mod:`mllm.drawn`
SOURCES = drawn.DRAWN | puzzles.PUZZLES
#: label of tokens that are not learned
IGNORED = -100


@dataclass(frozen=True)
class Chat:
    """A conversation about pictures, with its answers.

    Attributes:
        turns: questions and their answers. ``<image>`` in a question is the place of a picture; without any, all
            pictures stand before the first question.
        images: pictures, or files that are opened when they are needed.
        evidence: indices of the pictures that hold the answer, where known; empty: none does.
        id: what errors call it.
    """

    turns: tuple[tuple[str, str], ...]
    images: tuple[Image.Image | str | Path, ...] = ()
    evidence: tuple[int, ...] | None = None
    id: str = ""

    def __post_init__(self) -> None:
        if not self.turns:
            raise InputError(f"{self}: no turns. Give at least one question with its answer.")
        for number, (question, answer) in enumerate(self.turns):
            if not question.strip():
                raise InputError(f"{self}: question {number} is empty. Ask something, or drop the turn.")
            if not answer.strip():
                raise InputError(f"{self}: answer {number} is empty. Give what the model should learn to say.")
            if PLACEHOLDER in answer:
                raise InputError(f"{self}: answer {number} holds {PLACEHOLDER}. Pictures can stand in questions only.")
        places = sum(question.count(PLACEHOLDER) for question, _ in self.turns)
        if places and places != len(self.images):
            raise InputError(
                f"{self}: {places} {PLACEHOLDER} placeholders for {len(self.images)} pictures. Write one for each "
                "picture, or none at all to have them all before the first question."
            )
        if self.evidence is not None and any(not 0 <= page < len(self.images) for page in self.evidence):
            raise InputError(f"{self}: evidence {self.evidence} names pictures that are not among {len(self.images)}.")

    def __str__(self) -> str:
        return f"chat {self.id!r}" if self.id else "chat"

    @classmethod
    def from_sample(cls, sample: drawn.Sample, name: str = "") -> Chat:
        """A drawn sample as a chat."""
        turns = [(turn.question, turn.answer) for turn in sample.turns]
        if sample.shown_at:
            question, answer = turns[sample.shown_at]
            turns[sample.shown_at] = PLACEHOLDER * len(sample.images) + question, answer
        turns = tuple(turns)
        return cls(turns, sample.images, None if sample.evidence is None else (sample.evidence,), name or sample.group)

    def open_images(self) -> list[Image.Image]:
        """The pictures as 8-bit RGB; InputError names the chat with a file that cannot be read."""
        try:
            return [open_image(image) for image in self.images]
        except InputError as error:
            raise InputError(f"{self}: {error}") from error

    def messages(self, end: str = "") -> list[dict[str, Any]]:
        """The chat as ``apply_chat_template`` takes it, with ``end`` behind each answer."""
        first, answer = self.turns[0]
        if self.images and not any(PLACEHOLDER in question for question, _ in self.turns):
            first = PLACEHOLDER * len(self.images) + first
        messages = []
        for question, reply in ((first, answer), *self.turns[1:]):
            content: list[dict[str, str]] = []
            pieces = question.split(PLACEHOLDER)
            for number, piece in enumerate(pieces):
                # templates set a picture off with what they like; a line break beside it in the file would be a second
                piece = piece.removeprefix("\n") if number else piece
                piece = piece.removesuffix("\n") if number + 1 < len(pieces) else piece
                content += [{"type": "image"}] if number else []
                content += [{"type": "text", "text": piece}] if piece else []
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": reply + end}]})
        return messages


# --- batches ----------------------------------------------------------------------------------------------------------


def collate(processor: Any, chat_format: ChatFormat, chats: Sequence[Chat], padding_side: str = "left") -> Any:
    """Model inputs of some chats, with labels on what the model should learn to say.

    Where the chat template writes no end token behind an answer, the tokenizer's own is added: a model that never
    sees an end does not learn to stop.

    Args:
        processor: from :func:`mllm.load`.
        chat_format: of the same processor.
        chats: one per row.
        padding_side: ``"left"`` or ``"right"``.

    Returns:
        BatchFeature with ``input_ids``, ``attention_mask`` and ``labels`` (B, S), and pixel values where there are
        pictures. Labels are -100 everywhere but on answers and the end token behind each.

    Raises:
        InputError: a picture cannot be read, or a text of the chat reads like the mark of a turn.
    """
    eos = processor.tokenizer.eos_token
    end = "" if chat_format.end or eos is None else eos
    ends = chat_format.end or (() if eos is None else (processor.tokenizer.eos_token_id,))
    texts = [processor.apply_chat_template(chat.messages(end)) for chat in chats]
    inputs = encode(processor, texts, [chat.open_images() for chat in chats], padding_side)
    inputs["labels"] = _labels(chat_format, ends, chats, inputs["input_ids"], inputs["attention_mask"].bool())
    return inputs


def _labels(
    chat_format: ChatFormat, ends: tuple[int, ...], chats: Sequence[Chat], ids: Tensor, valid: Tensor
) -> Tensor:
    """(B, S) long, the ids of answers up to their end token, -100 elsewhere."""
    roles = chat_format.roles(ids, valid)
    end = roles.answer & torch.isin(ids, torch.tensor(ends, dtype=ids.dtype))  # (B, S)
    ended = end.long().cumsum(dim=1)  # (B, S) end tokens so far, and before the current answer:
    before = ended.masked_fill(~roles.assistant_header, 0).cummax(dim=1).values  # (B, S)
    learned = roles.answer & (ended - end.long() == before)
    for number, chat in enumerate(chats):
        found = {int(turn) for turn in roles.turn[number][learned[number]].unique()}
        if found != set(range(len(chat.turns))):
            raise InputError(
                f"{chat}: its {len(chat.turns)} turns are not told apart by the model's chat template. Does a question "
                "or an answer hold the template's own mark of a turn?"
            )
    return ids.masked_fill(~learned, IGNORED)


# --- files ------------------------------------------------------------------------------------------------------------


def read_chats(path: str | Path, images: str | Path | None = None) -> list[Chat]:
    """Read LLaVA-style records: a JSON list, or JSON Lines.

    Each record has ``conversations``, a list of ``{"from": "human" | "gpt", "value": text}`` that take turns; may have
    ``image``, a file or a list of files, ``retrieval_labels``, 0 or 1 for each picture, and ``id``. Other keys are
    left alone. Pictures are looked for now and opened when they are used.

    Args:
        path: the file.
        images: folder that picture files are relative to; without, the folder of ``path``.

    Raises:
        InputError: the file or a record is not as described, or a picture is missing; names file, record and field.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}") from error
    root = path.parent if images is None else Path(images)
    chats = []
    for where, record in _records(path, text):
        if not isinstance(record, dict):
            raise InputError(f"{where}: a record is a mapping with the key 'conversations', not {record!r:.80}.")
        name = str(record.get("id", len(chats)))
        try:
            pictures = tuple(_pictures(record.get("image"), root))
            chats.append(Chat(_turns(record.get("conversations")), pictures, _evidence(record, len(pictures)), name))
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
    if not chats:
        raise InputError(f"{path} holds no records.")
    return chats


def _records(path: Path, text: str) -> list[tuple[str, Any]]:
    """Each record of a file, with what errors call its place."""
    if text.lstrip().startswith("["):
        try:
            return [(f"{path}, record {number}", record) for number, record in enumerate(json.loads(text))]
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is not valid JSON: {error}") from error
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            records.append((f"{path}, line {number}", json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path}, line {number} is not valid JSON: {error}. Give one record a line, or a list of records."
            ) from error
    return records


def _pictures(value: Any, root: Path) -> list[Path]:
    names = [] if value is None else value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str) or not name:
            raise InputError(f"image = {value!r:.80} must be a file name or a list of them.")
        if not (root / name).is_file():
            raise InputError(f"image: {root / name} does not exist. File names are relative to {root}.")
    return [root / name for name in names]


def _turns(value: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list) or not value or len(value) % 2:
        raise InputError(
            f"conversations = {value!r:.80} must be a list of questions and answers in turn, an even number of them."
        )
    said = []
    for number, item in enumerate(value):
        speaker = ("human", "gpt")[number % 2]
        if not isinstance(item, dict) or item.get("from") != speaker or not isinstance(item.get("value"), str):
            raise InputError(
                f"conversations[{number}] = {item!r:.80} must be a mapping with 'from': {speaker!r} and a text 'value'."
            )
        if not item["value"].strip():
            raise InputError(f"conversations[{number}].value is empty. Write a text, or leave the turn out.")
        said.append(item["value"])
    return tuple(zip(said[::2], said[1::2], strict=True))


def _evidence(record: dict[str, Any], pictures: int) -> tuple[int, ...] | None:
    labels = record.get("retrieval_labels")
    if labels is None:
        return None
    if not isinstance(labels, list) or len(labels) != pictures or any(label not in (0, 1) for label in labels):
        raise InputError(f"retrieval_labels = {labels!r:.80} must hold 0 or 1 for each of the {pictures} pictures.")
    return tuple(page for page, label in enumerate(labels) if label)


# --- endless data -----------------------------------------------------------------------------------------------------


class Chats(Protocol):
    """Chats without end: number ``n`` is a function of ``n`` alone, so a run that was killed goes on with the same."""

    def __getitem__(self, number: int) -> Chat: ...


@dataclass(frozen=True)
class DrawnChats:
    """Chats about drawn pictures, each drawn when it is asked for.

    Attributes:
        name: one of :data:`SOURCES`.
        split: ``"train"`` or ``"test"``.
        seed: of the drawing.
        turns: questions a chat has at most; None: as many as the source asks.
    """

    name: str
    split: str = "train"
    seed: int = 0
    turns: int | None = None

    def __getitem__(self, number: int) -> Chat:
        sample = next(SOURCES[self.name](self.split, f"{self.seed}/{number}", 1))
        turns = sample.turns[: self.turns]
        sample = replace(sample, turns=turns, shown_at=min(sample.shown_at, len(turns) - 1))
        return Chat.from_sample(sample, f"{self.name} {number}")


@dataclass(frozen=True)
class ShuffledChats:
    """Chats from a list, in a new order in each round."""

    chats: tuple[Chat, ...]
    seed: int = 0

    def __getitem__(self, number: int) -> Chat:
        turn, place = divmod(number, len(self.chats))
        return self.chats[_order(len(self.chats), f"{self.seed}/{turn}")[place]]


@lru_cache(maxsize=8)
def _order(count: int, seed: str) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


@dataclass(frozen=True)
class MixedChats:
    """Several kinds of chats by turns."""

    parts: tuple[Chats, ...]

    def __getitem__(self, number: int) -> Chat:
        return self.parts[number % len(self.parts)][number // len(self.parts)]


def open_chats(data: str | Path, seed: int = 0, split: str | None = None, images: str | Path | None = None) -> Chats:
    """Chats to train on, without end.

    Args:
        data: a file for :func:`read_chats`, or one of :data:`SOURCES`, drawn; several, separated by commas, take turns.
            ``NAME:N`` leaves chats that are drawn at most N questions: ``grids:1``.
        seed: of the drawing and the order.
        split: ``"train"`` or ``"test"``: sides that share nothing, for held-out measurements. Of a file, the test side
            is a tenth of the records, told by what they say. None: all of a file, the training side of what is drawn.
        images: folder that the pictures of files are relative to.

    Raises:
        ConfigError: an unknown split, or a name that is neither a file nor drawn.
        InputError: a file that cannot be read, or that has no record on the side asked for.
    """
    if split not in (None, *drawn.SPLITS):
        raise ConfigError(f"split={split!r} is not one of: {', '.join(drawn.SPLITS)}.")
    parts: list[Chats] = []
    for name in [part.strip() for part in str(data).split(",") if part.strip()]:
        source, colon, turns = name.partition(":")
        if source in SOURCES and (not colon or (turns.isdecimal() and int(turns))):
            parts.append(DrawnChats(source, split or "train", seed, int(turns) if colon else None))
            continue
        if not Path(name).exists():
            raise ConfigError(
                f"data={name!r} is neither a file nor one of: {', '.join(SOURCES)}. Give a LLaVA-style .json or "
                ".jsonl file, or one of these, with the most questions a chat may have behind it if you like: grids:1."
            )
        chats = read_chats(name, images)
        if split is not None:
            said = {chat: repr((chat.turns, [Path(image).name for image in chat.images])) for chat in chats}
            chats = [chat for chat in chats if drawn.side(said[chat], 0.1) == split]
        if not chats:
            raise InputError(f"{name} has no record on its {split} side: it has too few records to be divided.")
        parts.append(ShuffledChats(tuple(chats), seed))
    if not parts:
        raise ConfigError(f"data={str(data)!r} names no data. Give a file, or one of: {', '.join(SOURCES)}.")
    return parts[0] if len(parts) == 1 else MixedChats(tuple(parts))
