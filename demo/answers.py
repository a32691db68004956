"""One model for all visitors: answers a chat twice, without and with techniques, and tells what each cost.

Only one answer is written at a time, whoever asked: a turnstile lets calls in one by one, in the order in which they
came. The techniques are attached behind it and detached before the next call enters, so no answer sees another
visitor's settings, and no timing shares the processor with another answer.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from mllm.cost import ModelSpec
from mllm.demo.limits import Limits
from mllm.demo.recording import Inside, Recorder
from mllm.demo.uploads import Picture
from mllm.errors import InputError, MllmError
from mllm.families import find_parts
from mllm.inputs import chat_inputs, encode
from mllm.technique import Stack
from mllm.timing import synchronize

log = logging.getLogger("mllm.demo")


class Turnstile:
    """A lock that lets threads in one by one, in the order in which they came."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._waiting: deque[object] = deque()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        ticket = object()
        with self._condition:
            self._waiting.append(ticket)
            self._condition.wait_for(lambda: self._waiting[0] is ticket)
        try:
            yield
        finally:
            with self._condition:
                self._waiting.popleft()
                self._condition.notify_all()


@dataclass
class Answer:
    """An answer as far as it is written, and what it cost.

    Attributes:
        text: what was written so far.
        state: ``"waiting"``, ``"writing"``, ``"done"``, ``"stopped"`` or ``"failed"``.
        error: why it failed.
        settings: the techniques in one line.
        prompt_tokens, new_tokens: read and written.
        first_s: seconds from the call to the first token (vision tower and prefill).
        tokens_per_s: further tokens a second; None where there was one at most.
        flops, dense_flops: decoder FLOPs of the whole answer, and those of the plain model for the same tokens.
        kv_bytes, dense_kv_bytes: cache at the end, the same.
        inside: what happened in the layers while the prompt was read.
    """

    text: str = ""
    state: str = "waiting"
    error: str | None = None
    settings: str = "full model"
    prompt_tokens: int = 0
    new_tokens: int = 0
    first_s: float | None = None
    tokens_per_s: float | None = None
    flops: int = 0
    dense_flops: int = 0
    kv_bytes: int = 0
    dense_kv_bytes: int = 0
    inside: Inside | None = field(default=None, repr=False)

    @property
    def ended(self) -> bool:
        return self.state in ("done", "stopped", "failed")

    def numbers(self) -> dict[str, Any]:
        """What a client gets: everything but the tensors."""
        names = [name for name in self.__dataclass_fields__ if name != "inside"]
        return {name: getattr(self, name) for name in names}


class _Stream(BaseStreamer):
    """Hands tokens on as they are made, with the time at which the device had them."""

    def __init__(self, device: torch.device, put: Any) -> None:
        self.device, self._put, self._prompt_seen = device, put, False

    def put(self, value: Tensor) -> None:
        if not self._prompt_seen:  # generate hands over the prompt first
            self._prompt_seen = True
            return
        synchronize(self.device)
        self._put((time.perf_counter(), value.tolist()))

    def end(self) -> None:
        pass


class _Stop(StoppingCriteria):
    def __init__(self, stop: threading.Event) -> None:
        self.stop = stop

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self.stop.is_set(), dtype=torch.bool, device=input_ids.device)


#: one turn of a chat: its question, its pictures, and the answer where there is one
Turn = tuple[str, Sequence[Picture], str | None]


