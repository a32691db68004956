"""What is special to DyVTE: gates, exits of each row, chance, checkpoints, images that a later question gets back."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from contract import close, counted_flops, extend, logits, text_rows, with_random_weights
from dyvte_reference import drawn_exit, last_header, probability, several_turns
from reference import prompts, reference_states
from safetensors.torch import save_file
from test_cli import run as run_command
from test_engine import pad_right
from tiny import FAMILIES, row, tiny_image, tiny_inputs, tiny_model, tiny_processor, visual_mask
from transformers import DynamicCache

from mllm import Stack, load_config, load_techniques
from mllm.config import Config, save_config
from mllm.cost import ARCHITECTURES, ModelSpec, predict
from mllm.errors import ConfigError, ConflictError, InputError, LoadError, UnsupportedModelError
from mllm.layout import TokenLayout
from mllm.roles import Roles
from mllm.saving import LearnedWeights, fingerprint
from mllm.technique import Revived, Technique
from mllm.token_pruning import DyVTE, FreezeVisual, NAAViT, URaG
from mllm.token_pruning.dyvte import exit_histogram, image_marks
from mllm.token_pruning.dyvte_gates import PREFIX, gate_features, read_prompts

every_family = pytest.mark.parametrize("family", FAMILIES)
every_backend = pytest.mark.parametrize("attn", ["eager", "sdpa"])


def prepared(family="llava", attn="sdpa", kind="batch"):
    model = tiny_model(family, attn)
    return model, tiny_processor(family), tiny_inputs(model, tiny_processor(family), kind)


def trained(model, seed=0, **arguments):
    """A technique whose gates are random numbers."""
    technique = DyVTE(**{"gate": "light", **arguments})
    return with_random_weights(Stack(technique), model, seed).techniques[0]


def answer(model, inputs, **options):
    return model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, **options)


def asked(model, inputs):
    """Rows with a header behind their last image."""
    found = []
    for prompt in prompts(model, inputs):
        end = last_header(model, prompt)
        found.append(bool(prompt.visual.any()) and end is not None and end > int(prompt.visual.nonzero()[-1, 0]))
    return found


# --- gates ------------------------------------------------------------------------------------------------------------


@every_family
@every_backend
@pytest.mark.parametrize("kind", ["batch", "two_images"])
def test_gates_that_never_or_always_let_go(family, attn, kind):
    model, processor, inputs = prepared(family, attn, kind)
    plain, said = logits(model, inputs), answer(model, inputs)
    with trained(model, threshold=1.0)(model, processor) as run:
        assert torch.equal(logits(model, inputs), plain)
        assert torch.equal(answer(model, inputs), said)
    assert run.outputs["DyVTE"]["exit_layer"] == [None] * len(plain)
    exits = [2 if rows else None for rows in asked(model, inputs)]
    with DyVTE(exit_layer=exits)(model):
        fixed, said = logits(model, inputs), answer(model, inputs)
    with trained(model, threshold=0.0, candidate_layers=[2, 4])(model, processor) as run:
        assert torch.equal(logits(model, inputs), fixed)
        assert torch.equal(answer(model, inputs), said)
    assert run.outputs["DyVTE"]["exit_layer"] == exits


@every_family
@pytest.mark.parametrize("gate", ["light", "paper"])
def test_each_row_leaves_at_its_own_layer(family, gate):
    """A batch equals fixed exits at the layers that the gates chose, and each row alone chooses the same."""
    model, processor, inputs = prepared(family)
    for seed in range(20):
        technique = trained(model, seed, gate=gate, hidden=32)
        with technique(model, processor) as run:
            found = logits(model, inputs)
            said = answer(model, inputs)
            told = run.outputs["DyVTE"]
            lengths = run.report().cache_lengths
        exits = told["exit_layer"]
        if len(set(exits)) >= 3:
            break
    assert len(set(exits)) >= 3
    with DyVTE(exit_layer=exits)(model) as run:
        assert torch.equal(logits(model, inputs), found)
        assert torch.equal(answer(model, inputs), said)
        assert run.report().cache_lengths == lengths
    for number, exit_layer in enumerate(exits):
        single = row(inputs, number)
        text = text_rows(model, single)[0]
        with technique(model, processor) as run:
            alone = logits(model, single)
        close(found[number, -len(text) :][text], alone[0][text])
        told_alone = run.outputs.get("DyVTE", {"exit_layer": [None], "probabilities": {}})
        assert told_alone["exit_layer"] == [exit_layer]
        for layer, values in told_alone["probabilities"].items():
            assert values[0] == pytest.approx(told["probabilities"][layer][number], abs=1e-5)
        with DyVTE(exit_layer=5 if exit_layer is None else exit_layer)(model):
            close(logits(model, single)[0][text], alone[0][text])


@every_family
@pytest.mark.parametrize("gate", ["light", "paper"])
def test_probabilities_are_those_of_the_formula(family, gate):
    model, processor, inputs = prepared(family, kind="two_images")
    technique = trained(model, gate=gate, threshold=1.0, candidate_layers=[0, 1, 3])
    with technique(model, processor) as run:
        logits(model, inputs)
    told = run.outputs["DyVTE"]["probabilities"]
    assert list(told) == [0, 1, 3]
    results = reference_states(model, inputs)
    for number, (prompt, result) in enumerate(zip(prompts(model, inputs), results, strict=True)):
        end = last_header(model, prompt)
        for layer, values in told.items():
            expected = probability(technique, layer, result.states[layer + 1], prompt.visual, end)
            assert values[number] == pytest.approx(expected, abs=1e-5)


def test_the_threshold_is_a_probability():
    """Rows leave at the first layer whose probability is above it, and nobody is asked afterwards."""
    model, processor, inputs = prepared(kind="two_images")
    with trained(model, threshold=1.0)(model, processor) as run:
        logits(model, inputs)
    chances = run.outputs["DyVTE"]["probabilities"]
    for threshold in (0.2, 0.5, 0.7, 0.9):
        with trained(model, threshold=threshold)(model, processor) as run:
            logits(model, inputs)
        told = run.outputs["DyVTE"]
        for number, exit_layer in enumerate(told["exit_layer"]):
            above = [layer for layer, values in chances.items() if values[number] > threshold]
            assert exit_layer == (above[0] if above else None)
            for layer, values in told["probabilities"].items():
                if exit_layer is not None and layer > exit_layer:
                    assert values[number] is None
                else:
                    assert values[number] == pytest.approx(chances[layer][number], abs=1e-5)


def test_limits_and_candidates():
    spec = ModelSpec(8, 32, 64, 2, 2, 16)
    assert DyVTE(gate="light").candidates(spec) == (0, 1, 2, 3, 4, 5, 6)  # the last layer saves nothing
    assert DyVTE(gate="light", min_exit_layer=2, max_exit_layer=5).candidates(spec) == (2, 3, 4)
    assert DyVTE(gate="light", candidate_layers="1:8", max_exit_layer=4).candidates(spec) == (1, 2, 3)
    assert DyVTE(gate="light", max_exit_layer=5).last_visual_layer(spec) == 5
    assert DyVTE(gate="light", candidate_layers=[7]).is_neutral(spec)
    model, processor, inputs = prepared()
    with trained(model, threshold=1.0, max_exit_layer=3)(model, processor) as run:
        found = logits(model, inputs)
    assert run.report().exit_layer == [3, 3, 3, None]  # the row without a header too
    assert run.outputs["DyVTE"]["exit_layer"] == [3, 3, 3, None]
    with DyVTE(exit_layer=3)(model):
        assert torch.equal(logits(model, inputs), found)
    with DyVTE(gate="light", candidate_layers=[], max_exit_layer=3)(model, processor):
        assert torch.equal(logits(model, inputs), found)


def test_fresh_gates():
    """Light ones let nobody go until they have learned to; the paper's are drawn as the authors' are."""
    model, processor, inputs = prepared()
    plain = logits(model, inputs)
    with DyVTE(gate="light")(model, processor) as run:
        assert torch.equal(logits(model, inputs), plain)
        assert set(run.outputs["DyVTE"]["probabilities"][0]) == {0.5, None}
    spec = ModelSpec(3, 32, 64, 2, 2, 16)
    module = DyVTE(gate="paper").build(spec)
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    assert shapes == {
        f"visual_gates_router.{layer}.{name}.weight": shape
        for layer in range(3)
        for name, shape in (("w1", (2048, 64)), ("w2", (2, 2048)))
    }
    assert DyVTE(gate="light").hidden == 128


@every_family
def test_padding_on_either_side_and_other_rows_change_no_decision(family):
    model, processor, left = prepared(family)
    technique = trained(model, threshold=1.0)
    told = []
    for inputs in (left, pad_right(left)):
        with technique(model, processor) as run:
            logits(model, inputs)
        told.append(run.outputs["DyVTE"]["probabilities"])
    for layer, values in told[0].items():
        assert told[1][layer] == pytest.approx(values, abs=1e-5)


def test_a_mixed_batch_of_text_one_and_several_images():
    model, processor = tiny_model("llava"), tiny_processor("llava")
    texts = [
        "USER: name a colour ASSISTANT:",
        "USER: <image> what is it? ASSISTANT:",
        "USER: <image> and <image> and <image> differ? ASSISTANT:",
        "USER: what is it? <image> ASSISTANT:",  # the image after its question
        "USER: <image> is it? ASSISTANT: a cat USER: and <image> this? ASSISTANT:",  # two turns
    ]
    images = [[tiny_image(n, (32, 32)) for n in range(text.count("<image>"))] for text in texts]
    inputs = processor(text=texts, images=[i for i in images if i], padding=True, return_tensors="pt")
    assert asked(model, inputs) == [False, True, True, True, True]
    technique = trained(model, seed=1)
    with technique(model, processor) as run:
        together = logits(model, inputs)
        said = answer(model, inputs)
    exits = run.outputs["DyVTE"]["exit_layer"]
    for number, exit_layer in enumerate(exits):
        single = row(inputs, number)
        with DyVTE(exit_layer=5 if exit_layer is None else exit_layer)(model):
            text = text_rows(model, single)[0]
            close(together[number, -len(text) :][text], logits(model, single)[0][text])
            assert torch.equal(answer(model, single)[0, len(text) :], said[number, -3:])


def test_features_of_a_question_of_one_token():
    """Nothing is left to average: the last state stands for the mean."""
    header = torch.tensor([[False, False, True, False]])
    none = torch.zeros_like(header)
    roles = Roles(torch.zeros(1, 4, dtype=torch.long), none, none, none, header, none)
    layout = TokenLayout(torch.tensor([[True, True, False, False]]), torch.ones(1, 4, dtype=torch.bool), 0, roles)
    averaged, last, has = read_prompts(layout)
    assert (averaged.any(), last.tolist(), has.tolist()) == (torch.tensor(False), [2], [True])
    states = torch.randn(1, 4, 3)
    assert torch.equal(gate_features(states, averaged, last), torch.stack([states[:, 2]] * 2, dim=1))


@every_family
def test_answers_in_the_same_call_are_not_read(family):
    """Scoring an answer sees the exits that generating it sees; so does training on it."""
    model, processor, inputs = prepared(family)
    technique = trained(model, seed=4)
    longer = extend(inputs, torch.full((4, 5), 40))
    with technique(model, processor) as run:
        logits(model, inputs)
        exits = run.outputs["DyVTE"]["exit_layer"]
        logits(model, longer)
        assert run.outputs["DyVTE"]["exit_layer"] == exits
        labels = longer["input_ids"].clone()
        labels[:, :-5] = -100
        assert torch.isfinite(model(**longer, labels=labels).loss)
        labels[0, -6] = 7
        with pytest.raises(InputError, match=r"DyVTE: 1 training labels, the first at row 0.*Label the last answer"):
            model(**longer, labels=labels)


def test_the_host_waits_once_per_candidate_and_never_while_decoding(monkeypatch):
    model, processor, inputs = prepared(kind="two_images")
    waits = []
    for name in ("tolist", "item", "__bool__", "__int__", "__float__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, _o=original, _n=name: waits.append(_n) or _o(self), raising=True
        )
    counts = {}
    for name, technique in {
        "plain": Stack(),
        "never": trained(model, threshold=1.0, candidate_layers=[0, 2, 3]),
        "gone": trained(model, threshold=0.0, candidate_layers=[1, 2, 3]),
    }.items():
        with technique(model, processor), torch.no_grad():
            cache = DynamicCache(config=model.config.get_text_config())
            waits.clear()
            model(**inputs, past_key_values=cache)
            prefill = len(waits)
            waits.clear()
            model(input_ids=torch.tensor([[30], [31]]), past_key_values=cache)
            counts[name] = (prefill - counts.get("plain", (0, 0))[0], len(waits) - counts.get("plain", (0, 0))[1])
    assert counts["never"] == (3, 0)
    assert counts["gone"] == (2, 0)  # one gate; one to count the rows that are left


@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_prediction_equals_the_run(family, limit):
    """Of a gate the last exit that it may choose is predicted, with the gates before it."""
    model, processor, inputs = prepared(family, kind="one")
    spec = ModelSpec.from_config(model.config.get_text_config())
    technique = trained(model, threshold=1.0, max_exit_layer=limit)
    visual = int(visual_mask(model, inputs).sum())
    cost = predict(Stack(technique), spec, inputs["input_ids"].shape[1] - visual, visual, bytes_per_value=4)
    with technique(model, processor) as run, torch.no_grad():
        model(**inputs, use_cache=True)
    assert (run.flops, run.dense_flops, run.kv_bytes) == (cost.flops, cost.dense_flops, cost.kv_bytes)
    assert cost.parameters == sum(value.numel() for value in technique.learned.tensors.values())
    assert predict(Stack(technique), spec, 10, 0).flops == predict(Stack(), spec, 10, 0).flops


@pytest.mark.parametrize("gate", ["light", "paper"])
def test_gates_are_booked_to_the_last_flop(gate):
    model, processor, inputs = prepared()
    technique = trained(model, gate=gate, threshold=1.0)
    plain = counted_flops(model, lambda: logits(model, inputs))
    with Stack()(model) as run:
        logits(model, inputs)
        dense = run.flops
    with technique(model, processor) as run:
        counted = counted_flops(model, lambda: logits(model, inputs))
    assert run.flops - dense == counted - plain > 0


def test_the_papers_gates_are_light_in_work_and_heavy_in_memory():
    spec = ARCHITECTURES["llava-1.5-7b"]
    paper, light = DyVTE(gate="paper"), DyVTE(gate="light")
    assert paper.gate_flops(spec) == 2 * (2 * 4096 * 2048 + 4096)
    assert Stack(paper).parameter_count(spec) == 32 * (2048 * 8192 + 2 * 2048)
    gates = predict(Stack(paper), spec, 64, 576).flops / predict(Stack(), spec, 64, 576).flops - 1
    assert 0 < gates < 2e-4
    assert Stack(light).parameter_count(spec) < 4e7


# --- exits that are given ---------------------------------------------------------------------------------------------


@every_family
@every_backend
def test_a_list_gives_each_row_its_exit(family, attn):
    model, _, inputs = prepared(family, attn)
    exits = [0, None, 3, 2]
    with DyVTE(exit_layer=exits)(model) as run:
        together, said = logits(model, inputs), answer(model, inputs)
        assert run.report().exit_layer == [0, 5, 3, None]
        lengths = [sum(count) for count in zip(*_lengths(model, inputs, exits), strict=True)]
        widest = [max(count) for count in zip(*_lengths(model, inputs, exits), strict=True)]
        logits_only = run.report().cache_lengths
    assert [length - 2 for length in logits_only][1:] == widest[1:]
    assert sum(lengths) > 0
    for number, exit_layer in enumerate(exits):
        single = row(inputs, number)
        text = text_rows(model, single)[0]
        with DyVTE(exit_layer=5 if exit_layer is None else exit_layer)(model):
            close(together[number, -len(text) :][text], logits(model, single)[0][text])
            assert torch.equal(answer(model, single)[0, len(text) :], said[number, -3:])


def _lengths(model, inputs, exits):
    """Per row and layer, the keys that are held; layer by layer padded to the widest row."""
    visual = visual_mask(model, inputs)
    valid = inputs["attention_mask"].bool()
    return [
        [int(valid[n].sum()) - (int(visual[n].sum()) if e is not None and layer > e else 0) for layer in range(6)]
        for n, e in enumerate(exits)
    ]


def test_a_list_fits_the_batch_and_the_model():
    model, _, inputs = prepared()
    with DyVTE(exit_layer=[1, 2])(model), pytest.raises(InputError, match="2 entries, but the batch has 4 rows"):
        logits(model, inputs)
    with pytest.raises(ConfigError, match=r"exit_layer=\(1, 6\), but this model has 6 layers"):
        DyVTE(exit_layer=[1, 6]).attach(model)
    assert DyVTE(exit_layer=[None, 5]).is_neutral(ModelSpec.from_config(model.config.get_text_config()))


# --- chance -----------------------------------------------------------------------------------------------------------


@every_family
def test_draws_depend_on_the_row_alone(family):
    model, processor, inputs = prepared(family)
    technique = DyVTE(histogram=[1, 1, 1, 1, 1, 1], seed=3)
    expected = [drawn_exit(model, technique, prompt) for prompt in prompts(model, inputs)]
    expected = [None if e == 5 else e for e in expected]
    for given in (inputs, pad_right(inputs), extend(inputs, torch.full((4, 2), 40))):
        with technique(model, processor) as run:
            logits(model, given)
        found = run.outputs["DyVTE"]["exit_layer"]
        # a row without a header does not tell its prompt from its answer: what stands before the image is hashed
        assert found == expected
    for number in range(4):
        with technique(model, processor) as run:
            logits(model, row(inputs, number))
        assert run.outputs.get("DyVTE", {"exit_layer": [None]})["exit_layer"] == [expected[number]]


def test_draws_follow_the_histogram():
    model, processor = tiny_model("llava"), tiny_processor("llava")
    text = "USER: <image> what is it? ASSISTANT:"
    histogram, reports = [0.1, 0.4, 0.0, 0.3, 0.0, 0.2], []
    technique = DyVTE(histogram=histogram)
    with technique(model, processor) as run:
        for batch in range(10):
            images = [tiny_image(batch * 40 + n, (32, 32)) for n in range(40)]
            inputs = processor(text=[text] * 40, images=[[image] for image in images], return_tensors="pt")
            logits(model, inputs)  # one question about many pictures: the pictures make the difference
            reports.append(run.report())
    found = exit_histogram(reports)
    assert found[2] == found[4] == 0
    assert found == pytest.approx(histogram, abs=0.08)  # 400 draws: 3.2 standard deviations
    assert exit_histogram([run]) == exit_histogram(reports[-1:])
    with pytest.raises(ConfigError, match="no run saw an image"):
        exit_histogram([])


def test_marks_of_images_stay_where_rounding_differs():
    states = torch.randn(2, 30, 16, generator=torch.Generator().manual_seed(0))
    visual = torch.zeros(2, 30, dtype=torch.bool)
    visual[0, 3:20] = visual[1, 8:25] = True
    states[1, 8:25] = states[0, 3:20] * (1 + 1e-6)
    states[:, 5] = states[:, 9]  # equal tokens: the first one counts
    marks = image_marks(states, visual)
    states[1, 8:25] = states[0, 3:20]
    assert torch.equal(image_marks(states, visual)[0], image_marks(states, visual)[1])
    assert torch.equal(marks[0], image_marks(states, visual)[0])


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give one of exit_layer, histogram, gate, which choose the exit, or weights, a folder with.*; 0"),
        ({"exit_layer": 2, "gate": "light"}, "give one of exit_layer, histogram, gate.*2 were given"),
        ({"exit_layer": 2, "threshold": 0.7}, "threshold belongs to gate, and exit_layer was given"),
        ({"exit_layer": 2, "recoverable": True}, "recoverable belongs to gate.*without a gate no later question"),
        ({"histogram": [1, 1], "hidden": 3}, "hidden belongs to gate, and histogram was given"),
        ({"gate": "light", "hidden": 300}, "a light gate has at most 256"),
        ({"gate": "heavy"}, "gate='heavy'"),
        ({"gate": "light", "threshold": 1.5}, "threshold=1.5"),
        ({"gate": "light", "min_exit_layer": 4, "max_exit_layer": 2}, "max_exit_layer=2 lies before"),
        ({"histogram": [0, 0]}, "histogram needs a weight above 0"),
        ({"histogram": [1, -1]}, "histogram=-1"),
        ({"exit_layer": [1, "x"]}, "exit_layer="),
        ({"exit_layer": True}, "exit_layer=True"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        DyVTE(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gate": "light", "max_exit_layer": 6}, r"max_exit_layer=6, but this model has 6 layers \(0 to 5\)"),
        ({"gate": "light", "min_exit_layer": 6}, r"min_exit_layer=6, but this model has 6 layers"),
        ({"gate": "light", "candidate_layers": [6]}, r"candidate_layers.*names layer 6"),
        ({"histogram": [1, 1]}, "histogram has 2 weights, but this model has 6 layers"),
        ({"gate": "light"}, "must tell questions from answers.*with the processor"),
        ({"histogram": [1] * 6}, "must tell questions from answers.*with the processor"),
    ],
)
def test_arguments_that_do_not_fit_the_model(arguments, message):
    with pytest.raises(ConfigError, match=message):
        DyVTE(**arguments).attach(tiny_model("llava"))


def test_embeddings_without_ids_are_refused():
    model, processor, inputs = prepared(kind="one")
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    for technique in (trained(model), DyVTE(histogram=[1] * 6)):
        with technique(model, processor), pytest.raises(InputError, match="not inputs_embeds"):
            model(**rest, inputs_embeds=embeds)


SETTINGS = [
    DyVTE(exit_layer=2),
    DyVTE(exit_layer=0.5),
    DyVTE(exit_layer=[2, None, 3]),
    DyVTE(histogram=[1, 0, 2], seed=5),
    DyVTE(gate="light"),
    DyVTE(gate="paper", threshold=0.25, candidate_layers="0:4", recoverable=True),
]


@pytest.mark.parametrize("technique", SETTINGS, ids=repr)
def test_descriptions_round_trip(technique, tmp_path):
    save_config(Config("mine", Stack(technique)), tmp_path / "mine.yaml")
    again = load_config(tmp_path / "mine.yaml")
    assert again.stack == Stack(technique)
    assert again.digest == Config("mine", Stack(technique)).digest
    assert again.stack.techniques[0].describe() == technique.describe()


def test_what_is_shown():
    assert repr(DyVTE(exit_layer=2)) == "DyVTE(exit_layer=2)"
    assert DyVTE(exit_layer=0.5).describe() == {"technique": "DyVTE", "exit_layer": 0.5}  # as before there were gates
    assert repr(DyVTE(gate="light", threshold=0.7)) == "DyVTE(gate='light', hidden=128, threshold=0.7)"
    assert not DyVTE(exit_layer=2).by_input
    assert all(t.by_input for t in (DyVTE(exit_layer=[1]), DyVTE(histogram=[1]), DyVTE(gate="light")))


def test_stacks():
    spec = ARCHITECTURES["llava-1.5-7b"]
    learned = DyVTE(gate="light")
    with pytest.raises(ConflictError, match="both remove all visual tokens"):
        Stack(learned, DyVTE(exit_layer=4)).check(spec)
    with pytest.raises(ConflictError, match="image_cache"):
        Stack(NAAViT(image_cache=2), learned).check(spec)
    with pytest.raises(ConflictError, match=r"acts from layer 5 on.*after layer 4"):
        Stack(DyVTE(gate="light", max_exit_layer=4), FreezeVisual(layers="5:9")).check(spec)
    with pytest.raises(ConflictError, match="both bring rows of an earlier turn back"):
        Stack(URaG(recoverable=True), DyVTE(gate="light", recoverable=True)).check(spec)
    Stack(NAAViT(), learned).check(spec)
    Stack(NAAViT(image_cache=2), DyVTE(exit_layer=4)).check(spec)
    Stack(FreezeVisual(layers="20:30"), learned).check(spec)


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_fixed_exit_saves_and_loads_without_weights(tmp_path):
    model, _, inputs = prepared(kind="one")
    handle = DyVTE(exit_layer=2).attach(model)
    expected = logits(model, inputs)
    handle.save_pretrained(tmp_path / "fixed")
    handle.detach()
    assert not (tmp_path / "fixed" / "technique.safetensors").exists()
    assert load_techniques(tmp_path / "fixed", model) == Stack(DyVTE(exit_layer=2))
    again = DyVTE.from_pretrained(tmp_path / "fixed")
    assert again == DyVTE(exit_layer=2)
    with again(model):
        assert torch.equal(logits(model, inputs), expected)


def test_gates_save_and_load_with_another_threshold(tmp_path):
    model, processor, inputs = prepared()
    handle = trained(model, max_exit_layer=4).attach(model, processor)
    expected = logits(model, inputs)
    handle.save_pretrained(tmp_path / "gates")
    handle.detach()
    again = DyVTE.from_pretrained(tmp_path / "gates")
    assert (again.gate, again.max_exit_layer, again.hidden) == ("light", 4, 128)
    with again(model, processor):
        assert torch.equal(logits(model, inputs), expected)
    never = DyVTE.from_pretrained(tmp_path / "gates", threshold=1.0, max_exit_layer=None)
    plain = logits(model, inputs)
    with never(model, processor):
        assert torch.equal(logits(model, inputs), plain)
    config = tmp_path / "gates.yaml"
    config.write_text(f"techniques: [{{technique: DyVTE, weights: {tmp_path / 'gates'}}}]")
    assert load_config(config).stack.techniques[0].learned == again.learned
    (tmp_path / "gates" / "technique.safetensors").unlink()
    with pytest.raises(LoadError, match="no learned weights"):
        DyVTE.from_pretrained(tmp_path / "gates")
    with pytest.raises(LoadError, match="no learned weights"):
        load_techniques(tmp_path / "gates")


@pytest.mark.parametrize("arguments", [{}, {"max_exit_layer": 5}], ids=str)
@pytest.mark.parametrize("gate", ["light", "paper"])
def test_gates_of_another_depth_or_width_are_refused(tmp_path, gate, arguments):
    model, processor, _ = prepared()
    handle = trained(model, gate=gate, hidden=8, **arguments).attach(model, processor)
    handle.save_pretrained(tmp_path / "gates")
    handle.detach()
    gates = DyVTE.from_pretrained(tmp_path / "gates")
    with pytest.raises(LoadError, match=r"asks for layers 6; this model has layers 4"):
        gates.attach(tiny_model("llava", layers=4), processor)
    with pytest.raises(LoadError, match=r"asks for .*hidden_size 48.*this model has .*hidden_size 64"):
        gates.attach(tiny_model("llava_next"), tiny_processor("llava_next"))
    # where it is not known what they were trained for, their shapes tell
    bare = gates.with_learned(LearnedWeights(gates.learned.tensors, {}, "gates"))
    with pytest.raises(LoadError, match="gates: the weights do not fit this model"):
        bare.attach(tiny_model("llava_next"), tiny_processor("llava_next"))


# --- the authors' checkpoints -----------------------------------------------------------------------------------------


def published(model, hidden=16):
    """A state dict with gates under the authors' keys, inside what else a LLaVA holds."""
    generator = torch.Generator().manual_seed(0)
    width = model.config.get_text_config().hidden_size
    gates = {}
    for layer in range(6):
        gates[f"{PREFIX}{layer}.w1.weight"] = torch.randn(hidden, 2 * width, generator=generator) * 0.2
        gates[f"{PREFIX}{layer}.w2.weight"] = torch.randn(2, hidden, generator=generator)
    return gates, {"model.layers.0.mlp.up_proj.weight": torch.zeros(2, 2), "lm_head.weight": torch.zeros(2)}


