"""The page, its API, and the server."""

from __future__ import annotations

import contextlib
import html
import logging
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import gradio as gr

from mllm.cost import predict
from mllm.demo import words
from mllm.demo.answers import Answer, Backend
from mllm.demo.charts import pareto, tokens_per_layer
from mllm.demo.evaluation import Evaluator, add_points, task_names
from mllm.demo.examples import write_examples
from mllm.demo.look import CSS, theme
from mllm.demo.pictures import (
    data_address,
    figures,
    layer_words,
    page_gallery,
    router_weights,
    tokens_over_pictures,
    told_per_layer,
)
from mllm.demo.recording import Inside
from mllm.demo.sessions import Chat, Exchange, Session, Sessions
from mllm.demo.settings import Argument, Panel, label, summary, to_yaml
from mllm.demo.uploads import SUFFIXES, Picture, read_upload, tidy_uploads
from mllm.errors import ConfigError, InputError, MllmError
from mllm.saving import packaged_parts

log = logging.getLogger("mllm.demo")

#: what is switched on when the page opens
FIRST = ({"technique": "DyVTE", "exit_layer": 0.75},)
_NO_TECHNIQUE = "No technique is switched on: this column would repeat the full model."
_MODEL = "model"  # the concurrency group of everything that takes the model for an answer


def plain(text: str) -> str:
    """Text as it is: no Markdown, no HTML."""
    escaped = "".join(c if c.isalnum() or c in " \n" or ord(c) > 127 else f"&#{ord(c)};" for c in text)
    return escaped.replace("\n", "<br>")


def notice(text: str, bad: bool = False, progress: tuple[int, int] | None = None) -> str:
    """A message above the question box, with a bar where (done, all) is given; nothing where there is no text."""
    if not text:
        return ""
    body = html.escape(text).replace("\n", "<br>")
    if progress is not None:
        body += f'<progress value="{progress[0]}" max="{progress[1]}" aria-label="answers"></progress>'
    return f'<div class="mllm-notice{" bad" if bad else ""}" role="{"alert" if bad else "status"}">{body}</div>'


def _within(value: Any, name: str, usual: int, most: int) -> int:
    """A whole number that a client gave, between 1 and what the server allows; the usual one where none was given."""
    if value is None:
        return min(usual, most)
    if not isinstance(value, int | float) or value != value // 1 or not 1 <= value <= most:
        raise InputError(f"{name}={value!r}: give a whole number from 1 to {most}.")
    return int(value)


def _thumbnails(pictures: Sequence[Picture]) -> str:
    """Small pictures for the message."""
    parts = []
    for picture in pictures:
        small = picture.image.copy()
        small.thumbnail((320, 152))
        name = picture.name if picture.page is None else f"{picture.name}, page {picture.page}"
        parts.append(f'<img src="{data_address(small)}" alt="{html.escape(name, quote=True)}">')
    return f'<div class="mllm-thumbs">{"".join(parts)}</div>' if parts else ""


def _shown(answer: Answer) -> str:
    text = plain(answer.text) or ("…" if not answer.ended else "<em>(no text)</em>")
    if answer.state == "failed":
        return f'<span class="mllm-error">{plain(answer.error or "")}</span>'
    if answer.state == "stopped":
        text += " <em>(stopped)</em>"
    costs = words.costs(answer) if answer.ended else ""
    return f'{text}<span class="mllm-costs">{html.escape(costs)}</span>' if costs else text


def messages(chat: Chat, column: str) -> list[dict[str, str]]:
    """One column of the chat, as the Chatbot takes it."""
    shown = []
    for turn in chat.turns:
        if not turn.thumbnails:
            turn.thumbnails = _thumbnails(turn.pictures)
        shown.append({"role": "user", "content": turn.thumbnails + plain(turn.question)})
        answer: Answer | None = getattr(turn, column)
        if answer is not None:
            shown.append({"role": "assistant", "content": _shown(answer)})
        elif column == "other" and turn.note:
            shown.append({"role": "assistant", "content": f"<em>{plain(turn.note)}</em>"})
    return shown


