"""The promises that every technique keeps, on every family and attention backend (DESIGN section 5).

A new technique needs one row in :data:`CASES`; one without it fails ``test_every_technique_has_a_case``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
from dyvte_reference import draw_extras, gate_extras
from lorra_reference import lorra_options
from reference import Extras, Prompt, reference_logits
from tiny import FAMILIES, row, tiny_inputs, tiny_model, tiny_processor, visual_mask
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from urag_reference import urag_options

from mllm import Stack, Technique, load_techniques
from mllm.adapters import LoRRA, ModalityMutualAttention
from mllm.cost import ModelSpec
from mllm.engine import Step
from mllm.errors import DidNotFireError, LoadError, UnsupportedModelError
from mllm.saving import LearnedWeights, fingerprint
from mllm.technique import TrainedTechnique, load_all
from mllm.token_pruning import EEMLLM, DyVTE, FreezeVisual, NAAViT, URaG

LAYERS = 6
BACKENDS = ("eager", "sdpa")
MULTIMODAL = ("one", "batch", "two_images", "same_length_ragged", "mixed")


@dataclass(frozen=True)
class Case:
    """A technique at a setting that changes the tiny models, and what the reference is told for it.

    Attributes:
        stack: the setting; learned parts are filled with random numbers that show (see :func:`with_random_weights`).
        neutral: a setting that changes nothing; None where only fresh learned parts are neutral.
        reference: options of :func:`reference.reference_logits`, or a function of model and stack that makes them.
        saves: whether fewer FLOPs are spent than without.
        labels: which text may be trained on, ``labels(model, inputs)`` -> (B, S) bool; None: all.
        kinds: inputs that show it, by the names of those that show the others.
        scale: of the random numbers in learned parts: large enough to show, small enough for float32 to agree.
    """

    stack: Stack
    neutral: Stack | None = None
    reference: dict[str, Any] | Callable[[Any, Stack], dict[str, Any]] = field(default_factory=dict)
    saves: bool = True
    labels: Callable[[Any, Any], torch.Tensor] | None = None
    kinds: dict[str, str] = field(default_factory=dict)
    scale: float = 0.3

    def on(self, model) -> Stack:
        """The stack with learned parts for this model."""
        return with_random_weights(self.stack, model, scale=self.scale)

    def options(self, model) -> dict[str, Any]:
        """What the naive reference must do on this model."""
        return self.reference(model, self.on(model)) if callable(self.reference) else self.reference

    def attach(self, model, **options: Any):
        return self.on(model).attach(model, processor_of(model), **options)

    def __call__(self, model):
        return self.on(model)(model, processor_of(model))


def processor_of(model):
    return tiny_processor(model.config.model_type)


def with_random_weights(stack: Stack, model, seed: int = 0, scale: float = 0.3) -> Stack:
    """The stack with learned parts that are not neutral, the same for the same model shape."""
    spec = ModelSpec.from_config(model.config.get_text_config(decoder=True))
    generator = torch.Generator().manual_seed(seed)
    techniques = []
    for technique in stack.techniques:
        if isinstance(technique, TrainedTechnique) and technique.learns:
            tensors = {
                name: torch.randn(value.shape, generator=generator) * scale
                for name, value in technique.build(spec).state_dict().items()
            }
            technique = technique.with_learned(LearnedWeights(tensors, fingerprint(model), "random"))
        techniques.append(technique)
    return Stack(*techniques)


def mma_options(model, stack: Stack) -> dict[str, Any]:
    """Image tokens see what stands between them and the header of the answer, read from the text itself."""
    headers = ["ASSISTANT:", "<|im_start|>assistant\n"]

    def extras(prompt: Prompt) -> Extras:
        tokenizer = processor_of(model).tokenizer
        tokens = [tokenizer.decode([token]) if token >= 0 else "?" for token in prompt.ids.tolist()]
        opened = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
        visual = prompt.visual.nonzero()[:, 0].tolist()
        for header in headers:
            spelled = [tokenizer.decode([t]) for t in tokenizer(header, add_special_tokens=False)["input_ids"]]
            ends = [n + len(spelled) for n in range(len(tokens)) if tokens[n : n + len(spelled)] == spelled]
            for query in visual if ends else []:
                for key in range(query + 1, ends[0]):
                    opened[query, key] = key not in visual
        return Extras(opened=opened)

    return {"extras": extras}


def mma_lorra_options(model, stack: Stack) -> dict[str, Any]:
    opened, beside = (options(model, stack)["extras"] for options in (mma_options, lorra_options))
    return {"extras": lambda prompt: replace(opened(prompt), branch=beside(prompt).branch)}


def before_images(model, inputs) -> torch.Tensor:
    """(B, S) bool, tokens with no image before them."""
    return visual_mask(model, inputs).cumsum(dim=1) == 0


CASES: dict[str, Case] = {
    "DyVTE": Case(Stack(DyVTE(exit_layer=2)), Stack(DyVTE(exit_layer=LAYERS - 1)), {"exit_after": 2}),
    "NAAViT": Case(Stack(NAAViT()), Stack(NAAViT(layers=[])), {"policy": "naavit"}),
    "EEMLLM": Case(Stack(EEMLLM()), Stack(EEMLLM(layers=[])), {"policy": "ee"}),
    "FreezeVisual": Case(Stack(FreezeVisual()), Stack(FreezeVisual(layers=[])), {"policy": "freeze"}),
    # some layers only: rows change between active and passive on the way
    "NAAViT some layers": Case(
        Stack(NAAViT(layers=[1, 2, 4])), Stack(), {"policy": "naavit", "policy_layers": (1, 2, 4)}
    ),
    # two techniques: rows are passive first, then gone
    "FreezeVisual, DyVTE": Case(
        Stack(FreezeVisual(layers="1:4"), DyVTE(exit_layer=3)),
        Stack(FreezeVisual(layers=[]), DyVTE(exit_layer=LAYERS - 1)),
        {"policy": "freeze", "policy_layers": (1, 2, 3), "exit_after": 3},
    ),
    # gates: each row of a batch leaves at its own layer; rows without a question leave after the last one allowed
    "DyVTE light": Case(
        Stack(DyVTE(gate="light", threshold=0.6, min_exit_layer=1, max_exit_layer=4)),
        Stack(DyVTE(gate="light", threshold=1.0)),
        lambda model, stack: {"extras": gate_extras(model, stack.techniques[0], [1, 2, 3], 4)},
        labels=lambda model, inputs: before_images(model, inputs),
    ),
    "DyVTE paper": Case(
        Stack(DyVTE(gate="paper", candidate_layers=[0, 2, 3, 4])),
        Stack(DyVTE(gate="paper", threshold=1.0)),
        lambda model, stack: {"extras": gate_extras(model, stack.techniques[0], [0, 2, 3, 4])},
        labels=lambda model, inputs: before_images(model, inputs),
    ),
    "DyVTE histogram": Case(
        Stack(DyVTE(histogram=[1, 2, 2, 1, 1, 0], seed=1)),
        Stack(DyVTE(histogram=[0, 0, 0, 0, 0, 1])),
        lambda model, stack: {"extras": draw_extras(model, stack.techniques[0])},
    ),
    "NAAViT, DyVTE light": Case(
        Stack(NAAViT(), DyVTE(gate="light", hidden=16, max_exit_layer=3, recoverable=True)),
        Stack(NAAViT(layers=[]), DyVTE(gate="light", threshold=1.0)),
        lambda model, stack: {
            "policy": "naavit",
            "extras": gate_extras(model, stack.techniques[1], [0, 1, 2], 3),
        },
        labels=lambda model, inputs: before_images(model, inputs),
    ),
    "FreezeVisual, DyVTE light": Case(
        Stack(FreezeVisual(layers="1:5"), DyVTE(gate="light", min_exit_layer=2, max_exit_layer=4)),
        Stack(FreezeVisual(layers=[]), DyVTE(gate="light", candidate_layers=[])),
        lambda model, stack: {
            "policy": "freeze",
            "policy_layers": (1, 2, 3, 4),
            "extras": gate_extras(model, stack.techniques[1], [2, 3], 4),
        },
        labels=lambda model, inputs: before_images(model, inputs),
    ),
    "LoRRA": Case(Stack(LoRRA(rank=3, router_length=512)), None, lorra_options, saves=False, scale=0.15),
    "MMA": Case(
        Stack(ModalityMutualAttention()),
        Stack(),
        mma_options,
        saves=False,
        labels=lambda model, inputs: before_images(model, inputs),
    ),
    # learners see causally whatever images see of their question; the router reads what attention really did
    "MMA, LoRRA": Case(
        Stack(ModalityMutualAttention(), LoRRA(rank=3, router_length=512, layers=[0, 2, 3, 5])),
        Stack(LoRRA(rank=3)),
        mma_lorra_options,
        saves=False,
        labels=lambda model, inputs: before_images(model, inputs),
        scale=0.15,
    ),
    "URaG": Case(
        Stack(URaG(layer=2, keep_pages=1, hidden=24, width=16)),
        Stack(URaG(layer=2, policy="all", hidden=24, width=16)),
        urag_options,
        kinds={"one": "pages", "batch": "mixed"},
    ),
    # pages leave first, then all visual rows
    "URaG, DyVTE": Case(
        Stack(URaG(layer=2, keep_pages=2, hidden=24, width=16), DyVTE(exit_layer=3)),
        Stack(URaG(layer=2, policy="all", hidden=24, width=16), DyVTE(exit_layer=LAYERS - 1)),
        urag_options,
        kinds={"one": "pages", "batch": "mixed"},
    ),
}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_family = pytest.mark.parametrize("family", FAMILIES)
every_backend = pytest.mark.parametrize("attn", BACKENDS)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal to ``tolerance`` of the largest value."""
    assert a.shape == b.shape
    scale = max(1.0, float(b.detach().abs().max()))
    difference = float((a - b).detach().abs().max())
    assert difference <= tolerance * scale, f"differs by {difference:.2e} at scale {scale:.2e}"


