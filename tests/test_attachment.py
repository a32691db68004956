"""What attaching does with learned parts, compiled and quantised models, and folders."""

from __future__ import annotations

import json
from typing import ClassVar

import pytest
import torch
from contract import close, logits
from tiny import tiny_inputs, tiny_model, tiny_processor
from torch import nn

from mllm import Stack, Technique, load_techniques
from mllm.errors import ConfigError, ConflictError, LoadError, UnsupportedModelError
from mllm.saving import CONFIG_NAME, WEIGHTS_NAME, read_learned
from mllm.technique import REGISTRY, TrainedTechnique
from mllm.token_pruning import EEMLLM, DyVTE, NAAViT


class Scaled(TrainedTechnique):
    """Adds a learned multiple of the residual stream in one layer; the smallest trained technique there is."""

    name: ClassVar[str] = "Scaled"
    paper: ClassVar[str] = "https://example.org"
    acts_on_text: ClassVar[bool] = True

    layer: int = 1
    width: int = 1

    def build(self, spec):
        module = nn.Linear(spec.hidden, self.width, bias=False)
        nn.init.zeros_(module.weight)
        return module

    def branch_layers(self, spec):
        return (self.layer,)

    def branch(self, view):
        return view.states * view.module(view.states).sum(dim=-1, keepdim=True)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(REGISTRY, "Scaled", Scaled)


def trained(model, tmp_path, **arguments):
    handle = Scaled(**arguments).attach(model)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    expected = logits(model, tiny_inputs(model, tiny_processor("llava"), "one"))
    handle.save_pretrained(tmp_path)
    handle.detach()
    return expected


# --- learned parts ----------------------------------------------------------------------------------------------------


def test_learned_parts_live_on_the_handle_and_travel_in_a_folder(tmp_path):
    model = tiny_model("llava", "sdpa", fresh=True)
    inputs = tiny_inputs(model, tiny_processor("llava"), "one")
    names = set(model.state_dict())
    plain = logits(model, inputs)
    expected = trained(model, tmp_path / "scaled", layer=2)
    assert not torch.allclose(expected, plain, atol=1e-3)
    assert set(model.state_dict()) == names
    loaded = Scaled.from_pretrained(tmp_path / "scaled")
    assert loaded.layer == 2
    with loaded(model):
        assert torch.equal(logits(model, inputs), expected)
    with load_techniques(tmp_path / "scaled", model)(model):
        assert torch.equal(logits(model, inputs), expected)
    assert torch.equal(logits(model, inputs), plain)
    assert "Scaled" in (tmp_path / "scaled" / "README.md").read_text()
    assert "weights" not in json.loads((tmp_path / "scaled" / CONFIG_NAME).read_text())["techniques"][0]


def test_two_trainings_are_two_identities(tmp_path):
    model = tiny_model("llava", "sdpa")
    trained(model, tmp_path / "one")
    one = Scaled(weights=str(tmp_path / "one"))
    again = Scaled.from_pretrained(tmp_path / "one")
    assert one == again
    assert one.identity() == again.identity()
    assert one.identity() != Scaled().identity()
    assert Stack(one).describe()[0]["weights"] == str(tmp_path / "one")


def test_weights_of_another_model_are_refused(tmp_path):
    trained(tiny_model("llava", "sdpa"), tmp_path / "scaled")
    other = tiny_model("llava_next", "sdpa")
    with pytest.raises(LoadError, match=r"asks for model_type llava.*this model has model_type llava_next"):
        Scaled.from_pretrained(tmp_path / "scaled").attach(other)
    with pytest.raises(LoadError, match=r"weights do not fit.*given \(1, 48\), needed \(2, 48\)"):
        Scaled.from_pretrained(tmp_path / "scaled", width=2).attach(tiny_model("llava", "sdpa"))


def test_broken_folders_are_refused(tmp_path):
    trained(tiny_model("llava", "sdpa"), tmp_path / "scaled")
    with pytest.raises(LoadError, match="holds Scaled, not DyVTE"):
        read_learned(tmp_path / "scaled", "DyVTE")
    (tmp_path / "scaled" / WEIGHTS_NAME).write_bytes(b"broken")
    with pytest.raises(LoadError, match="cannot be read"):
        Scaled.from_pretrained(tmp_path / "scaled")
    (tmp_path / "scaled" / WEIGHTS_NAME).unlink()
    with pytest.raises(LoadError, match="holds no learned weights"):
        Scaled.from_pretrained(tmp_path / "scaled")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "technique.bin").write_bytes(b"x")
    with pytest.raises(LoadError, match="a pickle, which is refused"):
        Scaled.from_pretrained(tmp_path / "pickled")


