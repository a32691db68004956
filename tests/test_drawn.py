"""Drawn data: reproducible, true, and divided between training and test."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm import drawn
from mllm.drawn import DRAWN, scene_samples, side, text_samples


def test_samples_are_a_function_of_their_seed():
    for source in (scene_samples, text_samples):
        first, again, other = (list(source("train", seed, 20)) for seed in (0, 0, 1))
        assert [s.turns for s in first] == [s.turns for s in again] != [s.turns for s in other]
        assert [[i.tobytes() for i in s.images] for s in first] == [[i.tobytes() for i in s.images] for s in again]


def test_train_and_test_share_no_scene_combination_and_no_fact():
    for source in (scene_samples, text_samples):
        groups = [{s.group for s in source(split, 3, 300)} for split in drawn.SPLITS]
        shared = {g for g in set.intersection(*groups) if len(g.split()) > 3 and "plus" not in g}
        assert not shared


def test_scene_answers_are_true():
    """Read back from the picture: the colours that are in it, and how many shapes."""
    for sample in scene_samples("test", 5, 60):
        colors = {color for _, color in sample.images[0].getcolors(10_000)}
        present = {name for name, color in drawn.COLORS.items() if color in colors}
        for turn in sample.turns:
            if turn.kind == "color":
                assert turn.answer in present
            elif turn.kind == "count":
                assert turn.answer == drawn.NUMBERS[len(present)]
            elif turn.kind == "caption":
                assert all(name in turn.answer for name in present)


@pytest.mark.parametrize("every_page", [False, True])
def test_document_answers_are_true(every_page):
    """Read back from the pages: the colour that covers most of each but for white."""
    shades = {color: name for name, color in drawn.COLORS.items()}
    for sample in drawn.document_samples("train", 4, 20, every_page=every_page):
        colors = []
        for page in sample.images:
            counted = {shades[color]: n for n, color in page.getcolors(100_000) if color in shades}
            colors.append(max(counted, key=counted.get))
        assert len(sample.turns) == 3 * (len(colors) if every_page else 1)
        assert not every_page or len({turn.question for turn in sample.turns}) == len(sample.turns)
        for turn in sample.turns:
            if turn.kind == "page":
                assert f" {colors[int(turn.answer) - 1]} " in turn.question
            elif turn.kind == "page color":
                assert turn.answer == colors[int(turn.question.split()[-1].strip("?")) - 1]
            else:
                assert turn.answer in colors


@given(st.text(min_size=1))
def test_a_group_has_one_side(group):
    assert side(group) == side(group) in drawn.SPLITS


@pytest.mark.parametrize(
    ("name", "digest"),
    [("scenes", "23c2de6240fb00d5"), ("text", "ed2f8fd0be5792cc")],
)
def test_samples_stay_what_they_were(name, digest):
    """Evaluation data and published training runs are told by source, split and seed alone."""
    turns = [sample.turns for split in drawn.SPLITS for sample in DRAWN[name](split, 3, 20)]
    assert hashlib.sha256(repr(turns).encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("name", DRAWN)
def test_no_fonts_are_needed(name, monkeypatch):
    """Where Debian's are missing, Pillow's own is scaled to the same boxes."""
    monkeypatch.setattr(drawn, "debian_fonts", lambda: ())
    drawn.fonts.cache_clear()
    try:
        assert drawn.fonts("train") == drawn.fonts("test") == (drawn.PILLOW_FONT,)
        for sample in DRAWN[name]("train", 0, 4):
            for image in sample.images:
                assert image.size == (drawn.SIZE, drawn.SIZE)
                assert len(image.getcolors(10_000)) > 1
    finally:
        drawn.fonts.cache_clear()


def test_fonts_are_divided_where_there_are_several(monkeypatch):
    monkeypatch.setattr(drawn, "debian_fonts", lambda: tuple(f"/fonts/{k}.ttf" for k in range(40)))
    drawn.fonts.cache_clear()
    try:
        train, test = map(set, map(drawn.fonts, drawn.SPLITS))
        assert train
        assert test
        assert not train & test
    finally:
        drawn.fonts.cache_clear()
