"""Offline tasks: the data that is committed, how lmms-eval finds it, and how answers are scored."""

from __future__ import annotations

import io
import random
import shutil
from collections import Counter
from typing import Any

import build_eval_data as build
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mllm import drawn as sources
from mllm.errors import EvalError
from mllm.eval import tasks
from mllm.eval.tasks import manifest, task_folder, task_include_path, verify_data
from mllm.eval.tasks.scoring import content_f1, content_words, is_right, item_f1, words

pq = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow: pip install -e '.[all,dev]'")

TASKS = ("mllm_caption", "mllm_docqa", "mllm_language", "mllm_reading", "mllm_text", "mllm_vqa")
TEXT_ONLY = ("mllm_language", "mllm_text")
PUZZLES = tuple(sorted(build.PUZZLE_TASKS))
CIDER = "mllm_caption_cider"
GOLD = ("puzzle_pages10_gold", "puzzle_pages20_gold", "puzzle_pages5_gold")


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, Any]]]:
    return {task: pq.read_table(task_folder() / "data" / f"{task}.parquet").to_pylist() for task in TASKS}


@pytest.fixture(scope="module")
def puzzles() -> dict[str, list[dict[str, Any]]]:
    return {task: pq.read_table(task_folder() / "data" / f"{task}.parquet").to_pylist() for task in PUZZLES}


# --- data -------------------------------------------------------------------------------------------------------------


def test_data_is_what_the_manifest_says(rows, puzzles):
    verify_data()
    assert sorted(manifest()) == [*TASKS, *PUZZLES]
    for task, entry in manifest().items():
        found = (rows | puzzles)[task]
        assert entry["n"] == len(found)
        assert entry["kinds"] == dict(Counter(row["kind"] for row in found))
    size = sum(path.stat().st_size for path in (task_folder() / "data").iterdir())
    assert size < 14e6


def test_puzzles_are_well_formed(puzzles):
    for task, found in puzzles.items():
        pages = {"puzzle_pages5": {5}, "puzzle_pages10": {10}, "puzzle_pages20": {20}, "puzzle_words": {0}}
        pages |= {"puzzle_album": {2, 3, 4}, "puzzle_chat": {0, 1}}
        for row in found:
            assert row["answers"][0] == row["answer"]
            assert len(row["images"]) in pages.get(task, {1})
            assert (0 <= row["evidence"] < len(row["images"])) == ("pages" in task)
            assert all(is_right(answer, row["answers"], row["options"]) for answer in row["answers"])
            if task == "puzzle_choice":
                assert len(row["options"]) == 2
                assert row["answer"] in row["options"]
            if task == "puzzle_chat":
                assert len(row["history"]) + 1 == len(row["kind"])
                assert bool(row["images"]) == ("V" in row["kind"])
                assert row["shown_at"] == max(0, row["kind"].find("V"))
        picture = next((row["images"][0] for row in found if row["images"]), None)
        if picture is not None:
            image = Image.open(io.BytesIO(picture["bytes"]))
            assert (image.size, image.mode) == ((96, 96), "RGB")


def test_questions_are_many_enough_for_three_points(rows, puzzles):
    for task, found in (rows | puzzles).items():
        if task in ("puzzle_list", "mllm_caption"):  # an F1 varies less than right and wrong
            continue
        points = 3.5 if task == "puzzle_words" else 3.1  # there are no more sums and facts
        assert 196 * (0.25 / len(found)) ** 0.5 < points, task


def test_puzzles_stand_on_the_test_side(puzzles):
    for task in ("puzzle_scenes", "puzzle_list", "puzzle_album", "puzzle_pages5", "puzzle_pages20", "puzzle_words"):
        for row in puzzles[task]:
            # one shape alone has too few combinations to be split; facts are split by their wording
            if len(row["group"].split()) > 3 and row["kind"] != "fact":
                group = f"words {row['group']}" if row["source"] == "words" else row["group"]
                assert sources.side(group) == "test", group
    for row in puzzles["puzzle_reading"]:
        if row["kind"] in ("number", "word"):  # digits and letters are too few: their fonts are split
            assert sources.side(row["group"]) == "test"


def test_puzzles_can_be_built_again(puzzles):
    assert build.rows_of("puzzle_words") == puzzles["puzzle_words"]