def test_published_gates_load(tmp_path):
    model, processor, inputs = prepared()
    gates, others = published(model)
    technique = DyVTE.from_checkpoint({**gates, **others}, model)
    assert (technique.gate, technique.hidden) == ("paper", 16)
    with technique(model, processor):
        expected = logits(model, inputs)
    save_file({**gates, **others}, tmp_path / "model.safetensors")
    for source in (tmp_path / "model.safetensors", tmp_path):
        again = DyVTE.from_checkpoint(source, candidate_layers="0:5")
        assert again.learned.tensors.keys() == technique.learned.tensors.keys()
        with again(model, processor):
            assert torch.equal(logits(model, inputs), expected)
    named = {name.removeprefix("model."): value for name, value in gates.items()}
    direct = DyVTE(gate="paper", hidden=16).with_learned(LearnedWeights(named, fingerprint(model), "named"))
    with direct(model, processor):
        assert torch.equal(logits(model, inputs), expected)


def test_wrong_published_gates_are_named(tmp_path):
    model, processor, _ = prepared()
    gates, others = published(model)

    def but(**changes):
        changed = {**gates, **{PREFIX + name.replace("_", "."): value for name, value in changes.items()}}
        return {name: value for name, value in changed.items() if value is not None}

    missing, extra = but(**{"2_w1_weight": None}), but(**{"2_w1_bias": torch.zeros(16)})
    shape = but(**{"3_w2_weight": torch.zeros(3, 16)})
    for source, message in (
        (missing, rf"the state dict lacks {PREFIX}2.w1.weight"),
        (extra, rf"holds what is no gate of this model: {PREFIX}2.w1.bias"),
        (shape, rf"wrong shape: {PREFIX}3.w2.weight, \(3, 16\) instead of \(2, 16\)"),
        (others, rf"the state dict lacks {PREFIX}0.w1.weight"),
    ):
        for known in (None, model):
            with pytest.raises(LoadError, match=message):
                DyVTE.from_checkpoint(source, known)
    with pytest.raises(LoadError, match=rf"lacks {PREFIX}6.w1.weight"):
        DyVTE.from_checkpoint(gates, tiny_model("llava", layers=8))
    with pytest.raises(LoadError, match=rf"no gate of this model: {PREFIX}4.w1.weight"):
        DyVTE.from_checkpoint(gates, tiny_model("llava", layers=4))
    with pytest.raises(LoadError, match=r"wrong shape: .*\(16, 96\) instead of \(16, 128\)"):
        DyVTE.from_checkpoint(gates, tiny_model("llava_next"))
    with pytest.raises(LoadError, match="the weights do not fit this model"):
        DyVTE.from_checkpoint(gates).attach(tiny_model("llava", layers=4), processor)
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    for path in (tmp_path / "broken.safetensors", tmp_path / "none.safetensors"):
        with pytest.raises(LoadError, match="cannot be read as safetensors"):
            DyVTE.from_checkpoint(path)