class Demo:
    """The page and what its buttons do.

    Args:
        backend: the model.
        weights: folders with trained techniques that visitors may choose.
        folder: for uploads and what is shown; removed with the server.
    """

    TIDY_SECONDS: ClassVar[float] = 10.0

    def __init__(self, backend: Backend, weights: Iterable[str | Path] = (), folder: str | Path | None = None) -> None:
        self.backend = backend
        self.limits = backend.limits
        self.panel = Panel(weights)
        self.sessions = Sessions(self.limits)
        self.evaluator = Evaluator(backend)
        self._kept = tempfile.TemporaryDirectory(prefix="mllm-demo-") if folder is None else None
        self.folder = Path(self._kept.name if self._kept else folder).resolve()
        self._before = os.environ.get("GRADIO_TEMP_DIR")
        os.environ["GRADIO_TEMP_DIR"] = str(self.folder / "files")  # read at every upload; one demo a process
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        self._closed = threading.Event()
        self.blocks = self._build()
        threading.Thread(target=self._tidy, daemon=True, name="tidy").start()

    def _tidy(self) -> None:
        """Forget old chats and uploads, also while nobody calls."""
        while not self._closed.wait(self.TIDY_SECONDS):
            try:
                self.sessions.tidy()
                tidy_uploads(self.folder / "files", self.limits)
            except Exception:
                log.exception("Old chats or uploads could not be removed; trying again.")

    def close(self) -> None:
        """Stop the server and remove its files."""
        self._closed.set()
        self.sessions.clear()
        self.blocks.close(verbose=False)
        if self._before is None:
            os.environ.pop("GRADIO_TEMP_DIR", None)
        else:
            os.environ["GRADIO_TEMP_DIR"] = self._before
        if self._kept is not None:
            self._kept.cleanup()

    # --- questions ---------------------------------------------------------------------------------------------------

    def receive(self, box: dict[str, Any] | None, request: gr.Request) -> dict[Any, Any]:
        """Take a question with its files into the chat; what is wrong with them is told above the box."""
        session = self.sessions.get(request.session_hash)
        chat = session.chat
        if chat.turns and self._running(chat.turns[-1]):
            return {self.notice: notice("The last question is still being answered. Wait, or press Stop.", bad=True)}
        try:
            question = self.backend.check_question((box or {}).get("text") or "")
            pictures = self._read_files((box or {}).get("files") or [])
            if chat.turns and chat.turns[-1].full is None:  # its answer never began: the new question replaces it
                chat.turns.pop()
            chat.add(question, pictures, self.limits)
        except MllmError as error:
            return {self.notice: notice(str(error), bad=True)}
        except Exception as error:
            log.exception("An upload failed.")
            return {self.notice: notice(f"The upload failed ({type(error).__name__}). The log says more.", bad=True)}
        self.sessions.tidy(request.session_hash)
        waiting = {self.notice: notice("In the queue…"), self.box: {"text": "", "files": []}}
        return {**waiting, **self._columns(chat), **self._buttons(True)}

    def _read_files(self, paths: Sequence[str]) -> list[Picture]:
        if len(paths) > self.limits.pictures:
            raise InputError(f"{len(paths)} files; at most {self.limits.pictures} are read. Upload fewer.")
        return [picture for path in paths for picture in read_upload(path, self.limits)]

    @staticmethod
    def _running(turn: Exchange) -> bool:
        return turn.full is not None and not turn.ended

    def answer(self, request: gr.Request, new_tokens: float, *values: Any) -> Iterator[dict[Any, Any]]:
        """Write both answers to the last question, one after the other."""
        session = self.sessions.get(request.session_hash)
        chat = session.chat
        if not chat.turns or chat.turns[-1].full is not None:  # the question was refused
            yield {self.notice: gr.skip()}  # a generator without a result would empty all outputs
            return
        turn = chat.turns[-1]
        yield {self.notice: ""}
        for _ in self.converse(chat, turn, self.panel.entries(values), int(new_tokens)):
            if session.chat is not chat:  # cleared meanwhile
                return
            yield self._columns(chat)
        if session.chat is chat:
            yield {**self._columns(chat), **self._buttons(False), **self._look_inside(session)}

    def converse(
        self, chat: Chat, turn: Exchange, entries: Sequence[dict[str, Any]], new_tokens: int
    ) -> Iterator[Exchange]:
        """Fill in both answers of the last turn; yields it whenever there is more.

        The full model answers first. The second answer begins when the first is done, so that each has the machine to
        itself and their times can be compared.
        """
        from mllm.technique import Stack

        new_tokens = min(max(new_tokens, 1), self.limits.new_tokens)
        turn.entries, turn.note = list(entries), ""
        stack = problem = None
        try:
            stack = self.panel.stack(entries, self.backend.spec)
        except MllmError as error:
            problem = str(error)
        try:
            for answer in self.backend.answer(chat.before("full"), Stack(), new_tokens, turn.stop):
                turn.full = answer
                yield turn
            if problem is not None:
                turn.other = Answer(state="failed", error=problem, settings=label(entries))
            elif not stack.techniques:
                turn.note = _NO_TECHNIQUE
            else:
                for answer in self.backend.answer(chat.before("other"), stack, new_tokens, turn.stop, label(entries)):
                    turn.other = answer
                    yield turn
        finally:  # also where the caller went away: the chat can go on
            turn.ended = True
        for earlier in chat.turns:  # only the last turn is looked into
            for answer in (earlier.full, earlier.other):
                if earlier is not turn and answer is not None:
                    answer.inside = None
        yield turn

    def stop(self, request: gr.Request) -> None:
        """End the answer that is being written, after its next token."""
        self.sessions.get(request.session_hash).chat.stop()

    def retry(self, request: gr.Request) -> dict[Any, Any]:
        """Forget the last answers, so that the last question is asked again with the settings as they are now."""
        chat = self.sessions.get(request.session_hash).chat
        if not chat.turns:
            return {self.notice: notice("There is no question to ask again yet.", bad=True)}
        last = chat.turns[-1]
        if self._running(last):
            return {self.notice: notice("The last question is still being answered. Press Stop first.", bad=True)}
        chat.turns[-1] = Exchange(last.question, last.pictures)
        return {self.notice: notice("In the queue…"), **self._columns(chat), **self._buttons(True)}

    def refused(self, request: gr.Request) -> dict[Any, Any]:
        """The server did not begin an answer, or could not end it."""
        chat = self.sessions.get(request.session_hash).chat
        if chat.turns and self._running(chat.turns[-1]):  # another call of this tab is at it
            return {self.notice: gr.skip()}
        told = "The answer could not be written: too many people are waiting. Press Retry in a moment."
        return {self.notice: notice(told, bad=True), **self._columns(chat), **self._buttons(False)}

    def clear(self, request: gr.Request) -> dict[Any, Any]:
        """Forget the chat and its pictures."""
        session = self.sessions.get(request.session_hash)
        session.chat.stop()
        session.chat = Chat()
        return {self.notice: "", **self._columns(session.chat), **self._buttons(False), **self._look_inside(session)}

    def _columns(self, chat: Chat) -> dict[Any, Any]:
        return {self.full: messages(chat, "full"), self.other: messages(chat, "other")}

    def _buttons(self, running: bool) -> dict[Any, Any]:
        return {
            self.stop_button: gr.Button(interactive=running),
            self.retry_button: gr.Button(interactive=not running),
        }

    # --- inside ------------------------------------------------------------------------------------------------------

    @staticmethod
    def _inside(session: Session) -> tuple[Inside | None, str]:
        """What the last answer shows, and its settings: that with techniques, else the full model's."""
        if session.chat.turns:
            turn = session.chat.turns[-1]
            for answer in (turn.other, turn.full):
                if answer is not None and answer.inside is not None:
                    return answer.inside, answer.settings
        return None, ""

    def _look_inside(self, session: Session, layer: int | None = None) -> dict[Any, Any]:
        inside, settings = self._inside(session)
        turn = session.chat.turns[-1] if session.chat.turns else None
        told = words.saving(turn.full, turn.other) if turn and turn.full and turn.other else ""
        shown = inside is not None and bool(inside.visual.any())
        if shown and layer is None:  # first the layer where there is most to see
            layer = inside.layers - 1 if inside.exit_layer is None else min(inside.exit_layer + 1, inside.layers - 1)
        pages = page_gallery(inside) if inside else []
        extra = told_per_layer(inside) if inside else ""
        router = router_weights(inside, layer or 0) if inside else ""
        return {
            self.saving: notice(told),
            self.inside: gr.Column(visible=bool(inside and (shown or router or extra))),
            self.slider: gr.Slider(value=layer or 0, visible=shown),
            self.tokens: figures(tokens_over_pictures(inside, layer)) if shown else "",
            self.layer_text: self._layer_text(inside, layer, settings) if shown else "",
            self.chart: tokens_per_layer(inside) if shown else "",
            self.pages_box: gr.Column(visible=bool(pages)),
            self.pages: figures(pages),
            self.router_box: gr.Column(visible=bool(router)),
            self.router: router,
            self.told: gr.HTML(extra, visible=bool(extra)),
        }

    def turn_to_layer(self, layer: float, request: gr.Request) -> dict[Any, Any]:
        """Show another layer."""
        session = self.sessions.get(request.session_hash)
        inside, settings = self._inside(session)
        if inside is None:
            return {self.layer_text: ""}
        layer = min(max(int(layer), 0), inside.layers - 1)
        return {
            self.tokens: figures(tokens_over_pictures(inside, layer)),
            self.layer_text: self._layer_text(inside, layer, settings),
            self.router: router_weights(inside, layer),
        }

    @staticmethod
    def _layer_text(inside: Inside, layer: int, settings: str) -> str:
        return f"**{plain(settings[:1].upper() + settings[1:])}** · {plain(layer_words(inside, layer))}"

    # --- settings ----------------------------------------------------------------------------------------------------

    def check(self, *values: Any) -> list[Any]:
        """What the settings would cost, or why they cannot run; their YAML; a file with it; what can be set."""
        entries = self.panel.entries(values)
        text = to_yaml(entries)
        return [self.judge(entries), text, self._config_file(text), *self._open(entries)]

    def _open(self, entries: Iterable[dict[str, Any]]) -> list[Any]:
        """Arguments are shown of techniques that are switched on."""
        names = {entry["technique"] for entry in entries}
        return [gr.Accordion(visible=cls.name in names) for cls, _ in self.panel.techniques]

    def judge(self, entries: Sequence[dict[str, Any]]) -> str:
        """The state of the settings as a message."""
        try:
            stack = self.panel.stack(entries, self.backend.spec)
        except MllmError as error:
            return notice(str(error), bad=True)
        if not stack.techniques:
            return notice("No technique is switched on.")
        visual = getattr(self.backend.model.config, "image_seq_length", None) or 576
        told = "Ready. How much is saved depends on the question and its pictures."
        if not any(technique.by_input for technique in stack.techniques):
            with contextlib.suppress(MllmError, NotImplementedError, TypeError):  # no cost from shapes alone
                cost = predict(stack, self.backend.spec, 64, visual)
                ratio = round(100 * cost.flops / cost.dense_flops)
                told = f"Ready. Reading 64 text and {visual} visual tokens takes {ratio} % of the full model's FLOPs."
        if untrained := self.panel.untrained(stack, self.backend.spec):
            told += f" {', '.join(untrained)}: learned parts are untrained, so answers say nothing about the method."
        return notice(told)

    def _config_file(self, text: str) -> str:
        """The YAML as a file to download; the name tells nothing, and old ones go."""
        import hashlib

        folder = self.folder / "files" / hashlib.sha256(text.encode()).hexdigest()[:32]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "techniques.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    def load_config(self, path: str | None) -> list[Any]:
        """Set all controls as a config file says."""
        skip = [gr.skip()] * (2 + len(self.argument_boxes) + len(self.controls))
        try:
            if path is None:
                raise ConfigError("No file was chosen.")
            if Path(path).stat().st_size > 64_000:
                raise ConfigError(f"{Path(path).name} is too large for a config.")
            try:
                text = Path(path).read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ConfigError(f"{Path(path).name} is not a text file.") from error
            name, entries = self.panel.read_yaml(text, Path(path).name)
        except (MllmError, OSError) as error:
            return [notice(str(error), bad=True), *skip]
        on = [entry for entry in entries if entry.get("enabled", True)]
        text = to_yaml(on, name)
        return [self.judge(on), text, self._config_file(text), *self._open(on), *self.panel.values(entries)]

    # --- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self, request: gr.Request, task: str, limit: float, *values: Any) -> Iterator[dict[Any, Any]]:
        """Score the settings on a few samples of an offline task and add the point to the plot."""
        session = self.sessions.get(request.session_hash)
        session.stop_evaluation.clear()
        entries = self.panel.entries(values)
        yield {self.evaluate_notice: notice("Evaluating; you can go on chatting.", progress=(0, 1))}
        try:
            for done, total, points in self.score(session, task, int(limit), entries):
                if points is None:
                    told = f"{task}: {done} of {total} answers. You can go on chatting."
                    yield {self.evaluate_notice: notice(told, progress=(done, total))}
        except MllmError as error:
            yield {self.evaluate_notice: notice(str(error), bad=True)}
            return
        except Exception as error:
            log.exception("An evaluation failed.")
            yield {self.evaluate_notice: notice(f"It failed ({type(error).__name__}). The log says more.", bad=True)}
            return
        size = session.points[-1].samples
        same = [point for point in session.points if (point.task, point.samples) == (task, size)]
        told = f"{size} samples: intervals are wide, so read small differences as none."
        yield {self.evaluate_notice: notice(told), self.plot: pareto(same)}

    def score(
        self, session: Session, task: str, limit: int, entries: Sequence[dict[str, Any]]
    ) -> Iterator[tuple[int, int, Any]]:
        """Progress of an evaluation, as (answers, all answers, points at the end)."""
        limit = min(max(limit, 1), self.limits.evaluation)
        stack = self.panel.stack(entries, self.backend.spec)
        total = self.evaluator.steps(task, limit, stack)
        for news in self.evaluator.run(task, limit, stack, label(entries), session.stop_evaluation):
            if isinstance(news, int):
                yield news, total, None
            else:
                session.points = add_points(session.points, news, self.limits.points)
                yield total, total, news

    def stop_evaluating(self, request: gr.Request) -> None:
        """End the evaluation after its sample."""
        self.sessions.get(request.session_hash).stop_evaluation.set()

    def leave(self, request: gr.Request) -> None:
        """A tab was closed: stop its answer and forget its chat."""
        if request.session_hash:
            self.sessions.drop(request.session_hash)

    # --- API ---------------------------------------------------------------------------------------------------------

    def api_ask(
        self,
        question: str,
        files: list[dict] | None = None,
        techniques: str = "techniques: []",
        max_new_tokens: int | None = None,
        new_chat: bool = True,
        request: gr.Request = None,
    ) -> Iterator[dict]:
        """Ask the full model and the model with techniques; yields both answers as they grow, the last one complete.

        files: pictures and PDFs, each from gradio_client.handle_file. techniques: YAML, as for `mllm eval`.
        max_new_tokens: at most what the server allows, which refuses more; 64 or as many as that without.
        new_chat: forget what this client asked before; False asks the next question about the same pictures.
        """
        session = self.sessions.get(request.session_hash)
        try:
            most = _within(max_new_tokens, "max_new_tokens", 64, self.limits.new_tokens)
            entries = self._api_entries(techniques)
            if new_chat:
                session.chat.stop()
                session.chat = Chat()
            chat = session.chat
            if chat.turns and not chat.turns[-1].ended:
                raise InputError("The last question is still being answered.")
            text = self.backend.check_question(str(question))
            chat.add(text, self._read_files([self._uploaded(file) for file in files or []]), self.limits)
            self.sessions.tidy(request.session_hash)
            turn = chat.turns[-1]
            for _ in self.converse(chat, turn, entries, most):
                yield self._api_turn(turn)
        except MllmError as error:
            raise gr.Error(str(error), print_exception=False) from None

    def api_check(self, techniques: str) -> dict:
        """Check a config (YAML) against the model, without asking anything."""
        try:
            stack = self.panel.stack(self._api_entries(techniques), self.backend.spec)
        except MllmError as error:
            return {"ok": False, "reason": str(error)}
        return {"ok": True, "techniques": stack.describe()}

    def api_techniques(self) -> list[dict]:
        """The techniques with the JSON schema of their arguments."""
        return [
            {"name": cls.name, "paper": cls.paper, "summary": summary(cls), "schema": cls.model_json_schema()}
            for cls, _ in self.panel.techniques
        ]

    def api_evaluate(
        self, task: str, limit: int | None = None, techniques: str = "techniques: []", request: gr.Request = None
    ) -> dict:
        """Score a config on the first samples of an offline task, 10 without a limit, beside the full model."""
        session = self.sessions.get(request.session_hash)
        session.stop_evaluation.clear()
        try:
            samples = _within(limit, "limit", 10, self.limits.evaluation)
            *_, (_, _, points) = self.score(session, task, samples, self._api_entries(techniques))
        except MllmError as error:
            raise gr.Error(str(error), print_exception=False) from None
        names = ("label", "task", "score", "interval", "flops_ratio", "samples")
        return {"points": [{name: getattr(point, name) for name in names} for point in points]}

    def _api_entries(self, techniques: str) -> list[dict[str, Any]]:
        _, entries = self.panel.read_yaml(str(techniques), "techniques")
        return [entry for entry in entries if entry.get("enabled", True)]

    def _uploaded(self, file: Any) -> str:
        """Path of a file that came through the upload; a client may not name any other file of the server."""
        path = Path(str(file.get("path") if isinstance(file, dict) else file)).resolve()
        if not path.is_relative_to(self.folder / "files"):
            raise InputError("Files must be uploaded: pass gradio_client.handle_file(path).")
        return str(path)

    @staticmethod
    def _api_turn(turn: Exchange) -> dict[str, Any]:
        return {
            "full": turn.full.numbers() if turn.full else None,
            "techniques": turn.other.numbers() if turn.other else None,
            "saving": words.saving(turn.full, turn.other) if turn.full and turn.other else turn.note,
        }

    # --- the page ----------------------------------------------------------------------------------------------------

    def _build(self) -> gr.Blocks:
        with gr.Blocks(title="mllm-efficiency", analytics_enabled=False, fill_width=True) as blocks:
            self._head()
            with gr.Row():
                with gr.Column(scale=7, min_width=320):
                    self._chat()
                    self._pictures()
                with gr.Column(scale=3, min_width=300):
                    self._settings()
            self._evaluation()
            self._wire(blocks)
        blocks.queue(max_size=self.limits.queue, default_concurrency_limit=8)
        return blocks

    def _head(self) -> None:
        spec = self.backend.spec
        dtype = str(self.backend.model.dtype).removeprefix("torch.")
        facts = f"{self.backend.name}, {spec.layers} layers, {self.backend.model.device.type}, {dtype}"
        small = (
            " It is small: it names drawn shapes, and is often wrong about anything else."
            if self.backend.name.split("/")[0] == "default"
            else ""
        )
        gr.HTML(
            "<h1>One question, two answers</h1><p>Ask about a picture or a PDF. The full model answers first, then the "
            f"same model with the techniques you switch on. <small>Model: {html.escape(facts)}.{small}</small></p>",
            elem_id="head",
        )

    def _chat(self) -> None:
        options = {"buttons": [], "latex_delimiters": [], "autoscroll": True, "layout": "bubble", "min_height": 240}
        with gr.Row():
            with gr.Column(min_width=300):
                self.full = gr.Chatbot(
                    label="Full model", elem_id="full", placeholder="The model as it is answers here.", **options
                )
            with gr.Column(min_width=300):
                self.other = gr.Chatbot(
                    label="With techniques",
                    elem_id="other",
                    placeholder="The same model with techniques answers here.",
                    **options,
                )
        self.saving = gr.HTML(padding=False, elem_id="saving")
        self.notice = gr.HTML(padding=False, elem_id="notice")
        self.box = gr.MultimodalTextbox(
            show_label=False,
            placeholder="Ask about a picture or PDF",
            file_count="multiple",
            file_types=list(SUFFIXES),
            sources=["upload"],
            elem_id="box",
            max_plain_text_length=1_000_000,  # a longer text would become a file; the question's limit is told instead
            submit_btn=True,
            autofocus=False,
        )
        with gr.Row(elem_id="actions"):
            self.stop_button = gr.Button("Stop", size="sm", interactive=False, elem_id="stop", min_width=80)
            self.retry_button = gr.Button("Retry", size="sm", interactive=False, elem_id="retry", min_width=80)
            self.clear_button = gr.Button("Clear", size="sm", elem_id="clear", min_width=80)
        made = write_examples(self.folder / "examples")
        gr.Examples(
            [example for _, example in made],
            inputs=self.box,
            label="Examples",
            elem_id="examples",
            api_visibility="private",
            example_labels=[f"{name}: {example['text']}" for name, example in made],
        )

    def _settings(self) -> None:
        values = iter(self.panel.values(FIRST))
        self.controls: list[Any] = []
        self.argument_boxes: list[gr.Accordion] = []
        on = {entry["technique"] for entry in FIRST}
        first = to_yaml(FIRST)
        gr.Markdown("### Techniques")
        self.status = gr.HTML(self.judge(FIRST), padding=False, elem_id="status")
        for cls, args in self.panel.techniques:
            with gr.Group():
                self.controls.append(
                    gr.Checkbox(next(values), label=cls.name, info=summary(cls), elem_id=f"on-{cls.name}")
                )
                named = f"arguments-{cls.name}"
                with gr.Accordion("Arguments", open=False, visible=cls.name in on, elem_id=named) as box:
                    self.argument_boxes.append(box)
                    gr.Markdown(f"[Paper]({cls.paper})")
                    self.controls += [_control(cls.name, argument, next(values)) for argument in args]
        with gr.Row():
            self.load_button = gr.UploadButton("Load config", file_types=[".yaml", ".yml"], size="sm", min_width=110)
            self.save_button = gr.DownloadButton(
                "Save config", value=self._config_file(first), size="sm", min_width=110, elem_id="save"
            )
        with gr.Accordion("Config as YAML, for mllm eval", open=False):
            self.code = gr.Code(first, language="yaml", show_label=False, interactive=False, elem_id="yaml")
        self.new_tokens = gr.Slider(
            4,
            self.limits.new_tokens,
            value=min(48, self.limits.new_tokens),
            step=4,
            label="Longest answer, in tokens",
            elem_id="answer-length",
        )

    def _pictures(self) -> None:
        layers = self.backend.spec.layers
        with gr.Column(visible=False, elem_id="inside") as self.inside:
            gr.Markdown("### Inside the last answer")
            self.slider = gr.Slider(0, layers - 1, value=0, step=1, label="Layer", elem_id="layer")
            self.layer_text = gr.Markdown(elem_id="layer-text")
            with gr.Row():
                with gr.Column(min_width=300):
                    self.tokens = gr.HTML(padding=False, elem_id="tokens")
                with gr.Column(min_width=300):
                    self.chart = gr.HTML(padding=False, elem_id="chart")
                    self.told = gr.HTML(visible=False, elem_id="told")
            with gr.Column(visible=False) as self.pages_box:
                gr.Markdown("#### Pages, and how well each fits the question")
                self.pages = gr.HTML(padding=False, elem_id="pages")
            with gr.Column(visible=False) as self.router_box:
                gr.Markdown("#### Router")
                self.router = gr.HTML(padding=False, elem_id="router")

    def _evaluation(self) -> None:
        names = task_names()
        with gr.Accordion("Evaluate these settings", open=False, elem_id="evaluation"):
            with gr.Row():
                self.task = gr.Dropdown(names, value=names[0], label="Offline task", min_width=160)
                self.limit = gr.Slider(
                    2, self.limits.evaluation, value=10, step=1, label="Samples", min_width=160, elem_id="samples"
                )
            with gr.Row():
                self.evaluate_button = gr.Button("Evaluate", variant="primary", min_width=120, elem_id="evaluate")
                self.stop_evaluate_button = gr.Button("Stop evaluation", min_width=120)
            self.evaluate_notice = gr.HTML(padding=False, elem_id="evaluate-notice")
            self.plot = gr.HTML(padding=False, elem_id="plot")

    def _wire(self, blocks: gr.Blocks) -> None:
        # these first: the names that they want are then still free
        gr.api(self.api_ask, api_name="ask", concurrency_limit=1, concurrency_id=_MODEL)
        gr.api(self.api_check, api_name="check")
        gr.api(self.api_techniques, api_name="techniques")
        gr.api(self.api_evaluate, api_name="evaluate", concurrency_limit=1, concurrency_id="evaluation")
        hidden = {"show_progress": "hidden", "api_visibility": "private"}
        columns = [self.full, self.other, self.notice, self.stop_button, self.retry_button]
        inside = [
            *(self.saving, self.inside, self.slider, self.tokens, self.layer_text, self.chart),
            *(self.pages_box, self.pages, self.router_box, self.router, self.told),
        ]
        answering = {
            "fn": self.answer,
            "inputs": [self.new_tokens, *self.controls],
            "outputs": [*columns, *inside],
            "concurrency_limit": 1,
            "concurrency_id": _MODEL,
            "show_progress": "minimal",
            "show_progress_on": [self.notice],
            "api_visibility": "private",
        }
        taken = self.box.submit(self.receive, self.box, [self.box, *columns], **hidden)
        again = self.retry_button.click(self.retry, None, columns, **hidden)
        for begun in (taken, again):
            answered = begun.success(**answering)
            answered.failure(self.refused, None, columns, queue=False, **hidden)  # such as by a full queue
        self.stop_button.click(self.stop, None, None, queue=False, **hidden)
        gr.on(
            [self.clear_button.click, self.full.clear, self.other.clear],
            self.clear,
            None,
            [*columns, *inside],
            queue=False,
            **hidden,
        )
        self.slider.input(  # also by the keyboard, and by typing the number
            self.turn_to_layer,
            self.slider,
            [self.tokens, self.layer_text, self.router],
            trigger_mode="always_last",
            **hidden,
        )
        state = [self.status, self.code, self.save_button, *self.argument_boxes]
        gr.on(
            [control.input for control in self.controls],
            self.check,
            self.controls,
            state,
            trigger_mode="always_last",
            **hidden,
        )
        self.load_button.upload(self.load_config, self.load_button, [*state, *self.controls], **hidden)
        self.evaluate_button.click(
            self.evaluate,
            [self.task, self.limit, *self.controls],
            [self.evaluate_notice, self.plot],
            concurrency_limit=1,
            concurrency_id="evaluation",
            **hidden,
        )
        self.stop_evaluate_button.click(self.stop_evaluating, None, None, queue=False, **hidden)
        blocks.unload(self.leave)

    def launch(self, host: str = "127.0.0.1", port: int | None = None, share: bool = False, **options: Any) -> str:
        """Start the server in the background and return its address.

        Raises:
            ConfigError: the address or the port cannot be used.
        """
        try:
            _, address, public = self.blocks.launch(
                server_name=host,
                server_port=port,
                share=share,
                prevent_thread_lock=True,
                quiet=True,
                show_error=False,
                max_file_size=self.limits.file_bytes,
                state_session_capacity=self.limits.sessions,
                theme=theme(),
                css=CSS,
                ssr_mode=False,
                enable_monitoring=False,
                mcp_server=False,
                pwa=False,
                footer_links=["api"],
                **options,
            )
        except OSError as error:
            raise ConfigError(f"The server cannot listen on {host}, port {port or '7860 to 7959'}: {error}") from error
        return public or address


