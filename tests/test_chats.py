"""Training chats: files that users have and that are broken, labels on answers alone, data without end."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import FAMILIES, images_per_row, tiny_image, tiny_model, tiny_processor

from mllm.chats import IGNORED, Chat, collate, open_chats, read_chats
from mllm.errors import ConfigError, InputError
from mllm.roles import ChatFormat

RECORD = {
    "id": "a",
    "image": ["cat.png", "dog.png"],
    "conversations": [
        {"from": "human", "value": "Is <image>\nlike\n<image>?"},
        {"from": "gpt", "value": "no"},
        {"from": "human", "value": "Why?"},
        {"from": "gpt", "value": "One barks."},
    ],
    "retrieval_labels": [0, 1],
    "source": "somewhere",
}


@pytest.fixture
def folder(tmp_path):
    for name in ("cat.png", "dog.png"):
        tiny_image().save(tmp_path / name)
    return tmp_path


def written(folder, *records, lines=False):
    path = folder / ("data.jsonl" if lines else "data.json")
    path.write_text("\n".join(map(json.dumps, records)) + "\n\n" if lines else json.dumps(records))
    return path


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lines", [True, False])
def test_records(folder, lines):
    text = {"conversations": [{"from": "human", "value": "2 + 2?\u2028"}, {"from": "gpt", "value": "4"}]}
    one = {"image": "cat.png", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]}
    first, second, third = read_chats(written(folder, RECORD, text, one, lines=lines))
    assert first.turns == (("Is <image>\nlike\n<image>?", "no"), ("Why?", "One barks."))
    assert first.evidence == (1,)
    assert [image.size for image in first.open_images()] == [(40, 24)] * 2
    assert (second.images, second.evidence, second.id) == ((), None, "1")
    assert third.messages()[0]["content"] == [{"type": "image"}]


def test_a_folder_of_pictures_elsewhere(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    path = written(elsewhere, RECORD)
    with pytest.raises(InputError, match=r"cat\.png does not exist"):
        read_chats(path)
    assert read_chats(path, images=folder)[0].images == (folder / "cat.png", folder / "dog.png")


def test_placeholders_stay_where_they_are():
    """Line breaks beside them are the template's business."""
    content = Chat(RECORD["conversations"] and (("Is <image>\nlike\n<image>?", "no"),), (tiny_image(),) * 2).messages()
    assert content[0]["content"] == [
        {"type": "text", "text": "Is "},
        {"type": "image"},
        {"type": "text", "text": "like"},
        {"type": "image"},
        {"type": "text", "text": "?"},
    ]
    unplaced = Chat((("What?", "a"), ("Why?", "b")), (tiny_image(),) * 2).messages("</s>")
    assert unplaced[0]["content"] == [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What?"}]
    assert unplaced[2]["content"] == [{"type": "text", "text": "Why?"}]
    assert unplaced[3]["content"] == [{"type": "text", "text": "b</s>"}]


def changed(**values):
    return {**RECORD, **values}


def said(number, **values):
    conversations = [dict(item) for item in RECORD["conversations"]]
    conversations[number].update(values)
    return changed(conversations=conversations)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (changed(image="bird.png"), r"image: .*bird\.png does not exist\. File names are relative to"),
        (changed(image=[3]), r"image = \[3\] must be a file name"),
        (changed(image=""), "image = '' must be a file name"),
        (changed(image="cat.png", retrieval_labels=[1]), "2 <image> placeholders for 1 pictures"),
        (changed(image=None, retrieval_labels=None), "2 <image> placeholders for 0 pictures"),
        (changed(retrieval_labels=[1]), r"retrieval_labels = \[1\] must hold 0 or 1 for each of the 2 pictures"),
        (changed(retrieval_labels=[0, 2]), r"retrieval_labels = \[0, 2\] must hold 0 or 1"),
        (changed(conversations=[]), r"conversations = \[\] must be a list"),
        (changed(conversations=RECORD["conversations"][:3]), "an even number of them"),
        ({"id": 1}, "conversations = None must be a list"),
        (said(1, value=" "), r"conversations\[1\]\.value is empty"),
        (said(2, value=""), r"conversations\[2\]\.value is empty"),
        (said(1, value="see <image>"), "answer 0 holds <image>"),
        (said(1, value=None), r"conversations\[1\] = .* a text 'value'"),
        (said(1, **{"from": "human"}), r"conversations\[1\] = .* 'from': 'gpt'"),
        (["no mapping"], "a record is a mapping"),
    ],
)
@pytest.mark.parametrize("lines", [True, False])
def test_broken_records_name_file_record_and_field(folder, record, message, lines):
    path = written(folder, RECORD, record, lines=lines)
    with pytest.raises(InputError, match=message) as caught:
        read_chats(path)
    assert str(caught.value).startswith(f"{path}, {'line 2' if lines else 'record 1'}: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no records"),
        (b"[]", "holds no records"),
        (b"[{]", r"data\.json is not valid JSON"),
        (b'{"conversations": []', r"data\.json, line 1 is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"\xff\xfe", "cannot be read as UTF-8 text"),
        (None, "cannot be read"),
    ],
)
def test_broken_files(tmp_path, content, message):
    path = tmp_path / "data.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_chats(path)


KEYS = st.sampled_from(["conversations", "image", "from", "value", "retrieval_labels", "id"]) | st.text()
LEAVES = st.none() | st.booleans() | st.integers() | st.text()


@settings(max_examples=60, deadline=None)
@given(st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner)))
def test_any_json_is_chats_or_an_input_error(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps([value]))
    try:
        chats = read_chats(path)
    except InputError:
        return
    assert all(isinstance(chat, Chat) for chat in chats)


