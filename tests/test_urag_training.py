"""Training URaG: losses, both stages, labels, held-out page accuracy."""

from __future__ import annotations

import json
import math

import pytest
import torch
from contract import logits
from hypothesis import given
from hypothesis import strategies as st
from reference import decode, prompts
from test_cli import run as run_command
from tiny import save_tiny, tiny_image, tiny_model, tiny_processor
from urag_reference import page_scores, pages_of, question_tokens

from mllm import load, load_techniques
from mllm.chats import Chat, collate, open_chats
from mllm.drawn import COLORS, page_samples
from mllm.errors import ConfigError, InputError
from mllm.families import find_parts
from mllm.inputs import chat_inputs
from mllm.saving import LearnedWeights
from mllm.token_pruning import URaG
from mllm.token_pruning.urag_training import Joint, Retrieval, recipe, retrieval_loss
from mllm.training import Options, read_log, train_technique

SMALL = {"layer": 2, "hidden": 32, "width": 16, "keep_pages": 2}


def made(family="llava", stage="retrieval", arguments=None, **own):
    model, processor = tiny_model(family, fresh=True), tiny_processor(family)
    own = {"stage": stage, "rank": 4, "dropout": 0.0, **own}
    options = Options(URaG, {**SMALL, **(arguments or {})}, own, data="pages")
    torch.manual_seed(0)
    return recipe(model, processor, options)


def chat(pages=4, evidence=(1,), question="which?", seed=0):
    return Chat(((question, "that"),), tuple(tiny_image(seed * 10 + n) for n in range(pages)), evidence)


# --- losses -----------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=6),
    st.sets(st.integers(0, 5), min_size=1),
    st.integers(1, 9),
)
def test_losses_equal_their_formulas(scores, positives, tokens):
    positives = {page % len(scores) for page in positives}
    right = [scores[page] for page in positives]
    wrong = sorted((s for page, s in enumerate(scores) if page not in positives), reverse=True)[: len(right)]
    given_scores = torch.tensor(scores, dtype=torch.float64)

    def softplus(x):
        return math.log1p(math.exp(x)) if x < 30 else x

    found = {
        k: float(retrieval_loss(given_scores, positives, k, tokens, 0.5))
        for k in ("set_softplus", "per_token", "infonce")
    }
    assert found["set_softplus"] == pytest.approx(softplus(sum(wrong) - sum(right)), abs=1e-6)
    assert found["per_token"] == pytest.approx(softplus((sum(wrong) - sum(right)) / tokens), abs=1e-6)
    share = sum(math.exp(s / tokens / 0.5) for s in right) / sum(math.exp(s / tokens / 0.5) for s in scores)
    assert found["infonce"] == pytest.approx(-math.log(share), abs=1e-6)


@pytest.mark.parametrize("kind", ["set_softplus", "per_token", "infonce"])
@pytest.mark.parametrize("normalise", [False, True])
def test_a_batch_costs_the_mean_of_its_chats(kind, normalise):
    """Scores are the formula's; chats without labels, without evidence and without pictures add nothing."""
    trained = made(arguments={"normalise": normalise}, loss=kind)
    labelled = [chat(4, (1,)), chat(3, (0, 2), "and who?", 1)]
    others = [chat(3, None), chat(3, ()), Chat((("2 + 2?", "4"),))]
    loss, numbers = trained.loss([*labelled, *others], 0)
    technique = URaG(**SMALL).with_learned(LearnedWeights(trained.head.state_dict(), {}, "test"))
    wanted, hits = 0.0, []
    for one in labelled:
        inputs = collate(trained.processor, trained.chat_format, [one])
        inputs.pop("labels")
        (prompt,) = prompts(trained.model, inputs)
        with torch.no_grad():
            states = decode(trained.model, prompt).states[2]
            question = question_tokens(trained.model, prompt)
            scores = torch.tensor(page_scores(technique, states, pages_of(prompt), question))
        wanted += float(retrieval_loss(scores, one.evidence, kind, len(question), trained.own.temperature))
        hits.append(int(scores.argmax()) in one.evidence)
    assert float(loss.detach()) == pytest.approx(wanted / 5, rel=1e-4)
    assert numbers["top1"] == sum(hits) / 2


def test_unanswerable_questions_are_ignored_unless_asked_for_and_labels_stay():
    batch = [chat(3, ()), chat(3, None)]
    loss, numbers = made().loss(batch, 0)
    loss.backward()
    assert float(loss.detach()) == 0
    assert numbers == {}
    loss, _ = made(pseudo_positive=True).loss(batch, 0)
    assert float(loss.detach()) > 0
    assert [one.evidence for one in batch] == [(), None]