def test_every_row_is_well_formed(rows):
    pages = {"mllm_text": (0,), "mllm_language": (0,), "mllm_docqa": (2, 3, 4)}
    for task in TASKS:
        assert [row["id"] for row in rows[task]] == list(range(len(rows[task])))
        for row in rows[task]:
            assert row["task"] == task
            assert row["question"]
            assert row["answers"][0] == row["answer"]
            assert len(row["images"]) in pages.get(task, (1,))
            if task == "mllm_docqa":
                assert 0 <= row["evidence"] < len(row["images"])
            else:
                assert row["evidence"] == -1
            for picture in row["images"]:
                image = Image.open(io.BytesIO(picture["bytes"]))
                assert (image.size, image.mode) == ((224, 224), "RGB")


def test_every_answer_is_right_and_every_other_option_wrong(rows):
    for task in TASKS:
        for row in rows[task]:
            if task == "mllm_caption":
                assert content_f1(row["answer"], row["answer"]) == 1
                continue
            for answer in row["answers"]:
                assert is_right(answer, row["answers"], row["options"])
                said = f"It is {answer.upper()}."
                assert is_right(said, row["answers"], row["options"]) or row["kind"] in ("letter", "last word")
            for option in row["options"]:
                if words(option) not in [words(answer) for answer in row["answers"]]:
                    assert not is_right(option, row["answers"], row["options"]), row["question"]


def test_no_picture_or_text_question_comes_twice(rows):
    for task in TASKS:
        keys = [b"".join(p["bytes"] for p in row["images"]) or row["question"].encode() for row in rows[task]]
        if task == "mllm_docqa":  # a document is asked three things
            assert max(Counter(keys).values()) == 3
            keys = [key + row["question"].encode() for key, row in zip(keys, rows[task], strict=True)]
        assert len(set(keys)) == len(keys)


def test_every_prefix_has_its_share_of_each_kind(rows):
    for task in TASKS:
        total = Counter(row["kind"] for row in rows[task])
        seen: Counter[str] = Counter()
        for count, row in enumerate(rows[task], start=1):
            seen[row["kind"]] += 1
            for kind, number in total.items():
                assert abs(seen[kind] - count * number / len(rows[task])) < 1.5, (task, count, kind)


def test_answers_within_a_kind_are_spread(rows):
    presence = Counter(row["answer"] for row in rows["mllm_vqa"] if row["kind"] == "presence")
    assert abs(presence["yes"] - presence["no"]) <= 1
    colors = Counter(row["answer"] for row in rows["mllm_vqa"] if row["kind"] == "color")
    assert len(colors) == 8
    assert max(colors.values()) - min(colors.values()) <= 1


def test_blind_scores_of_the_manifest(rows):
    for task in TASKS:
        found = build.blind_scores(task, rows[task])
        assert found == {key: manifest()[task][key] for key in ("constant_reply", "chance")}
        assert 0 <= found["chance"] < 0.5
        assert found["constant_reply"] < 0.5


def test_text_task_can_be_built_again(rows):
    assert build.rows_of("mllm_text") == rows["mllm_text"]


def test_page_task_can_be_built_again(rows):
    """But for the pictures' bytes, which are another encoder's elsewhere."""
    if not sources.debian_fonts():
        pytest.skip("fonts are missing: apt-get install fonts-dejavu-core fonts-liberation fonts-freefont-ttf")
    made, kept = (
        [{**row, "images": len(row["images"])} for row in found]
        for found in (build.rows_of("mllm_docqa"), rows["mllm_docqa"])
    )
    assert made == kept


def test_running_text_has_its_own_words(rows):
    """Frequent words come as often as people write them, and no passage is asked twice."""
    answers = Counter(row["answer"] for row in rows["mllm_language"])
    assert answers.most_common(1)[0][0] == "the"
    assert all(len(row["question"].split()) >= 15 for row in rows["mllm_language"])
    assert all(row["question"].isascii() for row in rows["mllm_language"])


def test_building_the_same_scenes_twice_gives_the_same_bytes():
    first, second = (
        [build.webp(image) for sample in sources.scene_samples("test", 3, 5) for image in sample.images] for _ in "ab"
    )
    assert first == second


