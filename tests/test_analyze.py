"""mllm analyze: attention flow against eager weights, layer effects against plain runs, stages, and the command."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from contract import logits
from reference import reference_logits
from test_cli import run
from tiny import FAMILIES, save_tiny, tiny_image, tiny_inputs, tiny_model, tiny_processor, visual_mask
from torch.utils._python_dispatch import TorchDispatchMode

from mllm.config import load_config
from mllm.errors import ConfigError, ConflictError, EvalError, InputError
from mllm.eval.analyze import Probe, analyze, choose_layers, choosing_stack, folder_samples, layer_effects, task_samples
from mllm.eval.analyze_report import find_stages
from mllm.eval.attention_flow import KEYS, QUERIES, attention_flow
from mllm.token_pruning import DyVTE, FreezeVisual, NAAViT

LAYERS = 6


# --- attention flow ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["batch", "two_images"])
def test_flow_equals_the_eager_weights(family, kind):
    """Summed by hand from the weights that eager attention returns; measured on SDPA, a few rows at a time."""
    eager, fused = tiny_model(family, "eager"), tiny_model(family, "sdpa")
    inputs = tiny_inputs(eager, tiny_processor(family), kind)
    with torch.no_grad():
        weights = eager(**inputs, output_attentions=True, use_cache=False).attentions  # layers x (B, heads, S, S)
    flow = attention_flow(fused, inputs, chunk_bytes=4096)
    visual, valid = visual_mask(eager, inputs), inputs["attention_mask"].bool()
    for row in range(len(valid)):
        seen = visual[row].cumsum(0) > 0 if visual[row].any() else torch.ones_like(visual[row])
        text = valid[row] & ~visual[row]
        last = torch.zeros_like(text)
        last[valid[row].nonzero().max()] = True
        asks = {"prefix": text & ~seen, "image": visual[row], "question": text & seen, "text": text, "last": last}
        first = torch.zeros_like(text)
        first[valid[row].nonzero().min()] = True
        looked = {"prefix": text & ~seen, "image": visual[row], "question": text & seen, "first": first}
        for layer in range(LAYERS):
            mean = weights[layer][row].mean(dim=0)  # (S, S)
            for q, query in enumerate(QUERIES):
                for k, key in enumerate(KEYS):
                    found = flow.mass[row, layer, q, k]
                    if not asks[query].any():
                        assert torch.isnan(found)
                        continue
                    expected = mean[asks[query]][:, looked[key]].sum(dim=1).mean()
                    assert float(found) == pytest.approx(float(expected), abs=1e-5)
    parts = flow.mass[..., :3].sum(dim=-1)
    assert torch.allclose(parts[~parts.isnan()], torch.ones(1, dtype=parts.dtype), atol=1e-5)


class Largest(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor):
                self.size = max(self.size, value.numel())
        return out


def test_no_layer_of_scores_is_ever_held():
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    inputs = processor(text=["USER: <image> " + "why? " * 400], images=[[tiny_image()]], return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    with Largest() as largest:
        attention_flow(model, inputs, chunk_bytes=1 << 18)
    assert length > 2000
    assert largest.size < length * length / 8


# --- layer effects ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_effects_equal_plain_runs(family):
    """Reusing the layers below changes nothing: KL of next-token distributions as two whole runs give them."""
    model = tiny_model(family, "sdpa")
    inputs = tiny_inputs(model, tiny_processor(family), "batch")
    effects = layer_effects(model, inputs)
    plain = logits(model, inputs)[:, -1].double().log_softmax(dim=-1)  # (B, V)
    for layer in range(LAYERS):
        for technique, change in (
            (FreezeVisual(layers=[layer]), effects.frozen),
            (DyVTE(exit_layer=layer), effects.exits),
        ):
            with technique(model):
                changed = logits(model, inputs)[:, -1].double().log_softmax(dim=-1)
            kl = (plain.exp() * (plain - changed)).sum(dim=-1)  # (B,)
            reverse = (changed.exp() * (changed - plain)).sum(dim=-1)  # (B,)
            assert torch.allclose(change.next_kl[:, layer], kl.clamp(min=0), atol=1e-6)
            assert torch.allclose(change.next_kl_reverse[:, layer], reverse.clamp(min=0), atol=1e-6)
            assert torch.equal(change.next_stays[:, layer], plain.argmax(-1) == changed.argmax(-1))
    assert (effects.exits.next_kl[:, -1] == 0).all()  # after the last layer there is nothing left to lose
    assert (effects.frozen.next_kl[-1] == 0).all()  # the row without a picture
    assert effects.frozen.next_kl[0].max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_effects_equal_the_naive_reference(family):
    """Row by row, without hooks, padding or reuse; two images in a row."""
    model = tiny_model(family, "sdpa")
    inputs = tiny_inputs(model, tiny_processor(family), "two_images")
    effects = layer_effects(model, inputs)
    with torch.no_grad():
        plain = [row[-1] for row in reference_logits(model, inputs)]  # B x (V,)
        for layer in (0, 3):
            for change, options in (
                (effects.frozen, {"policy": "freeze", "policy_layers": (layer,)}),
                (effects.exits, {"exit_after": layer}),
            ):
                for number, row in enumerate(reference_logits(model, inputs, **options)):
                    before, after = plain[number].double().log_softmax(-1), row[-1].double().log_softmax(-1)  # (V,)
                    expected = float((before.exp() * (before - after)).sum())
                    assert float(change.next_kl[number, layer]) == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_longer_answers_compare_every_token():
    model = tiny_model("llava", "sdpa")
    inputs = tiny_inputs(model, tiny_processor("llava"), "one")
    probe = Probe(model, inputs, answer_tokens=4)
    assert probe.plain.shape[1] == 4
    greedy = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(probe.plain.argmax(dim=-1), greedy)
    change = probe.under(DyVTE(exit_layer=0))
    assert change.answer_kl.item() != pytest.approx(change.next_kl.item(), rel=1e-6)


def test_the_plain_model_is_asked_for_and_left_alone():
    model = tiny_model("llava", "sdpa", fresh=True)
    inputs = tiny_inputs(model, tiny_processor("llava"), "one")
    layer_effects(model, inputs)  # transformers adds attributes of its own at first use
    before = [sorted(module.__dict__) for module in model.modules()]
    layer_effects(model, inputs)
    assert [sorted(module.__dict__) for module in model.modules()] == before
    with NAAViT()(model), pytest.raises(ConflictError, match="Detach it first"):
        attention_flow(model, inputs)
    with pytest.raises(ConfigError, match="answer_tokens=0"):
        Probe(model, inputs, answer_tokens=0)


# --- choice and stages ------------------------------------------------------------------------------------------------


def test_the_lowest_contributions_are_chosen():
    assert choose_layers([3.0, 1.0, 2.0, 1.0, 0.5], 3) == [1, 3, 4]
    assert choose_layers([1.0, 1.0], 1) == [1]
    for n in (0, 3):
        with pytest.raises(ConfigError, match="this model has 2"):
            choose_layers([1.0, 1.0], n)
    with pytest.raises(ConfigError, match="layer 1 is nan"):
        choose_layers([1.0, float("nan")], 1)
    assert choosing_stack("NAAViT", [1, 2]).techniques == (NAAViT(layers=[1, 2]),)
    with pytest.raises(ConfigError, match="no layers to choose"):
        choosing_stack("DyVTE", [1])


def test_stages_are_found_where_the_curve_shows_them():
    rng = np.random.default_rng(0)
    curve = np.array([0.5] * 3 + [0.1] * 15 + [0.3] * 12)
    found = find_stages(curve * rng.uniform(0.9, 1.1, (20, 30)))
    assert found["found"]
    assert [(s["first"], s["last"]) for s in found["stages"]] == [(0, 2), (3, 17), (18, 29)]
    curve[25:] = 0.05  # what comes after the reasoning is no stage
    found = find_stages(curve * rng.uniform(0.9, 1.1, (20, 30)))
    assert [(s["first"], s["last"]) for s in found["stages"]] == [(0, 2), (3, 17), (18, 24)]
    curve = np.array([0.5] * 14 + [0.1] * 8 + [0.3] * 8)
    found = find_stages(curve * rng.uniform(0.9, 1.1, (20, 30)))
    assert not found["found"]
    assert "late" in found["reason"]
    for flat in (np.full((20, 30), 0.2), np.tile(np.linspace(0.5, 0.1, 30), (20, 1)), np.full((20, 6), 0.2)):
        found = find_stages(flat * rng.uniform(0.97, 1.03, flat.shape))
        assert not found["found"]
        assert found["reason"]


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("analyze")
    (root / "pictures").mkdir()
    for number in range(3):
        tiny_image(number, (40, 40)).save(root / "pictures" / f"{number}.png")
    return save_tiny("llava", root / "model"), root / "pictures"


def test_a_run_writes_everything_and_goes_on_where_it_was_stopped(folders, tmp_path, monkeypatch):
    model, pictures = folders
    samples = folder_samples(pictures, "What is it?", 3)
    options = {"answer_tokens": 2, "device": "cpu"}
    first = analyze(str(model), samples[:2], tmp_path / "run", **options)
    assert first["samples"] == 2
    measured = []
    original = Probe.effects
    monkeypatch.setattr(Probe, "effects", lambda probe, *a: measured.append(1) or original(probe, *a))
    config = tmp_path / "mine.yaml"
    summary = analyze(str(model), samples, tmp_path / "run", choose=2, technique="EEMLLM", write=config, **options)
    assert measured == [1]  # two of three samples lay there already
    (technique,) = load_config(config).stack.techniques
    assert (technique.name, list(technique.layers)) == ("EEMLLM", summary["chosen"]["layers"])
    saved = json.loads((tmp_path / "run" / "analysis.json").read_text())
    assert len(saved["contribution"]["next_kl"]["mean"]) == LAYERS
    assert saved["contribution"]["next_kl"]["low"] == [None] * LAYERS  # three samples are too few for an interval
    assert saved["flow"]["text->image"]["n"] == 3
    assert "Layers" in (tmp_path / "run" / "analysis.md").read_text()
    assert (tmp_path / "run" / "analysis.png").stat().st_size > 5000


def test_an_unreadable_picture_is_left_out_and_counted(folders, tmp_path):
    model, pictures = folders
    broken = tmp_path / "pictures"
    broken.mkdir()
    (broken / "a.png").write_bytes((pictures / "0.png").read_bytes())
    (broken / "b.png").write_bytes(b"not a picture")
    summary = analyze(str(model), folder_samples(broken, "What?", 5), tmp_path / "run", answer_tokens=1, device="cpu")
    assert (summary["samples"], len(summary["failed"])) == (1, 1)
    (broken / "a.png").unlink()
    with pytest.raises(EvalError, match="None of 1 samples"):
        analyze(str(model), folder_samples(broken, "What?", 5), tmp_path / "other", answer_tokens=1, device="cpu")


def test_bad_samples_are_refused(tmp_path):
    with pytest.raises(EvalError, match="No pictures found"):
        folder_samples(tmp_path, "What?", 2)
    with pytest.raises(EvalError, match="is not a folder"):
        folder_samples(tmp_path / "x", "What?", 2)
    with pytest.raises(InputError, match="question is empty"):
        folder_samples(tmp_path, " ", 2)
    with pytest.raises(EvalError, match="no pictures"):
        task_samples("mllm_text", 2)
    with pytest.raises(EvalError, match="no offline task"):
        task_samples("nothing", 2)
    assert [s.name for s in task_samples("mllm_vqa", 4)][:2] == [s.name for s in task_samples("mllm_vqa", 2)]


def test_the_command(folders, tmp_path, monkeypatch, capsys):
    model, pictures = folders
    arguments = ["analyze", "--model", model, "--images", pictures, "--question", "What?", "--device", "cpu"]
    code, out, _ = run(monkeypatch, capsys, *arguments, "--samples", 1, "--answer-tokens", 1, "--out", tmp_path / "run")
    assert code == 0
    assert "1 samples, 6 layers" in out
    code, _, err = run(monkeypatch, capsys, *arguments, "--choose", 7, "--out", tmp_path / "run")
    assert code == 1
    assert "7 layers cannot be chosen: this model has 6" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--question", "What?"], "add --images FOLDER"),
        (["--images", "."], "takes a --question"),
        (["--images", ".", "--question", "What?", "--task", "mllm_vqa"], "no --task"),
        (["--task", "nothing"], "no offline task 'nothing'"),
        (["--samples", 0], "samples=0"),
        (["--answer-tokens", 0], "answer_tokens=0"),
        (["--write", "x.yaml"], "Add --choose N"),
        (["--choose", 0], "choose=0"),
        (["--choose", 1, "--technique", "DyVTE"], "DyVTE has no layers to choose"),
        (["--choose", 1, "--technique", "nothing"], "Unknown technique 'nothing'"),
        (["--choose", 1, "--write", "nowhere/x.yaml"], "nowhere/x.yaml cannot be written"),
        (["--choose", 1, "--write", "x.txt"], "must end in .yaml"),
        (["--choose", 1, "--write", "a b.yaml"], "use letters, digits"),
    ],
)
def test_mistakes_end_with_their_reason(monkeypatch, capsys, tmp_path, arguments, message):
    """Before a model is loaded: there is none here."""
    monkeypatch.chdir(tmp_path)
    code, out, err = run(monkeypatch, capsys, "analyze", "--model", "./none", "--out", "out", *arguments)
    assert (code, out) == (1, "")
    assert message in err
    assert "Traceback" not in err