# --- images that come back --------------------------------------------------------------------------------------------

FOLLOWING = {"llava": " a cat USER: and now? ASSISTANT:", "llava_next": " a cat USER: and now? ASSISTANT:"}
CHATML = "a cat<|im_end|>\n<|im_start|>user\nand now?<|im_end|>\n<|im_start|>assistant\n"


def following(family, batch, text=None):
    """(B, T) token ids of one more answer and question."""
    tokenizer = tiny_processor(family).tokenizer
    ids = tokenizer(text or FOLLOWING.get(family, CHATML), add_special_tokens=False, return_tensors="pt")["input_ids"]
    return ids.expand(batch, -1)


def continued(model, ids, mask):
    """What generate gives the model for new tokens on a cache."""
    call = {"input_ids": ids, "attention_mask": mask}
    if model.config.model_type == "qwen2_5_vl":
        positions = (mask.cumsum(dim=1) - 1)[:, -ids.shape[1] :] + model.model.rope_deltas  # (B, T)
        call["position_ids"] = positions.expand(3, -1, -1)
    return call


def turns(model, processor, inputs, techniques):
    """Logits, exits and reports of one turn after the other on one cache, each under its technique."""
    cache = DynamicCache(config=model.config.get_text_config())
    family, mask = model.config.model_type, inputs["attention_mask"]
    found, exits, reports, given = [], [], [], [inputs["input_ids"]]
    for number, technique in enumerate(techniques):
        with technique(model, processor) as run, torch.no_grad():
            if number == 0:
                found.append(model(**inputs, past_key_values=cache).logits)
            else:
                ids = following(family, mask.shape[0])
                mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
                given.append(ids)
                found.append(model(**continued(model, ids, mask), past_key_values=cache).logits)
            exits.append(run.outputs.get("DyVTE", {}).get("exit_layer", [None] * mask.shape[0]))
            reports.append(run.report())
            assert [layer.get_seq_length() for layer in cache.layers] == reports[-1].cache_lengths
    return found, exits, reports, {**inputs, "input_ids": torch.cat(given, 1), "attention_mask": mask}, cache


