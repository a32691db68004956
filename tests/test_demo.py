"""The demo without a browser: uploads, settings, answers, what happened inside, sessions, evaluation."""

from __future__ import annotations

import json
import struct
import threading
import time
import zipfile
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny import tiny_image, tiny_model, tiny_processor

pytest.importorskip("gradio", reason="needs gradio: pip install -e '.[all,dev]'")

from mllm import Stack
from mllm.adapters import LoRRA
from mllm.config import load_config
from mllm.cost import ModelSpec
from mllm.demo import words
from mllm.demo.answers import Answer, Backend, Turnstile
from mllm.demo.app import FIRST, Demo, messages, notice, plain
from mllm.demo.charts import Point, line_per_layer, pareto, tokens_per_layer
from mllm.demo.evaluation import Evaluator, add_points
from mllm.demo.examples import write_examples
from mllm.demo.limits import Limits
from mllm.demo.pictures import page_gallery, router_weights, tokens_over_pictures, told_per_layer
from mllm.demo.sessions import Chat, Sessions
from mllm.demo.settings import Panel, arguments, label, to_yaml
from mllm.demo.uploads import Picture, read_upload, tidy_uploads
from mllm.errors import ConfigError, ConflictError, InputError
from mllm.inputs import chat_inputs
from mllm.saving import packaged_parts
from mllm.technique import load_all
from mllm.token_pruning import DyVTE, FreezeVisual, NAAViT, URaG

LIMITS = Limits(pages=3, pixels=1_000_000, file_bytes=2_000_000, pictures=4, turns=3, new_tokens=16)
SPEC = ModelSpec(6, 48, 96, 4, 2, 16)


def picture(seed: int = 0, size: tuple[int, int] = (40, 24)) -> Picture:
    return Picture(tiny_image(seed, size), f"{seed}.png")


@pytest.fixture(scope="module")
def backend() -> Backend:
    return Backend(tiny_model("llava", fresh=True), tiny_processor("llava"), "tiny", LIMITS)


def generate(backend: Backend, stack: Stack, question: str, images: list[Image.Image], tokens: int = 6) -> str:
    """The answer as the library gives it."""
    inputs = chat_inputs(backend.processor, [question], [images])
    with stack(backend.model, backend.processor), torch.inference_mode():
        output = backend.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return backend.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


# --- uploads ----------------------------------------------------------------------------------------------------------