# --- training and test ------------------------------------------------------------------------------------------------


def test_groups_are_on_the_test_side(rows):
    for row in (row for task in TASKS for row in rows[task]):
        if row["source"] == "reading":
            assert sources.side(row["group"], 0.25) == "test"
        elif row["source"] == "scene" and row["kind"] != "count":
            # one shape alone has too few combinations to be split
            assert len(row["group"].split()) == 3 or sources.side(row["group"]) == "test"
        elif row["source"] in ("openclipart", "noto-emoji", "document"):
            assert sources.side(row["group"]) == "test"


def test_training_scenes_and_facts_are_not_in_the_test_data(rows):
    scenes = {row["group"] for row in rows["mllm_vqa"] if row["source"] == "scene" and len(row["group"].split()) > 3}
    facts = {row["question"] for row in rows["mllm_text"] if row["kind"] != "sum"}
    scenes |= {
        row["group"] for row in rows["mllm_caption"] if row["kind"] == "caption of a scene" and "and" in row["answer"]
    }
    assert scenes
    assert facts
    assert not scenes & {sample.group for sample in sources.scene_samples("train", 5, 1500)}
    assert not facts & {turn.question for sample in sources.text_samples("train", 5, 500) for turn in sample.turns}


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied_data(tmp_path, monkeypatch):
    shutil.copytree(task_folder() / "data", tmp_path / "data")
    monkeypatch.setattr(tasks, "task_folder", lambda: tmp_path)
    manifest.cache_clear()
    yield tmp_path / "data"
    manifest.cache_clear()


def test_changed_data_is_refused(copied_data):
    verify_data()
    path = copied_data / "mllm_vqa.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(EvalError, match=r"mllm_vqa\.parquet has the SHA-256 .* expected"):
        verify_data()
    verify_data("mllm_text")  # the others can still be used
    with pytest.raises(EvalError, match="SHA-256"):
        task_include_path()


def test_missing_data_is_refused(copied_data):
    (copied_data / "mllm_text.parquet").unlink()
    with pytest.raises(EvalError, match="mllm_text cannot be read"):
        verify_data()


def test_damaged_manifest_is_refused(copied_data):
    (copied_data / "data.json").write_text("{")
    manifest.cache_clear()
    with pytest.raises(EvalError, match=r"data\.json cannot be read"):
        verify_data()


def test_unknown_task_is_named():
    with pytest.raises(EvalError, match=r"no offline task 'mllm_audio'.*mllm_vqa"):
        verify_data("mllm_audio")


# --- lmms-eval --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """All tasks, built by lmms-eval from another working directory and an empty cache."""
    pytest.importorskip("lmms_eval", reason="needs lmms_eval: pip install -e '.[all,dev]'")
    import os

    from lmms_eval.tasks import TaskManager

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        from lmms_eval.api import task as task_module

        task_module._resolve_hf_datasets_cache_dir.cache_clear()
        manager = TaskManager(include_path=task_include_path(), include_defaults=False)
        assert os.listdir() == []
        found = manager.load_task_or_group(list(manager.all_tasks), task_type="chat")
    task_module._resolve_hf_datasets_cache_dir.cache_clear()
    return manager, found


def test_lmms_eval_finds_the_tasks(loaded):
    manager, found = loaded
    assert sorted(manager.all_tasks) == sorted([*TASKS, *PUZZLES, *GOLD, CIDER])
    for name, task in found.items():
        size = manifest()[name.removesuffix("_gold").removesuffix("_cider")]
        assert len(task.test_docs()) == (size["kinds"]["page number"] if name in GOLD else size["n"])
        if name != "mllm_language":
            assert list(task.config.generation_kwargs)[:2] == ["max_new_tokens", "do_sample"]
            assert 8 <= task.config.generation_kwargs["max_new_tokens"] <= 28
        assert set(task.higher_is_better().values()) == {True}
        # requests are built without pictures, which are opened one batch at a time
        assert "images" not in task.eval_docs_no_media.features


