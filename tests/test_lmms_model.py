"""Our lmms-eval model: batches answer like single requests, failures stay apart and are never scored as empty."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lmms_eval.api.instance import Instance
from tiny import FAMILIES, tiny_image, tiny_model, tiny_processor

from mllm import Stack, load
from mllm.errors import ConfigError, DidNotFireError, EvalError, UnsupportedModelError
from mllm.eval import lmms_model
from mllm.eval.lmms_model import MllmLmms
from mllm.technique import Technique
from mllm.token_pruning import DyVTE

DOCS = [
    {"q": "What is it?", "images": [tiny_image(1)]},
    {"q": "Hello", "images": []},
    {"q": "Is this picture like the other one, or not at all?", "images": [tiny_image(2), tiny_image(3, (24, 40))]},
    {"q": "Why?", "images": [tiny_image(4, (32, 32))]},
    {"q": "Name a colour", "images": []},
]


def messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    content = [{"type": "image", "url": image} for image in doc["images"]]
    return [{"role": "user", "content": [*content, {"type": "text", "text": doc["q"]}]}]


def requests(docs: list[dict[str, Any]], **settings: Any) -> list[Instance]:
    settings = {"max_new_tokens": 4, **settings}
    return [
        Instance(
            "generate_until",
            (doc["q"], messages, settings, number, "task", "test"),
            0,
            {"task": "task", "doc_id": number, "repeats": 1},
        )
        for number, doc in enumerate(docs)
    ]


def make(docs=DOCS, family="llava", **options: Any) -> MllmLmms:
    lm = MllmLmms(loaded=(tiny_model(family), tiny_processor(family)), **options)
    lm.task_dict = {"task": {"test": docs}}
    return lm


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stack", [Stack(), Stack(DyVTE(exit_layer=2))], ids=["plain", "exit"])
def test_a_batch_answers_like_single_requests(family, stack):
    alone = make(family=family, stack=stack, batch_size=1).generate_until(requests(DOCS))
    together = make(family=family, stack=stack, batch_size=3).generate_until(requests(DOCS))
    assert together == alone
    assert all(alone)


def test_records_count_what_was_spent():
    lm = make(stack=Stack(DyVTE(exit_layer=2)), batch_size=2)
    lm.generate_until(requests(DOCS))
    assert set(lm.records) == {("task", number) for number in range(len(DOCS))}
    for (_, number), record in lm.records.items():
        assert record.error is None
        assert record.ttft_ms > 0
        assert record.new_tokens == 4
        assert 0 < record.flops <= record.dense_flops
        assert (record.flops < record.dense_flops) or not DOCS[number]["images"]
    assert not lm.model.model._forward_pre_hooks


TEXTS = [
    ("The cat sat on", " the mat"),
    ("Why", " not"),
    ("One, two,", " three"),
    ("A longer text of many words", " ends"),
]


def likelihoods(texts: list[tuple[str, str]]) -> list[Instance]:
    return [
        Instance(
            "loglikelihood",
            (text, continuation, number, "task", "test"),
            0,
            {"task": "task", "doc_id": number, "repeats": 1},
        )
        for number, (text, continuation) in enumerate(texts)
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stack", [Stack(), Stack(DyVTE(exit_layer=2))], ids=["plain", "exit"])
def test_likelihoods_are_those_of_token_after_token(family, stack):
    lm = make(family=family, stack=stack, batch_size=3)
    found = lm.loglikelihood(likelihoods(TEXTS))
    tokenizer = lm.processor.tokenizer
    for number, (text, continuation) in enumerate(TEXTS):
        ids, start = tokenizer(text + continuation, return_tensors="pt")["input_ids"], len(tokenizer(text)["input_ids"])
        with torch.no_grad():
            steps = [lm.model(input_ids=ids[:, :end]).logits[0, -1] for end in range(start, ids.shape[1])]
        expected = sum(step.log_softmax(-1)[ids[0, start + k]].item() for k, step in enumerate(steps))
        assert found[number][0] == pytest.approx(expected, abs=1e-3)
        assert not found[number][1]
        said = lm.processor.decode(torch.stack(steps).argmax(-1))
        assert lm.records["task", number].text == said
        assert lm.records["task", number].flops > 0
    greedy = [(text, lm.records["task", number].text) for number, (text, _) in enumerate(TEXTS)]
    one = [tokenizer(text + said)["input_ids"] for text, said in greedy]
    kept = [row for row, ids in zip(greedy, one, strict=True) if len(ids) == len(tokenizer(row[0])["input_ids"]) + 1]
    assert all(same for _, same in make(family=family, batch_size=1).loglikelihood(likelihoods(kept)))


def test_temperature_samples_and_greedy_keeps_its_penalty():
    lm = make(docs=DOCS[:1] * 8)
    asked = []
    generate, lm.model.generate = lm.model.generate, lambda **options: asked.append(options) or generate(**options)
    try:
        torch.manual_seed(0)
        replies = lm.generate_until(requests(DOCS[:1] * 8, temperature=5.0, max_new_tokens=8))
        assert len(set(replies)) > 1
        lm.generate_until(requests(DOCS[:1], repetition_penalty=1.5, temperature=0))
    finally:
        del lm.model.generate
    assert asked[0]["do_sample"] is True
    assert (asked[-1]["do_sample"], asked[-1]["repetition_penalty"]) == (False, 1.5)
    assert "temperature" not in asked[-1]


def test_a_continuation_that_has_no_start_is_refused():
    """ "red" is one token of this model: alone, nothing stands before it; in a batch, padding does."""
    lm = MllmLmms(loaded=load("tiny", dtype="float32"), batch_size=2, on_error="record")
    first, second = lm.loglikelihood(likelihoods([("r", "ed"), TEXTS[3]]))
    assert first == (float("-inf"), False)
    assert "first token" in lm.records["task", 0].error
    assert second[0] > float("-inf")


def test_a_likelihood_of_nothing_is_an_error_of_its_own():
    lm = make(on_error="record")
    (first, second) = lm.loglikelihood(likelihoods([("A text", " "), TEXTS[0]]))
    assert first == (float("-inf"), False)
    assert second[0] > float("-inf")
    assert "empty" in lm.records["task", 0].error


def test_settings_are_grouped_and_stops_cut():
    lm = make(batch_size=4)
    plain = lm.generate_until(requests(DOCS[:2], max_new_tokens=6))
    stop = plain[0][2]
    mixed = requests(DOCS[:1], max_new_tokens=6, until=[stop]) + requests(DOCS[:1], max_new_tokens=2)
    cut, short = lm.generate_until(mixed)
    assert cut == plain[0].split(stop)[0].strip()
    assert short == plain[0][:2].strip()


def test_beams_and_sampling_settings_pass_through():
    lm = make(batch_size=2)
    assert all(lm.generate_until(requests(DOCS[:2], num_beams=2)))
    assert all(lm.generate_until(requests(DOCS[:2], do_sample=True, temperature=0.7, top_p=0.9)))


BAD = {
    "missing picture": {"q": "What?", "images": ["nowhere.png"]},
    "empty prompt": {"q": " ", "images": []},
    "extra placeholder": {"q": "What is <image>?", "images": [tiny_image()]},
    "not a picture": {"q": "What?", "images": [12]},
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_one_bad_sample_harms_no_other(bad):
    expected = make(batch_size=1).generate_until(requests(DOCS))
    docs = [*DOCS[:2], bad, *DOCS[2:]]
    lm = make(docs, batch_size=3, on_error="record")
    answers = lm.generate_until(requests(docs))
    assert [*answers[:2], *answers[3:]] == expected
    assert answers[2].startswith("[failed: ")
    record = lm.records["task", 2]
    assert record.text is None
    assert record.error
    with pytest.raises(EvalError, match="1 of 6 samples could not be answered"):
        make(docs, batch_size=3).generate_until(requests(docs))


def test_a_batch_that_fails_is_tried_row_by_row(monkeypatch):
    lm = make(batch_size=3, on_error="record")
    expected = lm.generate_until(requests(DOCS))
    generate = lm.model.generate

    def too_large(**options):
        if options["input_ids"].shape[0] > 1:
            raise RuntimeError("out of memory")
        return generate(**options)

    monkeypatch.setattr(lm.model, "generate", too_large)
    assert lm.generate_until(requests(DOCS)) == expected


def test_all_failed_is_an_error():
    docs = [BAD["missing picture"]] * 3
    with pytest.raises(EvalError, match=r"None of 3 samples could be answered.*nowhere\.png does not exist"):
        make(docs, on_error="record").generate_until(requests(docs))


class Idle(Technique):
    name = "Idle"
    paper = ""


def test_a_broken_technique_is_not_a_bad_sample():
    with pytest.raises(DidNotFireError):
        make(stack=Stack(Idle()), on_error="record").generate_until(requests(DOCS))
    lm = make(stack=Stack(DyVTE(exit_layer=2)), on_error="record")
    lm.model.generation_config.cache_implementation = "static"
    try:
        with pytest.raises(UnsupportedModelError):
            lm.generate_until(requests(DOCS))
    finally:
        lm.model.generation_config.cache_implementation = None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batchsize": 2}, "Unknown model_args: batchsize"),
        ({"batch_size": "auto"}, "batch_size='auto'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"on_error": "ignore"}, "on_error='ignore'"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ConfigError, match=message):
        make(**options)


def test_what_is_not_supported_says_so():
    with pytest.raises(EvalError, match="several rounds"):
        make().generate_until_multi_round([])


def test_the_entry_point_names_our_model():
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    from mllm.eval.manifest import mllm_manifest

    registry = ModelRegistryV2()
    registry.register_manifest(mllm_manifest())
    assert registry.get_model_class("mllm") is lmms_model.MllmLmms
