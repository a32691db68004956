"""Our lmms-eval model: any supported model with any config, in left-padded batches, timed, failures told apart.

By name: ``lmms-eval --model mllm --model_args pretrained=default,config=configs/exit_half.yaml --tasks ...``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

from mllm.config import load_config
from mllm.errors import ConfigError, EvalError, InputError, MllmError
from mllm.inputs import encode, open_image
from mllm.loading import load
from mllm.technique import Stack
from mllm.timing import TokenClock

_GENERATION = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty")


@dataclass
class Record:
    """What answering one request cost; shares of a batch are equal parts.

    Attributes:
        text: the reply; None where answering failed. Of a likelihood, what the model would have said instead.
        likelihood: of a continuation that was given: its log-likelihood in nats.
        error: why it failed.
        ttft_ms: time to the first token of its batch.
        new_tokens: tokens generated, up to the end-of-text token.
        decode_s: its share of the time after the first token.
        flops, dense_flops, kv_bytes, dense_kv_bytes: its share of the run's.
        decisions: what techniques decided about it, by technique: the layer it left after, the pages that stayed...
    """

    text: str | None = None
    likelihood: float | None = None
    error: str | None = None
    ttft_ms: float | None = None
    new_tokens: int = 0
    decode_s: float = 0.0
    flops: float = 0.0
    dense_flops: float = 0.0
    kv_bytes: float = 0.0
    dense_kv_bytes: float = 0.0
    decisions: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class _Request:
    number: int
    text: str
    images: list[Any] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    until: list[str] = field(default_factory=list)
    continuation: str = ""


_Prepare = Callable[[int, Instance], _Request]
_Act = Callable[[list[_Request], Any], list[Record]]


class MllmLmms(lmms):
    """A model with a stack of techniques behind lmms-eval's chat interface.

    Args:
        pretrained: ``"default"``, a folder or a hub name.
        config: config file; the plain model without.
        batch_size: prompts per batch.
        attn, dtype, device: see :func:`mllm.load`.
        on_error: ``"raise"`` stops the evaluation with the reason when a sample could not be answered; ``"record"``
            keeps the reason in :attr:`records` and goes on, for a runner that leaves the sample out of the score.
        loaded: a model and processor in memory, instead of ``pretrained``.
        stack: techniques in memory, instead of ``config``.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "default",
        config: str | None = None,
        batch_size: int | str = 1,
        attn: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        on_error: str = "raise",
        loaded: tuple[Any, Any] | None = None,
        stack: Stack | None = None,
        max_batch_size: int | None = None,
        progress: bool = True,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ConfigError(
                f"Unknown model_args: {', '.join(unknown)}. Allowed: pretrained, config, batch_size, attn, dtype, "
                "device, on_error."
            )
        if on_error not in ("raise", "record"):
            raise ConfigError(f"on_error={on_error!r} is not one of: raise, record.")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConfigError(f"batch_size={batch_size!r} must be a whole number of at least 1.")
        self.batch_size = int(batch_size)
        self.on_error = on_error
        self.progress = progress
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        stack = stack if stack is not None else load_config(config).stack if config else Stack()
        if loaded is None:
            loaded = load(pretrained, attn=attn, dtype=dtype, device=self._place(device))
        # lmms-eval deletes every attribute that is a module after each evaluation: hold it in a tuple
        self._loaded = loaded
        self.stack = stack
        self.records: dict[tuple[str, int], Record] = {}

    def _place(self, device: str | None) -> str:
        device = device or "auto"
        if device in ("auto", "cuda") and torch.cuda.is_available() and self._world_size > 1:
            return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        return device

    @property
    def model(self) -> Any:
        return self._loaded[0]

    @property
    def processor(self) -> Any:
        return self._loaded[1]

    @property
    def device(self) -> torch.device:
        return self.model.device

    # --- answering ---------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer chat requests; batches hold requests of equal settings and similar length."""
        records = self._serve(requests, self._prepare, self._generate)
        return [record.text if record.text is not None else f"[failed: {record.error}]" for record in records]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """How likely texts go on as given, in nats, and whether greedy decoding says the same; no chat template.

        The requests are those of :class:`mllm.eval.tasks.likelihood.LikelihoodTask`: lmms-eval's own chat tasks do not
        ask for likelihoods.
        """
        records = self._serve(requests, self._prepare_text, self._weigh)
        pairs = zip(requests, records, strict=True)
        return [
            (float("-inf"), False) if record.likelihood is None else (record.likelihood, record.text == request.args[1])
            for request, record in pairs
        ]

    def _serve(self, requests: list[Instance], prepare: _Prepare, act: _Act) -> list[Record]:
        """What came of every request, in order; each is prepared, and acted on in its batch."""
        answered: dict[int, Record] = {}
        hidden = self.rank != 0 or not self.progress
        bar = tqdm(total=len(requests), desc="answers", disable=hidden, file=sys.stderr, leave=False)
        with bar, self.stack(self.model, self.processor) as run:
            for numbers in self._batches(requests):
                batch = []
                for number in numbers:  # pictures are opened batch by batch: all of them need not fit into memory
                    try:
                        batch.append(prepare(number, requests[number]))
                    except Exception as error:
                        answered[number] = self._failed(error)
                records = self._answer(batch, run, act) if batch else []
                answered.update((request.number, record) for request, record in zip(batch, records, strict=True))
                bar.update(len(numbers))
        records = [answered[number] for number in range(len(requests))]
        for request, record in zip(requests, records, strict=True):
            *_, doc_id, task, _ = request.args
            self.records[task, doc_id] = record
        self._judge(records)
        return records

    def _batches(self, requests: list[Instance]) -> Iterator[list[int]]:
        """Numbers of requests with equal settings, long ones first, so that little is padding."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            settings = sorted(request.args[2].items()) if request.request_type == "generate_until" else None
            groups.setdefault(repr(settings), []).append(number)
        for group in groups.values():
            group.sort(key=lambda number: -len(requests[number].args[0]))
            for start in range(0, len(group), self.batch_size):
                yield group[start : start + self.batch_size]

    def _prepare(self, number: int, request: Instance) -> _Request:
        """Text with placeholders, pictures in order, and generation settings of one request."""
        _, to_messages, settings, doc_id, task, split = request.args
        settings = dict(settings)
        images, chat = [], []
        for message in to_messages(self.task_dict[task][split][doc_id]):
            content = message["content"]
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            items = []
            for item in content:
                if item["type"] == "text":
                    items.append({"type": "text", "text": item["text"]})
                elif item["type"] == "image":
                    images.append(open_image(item["url"]))
                    items.append({"type": "image"})
                else:
                    raise InputError(f"A message holds {item['type']!r}; text and images can be answered.")
            chat.append({"role": message["role"], "content": items})
        if not any(item["type"] == "text" and item["text"].strip() for turn in chat for item in turn["content"]):
            raise InputError("The prompt is empty.")
        text = self.processor.apply_chat_template(chat, add_generation_prompt=True)
        until = settings.pop("until", None) or []
        options = {name: settings[name] for name in _GENERATION if settings.get(name) is not None}
        options.setdefault("do_sample", options.get("temperature", 0) > 0)
        if not options["do_sample"]:  # what only sampling reads would be warned about
            options = {name: value for name, value in options.items() if name not in ("temperature", "top_p", "top_k")}
        options.setdefault("max_new_tokens", 128)
        return _Request(number, text, images, options, [until] if isinstance(until, str) else list(until))

    def _prepare_text(self, number: int, request: Instance) -> _Request:
        """A text and how it goes on."""
        text, continuation, *_ = request.args
        if not text.strip() or not continuation.strip():
            raise InputError("The text or its continuation is empty.")
        return _Request(number, text, continuation=continuation)

    def _answer(self, batch: list[_Request], run: Any, act: _Act) -> list[Record]:
        """Records of one batch; where it fails, of each request alone, so that one cannot harm the others."""
        try:
            return act(batch, run)
        except Exception as error:
            # what a technique or the model cannot serve at all is not a property of one sample
            if isinstance(error, MllmError) and not isinstance(error, InputError):
                raise
            if len(batch) == 1:
                return [self._failed(error)]
        return [record for request in batch for record in self._answer([request], run, act)]

    def _generate(self, batch: list[_Request], run: Any) -> list[Record]:
        inputs = encode(self.processor, [request.text for request in batch], [request.images for request in batch])
        inputs = inputs.to(self.device, self.model.dtype)
        clock = TokenClock(self.device)
        options = batch[0].options
        streamer = {"streamer": clock} if options.get("num_beams", 1) == 1 else {}
        run.reset()
        clock.start()
        with torch.inference_mode():
            output = self.model.generate(**inputs, **options, **streamer)
        new = output[:, inputs["input_ids"].shape[1] :]  # (B, T)
        rows = len(batch)
        costs = self._costs(run, rows)
        decode = clock.times[-1] - clock.times[0] if clock.times else 0.0
        records = []
        for row, (request, ids) in enumerate(zip(batch, new, strict=True)):
            text = self.processor.decode(ids, skip_special_tokens=True)
            for stop in request.until:
                text = text.split(stop)[0]
            records.append(
                Record(
                    text=text.strip(),
                    ttft_ms=clock.times[0] * 1e3 if clock.times else None,
                    new_tokens=self._length(ids),
                    decode_s=decode / rows,
                    decisions={name: _of_row(told, row, rows) for name, told in run.outputs.items()},
                    **costs,
                )
            )
        return records

    def _weigh(self, batch: list[_Request], run: Any) -> list[Record]:
        """Likelihoods of the continuations, from one forward pass."""
        whole = [request.text + request.continuation for request in batch]
        inputs = encode(self.processor, whole, [[] for _ in batch]).to(self.device, self.model.dtype)
        lengths = []
        for request, ids, mask in zip(batch, inputs["input_ids"], inputs["attention_mask"], strict=True):
            ids, alone = ids[mask.bool()].tolist(), self.processor.tokenizer(request.text)["input_ids"]
            # the continuation's tokens begin where the text's own end; one that both share is the continuation's
            shared = next((k for k, (one, two) in enumerate(zip(ids, alone, strict=False)) if one != two), len(alone))
            if not shared:
                raise InputError("The continuation joins the text's first token, before which there is nothing.")
            lengths.append(len(ids) - shared)
        run.reset()
        with torch.inference_mode():
            logits = self.model(**inputs, logits_to_keep=max(lengths) + 1).logits[:, :-1].float()  # (B, K, V)
        costs = self._costs(run, len(batch))
        records = []
        for row, (request, length) in enumerate(zip(batch, lengths, strict=True)):
            given = inputs["input_ids"][row, -length:]  # (T,); padding is on the left
            told = logits[row, -length:].log_softmax(-1)  # (T, V)
            greedy = told.argmax(-1)  # (T,)
            same = bool((greedy == given).all())
            records.append(
                Record(
                    text=request.continuation if same else self.processor.decode(greedy),
                    likelihood=told.gather(1, given[:, None]).sum().item(),
                    **costs,
                )
            )
        return records

    @staticmethod
    def _costs(run: Any, rows: int) -> dict[str, float]:
        """A row's share of what the run counted."""
        report = run.report()
        names = ("flops", "dense_flops", "kv_bytes", "dense_kv_bytes")
        return {name: getattr(report, name) / rows for name in names}

    def _length(self, ids: torch.Tensor) -> int:
        """Tokens up to and with the first end-of-text token."""
        ends = self.model.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else ends or []
        for number, token in enumerate(ids.tolist()):
            if token in ends:
                return number + 1
        return len(ids)

    # --- failures ----------------------------------------------------------------------------------------------------

    def _failed(self, error: Exception) -> Record:
        return Record(error=f"{type(error).__name__}: {error}".splitlines()[0][:300])

    def _judge(self, records: list[Record]) -> None:
        """Stop where errors must not pass: all samples failed, or the caller cannot leave samples out."""
        errors = [record.error for record in records if record.error is not None]
        if errors and len(errors) == len(records):
            raise EvalError(f"None of {len(records)} samples could be answered. The first one: {errors[0]}")
        if errors and self.on_error == "raise":
            raise EvalError(
                f"{len(errors)} of {len(records)} samples could not be answered, and would be scored as wrong answers. "
                f"The first one: {errors[0]}. `mllm eval` leaves them out and counts them."
            )

    # --- what chat tasks do not ask for ------------------------------------------------------------------------------

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise EvalError("Tasks of several rounds are not supported yet; choose a single-round task.")


def _of_row(told: Any, row: int, rows: int) -> Any:
    """What a technique told about one row of its batch, as JSON holds it: lists of one entry a row, also in mappings.

    Tensors of hidden size and what is told for the batch as a whole is left out.
    """
    found = {}
    for name, value in told.items():
        if isinstance(value, dict):
            found |= {str(name): inner} if (inner := _of_row(value, row, rows)) else {}
        elif isinstance(value, (list, tuple)) and len(value) == rows:
            entry = value[row]
            if isinstance(entry, torch.Tensor):
                entry = entry.tolist()
            found[str(name)] = sorted(entry) if isinstance(entry, (set, frozenset)) else entry
    return found
