"""What the YAML files of the offline tasks refer to with ``!function``; reading one of them checks the data.

The check stands here, at the import: lmms-eval repeats whatever fails while a task is built, for seconds, and then
hides the reason.
"""

from __future__ import annotations

from typing import Any

from datasets import Image, List

from mllm.eval.tasks import verify_data
from mllm.eval.tasks.scoring import content_f1, is_right, item_f1, words

verify_data()

Doc = dict[str, Any]


def doc_to_visual(doc: Doc) -> list[Any]:
    """The pictures of a document, in order, RGB; an empty list for text-only tasks."""
    return [image.convert("RGB") for image in doc.get("images") or []]


def doc_to_text(doc: Doc, lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """The question, between the task's ``pre_prompt`` and ``post_prompt`` where they are set."""
    around = lmms_eval_specific_kwargs or {}
    return f"{around.get('pre_prompt', '')}{doc['question']}{around.get('post_prompt', '')}"


def doc_to_messages(doc: Doc, lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """User turns, all but the last one answered: the pictures first, in the turn that they come with."""
    history = doc.get("history") or []
    questions = [*(turn["question"] for turn in history), doc_to_text(doc, lmms_eval_specific_kwargs)]
    messages: list[dict[str, Any]] = []
    for number, question in enumerate(questions):
        shown = doc_to_visual(doc) if number == (doc.get("shown_at") or 0) else []
        content = [{"type": "image", "url": image} for image in shown]
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
        if number < len(history):
            answer = history[number]["answer"]
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def gold_docs(docs: Any) -> Any:
    """The questions of documents that a single page answers, each with that page alone."""

    def alone(doc: Doc) -> Doc:
        return {**doc, "images": [doc["images"][doc["evidence"]]]}

    # as bytes: a picture that was opened would be stored again with losses
    closed = docs.cast_column("images", List(Image(decode=False)))
    chosen = closed.filter(lambda kind: kind == "page number", input_columns="kind").map(alone)
    return chosen.cast_column("images", List(Image()))


def doc_to_target(doc: Doc) -> str:
    """The answer."""
    return doc["answer"]


def next_word(doc: Doc) -> str:
    """The word that follows a text, after its space."""
    return f" {doc['answer']}"


def score_answer(doc: Doc, results: list[str]) -> dict[str, float]:
    """Accuracy of one short answer, 0 or 1."""
    return {"accuracy": float(is_right(results[0], doc["answers"], doc["options"]))}


def score_caption(doc: Doc, results: list[str]) -> dict[str, float]:
    """Content-word F1 of one caption, the best over the references, 0 to 1."""
    return {"content_f1": max(content_f1(results[0], reference) for reference in doc["answers"])}


def keep_caption(doc: Doc, results: list[str]) -> dict[str, Any]:
    """A caption and its references, for :func:`cider`, which weighs words by how rare they are among all captions."""
    return {"cider": {"reply": results[0], "answers": doc["answers"]}}


def cider(captions: list[dict[str, Any]]) -> float:
    """CIDEr of captions, as :func:`keep_caption` gives them, 0 to 10 (https://arxiv.org/abs/1411.5726)."""
    from pycocoevalcap.cider.cider import Cider

    replies = {n: [" ".join(words(caption["reply"]))] for n, caption in enumerate(captions)}
    answers = {n: [" ".join(words(text)) for text in caption["answers"]] for n, caption in enumerate(captions)}
    return float(Cider().compute_score(answers, replies)[0])


def score_list(doc: Doc, results: list[str]) -> dict[str, float]:
    """F1 of the things that a list names, 0 to 1."""
    return {"item_f1": item_f1(results[0], doc["answer"])}


def score_next_word(doc: Doc, results: list[tuple[float, bool]]) -> dict[str, float]:
    """Whether greedy decoding says the word that follows, 0 or 1."""
    (_, same) = results[0]
    return {"accuracy": float(same)}


def mean(values: list[float]) -> float:
    """Aggregation."""
    return sum(values) / len(values)
