"""The claims: how scores become rows, and the command on the weights that are committed."""

from __future__ import annotations

import json
import shlex
import statistics
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

pytest.importorskip("lmms_eval", reason="needs lmms_eval: pip install -e '.[all,dev]'")

from mllm.cli import app
from mllm.errors import ConfigError, EvalError, LoadError
from mllm.eval import claims
from mllm.eval.claims import CLAIMS, PARTS, Estimate, Scores, _kept, difference, estimate, mixed, run_claims
from mllm.training import trainable


def scores(values: list[float], task: str = "a", **decisions) -> Scores:
    keys = [(task, number) for number in range(len(values))]
    told = decisions.get("exits")
    return Scores(
        dict(zip(keys, values, strict=True)),
        dict.fromkeys(keys, 1.0),
        {key: {"DyVTE": {"exit_layer": layer}} for key, layer in zip(keys, told, strict=True)} if told else {},
    )


shares = st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=3, max_size=30)


@settings(deadline=None, max_examples=50)
@given(shares, st.randoms(use_true_random=False))
def test_differences_are_those_of_each_question_and_seed(values, rng):
    ones = [scores([rng.choice([0.0, 1.0]) for _ in values]) for _ in range(3)]
    base = scores(values)
    found = difference(ones, [base])
    each = [statistics.mean(a - b for a, b in zip(one.score.values(), values, strict=True)) for one in ones]
    assert found.seeds == pytest.approx(each)
    assert found.value == pytest.approx(statistics.mean(each))
    per_question = [statistics.mean(one.score[key] for one in ones) - base.score[key] for key in base.score]
    added = [*per_question, -1.0, 1.0]  # Bonett and Price (2012)
    middle, half = statistics.mean(added), 1.96 * statistics.pstdev(added) / len(added) ** 0.5
    expected = max(-1.0, middle - half), min(1.0, middle + half)
    assert (found.low, found.high) == pytest.approx(expected, abs=1e-4)
    assert found.low <= found.value <= found.high


def test_intervals_keep_a_width():
    """Eight of eight is not all of them: Wilson's interval begins at 0.68."""
    level = estimate([scores([1.0] * 8).score])
    assert (level.value, level.high) == (1.0, 1.0)
    assert 0.65 < level.low < 0.85
    same = difference([scores([1.0] * 200)], [scores([1.0] * 200)])
    assert same.value == 0
    assert -0.02 < same.low < -0.01 < 0.01 < same.high < 0.02


@pytest.mark.parametrize(
    ("drop", "flops", "verdict"),
    [
        ((0.0, -0.004, 0.004), 0.5, "holds"),
        ((0.0, -0.014, 0.014), 0.5, "holds (point)"),
        ((-0.01, -0.024, 0.004), 0.5, "does not hold (point)"),
        ((-0.05, -0.06, -0.04), 0.5, "does not hold"),
        ((0.0, -0.004, 0.004), 0.999, "saves nothing"),
    ],
)
def test_verdicts_on_what_is_kept(drop, flops, verdict):
    assert _kept(Estimate(*drop), flops) == verdict


def test_one_run_has_no_seeds_and_equal_runs_do_not_differ():
    run = scores([1.0, 0.0, 1.0])
    assert estimate([run.score]).seeds == ()
    assert difference([run], [run]).value == 0


def test_questions_are_told_apart_by_task():
    both = Scores(
        scores([1.0, 0.0]).score | scores([0.0], "b").score, scores([1.0, 0.0]).cost | scores([0.0], "b").cost
    )
    assert both.tasks == ["a", "b"]
    assert list(both.of("b").score) == [("b", 0)]
    assert both.flops == 1.0


def test_chance_is_expected_not_drawn():
    runs = [scores([0.0, 1.0]), scores([1.0, 1.0])]
    assert mixed(runs, [0.25, 0.75]).score == {("a", 0): 0.75, ("a", 1): 1.0}
    assert scores([1.0, 1.0], exits=[2, None]).exits(5) == {("a", 0): 2, ("a", 1): 5}