def whole(model, inputs):
    """Inputs of the whole conversation as the reference takes them."""
    if "mm_token_type_ids" in inputs:
        missing = inputs["input_ids"].shape[1] - inputs["mm_token_type_ids"].shape[1]
        types = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, missing))
        return {**inputs, "mm_token_type_ids": types}
    return inputs


def check_turns(model, found, exits, inputs, policy=None, plain=False):
    """Every turn's text rows equal the reference's, row by row."""
    widths = [logits.shape[1] for logits in found]
    for number, prompt in enumerate(prompts(model, whole(model, inputs))):
        length = prompt.visual.shape[0]
        starts = [0]
        for width in widths[:0:-1]:
            starts.insert(1, (starts[1] if len(starts) > 1 else length) - width)
        expected = several_turns(model, prompt, starts, [turn[number] for turn in exits], policy)
        text = ~prompt.visual
        together = torch.cat([logits[number] for logits in found])[-length:]
        close(together[text], expected[text])


@every_family
@every_backend
@pytest.mark.parametrize("kind", ["one", "batch", "two_images"])
@pytest.mark.parametrize("second", [{"threshold": 1.0}, {"threshold": 0.0, "min_exit_layer": 3}], ids=["all", "some"])
def test_a_later_question_gets_the_image_back(family, attn, kind, second):
    """Rows left after layer 1 and go on with the next question: to the end, or to layer 3."""
    model, processor, inputs = prepared(family, attn, kind)
    first = trained(model, threshold=0.0, min_exit_layer=1, recoverable=True)
    again = trained(model, recoverable=True, **second)
    found, exits, _, both, cache = turns(model, processor, inputs, [first, again])
    assert 1 in exits[0]
    assert set(exits[1]) <= ({None} if second["threshold"] else {3, None})
    check_turns(model, found, exits, both)
    # decoding goes on from there
    token = torch.full((both["input_ids"].shape[0], 1), 30)
    mask = torch.cat([both["attention_mask"], torch.ones_like(token)], dim=1)
    with again(model, processor), torch.no_grad():
        one = model(**continued(model, token, mask), past_key_values=cache).logits
    both = {**both, "input_ids": torch.cat([both["input_ids"], token], 1), "attention_mask": mask}
    check_turns(model, [found[0], torch.cat([found[1], one], dim=1)], exits, both)