class Backend:
    """A model that answers.

    Args:
        model, processor: from :func:`mllm.load`.
        name: how to call the model.
        limits: bounds.
    """

    def __init__(self, model: nn.Module, processor: Any, name: str = "default", limits: Limits | None = None) -> None:
        self.model, self.processor, self.name = model, processor, name
        self.limits = limits or Limits()
        self.parts = find_parts(model)
        self.spec = ModelSpec.from_config(self.parts.text_config)
        self.turnstile = Turnstile()

    @property
    def context(self) -> int | None:
        """Tokens that the model can read and write together, where its config says so."""
        return getattr(self.parts.text_config, "max_position_embeddings", None)

    def warm_up(self) -> None:
        """Answer once before anything is timed: first calls choose kernels and fill caches."""
        from PIL import Image

        inputs = chat_inputs(self.processor, ["What is it?"], [[Image.new("RGB", (224, 224))]])
        with self.turnstile(), torch.inference_mode():
            self.model.generate(**inputs.to(self.model.device, self.model.dtype), max_new_tokens=2, do_sample=False)

    def check_question(self, text: str) -> str:
        """The question without blanks around it.

        Raises:
            InputError: it is empty, too long, or holds one of the model's marks, which could stand for a picture.
        """
        text = text.strip()
        if not text:
            raise InputError("Write a question first, such as: What is in the picture?")
        if len(text) > self.limits.question:
            raise InputError(f"The question has {len(text):,} characters; at most {self.limits.question:,} are read.")
        marks = {self.processor.image_token, *self.processor.tokenizer.all_special_tokens}
        if found := sorted(mark for mark in marks if mark and mark in text):
            raise InputError(
                f"The question contains {found[0]}, which the model reads as a mark. Write it differently."
            )
        return text

    def prompt(self, turns: Sequence[Turn]) -> Any:
        """What the processor makes of a chat whose last turn waits for its answer, (1, S).

        Raises:
            InputError: it is longer than the model can read.
        """
        chat, images = [], []
        for question, pictures, answer in turns:
            images += [picture.image for picture in pictures]
            content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": question}]
            chat.append({"role": "user", "content": content})
            if answer is not None:
                chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        text = self.processor.apply_chat_template(chat, add_generation_prompt=True)
        return encode(self.processor, [text], [images])

    def answer(
        self, turns: Sequence[Turn], stack: Stack, new_tokens: int, stop: threading.Event, settings: str = "full model"
    ) -> Iterator[Answer]:
        """Write an answer; yields the same object whenever there is more of it.

        The work is done in a thread that ends by itself, also where the caller goes away and no longer looks.

        Args:
            turns: the chat; the last one has no answer.
            stack: techniques to attach for this answer alone.
            new_tokens: tokens to write at most.
            stop: ends the answer early.
            settings: how to call the stack.
        """
        answer = Answer(settings=settings)
        if stop.is_set():
            answer.state = "stopped"
            yield answer
            return
        news: queue.SimpleQueue[tuple[float, list[int]] | None] = queue.SimpleQueue()
        thread = threading.Thread(
            target=self._write, args=(answer, turns, stack, new_tokens, stop, news.put), daemon=True, name="answer"
        )
        thread.start()
        ids: list[int] = []
        try:
            yield answer
            while (item := news.get()) is not None:
                ids += item[1]
                while not news.empty():  # a slow reader catches up at once
                    later = news.get()
                    if later is None:
                        news.put(None)
                        break
                    ids += later[1]
                answer.text = self._decode(ids)
                yield answer
        except GeneratorExit:  # nobody listens any more: others are waiting for the model
            stop.set()
            raise
        thread.join()
        yield answer

    def complete(self, *arguments: Any, **named: Any) -> Answer:
        """:meth:`answer`, when it has ended."""
        *_, last = self.answer(*arguments, **named)
        return last

    def _decode(self, ids: list[int]) -> str:
        text = self.processor.decode(ids, skip_special_tokens=True)
        return text.rstrip("\ufffd").strip()  # half a character: its other tokens are still to come

    def _write(
        self, answer: Answer, turns: Sequence[Turn], stack: Stack, new_tokens: int, stop: threading.Event, put: Any
    ) -> None:
        try:
            inputs = self.prompt(turns)
            answer.prompt_tokens = inputs["input_ids"].shape[1]
            if self.context is not None and answer.prompt_tokens + new_tokens > self.context:
                raise InputError(
                    f"This chat has {answer.prompt_tokens:,} tokens, and {new_tokens:,} more are asked for; the model "
                    f"reads {self.context:,}. Clear the chat, take fewer pictures or pages, or a shorter answer."
                )
            with self.turnstile():
                if stop.is_set():
                    answer.state = "stopped"
                else:
                    self._generate(answer, inputs, turns, stack, new_tokens, stop, put)
        except MllmError as error:
            answer.state, answer.error = "failed", str(error)
        except Exception as error:  # one request must not end the server, whatever it ran into
            log.exception("An answer failed.")
            answer.state = "failed"
            answer.error = f"Something went wrong in the server ({type(error).__name__}). Its log says more."
        finally:
            put(None)

    def _generate(
        self,
        answer: Answer,
        inputs: Any,
        turns: Sequence[Turn],
        stack: Stack,
        new_tokens: int,
        stop: threading.Event,
        put: Any,
    ) -> None:
        device = self.model.device
        times: list[float] = []

        def hear(item: tuple[float, list[int]]) -> None:
            times.append(item[0])
            put(item)

        inputs = inputs.to(device, self.model.dtype)
        with stack(self.model, self.processor) as run, Recorder(self.parts) as recorder, torch.inference_mode():
            answer.state = "writing"
            synchronize(device)
            began = time.perf_counter()
            output = self.model.generate(
                **inputs,
                max_new_tokens=new_tokens,
                do_sample=False,
                num_beams=1,
                max_time=self.limits.answer_seconds,
                streamer=_Stream(device, hear),
                stopping_criteria=StoppingCriteriaList([_Stop(stop)]),
            )
            report = run.report()
            new = output[0, inputs["input_ids"].shape[1] :].tolist()
            pictures = [picture for _, some, _ in turns for picture in some]
            answer.inside = recorder.finish(run, stack, self.processor, inputs, pictures)
        answer.text = self._decode(new)
        answer.new_tokens = len(new)
        answer.first_s = times[0] - began if times else None
        if len(times) > 1:
            answer.tokens_per_s = (len(times) - 1) / (times[-1] - times[0])
        answer.flops, answer.dense_flops = report.flops, report.dense_flops
        answer.kv_bytes, answer.dense_kv_bytes = report.kv_bytes, report.dense_kv_bytes
        answer.state = "stopped" if stop.is_set() else "done"