def header_only_png(path, side: int) -> None:
    """A PNG that claims ``side`` x ``side`` pixels and holds none: decoding it would take 3 side^2 bytes."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(bytes(100)), b"IEND"]
    packed = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))


def write_pdf(path, pages: int, size: tuple[int, int] = (60, 40)) -> None:
    first, *rest = [tiny_image(number, size) for number in range(pages)]
    first.save(path, save_all=True, append_images=rest)


def bad_files(folder) -> dict[str, str]:
    """Name of each file that must be refused -> part of the message."""
    header_only_png(folder / "bomb.png", 50_000)
    header_only_png(folder / "wide.png", 3_000)
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no picture at all")
    tiny_image().save(folder / "whole.png")
    tiny_image(0, (640, 480)).save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:-2000])
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:-60])
    with zipfile.ZipFile(folder / "archive.png", "w") as archive:
        archive.writestr("zeros", bytes(1_000_000))
    (folder / "drawing.png").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    (folder / "xml.png").write_text('<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>')
    (folder / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (folder / "large.png").write_bytes(bytes(2_000_001))
    (folder / "broken.pdf").write_bytes(b"%PDF-1.7\nnothing follows")
    write_pdf(folder / "long.pdf", 4)
    write_pdf(folder / "book.pdf", 200)
    return {
        "bomb.png": "far too many pixels; at most 1 million",
        "wide.png": "3,000 x 3,000 pixels; at most 1 million",
        "empty.png": "is empty",
        "text.png": "is not a picture",
        "cut.png": "damaged or cut short",
        "cut.jpg": "damaged or cut short",
        "archive.png": "ZIP archive",
        "drawing.png": "SVG drawing",
        "xml.png": "an SVG drawing or another XML file",
        "script.png": "is not a picture",
        "large.png": "at most 2 MB",
        "broken.pdf": "is damaged or no PDF",
        "long.pdf": "has 4 pages; at most 3",
        "book.pdf": "has 200 pages; at most 3",
        "gone.png": "Upload it again",
    }


def test_bad_files_are_refused_with_a_plain_message(tmp_path):
    for name, message in bad_files(tmp_path).items():
        with pytest.raises(InputError, match=message) as caught:
            read_upload(tmp_path / name, LIMITS)
        assert name in str(caught.value)
        assert str(tmp_path) not in str(caught.value)


def test_pictures_and_pages_are_read(tmp_path):
    tiny_image(0, (300, 100)).save(tmp_path / "a.png")
    (read,) = read_upload(tmp_path / "a.png", Limits(side=150))
    assert read.image.size == (150, 50)
    frames = [Image.new("RGB", (30, 20), color) for color in ("red", "green", "blue")]
    frames[0].save(tmp_path / "c.gif", save_all=True, append_images=frames[1:])
    (first,) = read_upload(tmp_path / "c.gif", LIMITS)
    assert first.image.getpixel((0, 0)) == (255, 0, 0)  # of an animation, the first frame
    write_pdf(tmp_path / "b.pdf", 3)
    pages = read_upload(tmp_path / "b.pdf", LIMITS)
    assert [(page.name, page.page) for page in pages] == [("b.pdf", 1), ("b.pdf", 2), ("b.pdf", 3)]
    seen = np.asarray(pages[1].image.resize((60, 40), Image.Resampling.BOX), int)
    distances = [np.abs(seen - tiny_image(number, (60, 40))).mean() for number in range(3)]
    assert distances[1] < 0.4 * min(distances[0], distances[2])  # PDFs hold JPEGs, which blur the small squares


def test_large_pdf_pages_are_bounded(tmp_path):
    tiny_image(0, (40, 24)).save(tmp_path / "poster.pdf", resolution=0.2)  # 14,400 points wide
    (page,) = read_upload(tmp_path / "poster.pdf", Limits(side=200))
    assert max(page.image.size) <= 200


def test_a_pdf_that_takes_too_much_ends_its_own_process_only(tmp_path):
    write_pdf(tmp_path / "a.pdf", 1)
    with pytest.raises(InputError, match=r"cannot be drawn|too much"):
        read_upload(tmp_path / "a.pdf", Limits(pdf_memory=30_000_000))
    with pytest.raises(InputError, match="longer than"):
        read_upload(tmp_path / "a.pdf", Limits(pdf_seconds=0.001))


def test_old_uploads_go_and_their_folder_is_bounded(tmp_path):
    limits = Limits(upload_seconds=100, upload_bytes=2500, idle_seconds=1000)
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "a.png").write_bytes(bytes(1000))
        time.sleep(0.02)  # so that one is the oldest
    (tmp_path / "half").write_bytes(b"")  # an upload that is coming in
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "techniques.yaml").write_text("techniques: []")
    tidy_uploads(tmp_path, limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "c", "half"]
    tidy_uploads(tmp_path, limits, time.time() + 200)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]  # what the page offers to save stays with the tab
    tidy_uploads(tmp_path, limits, time.time() + 2000)
    assert list(tmp_path.iterdir()) == []
    tidy_uploads(tmp_path / "gone", limits)


def test_examples_can_be_read(tmp_path):
    for _, example in write_examples(tmp_path):
        assert example["text"].endswith(("?", "."))
        assert all(read_upload(file, Limits()) for file in example["files"])


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def panel() -> Panel:
    return Panel()


def test_every_argument_of_every_technique_has_a_control(panel):
    assert {cls.name for cls, _ in panel.techniques} == set(load_all())
    for cls, args in panel.techniques:
        assert [argument.name for argument in args] == list(cls.model_fields)
        for argument in args:
            assert argument.read(argument.show(argument.default)) == argument.default, (cls.name, argument.name)
            assert argument.help, (cls.name, argument.name)


def test_kinds_come_from_the_schema():
    kinds = {argument.name: argument.kind for argument in arguments(URaG)}
    assert kinds["policy"] == "choice"
    assert kinds["keep_pages"] == "whole"
    assert kinds["normalise"] == "switch"
    assert kinds["layer"] == kinds["threshold"] == "text"
    assert kinds["weights"] == "folder"


@pytest.mark.parametrize(
    "entries",
    [
        [],
        [{"technique": "DyVTE", "exit_layer": 2}],
        [{"technique": "DyVTE", "exit_layer": 0.5}, {"technique": "NAAViT", "layers": "0:2"}],
        [{"technique": "FreezeVisual", "layers": [0, 3]}],
        [{"technique": "URaG", "layer": 2, "keep_pages": 1, "always_keep": [-1], "normalise": True}],
    ],
)
def test_settings_go_through_controls_and_yaml_unchanged(panel, tmp_path, entries):
    read = panel.entries(panel.values(entries))
    assert sorted(read, key=str) == sorted(entries, key=str)
    (tmp_path / "mine.yaml").write_text(to_yaml(read, "mine"))
    assert panel.stack(read, SPEC) == load_config(tmp_path / "mine.yaml").stack  # as `mllm eval` reads it
    name, again = panel.read_yaml(to_yaml(read, "mine"))
    assert (name, again) == ("mine", read)


def test_what_is_switched_off_in_a_file_keeps_its_arguments(panel):
    _, entries = panel.read_yaml("techniques: [{technique: DyVTE, exit_layer: 3, enabled: false}]")
    values = panel.values(entries)
    assert panel.entries(values) == []
    shown = dict(zip([argument.name for argument in panel.techniques[0][1]], values[1:], strict=False))
    assert shown["exit_layer"] == "3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("techniques: 3", "must be a list"),
        ("[", "is not valid YAML"),
        ("techniques: [{technique: Magic}]", "Unknown technique 'Magic'"),
        ("techniques: [{technique: DyVTE, exit_layer: -1}]", "exit_layer"),
        ("techniques: [{technique: NAAViT}, {technique: NAAViT}]", "NAAViT more than once"),
        ("a: &a [1]\ntechniques: [*a]", "aliases"),
        ("techniques: [{technique: NAAViT, layers: '0:99999999999'}]", "out of any range"),
        ("techniques: [{technique: DyVTE, weights: /etc}]", "not among those that this server offers"),
        ("x" * 70_000, "larger than"),
    ],
)
def test_bad_configs_are_refused(panel, text, message):
    with pytest.raises(ConfigError, match=message):
        panel.read_yaml(text)


def test_a_conflict_is_told_as_its_reason(panel):
    with pytest.raises(ConflictError, match="both decide"):
        panel.stack([{"technique": "NAAViT"}, {"technique": "FreezeVisual"}], SPEC)
    with pytest.raises(ConflictError, match=r"^LoRRA\(\) and DyVTE\(exit_layer=2\) cannot run together"):
        panel.stack([{"technique": "LoRRA"}, {"technique": "DyVTE", "exit_layer": 2}], SPEC)
    with pytest.raises(ConfigError, match="parameters; at most"):
        panel.stack([{"technique": "LoRRA", "rank": 10_000_000}], SPEC)


def test_trained_folders_are_offered_by_technique(tmp_path, backend):
    handle = URaG(layer=2, keep_pages=1).attach(backend.model, backend.processor)
    handle.save_pretrained(tmp_path / "pages")
    handle.detach()
    panel = Panel([tmp_path / "pages"])
    entry = {"technique": "URaG", "weights": str(tmp_path / "pages")}
    assert panel.stack([entry], backend.spec).techniques[0].keep_pages == 1
    assert panel.entries(panel.values([entry])) == [entry]
    assert panel.untrained(panel.stack([entry], backend.spec), backend.spec) == []
    assert panel.untrained(Stack(URaG(layer=2)), backend.spec) == ["URaG"]
    off, on = Panel([tmp_path / "pages", *packaged_parts("default")]), {"technique": "URaG", "layer": 2}
    chosen = dict(zip(_names(off), off.values([]), strict=True))
    assert chosen["URaG.weights"] == str(tmp_path / "pages")  # ready for who switches it on
    assert chosen["DyVTE.weights"] == "default/gates"
    assert off.entries(off.values([on])) == [on]  # a config that names none has none
    with pytest.raises(ConfigError, match="holds no trained technique"):
        Panel([tmp_path])


def _names(panel: Panel) -> list[str]:
    """What each control sets."""
    return [
        name for cls, args in panel.techniques for name in (cls.name, *(f"{cls.name}.{found.name}" for found in args))
    ]


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stack", [Stack(), Stack(DyVTE(exit_layer=2)), Stack(FreezeVisual())], ids=repr)
def test_answers_are_those_of_the_library(backend, stack):
    expected = generate(backend, stack, "what is it?", [tiny_image()])
    steps = [
        (answer.state, answer.text)
        for answer in backend.answer([("what is it?", [picture()], None)], stack, 6, threading.Event())
    ]
    assert steps[-1] == ("done", expected)
    assert all(expected.startswith(text) for _, text in steps)
    assert len({text for _, text in steps}) >= 2  # it is written bit by bit, as fast as the page takes it


def test_an_answer_tells_its_cost(backend):
    plain_answer = backend.complete([("what is it?", [picture()], None)], Stack(), 4, threading.Event())
    answer = backend.complete([("what is it?", [picture()], None)], Stack(DyVTE(exit_layer=2)), 4, threading.Event())
    assert answer.new_tokens == 4
    assert answer.first_s > 0
    assert answer.tokens_per_s > 0
    assert plain_answer.flops == plain_answer.dense_flops == answer.dense_flops > answer.flops
    assert answer.dense_kv_bytes > answer.kv_bytes > 0
    json.dumps(answer.numbers())
    told = words.saving(plain_answer, answer)
    assert "less arithmetic" in told
    assert "less memory" in told
    assert "to the first token" in words.costs(answer)


def test_nothing_stays_on_the_model(backend):
    before = sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in backend.model.modules())
    stop = threading.Event()
    for answer in backend.answer([("what?", [picture()], None)], Stack(NAAViT()), 16, stop):
        if answer.text:
            stop.set()
    assert answer.state == "stopped"
    assert answer.new_tokens < 16
    failed = backend.complete([("what?", [], None)], Stack(DyVTE(exit_layer=[1, 2])), 4, threading.Event())
    assert failed.state in ("done", "failed")
    after = sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in backend.model.modules())
    assert after == before
    assert backend.model.model.language_model.config._attn_implementation == "sdpa"


def test_errors_of_one_answer_do_not_reach_the_next(backend, monkeypatch):
    turns = [("what is it?", [picture()], None)]
    monkeypatch.setattr(backend.model, "generate", lambda **_: 1 / 0)
    failed = backend.complete(turns, Stack(), 4, threading.Event())
    assert failed.state == "failed"
    assert failed.error == "Something went wrong in the server (ZeroDivisionError). Its log says more."
    monkeypatch.undo()
    assert backend.complete(turns, Stack(), 4, threading.Event()).state == "done"


def test_answers_at_the_same_time_do_not_see_each_others_techniques(backend):
    stacks = [Stack(), Stack(DyVTE(exit_layer=1)), Stack(FreezeVisual()), Stack(NAAViT(layers="0:3"))] * 3
    expected = [generate(backend, stack, "what is it?", [tiny_image(n)]) for n, stack in enumerate(stacks)]
    found: dict[int, str] = {}

    def ask(n: int) -> None:
        found[n] = backend.complete([("what is it?", [picture(n)], None)], stacks[n], 6, threading.Event()).text

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(stacks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(len(stacks))] == expected


def test_a_chat_goes_on_with_its_own_answers(backend):
    turns = [("what is it?", [picture()], "a cat"), ("why?", [], None)]
    prompt = backend.processor.decode(backend.prompt(turns)["input_ids"][0])
    assert prompt.index("what is it?") < prompt.index("a cat") < prompt.index("why?")
    assert backend.complete(turns, Stack(DyVTE(exit_layer=2)), 4, threading.Event()).state == "done"


def test_questions_are_checked(backend):
    assert backend.check_question("  what? ") == "what?"
    for question, message in [
        (" ", "Write a question"),
        ("x" * 3000, "3,000 characters"),
        ("what is <image>?", "reads as a mark"),
    ]:
        with pytest.raises(InputError, match=message):
            backend.check_question(question)


def test_a_chat_longer_than_the_model_reads_is_refused(backend, monkeypatch):
    monkeypatch.setattr(backend.parts.text_config, "max_position_embeddings", 40)
    answer = backend.complete([("what is it, in many words?", [picture()], None)], Stack(), 8, threading.Event())
    assert answer.state == "failed"
    assert "the model reads 40" in answer.error


def test_the_turnstile_keeps_the_order():
    turnstile, order, inside, all_there = Turnstile(), [], threading.Event(), threading.Event()

    def enter(number: int) -> None:
        with turnstile():
            order.append(number)

    def hold() -> None:
        with turnstile():
            inside.set()
            all_there.wait(60)

    threads = [threading.Thread(target=hold)]
    threads[0].start()
    inside.wait()
    for number in range(5):
        threads.append(threading.Thread(target=enter, args=(number,)))
        threads[-1].start()
        while len(turnstile._waiting) < number + 2:
            time.sleep(0.001)
    all_there.set()
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3, 4]


# --- inside -----------------------------------------------------------------------------------------------------------


def ask_inside(backend: Backend, stack: Stack, pictures: list[Picture]):
    answer = backend.complete([("which one?", pictures, None)], stack, 3, threading.Event())
    assert answer.state == "done", answer.error
    return answer.inside


def test_the_layers_are_seen_as_they_were(backend):
    inside = ask_inside(backend, Stack(DyVTE(exit_layer=2)), [picture()])
    assert inside.counts == inside.report.visual_per_layer
    assert inside.exit_layer == 2
    assert ask_inside(backend, Stack(), [picture()]).exit_layer is None
    chart = tokens_per_layer(inside)
    assert "exit after layer 2" in chart
    total = inside.counts[0]
    assert f"{total} in layers 0 to 2, 0 in layers 3 to 5" in chart


def test_tokens_that_left_are_dark_and_passive_ones_tinted(backend):
    stack = Stack(NAAViT(layers="0:2"), DyVTE(exit_layer=3))
    inside = ask_inside(backend, stack, [Picture(Image.new("RGB", (64, 64), (200, 200, 200)), "grey.png")])

    def colour(layer: int) -> np.ndarray:
        ((image, _, _),) = tokens_over_pictures(inside, layer)
        return np.median(np.asarray(image, int).reshape(-1, 3), axis=0)

    tinted, whole, dark = colour(0), colour(3), colour(4)
    assert tuple(whole) == (200, 200, 200)
    assert tinted[0] > tinted[2] + 20
    assert dark.max() < 120
    assert "keys and values only, then the FFN" in tokens_per_layer(inside)


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision", "qwen2_5_vl"])
def test_the_grid_of_every_family(family):
    backend = Backend(tiny_model(family, fresh=True), tiny_processor(family), family, LIMITS)
    wide = Picture(tiny_image(0, (64, 32)), "wide.png")
    inside = ask_inside(backend, Stack(DyVTE(exit_layer=1)), [wide])
    (grid,), (block,) = inside.grids, inside.blocks
    last = grid.first + (grid.height - 1) * grid.step + grid.width - 1
    assert last < len(block)
    assert grid.width >= grid.height
    assert len(tokens_over_pictures(inside, 2)) == 1


def test_pages_with_scores_and_kept_ones_framed(backend):
    pages = [Picture(tiny_image(n), "a.pdf", n + 1) for n in range(3)]
    inside = ask_inside(backend, Stack(URaG(layer=2, keep_pages=1)), pages)
    shown = page_gallery(inside)
    assert sorted(kind for _, _, kind in shown) == ["framed", "left-out", "left-out"]
    assert all("score" in caption for _, caption, _ in shown)
    kept = next(n for n, (_, _, kind) in enumerate(shown) if kind == "framed")
    assert inside.outputs["URaG"]["kept"] == [[kept]]
    assert inside.counts[3] == len(inside.blocks[kept])
    assert page_gallery(ask_inside(backend, Stack(), pages)) == []


def test_router_weights(backend):
    model = tiny_model("llava_next", fresh=True)
    inside = ask_inside(
        Backend(model, tiny_processor("llava_next"), "tiny", LIMITS),
        Stack(LoRRA(rank=2, router_length=512)),
        [picture()],
    )
    shown = router_weights(inside, 2)
    assert "Layer 2" in shown
    assert "picture" in shown
    assert shown.count('class="token"') == int((~inside.visual).sum())
    assert router_weights(ask_inside(backend, Stack(), [picture()]), 2) == ""


def test_what_else_a_technique_tells_per_layer_is_drawn(backend):
    inside = ask_inside(backend, Stack(DyVTE(gate="light", threshold=0.99)), [picture()])
    assert "DyVTE: probabilities" in told_per_layer(inside)
    assert told_per_layer(ask_inside(backend, Stack(), [picture()])) == ""


def test_text_in_charts_is_escaped():
    assert "<b>" not in line_per_layer("<b>", {0: 0.5}, 4)
    point = Point("<script>", "task", 0.5, (0.2, 0.8), 0.5, 10, True)
    assert "<script>" not in pareto([point])
    assert plain("<i>*a*\n$b$") == "&#60;i&#62;&#42;a&#42;<br>&#36;b&#36;"
    assert "<b>" not in notice("<b>")


# --- sessions ---------------------------------------------------------------------------------------------------------


def test_sessions_are_bounded_and_forgotten():
    sessions = Sessions(Limits(sessions=3))
    first = sessions.get("a")
    first.chat.add("?", [picture()], LIMITS)
    for name in "bcd":
        sessions.get(name)
    assert len(sessions) == 3
    assert first.chat.turns[0].stop.is_set()  # whatever was written for it ends
    assert sessions.get("d") is sessions.get("d")
    sessions.get("d").used -= 10_000
    sessions.get("e")
    assert len(sessions) == 3
    assert set(sessions._sessions) == {"b", "c", "e"} or len(sessions._sessions) == 3
    sessions.drop("e")
    assert "e" not in sessions._sessions


def test_the_pictures_of_all_chats_are_bounded():
    one = picture(0, (100, 100))
    sessions = Sessions(Limits(memory=100_000))
    for name in "abcd":
        sessions.get(name).chat.add("?", [one], LIMITS)
        sessions.tidy(name)
    assert set(sessions._sessions) == {"b", "c", "d"}  # 30,000 bytes each
    sessions.get("b")
    sessions.get("e").chat.add("?", [one] * 4, LIMITS)
    sessions.tidy("e")
    assert set(sessions._sessions) == {"e"}  # the one that asks stays
    sessions.get("e").used -= 10_000
    sessions.tidy()  # as the server does by itself
    assert len(sessions) == 0


def test_a_chat_is_bounded():
    chat = Chat()
    with pytest.raises(InputError, match="would hold 5 pictures"):
        chat.add("?", [picture(n) for n in range(5)], LIMITS)
    for _ in range(3):
        chat.add("?", [], LIMITS)
    with pytest.raises(InputError, match="which is the most"):
        chat.add("?", [], LIMITS)


# --- the page's functions ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(backend):
    demo = Demo(backend)
    yield demo
    folder = demo.folder
    demo.close()
    assert not folder.exists()


def visitor(name: str) -> SimpleNamespace:
    return SimpleNamespace(session_hash=name)


def ask(demo: Demo, name: str, text: str, files=(), entries=FIRST):
    received = demo.receive({"text": text, "files": list(map(str, files))}, visitor(name))
    updates = list(demo.answer(visitor(name), 6, *demo.panel.values(entries)))
    return received, updates


def test_one_question_two_answers(demo, tmp_path):
    tiny_image().save(tmp_path / "a.png")
    entries = [{"technique": "DyVTE", "exit_layer": 2}]
    received, updates = ask(demo, "one", "what is it?", [tmp_path / "a.png"], entries)
    assert received[demo.box] == {"text": "", "files": []}
    last = updates[-1]
    (asked, full), (_, other) = last[demo.full], last[demo.other]
    assert "data:image/webp" in asked["content"]
    backend = demo.backend
    assert plain(generate(backend, Stack(), "what is it?", [tiny_image()])) in full["content"]
    assert plain(generate(backend, Stack(DyVTE(exit_layer=2)), "what is it?", [tiny_image()])) in other["content"]
    assert "less arithmetic" in last[demo.saving]
    assert "<svg" in last[demo.chart]
    turned = demo.turn_to_layer(5, visitor("one"))
    assert turned[demo.layer_text].startswith(f"**{plain('DyVTE(exit_layer=2)')}** · Layer 5")
    assert "no visual tokens" in turned[demo.layer_text]
    # a second question about the same picture
    _, updates = ask(demo, "one", "why?", entries=entries)
    assert len(updates[-1][demo.full]) == 4
    assert demo.sessions.get("one").chat.turns[0].full.inside is None  # only the last turn is looked into


def test_a_conflict_is_shown_in_the_second_column(demo):
    _, updates = ask(demo, "two", "what?", entries=[{"technique": "NAAViT"}, {"technique": "FreezeVisual"}])
    assert (
        "both&#32;decide" in updates[-1][demo.other][-1]["content"]
        or "both decide" in updates[-1][demo.other][-1]["content"]
    )
    assert demo.sessions.get("two").chat.turns[-1].full.state == "done"
    _, updates = ask(demo, "two", "what?", entries=[])
    assert "would repeat the full model" in updates[-1][demo.other][-1]["content"]


def test_broken_uploads_are_told_and_change_nothing(demo, tmp_path):
    for name, message in bad_files(tmp_path).items():
        received = demo.receive({"text": "what?", "files": [str(tmp_path / name)]}, visitor("three"))
        assert message.split(";")[0] in received[demo.notice]
        assert demo.box not in received  # what was written stays
    assert demo.sessions.get("three").chat.turns == []


def test_retry_clear_and_stop(demo):
    assert "no question" in demo.retry(visitor("four"))[demo.notice]
    ask(demo, "four", "what?")
    old = demo.sessions.get("four").chat
    demo.retry(visitor("four"))
    assert old.turns[-1].full is None
    demo.stop(visitor("four"))
    (_, *_, last) = demo.answer(visitor("four"), 6, *demo.panel.values(FIRST))
    assert "(stopped)" in last[demo.full][-1]["content"]
    demo.clear(visitor("four"))
    assert demo.sessions.get("four").chat.turns == []


def test_an_answer_of_a_cleared_chat_does_not_come_back(demo):
    demo.receive({"text": "what?", "files": []}, visitor("five"))
    updates = demo.answer(visitor("five"), 16, *demo.panel.values(FIRST))
    next(updates)
    next(updates)
    demo.clear(visitor("five"))
    assert list(updates) == []
    assert messages(demo.sessions.get("five").chat, "full") == []


def test_an_answer_that_nobody_waits_for_ends(demo):
    demo.receive({"text": "what?", "files": []}, visitor("away"))
    updates = demo.answer(visitor("away"), 16, *demo.panel.values(FIRST))
    next(updates)
    next(updates)
    turn = demo.sessions.get("away").chat.turns[-1]
    updates.close()  # as Gradio does when the connection is gone
    assert turn.stop.is_set()
    assert turn.ended
    # the next question is not stopped by it, and the chat goes on
    _, updates = ask(demo, "away", "why?")
    assert demo.sessions.get("away").chat.turns[-1].full.state == "done"
    assert turn.full.state == "stopped"


def test_an_answer_that_the_server_refuses_can_be_asked_again(demo):
    demo.receive({"text": "what?", "files": []}, visitor("full"))
    told = demo.refused(visitor("full"))
    assert "Press Retry" in told[demo.notice]
    assert told[demo.retry_button].interactive
    assert not told[demo.stop_button].interactive
    demo.retry(visitor("full"))
    *_, last = demo.answer(visitor("full"), 4, *demo.panel.values(FIRST))
    assert "mllm-costs" in last[demo.other][-1]["content"]


def test_a_closed_tab_is_forgotten(demo):
    ask(demo, "six", "what?")
    assert "six" in demo.sessions._sessions
    demo.leave(visitor("six"))
    assert "six" not in demo.sessions._sessions


def test_settings_are_judged_as_they_change(demo):
    good, text, file, *boxes = demo.check(*demo.panel.values([{"technique": "DyVTE", "exit_layer": 2}]))
    assert "% of the full model" in good
    assert yaml.safe_load(text)["techniques"] == [{"technique": "DyVTE", "exit_layer": 2}]
    assert load_config(file).stack == Stack(DyVTE(exit_layer=2))
    assert [box.visible for box in boxes].count(True) == 1
    bad, *_ = demo.check(*demo.panel.values([{"technique": "DyVTE", "exit_layer": 99}]))
    assert "this model has 6 layers" in bad
    untrained, *_ = demo.check(*demo.panel.values([{"technique": "URaG", "layer": 2}]))
    assert "untrained" in untrained


def test_configs_are_loaded_into_the_controls(demo, tmp_path):
    (tmp_path / "mine.yaml").write_text("name: mine\ntechniques: [{technique: NAAViT, layers: '0:2'}]")
    _, text, _, *rest = demo.load_config(str(tmp_path / "mine.yaml"))
    assert "name: mine" in text
    values = rest[len(demo.argument_boxes) :]
    assert demo.panel.entries(values) == [{"technique": "NAAViT", "layers": "0:2"}]
    (tmp_path / "mine.yaml").write_text("techniques: [{technique: mma}]")  # names are read in any case
    _, _, _, *rest = demo.load_config(str(tmp_path / "mine.yaml"))
    assert demo.panel.entries(rest[len(demo.argument_boxes) :]) == [{"technique": "MMA"}]
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    message, *_ = demo.load_config(str(tmp_path / "bad.yaml"))
    assert "not a text file" in message


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_mllm_eval(backend, tmp_path, monkeypatch):
    pytest.importorskip("lmms_eval", reason="needs lmms_eval: pip install -e '.[all,dev]'")
    from mllm.eval import runner

    monkeypatch.setattr(runner, "load", lambda *_, **__: (backend.model, backend.processor))
    (tmp_path / "exit.yaml").write_text("techniques: [{technique: DyVTE, exit_layer: 2}]")
    (cell,) = runner.run_grid(
        ["tiny"], [tmp_path / "exit.yaml"], ["mllm_docqa"], tmp_path / "out", limit=3, dtype="float32"
    )
    stack = load_config(tmp_path / "exit.yaml").stack
    *_, points = Evaluator(backend).run("mllm_docqa", 3, stack, "exit", threading.Event())
    assert [point.label for point in points] == ["full model", "exit"]
    assert points[1].score == cell["score"]
    assert list(points[1].interval) == pytest.approx(cell["ci95"])
    assert points[1].flops_ratio == pytest.approx(cell["flops"] / cell["dense_flops"])
    assert points[0].flops_ratio == 1.0


def test_the_page_evaluates_in_the_background(demo):
    values = demo.panel.values([{"technique": "DyVTE", "exit_layer": 2}])
    updates = list(demo.evaluate(visitor("seven"), "mllm_vqa", 2, *values))
    assert "<svg" in updates[-1][demo.plot]
    assert updates[-1][demo.plot].count("<tr>") == 3
    assert "4 of 4 answers" in updates[-2][demo.evaluate_notice]
    assert '<progress value="4" max="4"' in updates[-2][demo.evaluate_notice]
    bad = demo.panel.values([{"technique": "DyVTE", "exit_layer": 99}])
    *_, last = demo.evaluate(visitor("seven"), "mllm_vqa", 2, *bad)
    assert "this model has 6 layers" in last[demo.evaluate_notice]


def test_points_are_replaced_bounded_and_the_front_is_marked():
    def point(name: str, score: float, flops: float) -> Point:
        return Point(name, "task", score, (0, 1), flops, 10)

    points = add_points([point("a", 0.5, 1.0)], [point("b", 0.5, 0.6), point("c", 0.4, 0.8)], 20)
    assert {p.label: p.front for p in points} == {"a": False, "b": True, "c": False}
    assert len(add_points(points, [point("b", 0.1, 0.6)], 20)) == 3
    assert len(add_points([point(str(n), 0.5, 0.5) for n in range(9)], [], 4)) == 4
    crowd = pareto(points)
    assert crowd.count("<circle") == 3


def test_words_of_a_saving():
    full = Answer("a", "done", new_tokens=3, first_s=1.0)
    other = Answer(
        "b", "done", settings="X", new_tokens=3, first_s=2.0, flops=3, dense_flops=2, kv_bytes=1, dense_kv_bytes=1
    )
    told = words.saving(full, other)
    assert "50 % more arithmetic" in told
    assert "the same memory" in told
    assert "the first token took 2.0 times as long" in told
    assert told.endswith("The answers differ.")
    assert label([]) == "full model"