def test_every_part_names_something_trainable_and_its_command():
    known = trainable()
    for part in PARTS.values():
        assert part.technique.lower() in known
        for seed in part.seeds:
            words = shlex.split(part.command(claims.PARTS_FOLDER, seed))
            assert words[:3] == ["mllm", "train", part.technique.lower()]
            assert words[-1].endswith(f"{part.name}-{seed}")
    result = CliRunner().invoke(app, ["claims", "--out", "runs/x", "--commands"])
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == sum(len(part.seeds) for part in PARTS.values())


def test_unknown_names_are_told(tmp_path):
    with pytest.raises(ConfigError, match="no claim 'magic'"):
        run_claims(tmp_path, names=["magic"])
    with pytest.raises(ConfigError, match="no part 'magic'"):
        claims.train_parts(tmp_path, ["magic"])
    with pytest.raises(LoadError, match=r"gates-0 is missing.*--retrain"):
        run_claims(tmp_path, tmp_path / "nothing", ["dyvte"], limit=1)


def test_two_runs_agree(tmp_path):
    tables = []
    # the second time in a process of its own, as --jobs does
    claims._measure_at_once(claims.Measured(tmp_path / "second", claims.PARTS_FOLDER, limit=2), [CLAIMS["static"]], 2)
    assert len(list((tmp_path / "second" / "cells").glob("*.json"))) == 12
    for folder in ("first", "second"):
        rows = run_claims(tmp_path / folder, names=["static"], limit=2)
        assert [row.claim for row in rows] == ["fixed exit"] * len(rows)
        tables.append(json.loads((tmp_path / folder / "claims.json").read_text()))
    assert tables[0] == tables[1]
    assert len(tables[0]) == 5


def test_documents_that_chose_a_recipe_are_not_counted(tmp_path):
    class Made(claims.Measured):
        """Kept pages are right about the first documents alone, all pages never."""

        def trained(self, part, seed, **arguments):
            return None

        def over(self, model, name, techniques, tasks, limit=None, batch_size=None):
            keys = [(tasks[0], number) for number in range(limit)]
            told = {"URaG": {"scores": [0.0] * 20}}
            right = {key: float(name == "urag" and key[1] < claims.SEEN) for key in keys}
            return Scores(right, dict.fromkeys(keys, 1.0), dict.fromkeys(keys, told))

    rows = claims.urag(Made(tmp_path, claims.PARTS_FOLDER))
    gains = {row.task: row.value for row in rows if row.what.startswith("answers")}
    assert gains["puzzle_pages5"].startswith("+0.0")
    assert gains["puzzle_pages10"].startswith("+0.0")
    assert gains["puzzle_pages20"].startswith("+100.0")  # these chose nothing


def test_too_few_questions_are_told():
    with pytest.raises(EvalError, match="--limit 20"):
        estimate([{}])


def test_every_part_is_committed():
    for part in PARTS.values():
        for seed in part.seeds:
            assert part.folder(claims.PARTS_FOLDER, seed).is_dir(), part.name
    assert set(CLAIMS) == {"dyvte", "naavit", "mma", "lorra", "urag", "static"}


def test_the_table_of_the_docs_is_the_one_that_is_committed():
    """docs/claims.json is what `mllm claims` wrote; docs/claims.md shows its table."""
    docs = Path(__file__).parent.parent / "docs"
    rows = [claims.Row(**row) for row in json.loads((docs / "claims.json").read_text(encoding="utf-8"))]
    assert {row.claim for row in rows} == {"DyVTE", "NAAViT", "MMA", "LoRRA", "URaG", "fixed exit"}
    text = (docs / "claims.md").read_text(encoding="utf-8")
    assert text.split("<!-- claims -->\n")[1].split("<!-- end of claims -->")[0].strip() == claims.table(rows).strip()
