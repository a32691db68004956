"""Fine-tuning with an attention policy on, and its result as a plain model."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from tiny import save_tiny, tiny_inputs

from mllm import load, load_techniques, saving
from mllm.errors import ConfigError, LoadError
from mllm.loading import model_config
from mllm.saving import config_fingerprint, fingerprint
from mllm.training import read_log, train_technique


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny("llava", tmp_path_factory.mktemp("model") / "tiny", layers=4)


def train(name, folder, out, **settings):
    training = {"steps": 6, "batch_size": 2, "accumulation": 1, "lr": 5e-3, **settings.pop("training", {})}
    return train_technique(name, str(folder), "scenes", out, training, dtype="float32", device="cpu", **settings)


@pytest.mark.parametrize("name", ["naavit", "mma", "eemllm", "freezevisual"])
def test_lora_learns_and_the_folder_is_a_plain_model(name, folder, tmp_path):
    out = train(name, folder, tmp_path / "run", training={"steps": 12})
    losses = [row["loss"] for row in read_log(out / "log.jsonl")]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert (out / "loss.png").stat().st_size > 1000
    base, _ = load(folder, dtype="float32", device="cpu")
    model, processor = load(out, dtype="float32", device="cpu")
    assert type(model) is type(base)
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, base.get_parameter(n))]
    assert changed
    assert all(".language_model.layers." in n and "_proj" in n for n in changed)
    inputs = tiny_inputs(model, processor, "one")
    with load_techniques(out, model)(model, processor) as run, torch.no_grad():
        model(**inputs)
    assert run.visual_steps == 1


def test_the_control_trains_alike_without_the_technique(folder, tmp_path):
    out = train("naavit", folder, tmp_path / "control", options={"attach": False}, training={"steps": 2})
    assert (out / "adapter_model.safetensors").exists()
    assert not (out / "technique_config.json").exists()


@pytest.mark.parametrize(("name", "options"), [("naavit", {}), ("lorra", {"model_lr": 1e-3})])
def test_libraries_do_not_warn_of_what_nobody_can_change(tmp_path, name, options):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings("error", "Could not find a config file in tiny")
        load(train(name, "tiny", tmp_path / "run", training={"steps": 1}, options=options))


def test_full_fine_tuning_saves_a_whole_model(folder, tmp_path):
    out = train("naavit", folder, tmp_path / "full", options={"method": "full"}, training={"steps": 2, "lr": 1e-3})
    base, _ = load(folder, dtype="float32", device="cpu")
    model, _ = load(out, dtype="float32", device="cpu")
    changed = {n.split(".layers.")[0] for n, p in model.named_parameters() if not torch.equal(p, base.get_parameter(n))}
    assert any("language_model" in name for name in changed)
    assert not any("vision" in name for name in changed)


def test_arguments_reach_the_technique_and_checkpointing_changes_nothing(folder, tmp_path):
    runs = []
    for checkpointing in (False, True):
        runs.append(
            train(
                "naavit",
                folder,
                tmp_path / str(checkpointing),
                arguments={"layers": "1:3"},
                options={"gradient_checkpointing": checkpointing},
                training={"steps": 2},
            )
        )
    entries = json.loads((runs[0] / "technique_config.json").read_text())["techniques"]
    assert entries[0]["layers"] == [1, 2]
    one, two = (load(run, dtype="float32", device="cpu")[0].state_dict() for run in runs)
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


def test_wrong_options_are_named(folder, tmp_path):
    with pytest.raises(ConfigError, match="rank=0"):
        train("naavit", folder, tmp_path / "x", options={"rank": 0})
    with pytest.raises(ConfigError, match=r"Unknown option ranks=4.*method, rank"):
        train("naavit", folder, tmp_path / "x", options={"ranks": 4})


def test_adapters_name_the_model_that_they_were_trained_on(folder, tmp_path):
    first = train("naavit", folder, tmp_path / "first", training={"steps": 1})
    second = train("naavit", first, tmp_path / "second", training={"steps": 1})
    for out, base in ((first, folder), (second, first)):
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(base)
    load(second)  # with the first one's updates beneath


def test_pictures_are_prepared_as_the_adapter_says(folder, tmp_path):
    out = train("naavit", folder, tmp_path / "run", training={"steps": 1})
    _, base = load(folder, dtype="float32", device="cpu")
    processor = load(out, dtype="float32", device="cpu")[1]
    assert processor.image_processor.to_dict() == base.image_processor.to_dict()
    processor.image_processor.size = {"shortest_edge": 28}
    processor.image_processor.save_pretrained(out)
    (out / "processor_config.json").unlink()
    assert load(out, dtype="float32", device="cpu")[1].image_processor.size["shortest_edge"] == 28
    (out / "preprocessor_config.json").unlink()
    assert load(out, dtype="float32", device="cpu")[1].image_processor.to_dict() == base.image_processor.to_dict()


def test_an_adapter_that_comes_along_goes_by_its_name(folder, tmp_path, monkeypatch):
    train("naavit", folder, tmp_path / "models" / "mine" / "part", training={"steps": 1})
    monkeypatch.setattr(saving, "PACKAGED", tmp_path / "models")
    model, _ = load("mine/part", dtype="float32", device="cpu")
    same, _ = load(tmp_path / "models" / "mine" / "part", dtype="float32", device="cpu")
    assert model.name_or_path == "mine/part"
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), same.parameters(), strict=True))
    assert fingerprint(model) == config_fingerprint(model_config("mine/part"))


def test_what_a_model_holds_already_is_not_merged_twice():
    with pytest.raises(LoadError, match="default/lora is merged into the default model already"):
        load("default/lora")


def test_a_broken_adapter_is_refused(folder, tmp_path):
    out = train("naavit", folder, tmp_path / "run", training={"steps": 1})
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(LoadError, match="does not name the model"):
        load(out)
    (out / "adapter_model.safetensors").unlink()
    with pytest.raises(LoadError, match=r"no adapter_model\.safetensors"):
        load(out)
