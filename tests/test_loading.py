"""Loading: what comes back, and what is refused with a reason."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, save_tiny, tiny_inputs, tiny_model, tiny_processor
from transformers import LlamaConfig

from mllm import load, load_techniques, loading
from mllm.errors import ConfigError, LoadError, UnsupportedModelError
from mllm.saving import config_fingerprint, fingerprint
from mllm.token_pruning import DyVTE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attn", [None, "eager"])
def test_a_folder_loads_as_a_plain_model(family, attn, tmp_path):
    save_tiny(family, tmp_path)
    model, processor = load(tmp_path, attn=attn, dtype="float32", device="cpu")
    original = tiny_model(family, attn or "sdpa")
    assert type(model) is type(original)
    assert not model.training
    assert model.config.get_text_config()._attn_implementation == (attn or "sdpa")
    assert processor.tokenizer.padding_side == "left"
    inputs = tiny_inputs(original, tiny_processor(family), "batch")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, original(**inputs).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_model_is_told_by_stands_in_its_config(family, tmp_path):
    folder = save_tiny(family, tmp_path / "model")
    for weights in folder.glob("*.safetensors"):  # there, and not read
        weights.write_bytes(b"")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    for source in (folder, adapter):
        assert config_fingerprint(loading.model_config(source)) == fingerprint(tiny_model(family))


def test_configs_of_the_models_that_come_along(monkeypatch, tmp_path):
    assert loading.model_config("tiny").get_text_config().num_hidden_layers == 6
    monkeypatch.setenv("MLLM_CACHE", str(tmp_path))  # the default model is not fetched to look at it
    assert loading.model_config("default") is None


@pytest.mark.parametrize(("text", "message"), [("{", "cannot be read"), ("{}", "does not name the model")])
def test_an_adapter_that_names_no_model(tmp_path, text, message):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(LoadError, match=message):
        loading.model_config(tmp_path)


def test_unknown_families_are_named(tmp_path):
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    LlamaConfig(**sizes, num_attention_heads=2).save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"'llama' model.*llava, llava_next, llava_onevision, qwen2_5_vl"):
        load(tmp_path)


def test_a_folder_without_weights(tmp_path):
    save_tiny("llava", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(LoadError, match=r"has no weights \(\*\.safetensors\)"):
        load(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    save_tiny("llava", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(LoadError, match=r"pickle \(pytorch_model\.bin\).*refused"):
        load(tmp_path)


def test_missing_weights_are_not_made_up(tmp_path):
    save_tiny("llava", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop(next(name for name in weights if name.endswith("layers.0.mlp.up_proj.weight")))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"lacks 1 of the model's weights.*up_proj"):
        load(tmp_path)


def test_truncated_weights(tmp_path):
    save_tiny("llava", tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(LoadError, match="cannot be loaded"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [("./nowhere", "is not a model folder"), ("no-such-org/no-such-model", "no config that transformers can read")],
)
def test_nothing_there(name, message):
    with pytest.raises(LoadError, match=message):
        load(name)


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(LoadError, match=r"has no config\.json"):
        load(tmp_path)
    DyVTE(exit_layer=1).attach(tiny_model("llava", fresh=True)).save_pretrained(tmp_path)
    with pytest.raises(LoadError, match=r"is a technique folder: .*load_techniques\('.*or write `weights: "):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(LoadError, match="no config that transformers can read"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn": "magic"}, r"attn='magic' is not one of: sdpa, eager\. Without techniques also: flash_attention_2"),
        ({"dtype": "float8"}, "dtype='float8' is not one of: auto, float32"),
        ({"device": "toaster"}, "device='toaster'"),
        ({"device": "cuda"}, "device='cuda': no usable GPU here. Use 'auto' or 'cpu'"),
        ({"device": "cuda:1"}, "device='cuda:1': no usable GPU here"),
    ],
)
def test_wrong_options(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=message):
        load(save_tiny("llava", tmp_path), **options)


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert loading.pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ConfigError, match="device='cuda:2': the last GPU here is 'cuda:1'"):
        loading.pick_device("cuda:2")


def test_auto_is_float32_on_a_cpu_without_bfloat16(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(loading, "cpu_has_bfloat16", lambda: False)
    assert loading.pick_dtype("auto", cpu) == torch.float32
    monkeypatch.setattr(loading, "cpu_has_bfloat16", lambda: True)
    assert loading.pick_dtype("auto", cpu) == torch.bfloat16


def test_technique_folders_that_cannot_be_used(tmp_path):
    model = tiny_model("llava")
    with pytest.raises(LoadError, match="no such file"):
        load_techniques(tmp_path, model)
    (tmp_path / "technique.bin").write_bytes(b"x")
    with pytest.raises(LoadError, match=r"technique\.bin, a pickle, which is refused"):
        load_techniques(tmp_path, model)
    (tmp_path / "technique_config.json").write_text("{")
    with pytest.raises(LoadError, match="cannot be read"):
        load_techniques(tmp_path, model)
    base = {"base_model": {}, "techniques": [{"technique": "Nonsense"}]}
    (tmp_path / "technique_config.json").write_text(json.dumps(base))
    with pytest.raises(ConfigError, match="Unknown technique 'Nonsense'"):
        load_techniques(tmp_path, model)