def logits(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits  # (B, S, V)


def text_rows(model, inputs) -> torch.Tensor:
    """(B, S) bool: neither visual nor padding."""
    return inputs["attention_mask"].bool() & ~visual_mask(model, inputs)


def prepared(family: str, attn: str, kind: str, case: Case | None = None):
    model = tiny_model(family, attn)
    kind = kind if case is None else case.kinds.get(kind, kind)
    return model, tiny_inputs(model, tiny_processor(family), kind)


def test_every_technique_has_a_case():
    covered = {type(technique).name for case in CASES.values() for technique in case.stack.techniques}
    assert covered >= {name for name, cls in load_all().items() if cls.__module__.startswith("mllm.")}


# 1. Neutral is identical ----------------------------------------------------------------------------------------------


@every_case
@every_family
@every_backend
def test_neutral_and_text_only_are_bitwise_identical(case, family, attn):
    model, inputs = prepared(family, attn, "batch", case)
    text = tiny_inputs(model, tiny_processor(family), "text")
    plain, plain_text = logits(model, inputs), logits(model, text)
    neutral = case.stack if case.neutral is None else case.neutral  # fresh learned parts
    with neutral(model, processor_of(model)):
        assert torch.equal(logits(model, inputs), plain)
    if any(technique.acts_on_text for technique in case.stack.techniques):
        return
    with case(model):
        assert torch.equal(logits(model, text), plain_text)


# 2. It fired ----------------------------------------------------------------------------------------------------------


@every_case
@every_family
@every_backend
def test_it_fired_in_forward_and_generate(case, family, attn):
    model, inputs = prepared(family, attn, "one", case)
    plain = logits(model, inputs)
    with case(model) as run:
        changed = logits(model, inputs)
        after_forward = run.report()
        model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
        after_generate = run.report()
    assert not torch.allclose(changed, plain, atol=1e-3), "the reference inputs do not show that anything happened"
    assert after_forward.steps == 1
    assert after_generate.steps == 3  # one prefill, one decoded token fed back
    assert (after_forward.flops < after_forward.dense_flops) == case.saves
    assert after_forward.visual_tokens == visual_mask(model, inputs).sum(dim=1).tolist()


class DoesNothing(Technique):
    """Claims to change the model and does not."""

    name: ClassVar[str] = "DoesNothing"
    paper: ClassVar[str] = ""


@every_family
def test_a_technique_that_did_nothing_raises(family):
    model, inputs = prepared(family, "sdpa", "one")
    with DoesNothing()(model):
        with pytest.raises(DidNotFireError, match="DoesNothing"):
            logits(model, inputs)
        with pytest.raises(DidNotFireError, match="DoesNothing"):
            model.generate(**inputs, max_new_tokens=2)
        logits(model, tiny_inputs(model, tiny_processor(family), "text"))  # nothing to do, nothing to raise


# 3. Physical equals masked --------------------------------------------------------------------------------------------


@every_case
@every_family
@every_backend
@pytest.mark.parametrize("kind", MULTIMODAL)
def test_physical_equals_the_naive_reference(case, family, attn, kind):
    model, inputs = prepared(family, attn, kind, case)
    expected = reference_logits(model, inputs, **case.options(model))
    with case(model):
        found = logits(model, inputs)
    valid, text = inputs["attention_mask"].bool(), text_rows(model, inputs)
    for number, reference in enumerate(expected):
        close(found[number][text[number]], reference[text[number][valid[number]]])


# 4. Cached equals cache-free ------------------------------------------------------------------------------------------


@every_case
@every_family
@every_backend
@pytest.mark.parametrize("kind", ["one", "batch"])
def test_cached_equals_cache_free(case, family, attn, kind):
    model, inputs = prepared(family, attn, kind, case)
    steps, length = 4, inputs["input_ids"].shape[1]
    with case(model) as run:
        cached = model.generate(
            **inputs,
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        lengths = run.report().cache_lengths
        assert [layer.get_seq_length() for layer in cached.past_key_values.layers] == lengths
        assert lengths[0] == length + steps - 1
        longer = extend(inputs, cached.sequences[:, length:-1])
        free = logits(model, longer)[:, length - 1 :]  # (B, steps, V)
    close(torch.stack(cached.logits, dim=1), free)


def extend(inputs, tokens: torch.Tensor) -> dict[str, Any]:
    """The same inputs with answer tokens appended."""
    more = dict(inputs)
    more["input_ids"] = torch.cat([inputs["input_ids"], tokens], dim=1)
    more["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], dim=1)
    if "mm_token_type_ids" in inputs:
        more["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(tokens)], dim=1)
    return more


# 5. A batch equals its rows -------------------------------------------------------------------------------------------


@every_case
@every_family
@every_backend
@pytest.mark.parametrize("kind", ["batch", "two_images", "same_length_ragged", "mixed"])
def test_a_batch_equals_its_rows(case, family, attn, kind):
    model, inputs = prepared(family, attn, kind, case)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with case(model):
        together = logits(model, inputs)
        answers = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        for number in range(together.shape[0]):
            single = row(inputs, number)
            alone = logits(model, single)
            text = text_rows(model, single)[0]
            close(together[number, -alone.shape[1] :][text], alone[0][text])
            assert torch.equal(model.generate(**single, **options)[0, single["input_ids"].shape[1] :], answers[number])


# 6. Backends agree ----------------------------------------------------------------------------------------------------


@every_case
@every_family
def test_backends_agree(case, family):
    results = []
    for attn in BACKENDS:
        model, inputs = prepared(family, attn, "batch", case)
        with case(model):
            results.append(logits(model, inputs)[text_rows(model, inputs)])
    close(*results)


@every_case
@every_family
def test_an_undeclared_backend_raises(case, family):
    model = tiny_model(family, "sdpa", fresh=True)
    model.model.language_model.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedModelError, match=r"flex_attention.*eager, sdpa"):
        case.attach(model)


# 7. Detach is exact ---------------------------------------------------------------------------------------------------


def snapshot(model) -> dict[str, Any]:
    """Everything that attaching may not change for good."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return {
        "modules": [(name, id(module), type(module), module.training) for name, module in model.named_modules()],
        "forwards": [(name, module.__dict__.get("forward")) for name, module in model.named_modules()],
        "hooks": [[list(getattr(module, kind).values()) for kind in hooks] for module in model.modules()],
        "attributes": [sorted(module.__dict__) for module in model.modules()],
        "parameters": [(name, id(p), p.requires_grad, p.grad is None) for name, p in model.named_parameters()],
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "config": copy.deepcopy(model.config.to_dict()),
        "attention": dict(ALL_ATTENTION_FUNCTIONS.items()),
        "models": set(AutoModel._model_mapping.keys()),
    }


def assert_untouched(model, before: dict[str, Any], call: Callable[[], torch.Tensor], plain: torch.Tensor) -> None:
    """The model is bitwise what it was, and computes bitwise what it did."""
    assert torch.equal(call(), plain)
    after = snapshot(model)
    for name, value in before.items():
        if name == "values":
            assert value.keys() == after[name].keys()
            assert all(torch.equal(tensor, after[name][key]) for key, tensor in value.items())
        else:
            assert value == after[name], f"{name} changed"


@every_case
@every_family
@every_backend
def test_detach_is_exact(case, family, attn):
    model, inputs = prepared(family, attn, "one", case)
    plain = logits(model, inputs)  # also lets the model install its own recording hooks first
    before = snapshot(model)
    handle = case.attach(model)
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    handle.detach()
    handle.detach()  # harmless
    assert_untouched(model, before, lambda: logits(model, inputs), plain)


@every_case
@every_family
def test_detach_is_exact_after_an_exception(case, family):
    model, inputs = prepared(family, "sdpa", "one", case)
    plain = logits(model, inputs)
    before = snapshot(model)
    layer = model.model.language_model.layers[3]

    def fail(module, args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), case(model):  # noqa: PT012
        hook = layer.mlp.register_forward_pre_hook(fail)
        try:
            logits(model, inputs)
        finally:
            hook.remove()
    assert_untouched(model, before, lambda: logits(model, inputs), plain)


class Leaky(DyVTE):
    """Leaves a hook, a changed weight or a changed config behind."""

    name: ClassVar[str] = "Leaky"
    what: str

    def keep(self, view):
        keep = super().keep(view)
        if view.layer == 0:
            Leaky.leak(self.what, Leaky.victim)
        return keep

    victim: ClassVar[Any] = None

    @staticmethod
    def leak(what: str, model) -> None:
        if what == "hook":
            model.model.register_forward_hook(lambda *_: None)
        elif what == "weight":
            next(model.parameters()).data.add_(1e-3)
        elif what == "requires_grad":
            parameter = next(model.parameters())
            parameter.requires_grad_(not parameter.requires_grad)
        elif what == "config":
            model.config.leaked = True
        elif what == "attribute":
            model.model.leaked = True


@pytest.mark.parametrize("what", ["hook", "weight", "requires_grad", "config", "attribute"])
def test_a_leaky_technique_fails(what):
    model = tiny_model("llava", "sdpa", fresh=True)
    inputs = tiny_inputs(model, tiny_processor("llava"), "one")
    plain = logits(model, inputs)
    before = snapshot(model)
    Leaky.victim = model
    with Leaky(exit_layer=2, what=what)(model):
        logits(model, inputs)
    with pytest.raises(AssertionError):
        assert_untouched(model, before, lambda: logits(model, inputs), plain)


# 8. Others are untouched ----------------------------------------------------------------------------------------------


@every_case
@every_family
def test_other_models_are_untouched(case, family):
    model, inputs = prepared(family, "sdpa", "one", case)
    other = tiny_model(family, "sdpa", seed=1)
    plain, other_plain = logits(model, inputs), logits(other, inputs)
    before = snapshot(other)
    with case(model):
        alone = logits(model, inputs)
        assert_untouched(other, before, lambda: logits(other, inputs), other_plain)
    with case(other):
        other_alone = logits(other, inputs)
    with case(model) as run, case(other) as other_run:
        assert torch.equal(logits(model, inputs), alone)
        assert torch.equal(logits(other, inputs), other_alone)
        assert (run.steps, other_run.steps) == (1, 1)
    assert torch.equal(logits(model, inputs), plain)


# 9. Save and load -----------------------------------------------------------------------------------------------------


@every_case
@every_family
def test_save_and_load(case, family, tmp_path):
    model, inputs = prepared(family, "sdpa", "one", case)
    handle = case.attach(model)
    expected = logits(model, inputs)
    handle.save_pretrained(tmp_path / "technique")
    handle.detach()
    loaded = load_techniques(tmp_path / "technique", model)
    assert loaded == case.on(model)
    with loaded(model, processor_of(model)):
        assert torch.equal(logits(model, inputs), expected)
    with pytest.raises(LoadError, match=r"asks for layers 6; this model has layers 5.*Load the model"):
        load_techniques(tmp_path / "technique", tiny_model(family, "sdpa", layers=LAYERS - 1))


# 10. Gradients --------------------------------------------------------------------------------------------------------


@every_case
@every_family
@every_backend
def test_gradients(case, family, attn):
    """The loss and its gradients are those of the reference, with and without checkpointing; frozen stays frozen."""
    model = tiny_model(family, attn, fresh=True)
    inputs = tiny_inputs(model, tiny_processor(family), case.kinds.get("batch", "batch"))
    # a row's first token would be predicted from the padding before it, which the reference does not have
    first = inputs["attention_mask"].cumsum(dim=1) == 1
    labels = inputs["input_ids"].masked_fill(~text_rows(model, inputs) | first, -100)
    if case.labels is not None:
        labels = labels.masked_fill(~case.labels(model, inputs), -100)
    model.requires_grad_(False)
    layers = model.model.language_model.layers
    chosen = {
        "k_proj": layers[1].self_attn.k_proj.weight,
        "up_proj": layers[2].mlp.up_proj.weight,
        "norm": layers[0].input_layernorm.weight,
    }
    for parameter in chosen.values():
        parameter.requires_grad_(True)

    def run(checkpointing: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.train(checkpointing)  # the tiny models have no dropout
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        with case.attach(model, freeze=False):
            loss = model(**inputs, labels=labels, use_cache=False).loss
            loss.backward()
        model.gradient_checkpointing_disable()
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        return loss.detach(), {name: parameter.grad.clone() for name, parameter in chosen.items()}

    loss, gradients = run(checkpointing=False)
    checkpointed_loss, checkpointed = run(checkpointing=True)
    close(checkpointed_loss, loss)
    for name, gradient in gradients.items():
        close(checkpointed[name], gradient)

    model.eval()
    model.zero_grad()
    reference = reference_loss(model, inputs, labels, case.options(model))
    reference.backward()
    close(loss, reference.detach())
    for name, parameter in chosen.items():
        close(gradients[name], parameter.grad, tolerance=1e-4)


def reference_loss(model, inputs, labels, options) -> torch.Tensor:
    valid = inputs["attention_mask"].bool()
    losses = []
    for number, found in enumerate(reference_logits(model, inputs, **options)):
        target = labels[number][valid[number]]
        losses.append(torch.nn.functional.cross_entropy(found[:-1], target[1:], reduction="none", ignore_index=-100))
    total = torch.cat(losses)
    counted = sum(int((labels[n][valid[n]][1:] != -100).sum()) for n in range(len(losses)))
    return total.sum() / counted


@every_family
def test_reentrant_checkpointing_is_refused(family):
    model = tiny_model(family, "sdpa", fresh=True)
    inputs = tiny_inputs(model, tiny_processor(family), "one")
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with NAAViT()(model), pytest.raises(UnsupportedModelError, match="use_reentrant"):
        model(**inputs, use_cache=False)


# 11. Cost is honest ---------------------------------------------------------------------------------------------------


@every_case
@every_family
@every_backend
@pytest.mark.parametrize("kind", ["one", "batch"])
def test_cost_equals_what_is_counted(case, family, attn, kind, monkeypatch):
    model, inputs = prepared(family, attn, kind, case)
    counted = counted_flops(model, lambda: logits(model, inputs))
    with Stack()(model) as run:
        logits(model, inputs)
    assert run.flops == run.dense_flops
    assert run.flops == pytest.approx(counted, rel=0.01)
    with case(model) as run:
        counted = counted_flops(model, lambda: logits(model, inputs))
        # rows of one shape attend in segments, which spares keys behind them: not booked as saved, as it is not for
        # the plain model, whose kernel spares as much
        assert counted <= 1.01 * run.flops
    monkeypatch.setattr(Step, "_segments", lambda *_: None)
    monkeypatch.setattr(Step, "_memory_segments", lambda *_: None)
    with case(model) as run:
        counted = counted_flops(model, lambda: logits(model, inputs))
        assert run.flops == pytest.approx(counted, rel=0.01)
        run.reset()
        counted = counted_flops(
            model, lambda: model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        )
        assert run.flops == pytest.approx(counted, rel=0.01)


def counted_flops(model, call: Callable[[], Any]) -> int:
    """FLOPs that torch counts inside the decoder layers."""
    counter = FlopCounterMode(display=False, depth=None)
    # the counter knows no formula for the CPU's fused attention: have it computed as matrix products
    with counter, sdpa_kernel(SDPBackend.MATH):
        call()
    # passive rows run their projections from a hook, outside the layer's own scope: count the whole decoder
    totals = counter.get_flop_counts()
    names = [name for name in totals if name.endswith("language_model")]
    assert len(names) == 1, names
    return sum(totals[names[0]].values())


# 12. No leakage -------------------------------------------------------------------------------------------------------


@every_case
@every_family
@every_backend
def test_no_text_position_sees_later_answer_tokens(case, family, attn):
    model, inputs = prepared(family, attn, "batch", case)
    length = inputs["input_ids"].shape[1]
    batch = inputs["input_ids"].shape[0]
    answers = [torch.full((batch, 3), token) for token in (7, 8)]
    with case(model):
        first, second = (logits(model, extend(inputs, answer)) for answer in answers)
    text = text_rows(model, inputs)
    assert torch.equal(first[:, :length][text], second[:, :length][text])
    assert not torch.allclose(first[:, length:], second[:, length:])