def test_documents_become_messages(loaded):
    _, found = loaded
    for name in TASKS:
        task = found[name]
        doc = task.test_docs()[0]
        (turn,) = task.doc_to_messages(doc)
        kinds = [item["type"] for item in turn["content"]]
        assert turn["role"] == "user"
        assert kinds == ["image"] * len(task.doc_to_visual(doc)) + ["text"]
        assert len(kinds) - 1 in dict.fromkeys(TEXT_ONLY, (0,)).get(name, (2, 3) if name == "mllm_docqa" else (1,))
        assert all(item["url"].mode == "RGB" for item in turn["content"][:-1])
        assert turn["content"][-1]["text"] == task.doc_to_text(doc) == doc["question"]


def test_likelihoods_are_asked_for_and_scored(loaded):
    _, found = loaded
    task = found["mllm_language"]
    task.build_all_requests(limit=2, rank=0, world_size=1)
    for request, doc in zip(task.instances, task.test_docs(), strict=False):
        assert request.request_type == "loglikelihood"
        assert request.args == (doc["question"], f" {doc['answer']}", request.doc_id, "mllm_language", "test")
    # a model's answer as it is, and as lmms-eval 0.7 hands it on
    for told, score in (((-1.5, True), 1.0), ("(-1.5, True)", 1.0), ("(-inf, False)", 0.0), ((-2.0, False), 0.0)):
        assert task.process_results(task.test_docs()[0], [told]) == {"accuracy": score}


def test_chats_show_their_picture_in_its_turn(loaded):
    _, found = loaded
    seen = set()
    for doc in found["puzzle_chat"].test_docs():
        if doc["kind"] in seen:
            continue
        seen.add(doc["kind"])
        messages = found["puzzle_chat"].doc_to_messages(doc)
        assert [message["role"] for message in messages] == ["user", "assistant"] * len(doc["history"]) + ["user"]
        shown = [any(item["type"] == "image" for item in message["content"]) for message in messages[::2]]
        assert shown == [letter == "V" and "V" not in doc["kind"][:n] for n, letter in enumerate(doc["kind"])]
        assert messages[-1]["content"][-1]["text"] == doc["question"]
    assert seen == {"T", "TT", "TTT", "TTV", "TV", "V"}


def test_gold_pages_are_the_evidence_alone(loaded):
    _, found = loaded
    whole = [doc for doc in found["puzzle_pages5"].test_docs() if doc["kind"] == "page number"]
    for doc, alone in zip(whole[:4], found["puzzle_pages5_gold"].test_docs(), strict=False):
        assert alone["question"] == doc["question"]
        (image,) = alone["images"]
        assert image.tobytes() == doc["images"][doc["evidence"]].tobytes()


def test_scores_are_means_of_what_documents_give(loaded):
    _, found = loaded
    for name, task in found.items():
        if name in (CIDER, "mllm_language"):
            continue
        (metric, aggregate) = next(iter(task.aggregation().items()))
        docs = [task.eval_docs_no_media[i] for i in range(6)]
        right = [task.process_results(doc, [task.doc_to_target(doc)])[metric] for doc in docs]
        wrong = [task.process_results(doc, [""])[metric] for doc in docs]
        assert aggregate(right) == 1, name
        assert aggregate(wrong) == 0
        assert aggregate(right + wrong) == 0.5


def test_cider_weighs_words_by_how_rare_they_are(loaded):
    task = loaded[1][CIDER]
    docs = [task.eval_docs_no_media[i] for i in range(40)]

    def score(reply):
        return task.aggregation()["cider"]([task.process_results(doc, [reply(doc)])["cider"] for doc in docs])

    # 10 where replies have n-grams of all four lengths
    assert score(lambda doc: doc["answer"]) == pytest.approx(10, abs=2)
    assert score(lambda doc: doc["answer"].upper()) == score(lambda doc: doc["answer"])
    assert score(lambda doc: "") == 0
    assert score(lambda doc: "A picture of") < 0.1  # what every caption says counts for nothing
    thing = score(lambda doc: doc["answer"].removeprefix("A picture of "))
    assert 0.1 < thing < score(lambda doc: doc["answer"])