def test_the_base_is_frozen_while_attached_and_only_then():
    model = tiny_model("llava", "sdpa", fresh=True)
    chosen = model.lm_head.weight
    chosen.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    handle = Scaled().attach(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    inputs = tiny_inputs(model, tiny_processor("llava"), "one")
    model(**inputs).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in handle.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    handle.detach()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    with Stack(Scaled()).attach(model, freeze=False):
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_parameters_are_counted():
    from mllm.cost import ARCHITECTURES

    assert Stack(Scaled(width=3), NAAViT()).parameter_count(ARCHITECTURES["llava-1.5-7b"]) == 3 * 4096


def test_a_folder_is_pushed_to_a_hub(monkeypatch, tmp_path):
    """The real call with the network's end replaced."""
    import huggingface_hub

    sent = {}

    def upload(repo_id, folder_path, **options):
        from pathlib import Path

        sent.update(repo=repo_id, files=sorted(path.name for path in Path(folder_path).iterdir()), options=options)
        return "https://example.org/commit"

    monkeypatch.setattr(huggingface_hub, "create_repo", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    with Scaled().attach(tiny_model("llava", "sdpa")) as _:
        pass
    handle = Scaled().attach(tiny_model("llava", "sdpa"))
    assert handle.push_to_hub("me/scaled", commit_message="first") == "https://example.org/commit"
    handle.detach()
    assert sent["repo"] == "me/scaled"
    assert sent["files"] == sorted(["README.md", CONFIG_NAME, WEIGHTS_NAME])
    assert sent["options"] == {"commit_message": "first"}


# --- models that are not plain ----------------------------------------------------------------------------------------


class Int8Linear(nn.Module):
    """Stands in for an 8-bit linear layer: integer weights with a scale per row, like bitsandbytes keeps them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, states):
        return nn.functional.linear(states, self.weight.to(states.dtype) * self.scale, self.bias)


def quantise(model) -> None:
    for layer in model.model.language_model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, child in list(block.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(block, name, Int8Linear(child))


@pytest.mark.parametrize("stack", [Stack(NAAViT()), Stack(EEMLLM(), DyVTE(exit_layer=3)), Stack(Scaled())], ids=str)
def test_quantised_layers_work(stack):
    """A quantised model under a technique equals its dequantised copy under it."""
    model, plain = (tiny_model("llava", "sdpa", fresh=True) for _ in range(2))
    quantise(model)
    for layer, original in zip(
        model.model.language_model.layers, plain.model.language_model.layers, strict=True
    ):  # what the 8-bit weights stand for
        for block in ("self_attn", "mlp"):
            for name, child in getattr(layer, block).named_children():
                if isinstance(child, Int8Linear):
                    getattr(getattr(original, block), name).weight.data = child.weight.float() * child.scale
    inputs = tiny_inputs(model, tiny_processor("llava"), "batch")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    results = []
    for each in (model, plain):
        handle = stack.attach(each)
        assert all(parameter.is_floating_point() for parameter in handle.parameters())
        results.append(logits(each, inputs))
        handle.detach()
    close(*results)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_compiled_models_are_refused():
    for compile_part in (lambda m: m, lambda m: m.model.language_model, lambda m: m.model.language_model.layers[1]):
        model = tiny_model("llava", "sdpa", fresh=True)
        compile_part(model).compile(backend="eager")
        with pytest.raises(UnsupportedModelError, match="is compiled"):
            DyVTE(exit_layer=2).attach(model)
    model = tiny_model("llava", "sdpa", fresh=True)
    with pytest.raises(UnsupportedModelError, match="is compiled"):
        DyVTE(exit_layer=2).attach(torch.compile(model, backend="eager"))


def test_a_compiled_view_of_an_attached_model_is_exact():
    """Hooks break the graph where rows are chosen; what is computed stays the same."""
    model = tiny_model("llava", "sdpa", fresh=True)
    inputs = tiny_inputs(model, tiny_processor("llava"), "one")
    compiled = torch.compile(model, backend="eager")
    with DyVTE(exit_layer=2)(model) as run:
        expected = logits(model, inputs)
        found = logits(compiled, inputs)
        assert run.visual_steps == 2
    close(found, expected)


# --- seams ------------------------------------------------------------------------------------------------------------


class Unopened(Technique):
    name: ClassVar[str] = "Unopened"
    paper: ClassVar[str] = ""
    needs_roles: ClassVar[bool] = True

    def excludes(self, other):
        return "the test says so." if isinstance(other, NAAViT) else None


def test_exclusions_name_both_and_the_reason():
    with pytest.raises(ConflictError, match=r"Unopened\(\) and NAAViT.*cannot run together: the test says so"):
        Stack(NAAViT(), Unopened()).attach(tiny_model("llava", "sdpa"), tiny_processor("llava"))


def test_roles_need_the_processor():
    with pytest.raises(ConfigError, match="processor"):
        Unopened().attach(tiny_model("llava", "sdpa"))