# --- stages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_retrieval_runs_the_first_layers_and_trains_the_head(family):
    trained = made(family)
    assert isinstance(trained, Retrieval)
    layers, ran = find_parts(trained.model).layers, set()
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, number=number: ran.add(number))
    loss, _ = trained.loss([chat(4), chat(2, (0,), seed=1)], 0)
    loss.backward()
    assert ran == {0, 1}
    assert all(p.grad is None for p in trained.model.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.head.first.parameters())
    assert {id(p) for p in trained.parameter_groups()[0]["params"]} == {id(p) for p in trained.head.parameters()}
    trained.handle.detach()
    # nothing is left of the forwards that were cut short
    inputs = chat_inputs(trained.processor, ["what?"], [[tiny_image()]])
    assert torch.equal(logits(trained.model, inputs), logits(tiny_model(family), inputs))


def test_joint_training_keeps_all_evidence_and_the_best_others():
    trained = made(stage="joint")
    assert isinstance(trained, Joint)
    batch = [chat(5, (1, 3, 4)), chat(5, (2,), seed=1), chat(2, (0,), seed=2), chat(4, (), seed=3)]
    loss, numbers = trained.loss(batch, 0)
    told = trained.handle.run.outputs["URaG"]
    assert told["kept"][0] == [1, 3, 4]  # all that hold the answer, even if they are more than keep_pages
    scores = told["scores"][1].detach()
    others = [page for page in scores.argsort(descending=True).tolist() if page != 2]
    assert told["kept"][1] == sorted([2, others[0]])
    assert told["kept"][2] == [0, 1]
    assert told["kept"][3] == sorted(told["scores"][3].argsort(descending=True).tolist()[:2])
    assert float(loss.detach()) == pytest.approx(numbers["answers"] + numbers["pages"], rel=1e-5)
    assert numbers["weight"] > 0


def test_both_losses_reach_the_first_layers():
    """Pages and answers both teach the layers below K; the choice itself passes no gradient, so that the answer does
    not teach the head."""
    trained = made(stage="joint")
    batch = [chat(5, (2,))]
    first = [p for n, p in trained.model.named_parameters() if ".layers.0." in n and "lora_B" in n]
    deep = [p for n, p in trained.model.named_parameters() if ".layers.4." in n and "lora_B" in n]
    head = list(trained.head.parameters())
    trained.loss(batch, 0)
    (scores,) = trained.handle.run.outputs["URaG"]["scores"]
    pages = torch.autograd.grad(retrieval_loss(scores, (2,)), [*first, *deep, *head], allow_unused=True)
    assert all(g is not None and g.abs().sum() > 0 for g in pages[: len(first)])
    assert all(g is None for g in pages[len(first) : len(first) + len(deep)])
    assert all(g is not None for g in pages[len(first) + len(deep) :])
    from mllm.training import answer_loss

    inputs = trained.inputs(batch)
    answers, _ = answer_loss(find_parts(trained.model).model, inputs)
    found = torch.autograd.grad(answers, [*first, *deep, *head], allow_unused=True)
    assert all(g is not None and g.abs().sum() > 0 for g in found[: len(first) + len(deep)])
    assert all(g is None for g in found[len(first) + len(deep) :])


def test_the_loss_falls_by_heart():
    trained = made(loss="infonce")
    batch = [chat(4, (1,)), chat(4, (3,), "where?", 1)]
    optimizer = torch.optim.AdamW(trained.parameter_groups(), lr=1e-2)
    losses = []
    for step in range(40):
        loss, numbers = trained.loss(batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert numbers["top1"] == 1.0


def test_both_stages_from_the_command(tmp_path, capsys):
    """The head first, then head and model; each folder loads, and says how well pages are found."""
    folder = save_tiny("llava", tmp_path / "model", layers=4)

    def run(out, stage, arguments, steps):
        own = {"stage": stage, "held_out": 12, "loss": "per_token", "rank": 4}
        training = {"steps": steps, "batch_size": 2, "accumulation": 1, "lr": 5e-3}
        return train_technique("urag", str(folder), None, out, training, arguments, own, dtype="float32", device="cpu")

    first = run(tmp_path / "retrieval", "retrieval", SMALL, 8)
    assert json.loads((first / "training.json").read_text())["data"] == "pages"
    result = json.loads((first / "retrieval.json").read_text())
    assert result["chats"] == 12
    assert 0 <= result["top1"] <= result["top5"] <= 1
    assert 0.1 < result["chance_top1"] < 0.3
    assert f"top-1 {result['top1']:.1%}" in capsys.readouterr().out
    assert len(read_log(first / "log.jsonl")) == 8
    technique = URaG.from_pretrained(first)
    assert (technique.layer, technique.hidden, technique.keep_pages) == (2, 32, 2)

    second = run(tmp_path / "joint", "joint", {"weights": str(first), "keep_pages": 1}, 3)
    assert set(read_log(second / "log.jsonl")[0]) >= {"loss", "answers", "pages"}
    model, processor = load(second, dtype="float32", device="cpu")
    base, _ = load(folder, dtype="float32", device="cpu")
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, base.get_parameter(n))]
    assert changed
    assert all(".language_model.layers." in name for name in changed)
    again = URaG.from_pretrained(second)
    assert again.keep_pages == 1
    assert again.learned.digest != technique.learned.digest
    inputs = chat_inputs(processor, ["which?"], [[tiny_image(n) for n in range(3)]])
    with load_techniques(second, model)(model, processor) as run_:
        logits(model, inputs)
    assert len(run_.outputs["URaG"]["kept"][0]) == 1