@every_family
@pytest.mark.parametrize("kind", ["batch", "two_images"])
def test_gates_decide_anew_in_every_turn(family, kind):
    """Four turns, in which rows of a batch go further, or not as far as before, each by itself."""
    model, processor, inputs = prepared(family, kind=kind)
    techniques = [trained(model, seed=seed, threshold=0.55, recoverable=True) for seed in (0, 1, 2, 3)]
    found, exits, *_, both, _ = turns(model, processor, inputs, techniques)
    moves = {
        (a is None or (b is not None and b <= a))
        for t in (0, 1, 2)
        for a, b in zip(exits[t], exits[t + 1], strict=True)
    }
    assert moves == {True, False}, exits  # otherwise this shows nothing
    check_turns(model, found, exits, both)


def test_the_gates_read_the_new_question():
    model, processor, inputs = prepared(kind="one")
    technique = trained(model, threshold=1.0, recoverable=True)
    first = trained(model, threshold=0.0, recoverable=True, min_exit_layer=1)
    cache = DynamicCache(config=model.config.get_text_config())
    with first(model, processor), torch.no_grad():
        model(**inputs, past_key_values=cache)
    ids = following("llava", 1)
    with technique(model, processor) as run, torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    told = run.outputs["DyVTE"]["probabilities"]
    assert list(told) == [0, 1, 2, 3, 4]  # also below the layer where the rows come back
    both = {**inputs, "input_ids": torch.cat([inputs["input_ids"], ids], 1)}
    both["attention_mask"] = torch.ones_like(both["input_ids"])
    (prompt,) = prompts(model, both)
    states = reference_states(model, both)[0].states[1]  # after layer 0 both turns are the plain model's
    text = torch.cat([prompt.visual[: -ids.shape[1]] | True, prompt.visual[-ids.shape[1] :]])  # the new turn alone
    expected = probability(technique, 0, states, text, text.shape[0] - 1)
    assert told[0][0] == pytest.approx(expected, abs=1e-5)


