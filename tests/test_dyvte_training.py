"""DyVTE's training: labels of all exits against runs with each of them, shards, the fit, and thresholds."""

from __future__ import annotations

import json
import time

import pytest
import torch
from contract import close, logits, with_random_weights
from safetensors.torch import load_file
from test_cli import run as run_command
from tiny import FAMILIES, save_tiny, tiny_image, tiny_model, tiny_processor

from mllm import Stack
from mllm.chats import IGNORED, Chat, collate, open_chats
from mllm.cost import ModelSpec
from mllm.errors import ConfigError, InputError, LoadError, UnsupportedModelError
from mllm.roles import ChatFormat
from mllm.token_pruning import DyVTE, dyvte_training
from mllm.token_pruning.dyvte_training import (
    Curves,
    ExitLabels,
    LabelRule,
    collect_labels,
    label_exits,
    oracle_exits,
)
from mllm.training import Options, TrainingConfig, read_log, train

CHATS = [
    Chat((("what is it?", "a dog"),), (tiny_image(0, (32, 32)),), id="one"),
    Chat((("name a colour", "red"),), id="text"),
    Chat((("<image> or <image>?", "the first"), ("why?", "larger")), (tiny_image(1), tiny_image(2)), id="two"),
    Chat((("hello", "hi"), ("<image> and this?", "no")), (tiny_image(3),), id="late"),
]


def last_answer(labels: torch.Tensor) -> torch.Tensor:
    """Columns of the last stretch of labelled tokens."""
    labelled = (labels != IGNORED).nonzero()[:, 0].tolist()
    first = next((n for n in range(len(labelled) - 1, 0, -1) if labelled[n] != labelled[n - 1] + 1), 0)
    return torch.tensor(labelled[first:])


def spec_of(model) -> ModelSpec:
    return ModelSpec.from_config(model.config.get_text_config())


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_labels_are_those_of_running_each_exit(family, attn):
    """The last answer's scores of every exit equal those of ``DyVTE(exit_layer=e)``."""
    model, processor = tiny_model(family, attn), tiny_processor(family)
    labels = label_exits(model, processor, CHATS, first=10)
    assert labels.number.tolist() == [10, 12, 13]  # one has no picture
    assert labels.features.shape == (3, 5, 2, spec_of(model).hidden)
    pictured = [chat for chat in CHATS if chat.images]
    gates = with_random_weights(Stack(DyVTE(gate="light", threshold=1.0)), model).techniques[0]
    module = gates.build(spec_of(model))
    gates.learned.load_into(module, model)
    for number, chat in enumerate(pictured):
        inputs = collate(processor, ChatFormat.from_processor(processor), [chat])
        targets = inputs.pop("labels")[0]
        answer = last_answer(targets)
        targets = targets[answer]
        scores = {}
        for exit_layer in range(6):
            with DyVTE(exit_layer=exit_layer)(model):
                scores[exit_layer] = logits(model, inputs)[0, answer - 1].log_softmax(dim=-1)  # (a, V)
        for exit_layer, found in scores.items():
            ce = torch.nn.functional.nll_loss(found, targets)
            close(labels.ce[number, exit_layer], ce)
            assert labels.right[number, exit_layer] == (found.argmax(-1) == targets).float().mean()
            assert labels.agreement[number, exit_layer] == (found.argmax(-1) == scores[5].argmax(-1)).float().mean()
            close(labels.kl[number, exit_layer], (scores[5].exp() * (scores[5] - found)).sum(-1).mean())
        with gates(model, processor) as run:
            logits(model, inputs)
        for layer, (chance,) in run.outputs["DyVTE"]["probabilities"].items():
            ours = module(labels.features[number, layer], layer).sigmoid()
            assert float(ours) == pytest.approx(chance, abs=1e-5)
        assert int(labels.visual[number]) == run.report().visual_tokens[0]


def test_labels_leave_the_model_alone():
    model = tiny_model("llava", "sdpa")
    before = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    label_exits(model, tiny_processor("llava"), CHATS[:1])
    assert before == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert label_exits(model, tiny_processor("llava"), CHATS[1:2]) is None
    other = tiny_model("llava", "sdpa", fresh=True)
    other.model.language_model.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedModelError, match=r"eager, sdpa, not 'flex_attention'"):
        label_exits(other, tiny_processor("llava"), CHATS[:1])