def test_prompts_of_other_models_can_be_wrapped():
    pytest.importorskip("lmms_eval", reason="needs lmms_eval: pip install -e '.[all,dev]'")
    from mllm.eval.tasks import utils

    doc = {"question": "Which one?", "images": []}
    around = {"pre_prompt": "Look. ", "post_prompt": " Be brief."}
    assert utils.doc_to_text(doc, around) == "Look. Which one? Be brief."
    assert utils.doc_to_messages(doc, around)[0]["content"] == [{"type": "text", "text": "Look. Which one? Be brief."}]


def test_damage_stops_lmms_eval_at_once_and_by_name(loaded, copied_data):
    manager, _ = loaded
    (copied_data / "mllm_vqa.parquet").write_bytes(b"")
    with pytest.raises(EvalError, match="was changed or damaged"):
        manager.load_task_or_group(["mllm_vqa"], task_type="chat")


# --- scores -----------------------------------------------------------------------------------------------------------

COLORS = ("red", "green", "blue", "light blue")


@pytest.mark.parametrize(
    ("reply", "accepted", "options", "expected"),
    [
        ("red", ["red"], COLORS, True),
        ("Red.", ["red"], COLORS, True),
        ("It is a red star", ["red"], COLORS, True),
        ("red or blue", ["red"], COLORS, False),
        ("reddish", ["red"], COLORS, False),
        ("", ["red"], COLORS, False),
        ("light blue", ["light blue"], COLORS, True),
        ("light blue", ["blue"], COLORS, False),
        ("the Eiffel tower", ["eiffel tower"], (), True),
        ("tower eiffel", ["eiffel tower"], (), False),
        ("two", ["2"], (), True),
        ("There are 3 shapes.", ["three"], ("one", "two", "three"), True),
        ("1 + 7 = 8", ["8"], ("2", "3", "8"), True),
        ("18", ["8"], ("8", "18"), False),
        ("A", ["A"], ("A", "B"), True),
        ("a", ["A"], ("A", "B"), True),
        ("The letter is A.", ["B"], ("A", "B"), False),
        ("yes and no", ["yes"], ("yes", "no"), False),
        ("Animal", ["duck", "animal"], (), True),
        ("...", ["..."], (), False),
    ],
)
def test_short_answers(reply, accepted, options, expected):
    assert is_right(reply, accepted, options) is expected


@pytest.mark.parametrize(
    ("reply", "reference", "expected"),
    [
        ("A picture of a duck, an animal.", "A picture of a duck, an animal.", 1.0),
        ("An animal", "A picture of a duck, an animal.", 2 / 3),
        ("A picture of a cat, an animal.", "A picture of a duck, an animal.", 0.5),
        ("A picture of a.", "A picture of a duck.", 0.0),
        ("", "A picture of a duck.", 0.0),
        ("duck duck duck", "A duck", 1.0),
    ],
)
def test_captions(reply, reference, expected):
    assert content_f1(reply, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("red star, blue circle", 1.0),
        ("blue circle, red star", 1.0),
        ("red star", 2 / 3),
        ("red circle", 0.0),
        ("", 0.0),
    ],
)
def test_lists(reply, expected):
    assert item_f1(reply, "red star, blue circle") == pytest.approx(expected)


word = st.text("abcdefghijklmnop", min_size=2, max_size=6).filter(lambda w: w not in ("an", "in", "of", "on", "and"))


@settings(deadline=None, max_examples=60)
@given(st.lists(word, min_size=1, max_size=3), st.lists(word, max_size=3), st.integers(0, 10**6))
def test_form_does_not_matter(answer, around, seed):
    rng = random.Random(seed)
    accepted = " ".join(answer)
    cut = rng.randrange(len(around) + 1)
    said = [*around[:cut], *(rng.choice([w, w.upper(), w.title(), f"the {w}", f"{w},"]) for w in answer), *around[cut:]]
    assert is_right(" ".join(said) + "!", [accepted])


@settings(deadline=None, max_examples=60)
@given(st.lists(word, min_size=2, max_size=5, unique=True))
def test_naming_two_options_is_wrong(options):
    assert is_right(options[0], options[:1], options)
    assert not is_right(" ".join(options), options[:1], options)


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=40), st.text(max_size=40))
def test_caption_score_is_a_share_and_symmetric(a, b):
    assert 0 <= content_f1(a, b) <= 1
    assert content_f1(a, b) == content_f1(b, a)
    assert content_f1(a, a) == (1 if content_words(a) else 0)
