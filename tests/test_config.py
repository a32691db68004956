"""Configs: what is right loads, what is wrong names file, key, value and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from mllm import Stack, load_config
from mllm.adapters import ModalityMutualAttention
from mllm.config import Config, save_config
from mllm.cost import ARCHITECTURES
from mllm.errors import ConfigError, ConflictError, LoadError
from mllm.saving import packaged_parts
from mllm.token_pruning import EEMLLM, DyVTE, FreezeVisual, NAAViT, URaG

CONFIGS = Path(__file__).parent.parent / "configs"
SPEC = ARCHITECTURES["llava-1.5-7b"]


def write(folder: Path, text: str) -> Path:
    path = folder / "my_config.yaml"
    path.write_text(text)
    return path


def test_shipped_configs_load_and_fit_a_model():
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert {"none", "naavit_all", "ee_all", "freeze_all", "exit_half"} <= names
    for path in CONFIGS.glob("*.yaml"):
        config = load_config(path)
        assert config.name == path.stem
        config.stack.check(SPEC)


def test_shipped_configs_for_a_model_name_packaged_parts(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the names hold wherever one stands
    found = sorted(CONFIGS.glob("*/*.yaml"))
    assert [path.parent.name for path in found] == ["default", "tiny"]
    for path in found:
        (technique,) = load_config(path).stack.techniques
        assert technique.learned.base_model["layers"] == {"default": 30, "tiny": 6}[path.parent.name]
    assert packaged_parts("default") == ["default/gates", "default/urag"]
    assert packaged_parts("llava-hf/llava-1.5-7b-hf") == packaged_parts(str(tmp_path)) == []
    with pytest.raises(LoadError, match="default/nothing is not a technique folder"):
        DyVTE(weights="default/nothing")


def test_round_trip_order_and_switched_off_techniques(tmp_path):
    path = write(
        tmp_path,
        """
        name: mine
        techniques:
          - {technique: NAAViT, layers: "0:4"}
          - {technique: EEMLLM, enabled: false}
          - {technique: DyVTE, exit_layer: 0.5}
        """,
    )
    config = load_config(path)
    assert config.stack == Stack(NAAViT(layers=[0, 1, 2, 3]), DyVTE(exit_layer=0.5))
    save_config(config, tmp_path / "again.yaml")
    again = load_config(tmp_path / "again.yaml")
    assert again == config
    assert again.digest == config.digest
    assert Config("mine", Stack(DyVTE(exit_layer=0.5))).digest != config.digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("techniqes: []", r"my_config\.yaml: unknown key 'techniqes'.*Allowed keys: name, techniques"),
        ("techniques: NAAViT", r"techniques = 'NAAViT' must be a list"),
        ("name: a/b\ntechniques: []", r"name = 'a/b'"),
        ("name: only", r"'techniques' is missing"),
        ("- 1", r"a config is a mapping"),
        ("techniques: [{technique: NAVit}]", r"techniques\[0\]: Unknown technique 'NAVit'\. Known: .*NAAViT"),
        ("techniques: [{layers: all}]", r"techniques\[0\]: .*key 'technique'"),
        ("techniques: [{technique: NAAViT, layer: all}]", r"NAAViT: layer='all': .*Arguments of NAAViT: layers"),
        ("techniques: [{technique: NAAViT, layers: every}]", r"layers='every': layers are 'all', a list"),
        ("techniques: [{technique: NAAViT, layers: [1, x]}]", r"whole numbers of at least 0"),
        ("techniques: [{technique: NAAViT, layers: 4:12}]", r'layers=252: .*Quote ranges: layers: "4:12" \(YAML reads'),
        ("techniques: [{technique: NAAViT, layers: 3}]", r'layers=3: .*such as \[3\].*Quote ranges: layers: "4:12"'),
        (
            "techniques: [{technique: DyVTE, gate: light, candidate_layers: 4:12}]",
            r'candidate_layers=252: .*Quote ranges: candidate_layers: "4:12"',
        ),
        ("techniques: [{technique: DyVTE}]", r"DyVTE: .*give one of exit_layer, histogram, gate.*or weights, a folder"),
        ("techniques: [{technique: DyVTE, exit_layer: -1}]", r"exit_layer=-1: .*greater than or equal to 0"),
        ("techniques: [{technique: DyVTE, exit_layer: half}]", r"exit_layer='half'"),
        ("techniques: [{technique: DyVTE, exit_layer: 1.5}]", r"exit_layer=1\.5"),
        ("techniques: [{technique: DyVTE, exit_layer: 3, enabled: maybe}]", r"enabled = 'maybe'"),
        ("techniques: [", r"not valid YAML"),
    ],
)
def test_wrong_configs_say_what_is_wrong(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


@pytest.mark.parametrize("name", ["MMA", "mma", "ModalityMutualAttention", "modalitymutualattention"])
def test_techniques_go_by_name_or_class_in_any_case(tmp_path, name):
    (technique,) = load_config(write(tmp_path, f"techniques: [{{technique: {name}}}]")).stack.techniques
    assert technique == ModalityMutualAttention()
    assert technique.describe()["technique"] == "MMA"


def test_a_range_in_a_list_that_yaml_read_as_a_number(tmp_path):
    stack = load_config(write(tmp_path, "techniques: [{technique: NAAViT, layers: [4:12]}]")).stack
    with pytest.raises(ConfigError, match=r'names layer 252, but .*Quote ranges: layers: "4:12"'):
        stack.check(SPEC)


def test_a_folder_instead_of_a_file(tmp_path):
    with pytest.raises(ConfigError, match=r"is a folder\. Give its config files, such as .*/\*\.yaml"):
        load_config(tmp_path)
    (tmp_path / "technique_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"is a technique folder, not a config file\. Write `weights: .*` under"):
        load_config(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml cannot be read"):
        load_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("technique", "message"),
    [
        (DyVTE(exit_layer=32), r"exit_layer=32, but this model has 32 layers \(0 to 31\)"),
        (NAAViT(layers=[3, 40]), r"names layer 40, but this model has 32 layers"),
        (URaG(layer=32), r"layer=32, but this model has 32 layers.*Give 1 to 31"),
    ],
)
def test_layers_that_the_model_does_not_have(technique, message):
    with pytest.raises(ConfigError, match=message):
        Stack(technique).check(SPEC)


@pytest.mark.parametrize(
    ("stack", "message"),
    [
        (Stack(NAAViT(), EEMLLM(layers=[3])), r"both decide what visual rows do in layer 3"),
        (Stack(DyVTE(exit_layer=4), DyVTE(exit_layer=9)), r"both remove all visual tokens"),
        (Stack(DyVTE(exit_layer=4), FreezeVisual(layers="5:9")), r"acts from layer 5 on.*after layer 4"),
        (Stack(URaG(layer=6), DyVTE(exit_layer=5)), r"URaG.*acts from layer 6 on.*after layer 5"),
    ],
)
def test_conflicts_are_found_before_the_model_is_touched(stack, message):
    with pytest.raises(ConflictError, match=message):
        stack.check(SPEC)


def test_neutral_techniques_do_not_conflict():
    Stack(NAAViT(), EEMLLM(layers=[]), DyVTE(exit_layer=31)).check(SPEC)


@pytest.mark.parametrize(
    ("fraction", "layers", "expected"), [(0.5, 32, 15), (0.5, 30, 14), (0.01, 32, 0), (0.25, 24, 5)]
)
def test_exit_as_a_fraction_of_the_depth(fraction, layers, expected):
    spec = ARCHITECTURES["llava-1.5-7b"]
    spec = type(spec)(layers, spec.hidden, spec.intermediate, spec.heads, spec.kv_heads, spec.head_dim)
    assert DyVTE(exit_layer=fraction).last_visual_layer(spec) == expected
