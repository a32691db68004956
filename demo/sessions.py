"""What the server remembers of each visitor, and forgets when the tab is closed."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mllm.demo.answers import Answer, Turn
from mllm.demo.charts import Point
from mllm.demo.limits import Limits
from mllm.demo.uploads import Picture
from mllm.errors import InputError


@dataclass
class Exchange:
    """One question with what came with it, and its two answers; None while an answer is not begun.

    Attributes:
        entries: the techniques of the second answer, as they stand in YAML.
        note: what the second column says where no technique is on.
        ended: both answers are complete.
        thumbnails: the pictures as HTML, made once.
        stop: ends its answers early; each question has its own, so that an old answer cannot end a new one.
    """

    question: str
    pictures: Sequence[Picture]
    full: Answer | None = None
    other: Answer | None = None
    entries: Sequence[dict[str, Any]] = ()
    note: str = ""
    ended: bool = False
    thumbnails: str = ""
    stop: threading.Event = field(default_factory=threading.Event, repr=False)

    @property
    def size(self) -> int:
        """Bytes of its pictures in memory, about."""
        return sum(3 * picture.image.width * picture.image.height for picture in self.pictures)


@dataclass
class Chat:
    """The turns of one conversation; clearing makes a new one, so that an answer still being written has its own."""

    turns: list[Exchange] = field(default_factory=list)

    def stop(self) -> None:
        """End whatever is still being written."""
        for turn in self.turns:
            turn.stop.set()

    @property
    def size(self) -> int:
        """Bytes of its pictures in memory, about."""
        return sum(turn.size for turn in self.turns)

    def add(self, question: str, pictures: Sequence[Picture], limits: Limits) -> None:
        """Append a question.

        Raises:
            InputError: the chat would become too long.
        """
        held = sum(len(turn.pictures) for turn in self.turns) + len(pictures)
        if held > limits.pictures:
            raise InputError(
                f"This chat would hold {held} pictures and pages; at most {limits.pictures} are read. Clear it first, "
                "or upload fewer."
            )
        if len(self.turns) >= limits.turns:
            raise InputError(f"This chat has {len(self.turns)} questions, which is the most. Clear it to go on.")
        self.turns.append(Exchange(question, pictures))

    def before(self, column: str) -> list[Turn]:
        """What the model is asked in a column: all turns, with the answers of that column, the last one open."""
        turns: list[Turn] = []
        for number, turn in enumerate(self.turns):
            answer = getattr(turn, column) or turn.full
            last = number == len(self.turns) - 1
            turns.append((turn.question, turn.pictures, None if last else (answer.text if answer else "")))
        return turns


@dataclass
class Session:
    """One open tab, or one API client."""

    chat: Chat = field(default_factory=Chat)
    points: list[Point] = field(default_factory=list)
    stop_evaluation: threading.Event = field(default_factory=threading.Event)
    used: float = field(default_factory=time.monotonic)

    def end(self) -> None:
        """Stop whatever is still being written for it."""
        self.chat.stop()
        self.stop_evaluation.set()


class Sessions:
    """Sessions by the random name that Gradio gives each tab; bounded in number, idle time and memory of pictures."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, name: str) -> Session:
        """The session of that name, made where there is none."""
        with self._lock:
            session = self._sessions.setdefault(name, Session())
            session.used = time.monotonic()
        self.tidy(name)
        return session

    def tidy(self, name: str | None = None) -> None:
        """Forget chats that were idle too long; while there are too many, or their pictures take too much memory, also
        those that were idle longest.

        Args:
            name: a session that stays.
        """
        now = time.monotonic()
        with self._lock:
            gone: list[Session] = []
            held = sum(session.chat.size for session in self._sessions.values())
            for old in sorted(self._sessions, key=lambda old: self._sessions[old].used):
                session = self._sessions[old]
                idle = now - session.used > self.limits.idle_seconds
                full = len(self._sessions) > self.limits.sessions or held > self.limits.memory
                if old != name and (idle or full):
                    held -= session.chat.size
                    gone.append(self._sessions.pop(old))
        for session in gone:
            session.end()

    def clear(self) -> None:
        """Forget all of them."""
        for name in list(self._sessions):
            self.drop(name)

    def drop(self, name: str) -> None:
        """Forget a session, and stop what is being written for it."""
        with self._lock:
            session = self._sessions.pop(name, None)
        if session is not None:
            session.end()
