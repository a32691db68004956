"""What one visitor may ask of the server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds that are checked before the work is done.

    Attributes:
        file_bytes: size of one upload.
        pixels: of one picture, before it is decoded.
        side: longest side of what is kept of a picture, in pixels.
        pages: pages of one PDF.
        pictures: pictures and pages in one chat.
        turns: questions in one chat.
        question: characters of one question.
        new_tokens: tokens of one answer.
        answer_seconds: time for one answer.
        pdf_seconds: time to render a PDF.
        pdf_memory: bytes that the process which renders a PDF may use.
        sessions: visitors whose chats are kept; the one that was idle longest goes first.
        idle_seconds: after this time without a call a chat is forgotten.
        memory: bytes that the pictures of all chats may take together; then the chats that were idle longest go.
        upload_seconds: time after which an upload is removed from the disk; the chat has its picture by then.
        upload_bytes: of all uploads on the disk together; then the oldest go.
        queue: requests that may wait.
        evaluation: samples of one evaluation.
        points: evaluations that one visitor's plot holds.
    """

    file_bytes: int = 20_000_000
    pixels: int = 40_000_000
    side: int = 1536
    pages: int = 12
    pictures: int = 16
    turns: int = 20
    question: int = 2000
    new_tokens: int = 256
    answer_seconds: float = 300.0
    pdf_seconds: float = 30.0
    pdf_memory: int = 2 << 30
    sessions: int = 100
    idle_seconds: float = 3600.0
    memory: int = 2 << 30
    upload_seconds: float = 600.0
    upload_bytes: int = 2 << 30
    queue: int = 64
    evaluation: int = 40
    points: int = 20
