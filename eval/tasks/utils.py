"""What the YAML files of the offline tasks refer to with ``!function``; reading one of them checks the data.

The check stands here, at the import: lmms-eval repeats whatever fails while a task is built, for seconds, and then
hides the reason.
"""

from __future__ import annotations

from typing import Any

from mllm.eval.tasks import verify_data
from mllm.eval.tasks.scoring import content_f1, is_right

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
    """One user turn: the pictures first, then the question."""
    content = [{"type": "image", "url": image} for image in doc_to_visual(doc)]
    content.append({"type": "text", "text": doc_to_text(doc, lmms_eval_specific_kwargs)})
    return [{"role": "user", "content": content}]


def doc_to_target(doc: Doc) -> str:
    """The answer."""
    return doc["answer"]


def score_answer(doc: Doc, results: list[str]) -> dict[str, float]:
    """Accuracy of one short answer, 0 or 1."""
    return {"accuracy": float(is_right(results[0], doc["answers"], doc["options"]))}


def score_caption(doc: Doc, results: list[str]) -> dict[str, float]:
    """Content-word F1 of one caption, the best over the references, 0 to 1."""
    return {"content_f1": max(content_f1(results[0], reference) for reference in doc["answers"])}


def mean(values: list[float]) -> float:
    """Aggregation."""
    return sum(values) / len(values)