def made_labels(agreement, ce, kl=None, right=None) -> ExitLabels:
    agreement, ce = torch.tensor(agreement), torch.tensor(ce)
    count, layers = ce.shape
    return ExitLabels(
        features=torch.zeros(count, layers - 1, 2, 4),
        ce=ce,
        right=agreement if right is None else torch.tensor(right),
        agreement=agreement,
        kl=torch.zeros_like(ce) if kl is None else torch.tensor(kl),
        text=torch.full((count,), 8),
        visual=torch.full((count,), 24),
        number=torch.arange(count),
    )


def test_the_rule_and_the_oracle():
    labels = made_labels(
        [[0.5, 1.0, 1.0, 1.0], [1.0, 1.0, 0.98, 1.0], [0.0, 0.5, 0.9, 1.0]],
        [[1.0, 1.02, 1.0, 1.0], [2.1, 2.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]],
        [[0.0, 0.2, 0.0, 0.0]] * 3,
    )
    assert LabelRule()(labels)[:, :3].tolist() == [[False, True, True], [False, True, False], [False] * 3]
    assert LabelRule(ce_ratio=1.01)(labels)[0].tolist() == [False, False, True, True]
    assert LabelRule(agreement=0.4, ce_ratio=9)(labels)[2].tolist() == [False, True, True, True]
    assert LabelRule(max_kl=0.1)(labels)[0, :3].tolist() == [False, False, True]
    assert oracle_exits(labels) == [1, 1, None]
    assert oracle_exits(labels, candidates=[2]) == [2, None, None]
    assert oracle_exits(labels, LabelRule(agreement=0.4, ce_ratio=9)) == [0, 0, 1]


def test_an_oracle_leaves_the_plain_answers():
    """What the labels promise comes true: with these exits the answers are the plain model's."""
    model, processor = tiny_model("llava", "sdpa", fresh=True), tiny_processor("llava")
    for parameter in model.model.multi_modal_projector.parameters():  # pictures that say little
        parameter.data.mul_(0.3)
    chats = [Chat((("what is it?", "a dog"),), (tiny_image(n, (32, 32)),)) for n in range(6)]
    rule = LabelRule(agreement=0.99, ce_ratio=9)
    exits = oracle_exits(label_exits(model, processor, chats), rule)
    assert len(set(exits)) > 1
    inputs = collate(processor, ChatFormat.from_processor(processor), chats)
    labels = inputs.pop("labels")
    learned = (labels != IGNORED)[:, 1:]
    plain = logits(model, inputs)[:, :-1].argmax(dim=-1)[learned]
    with DyVTE(exit_layer=exits)(model) as run:
        found = logits(model, inputs)[:, :-1].argmax(dim=-1)[learned]
        assert run.report().exit_layer == [5 if e is None else e for e in exits]
    assert torch.equal(found, plain)


# --- shards -----------------------------------------------------------------------------------------------------------


def test_shards_are_made_once_and_go_on_after_a_kill(tmp_path, monkeypatch):
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    arguments = (model, processor, CHATS * 2, 8, tmp_path / "labels")
    original, calls = dyvte_training.label_exits, []

    def counted(*args):
        calls.append(args[3])
        if calls == [0, 3]:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(dyvte_training, "label_exits", counted)
    with pytest.raises(KeyboardInterrupt):
        collect_labels(*arguments, {"data": "x"}, shard=3)
    labels = collect_labels(*arguments, {"data": "x"}, shard=3)
    assert calls == [0, 3, 3, 6]
    again = collect_labels(*arguments, {"data": "x"}, shard=3)
    assert calls == [0, 3, 3, 6]
    assert labels.number.tolist() == again.number.tolist() == [0, 2, 3, 4, 6, 7]
    assert torch.equal(labels.features, again.features)
    whole = label_exits(model, processor, CHATS * 2)
    assert torch.equal(labels.ce, whole.ce)
    with pytest.raises(ConfigError, match=r"holds labels with data='x', this run has data='y'"):
        collect_labels(*arguments, {"data": "y"}, shard=3)
    with pytest.raises(ConfigError, match="holds labels with weights="):
        collect_labels(tiny_model("llava", "sdpa", seed=1), *arguments[1:], {"data": "x"}, shard=3)
    (tmp_path / "labels" / "000003-000006.safetensors").write_bytes(b"cut")
    with pytest.raises(LoadError, match=r"000003-000006\.safetensors cannot be read"):
        collect_labels(*arguments, {"data": "x"}, shard=3)


