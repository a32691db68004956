"""What the model tiny learns from is a function of split, seed and number."""

from __future__ import annotations

import pytest

from mllm.puzzles import PUZZLES


@pytest.mark.parametrize("name", sorted(PUZZLES))
def test_puzzles_are_made_alike_and_differ_between_splits(name):
    made = {}
    for split in ("train", "test"):
        first, again = (list(PUZZLES[name](split, 3, 4)) for _ in range(2))
        assert len(first) == 4
        assert [sample.turns for sample in first] == [sample.turns for sample in again]
        pictures = [[image.tobytes() for image in sample.images] for sample in first]
        assert pictures == [[image.tobytes() for image in sample.images] for sample in again]
        assert all(turn.question and turn.answer for sample in first for turn in sample.turns)
        made[split] = [sample.turns for sample in first]
    assert made["train"] != made["test"]
