"""The demo's server over the network, as clients meet it: API, separate visitors, limits, and what is left behind."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
from PIL import Image
from tiny import tiny_image, tiny_model, tiny_processor

pytest.importorskip("gradio", reason="needs gradio: pip install -e '.[all,dev]'")

from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from mllm.demo.answers import Backend
from mllm.demo.app import Demo
from mllm.demo.limits import Limits
from mllm.errors import ConfigError

LIMITS = Limits(pages=3, pixels=1_000_000, file_bytes=200_000, pictures=4, new_tokens=16)
EXIT = "techniques: [{technique: DyVTE, exit_layer: 2}]"


@pytest.fixture(scope="module")
def demo():
    demo = Demo(Backend(tiny_model("llava", fresh=True), tiny_processor("llava"), "tiny", LIMITS))
    demo.address = demo.launch()
    yield demo
    folder = demo.folder
    demo.close()
    assert not folder.exists()


@pytest.fixture
def connect(demo):
    clients = []

    def open_client() -> Client:
        clients.append(Client(demo.address, verbose=False))
        return clients[-1]

    yield open_client
    for client in clients:
        client.close()


@pytest.fixture
def picture(tmp_path) -> str:
    tiny_image().save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def test_it_listens_on_this_machine_only(demo):
    assert demo.blocks.server_name == "127.0.0.1"
    assert not demo.blocks.share
    assert demo.blocks.max_file_size == LIMITS.file_bytes


def test_ask_streams_both_answers(connect, picture):
    client = connect()
    job = client.submit("what is it?", [handle_file(picture)], EXIT, 8, api_name="/ask")
    result = job.result()
    assert result["full"]["state"] == result["techniques"]["state"] == "done"
    assert result["full"]["new_tokens"] == 8
    assert result["techniques"]["flops"] < result["full"]["flops"]
    assert "less arithmetic" in result["saving"]
    texts = [step["full"]["text"] for step in job.outputs()]
    assert len(set(texts)) > 2
    again = client.predict("why?", None, EXIT, 4, False, api_name="/ask")  # about the same picture
    assert again["full"]["prompt_tokens"] > result["full"]["prompt_tokens"]


def test_mistakes_come_back_as_messages_and_the_server_goes_on(connect, picture, tmp_path):
    client = connect()
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "secret.png").write_bytes(b"x")
    calls = [
        (("", None), "Write a question"),
        (("what?", [handle_file(str(tmp_path / "text.png"))]), "is not a picture"),
        (("what?", [{"path": str(tmp_path / "secret.png")}]), "Files must be uploaded|not in the cache"),
        (("what?", None, "techniques: [{technique: Magic}]"), "Unknown technique 'Magic'"),
    ]
    for most in (0, 17, 1.5):
        calls.append((("what?", None, EXIT, most), f"max_new_tokens={most}: give a whole number from 1 to 16"))
    for arguments, message in calls:
        with pytest.raises(AppError, match=message):
            client.predict(*arguments, api_name="/ask")
    for limit in (0, LIMITS.evaluation + 1):
        with pytest.raises(AppError, match=rf"limit={limit}: give a whole number from 1 to {LIMITS.evaluation}"):
            client.predict("mllm_vqa", limit, EXIT, api_name="/evaluate")
    (tmp_path / "large.png").write_bytes(bytes(300_000))
    with pytest.raises(Exception, match=r"413|size"):
        client.predict("what?", [handle_file(str(tmp_path / "large.png"))], api_name="/ask")
    answer = client.predict("what?", [handle_file(picture)], EXIT, 4, api_name="/ask")
    assert answer["techniques"]["state"] == "done"
    conflict = "techniques: [{technique: NAAViT}, {technique: FreezeVisual}]"
    assert "both decide" in client.predict(conflict, api_name="/check")["reason"]
    told = client.predict("what?", None, conflict, 4, api_name="/ask")
    assert "both decide" in told["techniques"]["error"]
    assert told["full"]["state"] == "done"


def test_the_other_functions(connect):
    client = connect()
    assert client.predict(EXIT, api_name="/check")["ok"] is True
    names = {entry["name"] for entry in client.predict(api_name="/techniques")}
    assert {"DyVTE", "NAAViT"} <= names
    points = client.predict("mllm_vqa", 2, EXIT, api_name="/evaluate")["points"]
    assert [point["samples"] for point in points] == [2, 2]
    assert points[1]["flops_ratio"] < points[0]["flops_ratio"] == 1.0


def test_the_page_s_own_events_are_not_part_of_the_api(connect):
    names = set(connect().view_api(return_format="dict")["named_endpoints"])
    assert {"/ask", "/check", "/evaluate", "/techniques"} <= names
    assert not names & {"/receive", "/answer", "/leave", "/load_config"}


def test_two_visitors_do_not_see_each_other(connect, tmp_path):
    first, second = connect(), connect()
    found = {}

    def ask(name: str, client: Client, config: str, seed: int) -> None:
        tiny_image(seed).save(tmp_path / f"{seed}.png")
        file = [handle_file(str(tmp_path / f"{seed}.png"))]
        found[name] = [client.predict(f"what is {seed}?", file, config, 6, api_name="/ask") for _ in range(3)]

    threads = [
        threading.Thread(target=ask, args=("first", first, EXIT, 1)),
        threading.Thread(target=ask, args=("second", second, "techniques: [{technique: FreezeVisual}]", 2)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, settings in ((found["first"], "DyVTE(exit_layer=2)"), (found["second"], "FreezeVisual")):
        assert {result["techniques"]["settings"] for result in results} == {settings}
        assert len({result["full"]["text"] for result in results}) == 1
        assert len({result["techniques"]["text"] for result in results}) == 1
    with pytest.raises(AppError, match="Write a question"):
        second.predict("", None, EXIT, 4, False, api_name="/ask")


def test_a_client_that_goes_away_is_forgotten(demo, picture):
    before = len(demo.sessions)
    client = Client(demo.address, verbose=False)
    client.predict("what?", [handle_file(picture)], EXIT, 4, api_name="/ask")
    assert len(demo.sessions) == before + 1
    client.close()
    end = time.monotonic() + 30
    while len(demo.sessions) > before and time.monotonic() < end:
        time.sleep(0.2)
    assert len(demo.sessions) == before


def test_a_cancelled_answer_leaves_the_model_to_others(demo, connect):
    first, second = connect(), connect()
    entered, seen = threading.Event(), {}
    real = demo.backend.model.generate

    def generate(*arguments, stopping_criteria=(), **options):
        if entered.is_set():
            return real(*arguments, stopping_criteria=stopping_criteria, **options)
        entered.set()
        seen["stop"] = stopping_criteria[0].stop  # an answer that ends only when it is told to
        seen["stopped"] = seen["stop"].wait(60)
        return real(*arguments, stopping_criteria=stopping_criteria, **options)

    demo.backend.model.generate = generate
    try:
        job = first.submit("what is it?", None, EXIT, 16, api_name="/ask")
        assert entered.wait(60)
        threading.Thread(target=first.close).start()
        assert second.predict("and this?", None, EXIT, 4, api_name="/ask")["techniques"]["state"] == "done"
        assert seen["stopped"]
    finally:
        del demo.backend.model.generate
        job.cancel()


def test_the_queue_is_bounded(connect, demo, monkeypatch):
    """What does not fit is refused with a message, the others get their answers, and the server goes on."""
    monkeypatch.setattr(demo.blocks._queue, "max_size", 2)
    jobs = [connect().submit("what is it?", None, EXIT, 16, api_name="/ask") for _ in range(8)]
    states, refused = [], []
    for job in jobs:
        try:
            states.append(job.result()["techniques"]["state"])
        except Exception as error:
            refused.append(str(error))
    assert set(states) == {"done"}
    assert refused
    assert all("full" in message.lower() for message in refused)
    monkeypatch.undo()
    assert connect().predict("again?", None, EXIT, 4, api_name="/ask")["full"]["state"] == "done"


def test_uploads_are_removed(demo, connect, picture, monkeypatch):
    connect().predict("what?", [handle_file(picture)], EXIT, 4, api_name="/ask")
    held = list((demo.folder / "files").rglob("*.png"))
    assert held
    monkeypatch.setattr(demo, "limits", replace(LIMITS, upload_seconds=0.0))
    end = time.monotonic() + 60
    while any(path.exists() for path in held) and time.monotonic() < end:
        time.sleep(0.2)
    assert not any(path.exists() for path in held)


def test_a_port_in_use_is_told(demo):
    other = Demo(demo.backend)
    try:
        with pytest.raises(ConfigError, match="cannot listen"):
            other.launch(port=int(demo.address.rstrip("/").rsplit(":", 1)[1]))
    finally:
        other.close()


def test_examples_lie_where_the_page_may_read_them(demo):
    files = list((demo.folder / "examples").iterdir())
    assert {file.suffix for file in files} == {".png", ".pdf"}
    assert all(Image.open(file).size == (224, 224) for file in files if file.suffix == ".png")