def test_data_without_pictures(tmp_path):
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    with pytest.raises(InputError, match="None of 3 chats has a picture"):
        collect_labels(model, processor, [CHATS[1]] * 3, 3, tmp_path)


# --- thresholds -------------------------------------------------------------------------------------------------------


def test_the_curve_is_what_runs_do():
    """Exits and FLOPs of each threshold equal those of the technique with that threshold on the same prompts."""
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    spec = spec_of(model)
    for limits in ({}, {"min_exit_layer": 1, "max_exit_layer": 4}, {"candidate_layers": [0, 3]}):
        technique = with_random_weights(Stack(DyVTE(gate="light", **limits)), model).techniques[0]
        module = technique.build(spec)
        technique.learned.load_into(module, model)
        labels = label_exits(model, processor, CHATS)
        candidates = technique.candidates(spec)
        with torch.no_grad():
            scores = torch.stack([module(labels.features[:, layer], layer) for layer in candidates], dim=1)
        curves = Curves(technique, spec, labels, scores, LabelRule())
        for threshold in (0.0, 0.3, 0.5, 0.7, 1.0):
            exits = curves.exits(threshold)
            ratios = curves.flops(exits, gates=True)
            for number, chat in enumerate(chat for chat in CHATS if chat.images):
                inputs = collate(processor, ChatFormat.from_processor(processor), [chat])
                length = int(last_answer(inputs.pop("labels")[0])[0])
                prompt = {**inputs, "input_ids": inputs["input_ids"][:, :length]}
                prompt["attention_mask"] = inputs["attention_mask"][:, :length]
                with technique.model_copy(update={"threshold": threshold})(model, processor) as run:
                    logits(model, prompt)
                assert run.report().exit_layer == [int(exits[number])]
                assert float(ratios[number]) == pytest.approx(run.report().flops_ratio, rel=1e-6)


def test_the_cheapest_threshold_that_keeps_enough_is_chosen():
    spec = ModelSpec(4, 32, 64, 2, 2, 16)
    right = [[1.0, 1, 1, 1], [0.0, 1, 1, 1], [0.0, 0, 1, 1], [0.0, 0, 0, 1]]
    labels = made_labels(right, [[1.0] * 4] * 4)
    # the gates know: a high chance where leaving is right, the lower the harder
    scores = torch.tensor([[3.0, 3, 3], [-3, 2.0, 2], [-3, -3, 1.0], [0.5, -3, -3]])
    curves = Curves(DyVTE(gate="light"), spec, labels, scores, LabelRule(ce_ratio=2))
    report = curves.report(0.0, "accuracy")
    assert report["reached"]
    assert report["chosen"]["accuracy"] == 1.0
    assert 0.622 < report["chosen"]["threshold"] < 0.75  # the last one, 0.5, is wrong; 1.0 may go
    assert report["chosen"]["mean_exit_layer"] == (0 + 1 + 2 + 3) / 4
    loose = curves.report(0.25, "accuracy")
    assert loose["chosen"]["flops_ratio"] < report["chosen"]["flops_ratio"]
    assert loose["chosen"]["drop"] == 0.25
    assert [one["accuracy"] for one in report["fixed"]] == [0.25, 0.5, 0.75, 1.0]
    assert report["dense"]["flops_ratio"] == 1.0
    assert report["oracle"]["accuracy"] == 1.0
    assert report["oracle"]["mean_exit_layer"] == 1.5
    assert report["right_to_leave"] == [0.25, 0.5, 0.75, 1.0]
    chance = next(one for one in report["chance"] if one["threshold"] == report["chosen"]["threshold"])
    assert chance["accuracy"] == pytest.approx((0.25 + 0.5 + 0.75 + 1.0) / 4)  # a quarter at each layer
    assert chance["mean_exit_layer"] == report["chosen"]["mean_exit_layer"]
    forced = Curves(DyVTE(gate="light", max_exit_layer=1), spec, labels, scores[:, :1], LabelRule())
    assert not forced.report(0.1, "accuracy")["reached"]