def test_a_gate_may_keep_the_rows_away():
    """The new question is content with less than the first: nothing enters again, and the rows are kept for later."""
    model, processor, inputs = prepared()
    techniques = [
        trained(model, threshold=0.0, min_exit_layer=layer, recoverable=True) for layer in (2, 0, 4, 1, 5 - 1)
    ]
    found, exits, reports, both, _ = turns(model, processor, inputs, techniques)
    rows = [number for number, has in enumerate(asked(model, inputs)) if has]
    assert [[turn[n] for n in rows] for turn in exits] == [[layer] * len(rows) for layer in (2, 0, 4, 1, 4)]
    check_turns(model, found, exits, both)
    new = both["input_ids"].shape[1] - found[0].shape[1]
    text = [int(text_rows(model, row(inputs, n)).sum()) for n in range(4)]
    valid = [int(inputs["attention_mask"][n].sum()) for n in range(4)]
    widest = max(t if n in rows else v for n, (t, v) in enumerate(zip(text, valid, strict=True)))
    assert reports[-1].cache_lengths[5] == widest + new


def test_without_it_later_questions_see_what_the_first_one_left():
    model, processor, inputs = prepared(kind="one")
    first = trained(model, threshold=0.0, min_exit_layer=1)
    found, _, reports, both, cache = turns(model, processor, inputs, [first, trained(model, threshold=1.0)])
    with DyVTE(exit_layer=1)(model):
        expected = logits(model, both)
    text = text_rows(model, both)
    close(torch.cat(found, dim=1)[text], expected[text])
    assert cache.mllm_state.store == {}
    assert reports[0].kv_bytes == sum(reports[0].cache_lengths) * 2 * 2 * 16 * 4  # nothing is kept beside keys


