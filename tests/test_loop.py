"""The training loop: what it changes, what a kill costs, several processes, and runs that cannot go on."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import BaseModel
from safetensors.torch import load_file
from tiny import FAMILIES, tiny_image, tiny_model, tiny_processor
from tiny_recipe import Projector, tiny_recipe
from torch import nn

from mllm.chats import Chat, collate, open_chats
from mllm.errors import ConfigError, LoadError, TrainingError
from mllm.roles import ChatFormat
from mllm.token_pruning import DyVTE, NAAViT
from mllm.training import Options, Recipe, TrainingConfig, answer_loss, draw_curve, read_log, train

ROOT = Path(__file__).parent.parent
SCENES = open_chats("scenes")


def config(**values) -> TrainingConfig:
    return TrainingConfig(**{"steps": 4, "batch_size": 1, "lr": 1e-2, "save_seconds": 0, **values})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "projector.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# --- what it does -----------------------------------------------------------------------------------------------------


def test_the_projector_learns_and_nothing_else(tmp_path, capsys):
    made = tiny_recipe()
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    generator = torch.random.get_rng_state()
    # one scene again and again: it must be learned by heart
    out = train(made, dict.fromkeys(range(30), SCENES[0]), tmp_path / "run", config(steps=30, lr=3e-2))
    changed = {name for name, value in made.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "multi_modal_projector" in name}
    assert torch.equal(torch.random.get_rng_state(), generator)
    rows = read_log(out / "log.jsonl")
    assert [row["step"] for row in rows] == list(range(30))
    assert sum(row["loss"] for row in rows[-3:]) < 0.9 * sum(row["loss"] for row in rows[:3])
    assert {"step", "loss", "lr", "norm", "chats"} == set(rows[0])
    with Image.open(out / "loss.png") as picture:
        assert picture.size[0] > 300
    assert len(list((out / "checkpoints").iterdir())) == 2
    assert json.loads((out / "training.json").read_text())["steps"] == 30
    assert capsys.readouterr().out == ""
    assert same(weights(out), made.projector.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("technique", [None, NAAViT(), DyVTE(exit_layer=1)], ids=["plain", "NAAViT", "DyVTE"])
def test_answer_loss_is_the_model_s_own(family, technique):
    model, processor = tiny_model(family), tiny_processor(family)
    chats = [Chat((("What?", "a dog"), ("Why?", "so")), (tiny_image(),)), Chat((("2 + 2?", "4"),))]
    inputs = collate(processor, ChatFormat.from_processor(processor), chats)
    handle = technique.attach(model) if technique else None
    try:
        with torch.no_grad():
            loss, numbers = answer_loss(model, inputs)
            torch.testing.assert_close(loss, model(**inputs).loss)
    finally:
        if handle:
            handle.detach()
    assert numbers["weight"] == (inputs["labels"] != -100).sum()


class Guarded(NAAViT):
    name: ClassVar[str] = "Guarded"

    def check_labels(self, labels, layout):
        assert labels.shape == layout.visual.shape
        raise ConfigError("these labels would leak")


def test_answer_loss_lets_techniques_check_the_labels():
    model, processor = tiny_model("llava"), tiny_processor("llava")
    inputs = collate(processor, ChatFormat.from_processor(processor), [SCENES[0]])
    with Guarded()(model), pytest.raises(ConfigError, match="would leak"):
        answer_loss(model, inputs)
    answer_loss(model, inputs)


def test_accumulation_equals_a_larger_batch(tmp_path):
    """Weighted by answer tokens, whose number differs between micro-batches."""
    results = []
    for name, options in (("large", {"batch_size": 4}), ("small", {"batch_size": 1, "accumulation": 4})):
        results.append(weights(train(tiny_recipe(), SCENES, tmp_path / name, config(**options))))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], atol=2e-5, rtol=1e-3)


def test_parameter_groups_have_their_own_rate(tmp_path):
    made = tiny_recipe()
    made.options.bias_rate = 1e-9
    before = {name: value.clone() for name, value in made.projector.state_dict().items()}
    train(made, SCENES, tmp_path, config(steps=1))
    for name, value in made.projector.state_dict().items():
        assert ((value - before[name]).abs().max() < 1e-8) == name.endswith("bias")


@given(steps=st.integers(1, 200), warmup=st.floats(0, 1), schedule=st.sampled_from(["cosine", "constant"]))
def test_rates(steps, warmup, schedule):
    settings = TrainingConfig(steps=steps, warmup=warmup, schedule=schedule)
    rates = [settings.rate(step) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    rising = math.ceil(warmup * steps)
    assert rates[:rising] == sorted(rates[:rising])
    assert rates[rising:] == sorted(rates[rising:], reverse=True)
    assert max(rates) == 1


def test_bfloat16_models_train_in_mixed_precision(tmp_path):
    made = tiny_recipe()
    made.model.model.language_model.to(torch.bfloat16)
    made.model.model.vision_tower.to(torch.bfloat16)
    made.model.lm_head.to(torch.bfloat16)
    seen = []
    made.projector.linear_1.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    train(made, SCENES, tmp_path, config(steps=2))
    assert set(seen) == {torch.bfloat16}
    assert {value.dtype for value in weights(tmp_path).values()} == {torch.float32}


class LoRA(Recipe):
    """Fine-tuning of the decoder with a technique on, as the docs of the loop describe it."""

    def __init__(self, family):
        from peft import LoraConfig, get_peft_model

        self.processor = tiny_processor(family)
        base = tiny_model(family, layers=2, fresh=True)
        pattern = r".*language_model.*\.[qv]_proj"
        self.model = get_peft_model(base, LoraConfig(r=2, target_modules=pattern, lora_dropout=0.5)).train()
        self.handle = NAAViT().attach(self.model)
        self.format = ChatFormat.from_processor(self.processor)

    def parameter_groups(self):
        return [{"params": [parameter for parameter in self.model.parameters() if parameter.requires_grad]}]

    def loss(self, batch, step):
        return answer_loss(self.model, collate(self.processor, self.format, batch))

    def save(self, folder):
        self.model.save_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_with_a_technique_on(tmp_path, family):
    made = LoRA(family)
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    torch.manual_seed(0)
    train(made, SCENES, tmp_path, config(steps=2))
    changed = {name for name, value in made.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert made.handle.run.flops < made.handle.run.dense_flops
    assert (tmp_path / "adapter_model.safetensors").exists()


class Noisy(Projector):
    """Random numbers in the loss, as dropout has."""

    def loss(self, batch, step):
        loss, numbers = super().loss(batch, step)
        return loss * (1 + torch.rand(())), numbers


def test_random_numbers_are_resumed_too(tmp_path, monkeypatch):
    def noisy():
        made = tiny_recipe()
        made.__class__ = Noisy
        return made

    whole = weights(train(noisy(), SCENES, tmp_path / "whole", config()))
    monkeypatch.setattr(torch.optim.AdamW, "step", failing(torch.optim.AdamW.step, 3))
    with pytest.raises(KeyboardInterrupt):
        train(noisy(), SCENES, tmp_path / "cut", config())
    monkeypatch.undo()
    torch.rand(7)
    assert same(weights(train(noisy(), SCENES, tmp_path / "cut", config())), whole)


class Cached(Projector):
    def examples(self, chats, folder):
        assert folder.is_dir()
        return {number: [chats[number]] for number in range(10)}

    def loss(self, batch, step):
        return super().loss([chat for chats in batch for chat in chats], step)


def test_recipes_may_prepare_their_examples(tmp_path):
    made = tiny_recipe()
    made.__class__ = Cached
    assert same(
        weights(train(made, SCENES, tmp_path / "a", config())),
        weights(train(tiny_recipe(), SCENES, tmp_path / "b", config())),
    )


# --- kills ------------------------------------------------------------------------------------------------------------


def failing(function, call):
    calls = []

    def dies(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    return dies


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    "saves", [{"save_seconds": 0}, {"save_seconds": 3600, "save_steps": 2}, {"save_seconds": 3600}]
)
def test_an_interrupted_run_ends_like_one_that_was_not(tmp_path, saves, accumulation):
    settings = config(steps=5, accumulation=accumulation, **saves)
    whole = train(tiny_recipe(), SCENES, tmp_path / "whole", settings)
    made = tiny_recipe()
    made.loss = failing(made.loss, 4 * accumulation)
    with pytest.raises(KeyboardInterrupt):
        train(made, SCENES, tmp_path / "cut", settings)
    assert not (tmp_path / "cut" / "projector.safetensors").exists()
    cut = train(tiny_recipe(), SCENES, tmp_path / "cut", settings)
    assert same(weights(cut), weights(whole))
    assert (cut / "log.jsonl").read_text() == (whole / "log.jsonl").read_text()


@pytest.mark.parametrize("where", ["save_file", "os.replace", "json.dumps"])
def test_a_kill_while_a_checkpoint_is_written(tmp_path, monkeypatch, where):
    whole = weights(train(tiny_recipe(), SCENES, tmp_path / "whole", config()))
    module, _, name = where.rpartition(".")
    from mllm import training

    owner = getattr(training, module) if module else training
    monkeypatch.setattr(owner, name, failing(getattr(owner, name), 6))
    for _ in range(4):  # until it gets through
        try:
            result = train(tiny_recipe(), SCENES, tmp_path / "cut", config())
            break
        except KeyboardInterrupt:
            continue
    assert same(weights(result), whole)
    assert sorted(path.name for path in (result / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]


def script(*arguments: object, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(ROOT / "tests" / "tiny_recipe.py"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_sigkill(tmp_path):
    whole = train(tiny_recipe(), SCENES, tmp_path / "whole", config())
    killed = script(tmp_path / "cut", "--kill-in-step", 2)
    assert killed.returncode == -9, killed.stderr
    assert len(read_log(tmp_path / "cut" / "log.jsonl")) == 2
    assert same(weights(train(tiny_recipe(), SCENES, tmp_path / "cut", config())), weights(whole))


def test_a_finished_run_is_done(tmp_path):
    first = weights(train(tiny_recipe(), SCENES, tmp_path, config()))
    (tmp_path / "projector.safetensors").unlink()
    made = tiny_recipe()
    made.loss = lambda *_: pytest.fail("it was trained again")
    assert same(weights(train(made, SCENES, tmp_path, config())), first)


# --- several processes ------------------------------------------------------------------------------------------------


def test_two_processes_learn_what_one_learns_from_twice_the_batch(tmp_path):
    one = weights(train(tiny_recipe(), SCENES, tmp_path / "one", config(batch_size=2)))
    two = tmp_path / "two"
    done = script(two, launcher=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"))
    assert done.returncode == 0, done.stderr
    for name, value in weights(two).items():
        torch.testing.assert_close(value, one[name], atol=2e-5, rtol=1e-3)
    logs = [read_log(folder / "log.jsonl") for folder in (two, tmp_path / "one")]
    for row, other in zip(*logs, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert json.loads((two / "training.json").read_text())["processes"] == 2
    with pytest.raises(ConfigError, match=r"holds a run with processes=2, this one has processes=1"):
        train(tiny_recipe(), SCENES, two, config())


# --- what cannot go on ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path, bad):
    made = tiny_recipe()
    loss = made.loss
    made.loss = lambda batch, step: (loss(batch, step)[0] * (bad if step == 2 else 1), {})
    with pytest.raises(TrainingError, match=r"In step 2 the loss is (nan|inf); .*step-00000002 is kept.*lower lr"):
        train(made, SCENES, tmp_path, config())
    assert all(parameter.isfinite().all() for parameter in made.projector.parameters())
    whole = weights(train(tiny_recipe(), SCENES, tmp_path / "whole", config()))
    assert same(weights(train(tiny_recipe(), SCENES, tmp_path, config())), whole)


class _Blind(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.nan


def test_a_gradient_that_is_not_finite_stops(tmp_path):
    made = tiny_recipe()
    loss = made.loss
    made.loss = lambda batch, step: _Blind.apply(loss(batch, step)[0])
    with pytest.raises(TrainingError, match="In step 0 the norm of the gradient is nan; there is no checkpoint yet"):
        train(made, SCENES, tmp_path, config())


@pytest.mark.parametrize(
    ("changes", "settings", "field"),
    [
        ({"lr": 1e-3}, {}, r"lr=0\.01, this one has lr=0\.001"),
        ({"steps": 9}, {}, "steps=4, this one has steps=9"),
        ({"seed": 1}, {}, "seed=0"),
        ({}, {"data": "text"}, "data=None, this one has data='text'"),
    ],
)
def test_another_config_is_refused(tmp_path, changes, settings, field):
    train(tiny_recipe(), SCENES, tmp_path, config())
    with pytest.raises(ConfigError, match=f"holds a run with {field}"):
        train(tiny_recipe(), SCENES, tmp_path, config(**changes), settings)
    train(tiny_recipe(), SCENES, tmp_path, config(save_seconds=1, save_steps=3, keep=5))


def test_broken_checkpoints(tmp_path):
    train(tiny_recipe(), SCENES, tmp_path, config())
    newest = tmp_path / "checkpoints" / "step-00000004"
    other = tiny_recipe()
    groups = other.parameter_groups()
    other.parameter_groups = lambda: groups[:1]
    groups[1]["params"][0].requires_grad_(False)
    groups[1]["params"][1].requires_grad_(False)
    with pytest.raises(LoadError, match="holds other parameters"):
        train(other, SCENES, tmp_path, config())
    (newest / "state.safetensors").write_bytes(b"rotten")
    with pytest.raises(LoadError, match=r"step-00000004 cannot be read.*Delete it"):
        train(tiny_recipe(), SCENES, tmp_path, config())
    (tmp_path / "training.json").write_text("{")
    with pytest.raises(LoadError, match=r"training\.json cannot be read"):
        train(tiny_recipe(), SCENES, tmp_path, config())


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        train(tiny_recipe(), SCENES, tmp_path / "file" / "run", config())


class Bad(Recipe):
    def __init__(self, **parts):
        self.model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        self.parts = parts

    def parameter_groups(self):
        return self.parts.get("groups", lambda model: [{"params": list(model.parameters())}])(self.model)

    def loss(self, batch, step):
        return self.parts["loss"](self.model)

    def save(self, folder):
        pass


def good(model):
    return model["a"].weight.sum()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"groups": lambda model: []}, "Bad has nothing to train"),
        ({"groups": lambda model: [{"params": list(model["a"].parameters())}]}, r"b\.weight requires gradients but"),
        ({"groups": lambda model: [{"params": [model["a"].bias] * 2}]}, "gives a parameter twice"),
        ({"groups": lambda model: [{"params": [model["a"].bias.requires_grad_(False)]}]}, "1 of 1 parameters are froz"),
        ({"groups": lambda model: [{"params": list(model.half().parameters())}]}, r"float16.*bfloat16 or float32"),
        ({"loss": lambda model: model["a"].weight}, r"has the shape \(2, 2\)"),
        ({"loss": lambda model: torch.zeros(())}, "and no gradient"),
        ({"loss": lambda model: (good(model), {"weight": 0})}, r"weight=0\.0; it must be above 0"),
    ],
)
def test_recipes_that_do_not_fit(tmp_path, parts, message):
    with pytest.raises(ConfigError, match=message):
        train(Bad(loss=good, **parts) if "loss" not in parts else Bad(**parts), SCENES, tmp_path, config())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "training: steps=0: .*greater than or equal to 1"),
        ({"lr": 0}, "training: lr=0"),
        ({"warmup": 2}, "training: warmup=2"),
        ({"schedule": "linear"}, "training: schedule='linear'.*'cosine' or 'constant'"),
        ({"epochs": 3}, "training: epochs=3.*Settings of training: steps, batch_size"),
    ],
)
def test_wrong_settings(values, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        TrainingConfig(**values)


class Schema(BaseModel):
    stage: int = 1


def test_options_of_recipes():
    assert Options(own={"stage": "2"}).read(Schema).stage == 2
    with pytest.raises(ConfigError, match=r"Unknown option stages=2\. Options of this recipe: stage\."):
        Options(own={"stages": 2}).read(Schema)
    with pytest.raises(ConfigError, match=r"option: stage='x': .*integer"):
        Options(own={"stage": "x"}).read(Schema)


def test_a_log_that_was_cut_short(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 0, "loss": 2.0}\n{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    assert [row["step"] for row in read_log(log)] == [0, 1]
    draw_curve(log, tmp_path / "loss.png")
    assert read_log(tmp_path / "none.jsonl") == []