# --- the recipe -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny("llava", tmp_path_factory.mktemp("model"))


def test_train_from_the_command_line(monkeypatch, capsys, folder, tmp_path):
    began = time.monotonic()
    out = tmp_path / "run"
    command = ["train", "dyvte", "--smoke", "--model", folder, "--data", "scenes", "--out", out, "--dtype", "float32"]
    code, _, err = run_command(monkeypatch, capsys, *command)
    assert code == 0, err
    assert time.monotonic() - began < 60
    report = json.loads((out / "exits.json").read_text())
    assert report["samples"] == 4
    assert (out / "exits.png").stat().st_size > 1000
    assert (out / "loss.png").exists()
    technique = DyVTE.from_pretrained(out)
    assert technique.threshold == report["chosen"]["threshold"]
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")  # the weights of the folder's
    chats = open_chats("scenes", 0, "test")
    inputs = collate(processor, ChatFormat.from_processor(processor), [chats[n] for n in range(4)])
    inputs.pop("labels")
    with technique(model, processor) as run:
        logits(model, inputs)
    kept = load_file(out / "labels" / "test" / "000000-000002.safetensors")
    assert kept["number"].tolist() == [0, 1]
    assert len(run.outputs["DyVTE"]["exit_layer"]) == 4
    before = (out / "technique.safetensors").read_bytes()
    code, _, err = run_command(monkeypatch, capsys, *command)  # again: nothing is left to do
    assert code == 0, err
    assert (out / "technique.safetensors").read_bytes() == before


def test_gates_learn(tmp_path):
    """The loss falls, and on what they learned from gates tell where leaving is right."""
    model, processor = tiny_model("llava", "sdpa", fresh=True), tiny_processor("llava")
    own = {"samples": 48, "held_out": 16, "agreement": 0.6, "ce_ratio": 1.2, "measure": "agreement", "target_drop": 0.2}
    made = dyvte_training.recipe(model, processor, Options(DyVTE, {"hidden": 64}, own))
    train(made, open_chats("scenes", 0, "train"), tmp_path, TrainingConfig(steps=150, batch_size=32, lr=3e-3))
    log = read_log(tmp_path / "log.jsonl")
    assert sum(row["loss"] for row in log[-10:]) < 0.6 * sum(row["loss"] for row in log[:10])
    assert log[-1]["told_right"] > 0.9
    assert all(not p.requires_grad for p in model.parameters())
    loaded = DyVTE.from_pretrained(tmp_path)
    assert loaded.hidden == 64
    with loaded(model, processor):
        pass
    # what is learned already is where a second training starts
    again = dyvte_training.recipe(model, processor, Options(DyVTE, {"weights": str(tmp_path)}, own))
    for name, value in loaded.learned.tensors.items():
        assert torch.equal(again.gates.state_dict()[name], value)
    given = dyvte_training.recipe(model, processor, Options(DyVTE, {"threshold": 0.9}, own))
    given.examples(open_chats("scenes", 0, "train"), tmp_path)
    given.save(tmp_path / "labels")
    assert DyVTE.from_pretrained(tmp_path / "labels").threshold == 0.9  # one that was asked for is kept


@pytest.mark.parametrize(
    ("arguments", "own", "message"),
    [
        ({"exit_layer": 3}, {}, "with exit_layer there is nothing to train"),
        ({"candidate_layers": []}, {}, "has no gate to train"),
        ({"candidate_layers": [9]}, {}, "names layer 9"),
        ({}, {"target": 1}, "Unknown option target=1.*target_drop"),
        ({}, {"measure": "bleu"}, "measure='bleu'"),
    ],
)
def test_wrong_settings(arguments, own, message):
    with pytest.raises(ConfigError, match=message):
        dyvte_training.recipe(tiny_model("llava"), tiny_processor("llava"), Options(DyVTE, arguments, own))