def test_kept_rows_are_booked():
    model, processor, inputs = prepared(kind="one")
    first = trained(model, threshold=0.0, min_exit_layer=1, recoverable=True)
    _, _, reports, *_ = turns(model, processor, inputs, [first])
    rows = int(visual_mask(model, inputs).sum())
    kept = rows * (48 + 2 * 16) * 4 + rows * 0
    assert reports[0].kv_bytes == sum(reports[0].cache_lengths) * 2 * 2 * 16 * 4 + kept


@every_backend
def test_rows_that_come_back_follow_their_policy(attn):
    """Under NAAViT they go on without attending."""
    model, processor, inputs = prepared(attn=attn)
    stacks = [
        Stack(NAAViT(), trained(model, threshold=0.0, min_exit_layer=1, recoverable=True)),
        Stack(NAAViT(), trained(model, threshold=1.0, recoverable=True)),
    ]
    found, exits, _, both, _ = turns(model, processor, inputs, stacks)
    check_turns(model, found, exits, both, policy="naavit")


def test_a_new_image_in_a_later_turn_beside_one_that_comes_back():
    model, processor = tiny_model("llava"), tiny_processor("llava")
    texts = ["USER: see <image> what is it? ASSISTANT:", " a cat USER: and <image> now? ASSISTANT:"]
    given = [
        processor(text=[t], images=[tiny_image(n, (32, 32))], return_tensors="pt", add_special_tokens=n == 0)
        for n, t in enumerate(texts)
    ]
    third = following("llava", 1)
    both = {name: torch.cat([turn[name] for turn in given], 0 if name == "pixel_values" else 1) for name in given[0]}
    for layers in ((1, 3, 4), (3, 1, 4), (3, 1, 2), (0, 4, None)):
        cache, found, exits = DynamicCache(config=model.config.get_text_config()), [], []
        calls = [given[0], {**given[1], "attention_mask": both["attention_mask"]}, {"input_ids": third}]
        for layer, call in zip(layers, calls, strict=True):
            limits = {"threshold": 1.0} if layer is None else {"threshold": 0.0, "min_exit_layer": layer}
            with trained(model, recoverable=True, **limits)(model, processor) as run, torch.no_grad():
                found.append(model(**call, past_key_values=cache).logits)
                exits.append(run.outputs["DyVTE"]["exit_layer"])
                assert [one.get_seq_length() for one in cache.layers] == run.report().cache_lengths
        assert exits == [[layer] for layer in layers]
        ids = torch.cat([both["input_ids"], third], dim=1)
        check_turns(model, found, exits, {**both, "input_ids": ids, "attention_mask": torch.ones_like(ids)})