def _control(technique: str, argument: Argument, value: Any) -> Any:
    """The Gradio component that asks for an argument."""
    common = {"label": argument.name, "info": argument.help or None, "elem_id": f"{technique}-{argument.name}"}
    if argument.kind == "switch":
        return gr.Checkbox(value, **common)
    if argument.kind in ("choice", "folder"):
        return gr.Dropdown(list(argument.choices), value=value, **common)
    if argument.kind in ("whole", "number"):
        precision = 0 if argument.kind == "whole" else None
        step = 1 if argument.kind == "whole" else 0.05
        return gr.Number(value, precision=precision, minimum=argument.low, maximum=argument.high, step=step, **common)
    return gr.Textbox(value, max_lines=1, placeholder="default", max_length=2000, **common)


def serve(
    model: str = "default",
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    weights: Sequence[str | Path] = (),
    attn: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    ready: Any = print,
) -> None:
    """Load a model, open the demo and serve it until it is interrupted.

    Args:
        model, attn, dtype, device: as for :func:`mllm.load`.
        host: address to listen on; only this machine by default.
        port: the first free one from 7860 on without.
        share: open Gradio's public tunnel.
        weights: folders with trained techniques to offer, before those that come with this package for the model.
        ready: is told the address.

    Raises:
        LoadError, ConfigError: the model, a folder or the address cannot be used.
    """
    from mllm.loading import load

    loaded, processor = load(model, attn=attn, dtype=dtype, device=device)
    backend = Backend(loaded, processor, Path(model).name if Path(model).exists() else model)
    backend.warm_up()
    demo = Demo(backend, [*weights, *packaged_parts(model)])
    try:
        ready(demo.launch(host, port, share))
        threading.Event().wait()
    finally:
        demo.close()