def test_stages_and_smoke_on_the_command_line(monkeypatch, capsys, tmp_path):
    folder = save_tiny("llava", tmp_path / "model", layers=3)
    command = ["train", "urag", "--model", folder, "--smoke", "--dtype", "float32", "--out"]
    arguments = ["--argument", "layer=1", "--argument", "hidden=16", "--argument", "width=8"]
    code, out, err = run_command(monkeypatch, capsys, *command, tmp_path / "one", "--stage", "retrieval", *arguments)
    assert code == 0, err
    assert "Held-out pages: top-1" in out
    more = ["--stage", "joint", "--argument", f"weights={tmp_path / 'one'}"]
    code, out, err = run_command(monkeypatch, capsys, *command, tmp_path / "two", *more)
    assert code == 0, err
    assert json.loads((tmp_path / "two" / "training.json").read_text())["options"] == {"stage": "joint"}
    assert (tmp_path / "two" / "adapter_model.safetensors").exists()
    code, _, err = run_command(monkeypatch, capsys, *command, tmp_path / "three", "--stage", "last")
    assert code == 1
    assert "stage='last'" in err


def test_the_measure_is_true(tmp_path):
    """Page accuracy equals a count over the test side by hand; the modes of the modules are as before."""
    trained = made(held_out=8)
    assert trained.split == "train"
    trained.measure(tmp_path)
    assert trained.head.training
    result = json.loads((tmp_path / "retrieval.json").read_text())
    chats, hits, chance = open_chats("pages", 0, "test"), 0, 0.0
    for number in range(8):
        (scores,) = trained.scores([chats[number]])["scores"]
        hits += int(scores.argmax()) in chats[number].evidence
        chance += 1 / len(scores) / 8
    assert result["top1"] == hits / 8
    assert result["chance_top1"] == pytest.approx(chance)


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_data_without_labels_is_refused():
    with pytest.raises(InputError, match=r"None of the first 64 chats.*retrieval_labels.*--data pages"):
        made().examples(open_chats("scenes"), None)


def test_pictures_side_by_side_are_named():
    trained = made()
    trained.processor = _joined(trained.processor)
    with pytest.raises(InputError, match="3 pictures make 1 pages"):
        trained.loss([chat(3)], 0)


def _joined(processor):
    """A processor whose template writes nothing between two pictures."""
    import copy

    joined = copy.deepcopy(processor)
    joined.chat_template = joined.chat_template.replace("'<image>\\n'", "'<image>'").replace("'<image>\n'", "'<image>'")
    return joined


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"stage": "third"}, "stage='third'.*'retrieval' or 'joint'"),
        ({"loss": "mse"}, "loss='mse'"),
        ({"temperature": 0}, "temperature=0"),
        ({"attach": False}, "attach=False"),
        ({"pages": 3}, "Unknown option pages=3"),
    ],
)
def test_wrong_options(own, message):
    with pytest.raises(ConfigError, match=message):
        recipe(None, None, Options(URaG, {}, own))


# --- drawn pages ------------------------------------------------------------------------------------------------------


def test_drawn_pages_hold_their_answer():
    """The colour that is asked for is on the evidence page and on no other."""
    for split in ("train", "test"):
        for sample in page_samples(split, 0, 6):
            (turn,) = sample.turns
            color = COLORS[turn.question.split()[-1].removesuffix("?")]
            # text has greys of its own, but few pixels of one
            large = [{c for count, c in image.getcolors(100_000) if count > 1000} for image in sample.images]
            found = [number for number, colors in enumerate(large) if color in colors]
            assert found == [sample.evidence]
            assert 4 <= len(sample.images) <= 8
    groups = [{sample.group for sample in page_samples(split, 1, 60)} for split in ("train", "test")]
    assert not set.intersection(*groups)