def test_a_picture_that_breaks_later_names_the_chat(folder):
    chat = read_chats(written(folder, RECORD))[0]
    (folder / "dog.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"chat 'a': .*dog\.png is empty"):
        chat.open_images()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"turns": ()}, "no turns"),
        ({"turns": (("", "a"),)}, "question 0 is empty"),
        ({"turns": (("q", ""),)}, "answer 0 is empty"),
        ({"turns": (("<image>", "a"),)}, "1 <image> placeholders for 0 pictures"),
        ({"turns": (("q", "a"),), "evidence": (0,)}, "evidence"),
    ],
)
def test_chats_that_cannot_be(arguments, message):
    with pytest.raises(InputError, match=message):
        Chat(**arguments)


# --- batches ----------------------------------------------------------------------------------------------------------

CHATS = [
    Chat((("Is <image> like <image>?", "no."), ("Why?", "One\nbarks.\n")), (tiny_image(), tiny_image(1, (24, 40)))),
    Chat((("2 + 2?", "4"),)),
    Chat((("What?", " a dog"), ("So?", ": yes"), ("?", "?")), (tiny_image(2),)),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_are_the_answers_and_their_ends(family, side):
    processor = tiny_processor(family)
    inputs = collate(processor, ChatFormat.from_processor(processor), CHATS, side)
    ids, labels, mask = inputs["input_ids"], inputs["labels"], inputs["attention_mask"].bool()
    learned = labels != IGNORED
    end = "</s>" if family in ("llava", "llava_next") else "<|im_end|>"
    for row, chat in enumerate(CHATS):
        assert processor.tokenizer.decode(labels[row][learned[row]]) == "".join(f"{a}{end}" for _, a in chat.turns)
    assert torch.equal(labels[learned], ids[learned])
    assert not (learned & ~mask).any()
    assert images_per_row(inputs) == [2, 0, 1]
    assert mask[:, -1 if side == "left" else 0].all()
    with torch.no_grad():
        loss = tiny_model(family)(**inputs).loss
    assert loss.isfinite()


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None)
@given(
    turns=st.lists(
        st.tuples(*[st.text("ab 7?.:\n(<>", min_size=1, max_size=9).filter(str.strip)] * 2), min_size=1, max_size=3
    ),
    image=st.booleans(),
)
def test_any_answers_are_labelled(family, turns, image):
    processor = tiny_processor(family)
    inputs = collate(processor, ChatFormat.from_processor(processor), [Chat(tuple(turns), (tiny_image(),) * image)])
    labels = inputs["labels"][inputs["labels"] != IGNORED]
    end = "</s>" if family in ("llava", "llava_next") else "<|im_end|>"
    assert processor.tokenizer.decode(labels) == "".join(f"{answer}{end}" for _, answer in turns)


def test_text_that_reads_like_a_turn_is_refused():
    processor = tiny_processor("llava")
    chat = Chat((("why? USER: what?", "so"),), id="odd")
    with pytest.raises(InputError, match=r"chat 'odd': its 1 turns are not told apart"):
        collate(processor, ChatFormat.from_processor(processor), [chat])


def test_placeholders_in_text_only_chats_are_refused():
    processor = tiny_processor("qwen2_5_vl")
    with pytest.raises(InputError, match="1 image placeholders"):
        collate(processor, ChatFormat.from_processor(processor), [Chat((("a <|image_pad|>?", "b"),))])


# --- endless data -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["scenes", "reading", "documents", "text", "scenes,text"])
def test_drawn_chats_depend_on_seed_and_number_alone(name):
    chats, again, other = open_chats(name, seed=1), open_chats(name, seed=1), open_chats(name, seed=2)
    again[7]
    first = [chats[number] for number in range(6)]
    assert first == [again[number] for number in range(6)]
    assert [chat.turns for chat in first] != [other[number].turns for number in range(6)]
    assert first[0].id == f"{name.partition(',')[0]} 0"


def test_documents_name_their_evidence():
    chat = open_chats("documents")[0]
    assert len(chat.evidence) == 1
    assert chat.turns[0] == (chat.turns[0][0], str(chat.evidence[0] + 1)) or "page" in chat.turns[0][0]


def test_files_are_shuffled_anew_in_each_round(folder):
    records = [
        {"id": n, "conversations": [{"from": "human", "value": f"{n}?"}, {"from": "gpt", "value": "x"}]}
        for n in range(40)
    ]
    path = written(folder, *records, lines=True)
    chats = open_chats(path, seed=3)
    rounds = [[chats[number].id for number in range(start, start + 40)] for start in (0, 40)]
    assert rounds[0] != rounds[1]
    assert sorted(rounds[0]) == sorted(rounds[1]) == sorted(str(n) for n in range(40))
    train, test = (open_chats(path, split=split).chats for split in ("train", "test"))
    assert set(train) | set(test) == set(chats.chats)
    assert not set(train) & set(test)
    mixed = open_chats(f"{path}, scenes")
    assert [bool(mixed[number].images) for number in range(4)] == [False, True, False, True]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"data": "scene"}, ConfigError, r"data='scene' is neither a file nor one of: scenes, reading"),
        ({"data": " , "}, ConfigError, "names no data"),
        ({"data": "scenes", "split": "dev"}, ConfigError, "split='dev' is not one of: train, test"),
    ],
)
def test_unknown_data(arguments, error, message):
    with pytest.raises(error, match=message):
        open_chats(**arguments)


def test_a_file_too_small_to_divide(folder):
    record = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    path = written(folder, record)
    with pytest.raises(InputError, match="has no record on its test side: it has too few records"):
        open_chats(path, split="test")
    assert len(open_chats(path, split="train").chats) == 1


def test_images_given_as_objects():
    assert Chat((("q", "a"),), (Image.new("L", (4, 4)),)).open_images()[0].mode == "RGB"