@pytest.mark.parametrize("exit_layer", [0, 2])
def test_rows_that_another_technique_brings_back(exit_layer):
    """Their exit is the new question's, also where they enter behind it."""
    model, processor, inputs = prepared(kind="one")

    class Returning(Technique):
        """Visual rows leave before layer 3, where the next turn finds them."""

        name: ClassVar[str] = "Returning"
        paper: ClassVar[str] = ""

        def keep(self, view):
            if view.layer != 3 or view.layout.revived:
                return view.alive if view.layer == 3 else None
            view.store["stash"] = view.stash(view.layout.visual & view.alive)
            return view.alive & ~view.layout.visual

        def revive(self, layout, store):
            return Revived(store["stash"], store["stash"].layer[:, 0])

    first = Stack(Returning(), trained(model, threshold=1.0))
    chosen = {
        "gate": trained(model, threshold=0.0, min_exit_layer=exit_layer),
        "list": DyVTE(exit_layer=[exit_layer]),
        "chance": DyVTE(histogram=[float(layer == exit_layer) for layer in range(6)]),
    }
    for technique in chosen.values():
        found, _, reports, both, _ = turns(model, processor, inputs, [first, Stack(Returning(), technique)])
        check_turns(model, found, [[2], [2]], both)
        text = int((~visual_mask(model, both)).sum())
        assert reports[1].cache_lengths == [both["input_ids"].shape[1]] * 3 + [text] * 3


def test_generate_in_a_later_turn():
    """As a chat does it: the whole conversation's ids and the cache; and with guesses, which are no new questions."""
    model, processor, inputs = prepared(kind="one")
    technique = trained(model, threshold=0.0, min_exit_layer=1, recoverable=True)
    again = trained(model, threshold=1.0, recoverable=True)
    for guesses in ({}, {"prompt_lookup_num_tokens": 2}):
        with technique(model, processor) as run:
            first = model.generate(**inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, **guesses)
            assert run.report().exit_layer == [1]
        stash = first.past_key_values.mllm_state.store["0.DyVTE"]["stash"]
        assert int(stash.valid.sum()) == int(visual_mask(model, inputs).sum())  # guesses are no new question
    ids = torch.cat([first.sequences, following("llava", 1)], dim=1)
    with again(model, processor) as run:
        said = model.generate(
            input_ids=ids,
            past_key_values=first.past_key_values,
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    both = {**inputs, "input_ids": said.sequences[:, :-1], "attention_mask": torch.ones_like(said.sequences[:, :-1])}
    (prompt,) = prompts(model, both)
    # the first answer's last token is read with the second question
    expected = several_turns(model, prompt, [0, first.sequences.shape[1] - 1], [1, None])
    close(torch.stack(said.logits, dim=1)[0], expected[-3:])


def test_hidden_states_are_refused_where_rows_come_back():
    model, processor, inputs = prepared(kind="one")
    technique = trained(model, threshold=0.0, recoverable=True)
    cache = DynamicCache(config=model.config.get_text_config())
    with technique(model, processor), torch.no_grad():
        model(**inputs, past_key_values=cache)
        with pytest.raises(UnsupportedModelError, match="rows of an earlier turn"):
            model(input_ids=following("llava", 1), past_key_values=cache, output_hidden_states=True)


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_command_line_shows_it(monkeypatch, capsys, tmp_path):
    code, out, _ = run_command(monkeypatch, capsys, "list")
    assert code == 0
    lines = out.splitlines()
    (place,) = [number for number, line in enumerate(lines) if line.startswith("DyVTE ")]
    assert "mllm train dyvte" in lines[place]
    assert "exit_layer" in lines[place + 1]
    config = tmp_path / "gate.yaml"
    config.write_text("techniques: [{technique: DyVTE, gate: paper, max_exit_layer: 15}]")
    code, out, _ = run_command(monkeypatch, capsys, "cost", "--arch", "llava-1.5-7b", "--config", config)
    assert code == 0
    assert out.startswith("4.668 TFLOPs (54.9%")
    assert "537,001,984 added parameters" in out
