"""Modality-mutual attention: its mask, its turns, its guards, and the fast path."""

from __future__ import annotations

import pytest
import torch
from contract import close, extend, logits
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, IMAGE_ID, row, tiny_image, tiny_inputs, tiny_model, tiny_processor, visual_mask
from torch.utils._python_dispatch import TorchDispatchMode

from mllm import Stack
from mllm.adapters import ModalityMutualAttention
from mllm.engine import Step
from mllm.errors import CacheError, ConfigError, ConflictError, InputError
from mllm.layout import TokenLayout
from mllm.roles import ChatFormat, Roles
from mllm.token_pruning import DyVTE, FreezeVisual, NAAViT

MMA = ModalityMutualAttention


def layout_of(text: str, pad: int = 0) -> TokenLayout:
    """One row spelled out: p padding, s system, U user header, i image, q question, A assistant header, a answer."""
    letters = "p" * pad + text
    turn, turns = -1, []
    for number, letter in enumerate(letters):
        if letter == "U" and (number == 0 or letters[number - 1] != "U"):
            turn += 1
        turns.append(-1 if letter == "p" else turn)
    marks = {letter: torch.tensor([[c == letter for c in letters]]) for letter in "psUiqAa"}
    roles = Roles(torch.tensor([turns]), marks["s"], marks["U"], marks["q"] | marks["i"], marks["A"], marks["a"])
    return TokenLayout(marks["i"], ~marks["p"], roles=roles)


def allowed(technique: MMA, layout: TokenLayout) -> list[list[bool]]:
    """(S, S) whether each row sees each key."""
    size = layout.visual.shape[1]
    index = torch.arange(size)[None]
    mask = torch.ones(size, size, dtype=torch.bool).tril()
    for opened in technique.opens(layout):
        mask = mask | opened.allowed(index, index)[0]
    return (mask & layout.valid).tolist()


def naive(text: str, turns: str = "own", header: bool = True, bidirectional: bool = False) -> list[list[bool]]:
    """The rule, read off the letters."""
    number, turn_of = -1, []
    for place, letter in enumerate(text):
        number += letter == "U" and (place == 0 or text[place - 1] != "U")
        turn_of.append(max(number, 0))
    answered = [turn_of[k] for k, letter in enumerate(text) if letter == "A"]

    def sees(q: int, k: int) -> bool:
        if k <= q:
            return True
        if text[q] != "i":
            return False
        if bidirectional and text[q : k + 1] == "i" * (k + 1 - q):
            return True
        if text[k] in "ia" or (text[k] == "A" and not header) or turn_of[k] not in answered:
            return False
        if turns == "own":
            return turn_of[k] == turn_of[q]
        if turns == "first":
            return turn_of[k] == min(answered)
        return turn_of[k] >= turn_of[q]

    return [[sees(q, k) for k in range(len(text))] for q in range(len(text))]


def test_the_mask_of_the_original():
    """Image rows see all that follows up to and with the answer's header; the rest is causal (golden matrix)."""
    found = allowed(MMA(turns="first"), layout_of("sUiiqqAaa"))
    golden = [
        "100000000",
        "110000000",
        "111011100",
        "111111100",
        "111110000",
        "111111000",
        "111111100",
        "111111110",
        "111111111",
    ]
    assert ["".join(str(int(v)) for v in row) for row in found] == golden


turn = st.sampled_from(["UiqAa", "UqAa", "UiiqqAAaa", "UqiA", "UiqiqAa", "Uiq", "UqqAa"])


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["", "s", "ss", "si"]),
    st.lists(turn, min_size=1, max_size=4),
    st.sampled_from(["own", "first", "all_previous"]),
    st.booleans(),
    st.booleans(),
)
def test_masks_equal_the_rule(start, turns, which, header, bidirectional):
    text = start + "".join(turns)
    technique = MMA(turns=which, include_assistant_header=header, bidirectional_images=bidirectional)
    expected = naive(text, which, header, bidirectional)
    later = any(expected[q][k] for q in range(len(text)) for k in range(q + 1, len(text)))
    try:
        found = allowed(technique, layout_of(text))
    except InputError:
        assert not later
        return
    assert found == expected
    padded = allowed(technique, layout_of(text, pad=2))
    assert [row[2:] for row in padded[2:]] == expected
    assert not any(row[0] or row[1] for row in padded)


# --- on models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["one", "two_images"])
@pytest.mark.parametrize("arguments", [{}, {"bidirectional_images": True}, {"include_assistant_header": False}])
def test_the_fast_path_equals_the_mask(family, attn, kind, arguments, monkeypatch):
    model, processor = tiny_model(family, attn), tiny_processor(family)
    inputs = tiny_inputs(model, processor, kind)
    if kind == "two_images":
        inputs = row(inputs, 0)  # one shape in all rows
    seen = []
    make = Step._make_segments

    def spy(step, *arguments):
        seen.append(make(step, *arguments))
        return seen[-1]

    monkeypatch.setattr(Step, "_make_segments", spy)
    with MMA(**arguments)(model, processor):
        fast = logits(model, inputs)
    assert seen
    assert all(segments is not None for segments in seen)
    monkeypatch.setattr(Step, "_segments", lambda *_: None)
    with MMA(**arguments)(model, processor):
        masked = logits(model, inputs)
    close(fast, masked)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor):
                self.size = max(self.size, value.numel())
        return out


def test_no_tensor_of_heads_by_length_by_length():
    """Scores of a long prompt are never held: neither the plain kernel's nor those of the opened questions."""
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    question = "what is it, " * 180
    prompt = f"USER: <image> {question} ASSISTANT:"
    inputs = processor(text=[prompt], images=[[tiny_image()]], return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    assert length > 2000
    with MMA()(model, processor), torch.no_grad(), Largest() as largest:
        model.model(**inputs, use_cache=False)
    assert largest.size < length * length / 2


def test_generated_tokens_change_nothing_before_them():
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    inputs = tiny_inputs(model, processor, "one")
    length = inputs["input_ids"].shape[1]
    with MMA()(model, processor):
        plain = logits(model, inputs)
        longer = logits(model, extend(inputs, torch.full((1, 5), 9)))
    close(longer[:, :length], plain)


def test_text_only_rows_of_a_batch_are_the_plain_model():
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    inputs = tiny_inputs(model, processor, "batch")
    plain = logits(model, inputs)
    with MMA()(model, processor):
        found = logits(model, inputs)
    rows = visual_mask(model, inputs).any(dim=1)
    assert torch.equal(found[~rows], plain[~rows])
    assert not torch.allclose(found[rows], plain[rows], atol=1e-2)


def test_a_second_turn_on_the_cache_is_causal_for_what_is_there():
    """Image rows of the first turn are not read again; a new image in the second turn sees its own question."""
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    first = processor(text=["USER: <image> why? ASSISTANT:"], images=[[tiny_image()]], return_tensors="pt")
    second = "USER: <image> and this? ASSISTANT:"
    both = processor(
        text=["USER: <image> why? ASSISTANT:ok " + second], images=[[tiny_image(), tiny_image(1)]], return_tensors="pt"
    )
    with MMA()(model, processor), torch.no_grad():
        start = model(**first, use_cache=True)
        length = first["input_ids"].shape[1]
        rest = model(
            input_ids=both["input_ids"][:, length:],
            attention_mask=both["attention_mask"],
            pixel_values=both["pixel_values"][1:],
            past_key_values=start.past_key_values,
            use_cache=True,
        )
        whole = model(**both)
    close(rest.logits, whole.logits[:, length:])


def test_labels_on_an_opened_question_are_refused():
    model, processor = tiny_model("llava", "sdpa", fresh=True), tiny_processor("llava")
    inputs = tiny_inputs(model, processor, "one")
    labels = inputs["input_ids"].masked_fill(visual_mask(model, inputs), -100)
    with MMA()(model, processor), pytest.raises(InputError, match=r"training labels, the first at row 0, token \d+"):
        model(**inputs, labels=labels)
    answered = extend(inputs, torch.tensor([[7, 8]]))
    labels = answered["input_ids"].clone()
    labels[:, :-2] = -100
    with MMA()(model, processor):
        assert torch.isfinite(model(**answered, labels=labels).loss)


def test_an_image_after_its_question_is_refused():
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    prompt = "USER: why? ASSISTANT:so USER: look <image>"
    inputs = processor(text=[prompt], images=[[tiny_image()]], return_tensors="pt")
    with MMA()(model, processor), pytest.raises(InputError, match="Put images before the question"):
        logits(model, inputs)


def test_an_empty_question_opens_the_header_alone():
    """Nothing is asked: with the header opened the image sees it, without it there is nothing to see."""
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    inputs = processor(text=["USER: <image>ASSISTANT:"], images=[[tiny_image()]], return_tensors="pt")
    plain = logits(model, inputs)
    with MMA()(model, processor):
        assert not torch.allclose(logits(model, inputs), plain, atol=1e-3)
    with MMA(include_assistant_header=False)(model, processor), pytest.raises(InputError, match="followed by"):
        logits(model, inputs)


def test_a_caption_without_a_header_stays_causal():
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    inputs = processor(text=["<image> A red square."], images=[[tiny_image()]], return_tensors="pt")
    plain = logits(model, inputs)
    with MMA()(model, processor):
        close(logits(model, inputs), plain)


def test_it_needs_the_processor_and_token_ids():
    model, processor = tiny_model("llava", "sdpa"), tiny_processor("llava")
    with pytest.raises(ConfigError, match="Attach it with the processor"):
        MMA().attach(model)
    inputs = dict(tiny_inputs(model, processor, "one"))
    ids = inputs.pop("input_ids")
    with MMA()(model, processor), pytest.raises(InputError, match="input_ids, not inputs_embeds"):
        logits(model, {**inputs, "inputs_embeds": model.get_input_embeddings()(ids)})


@pytest.mark.parametrize("family", FAMILIES)
def test_it_stacks_with_an_exit(family):
    """Above the exit the images are gone, and the rest is causal."""
    model, processor = tiny_model(family, "sdpa"), tiny_processor(family)
    inputs = tiny_inputs(model, processor, "batch")
    with Stack(MMA(), DyVTE(exit_layer=2))(model, processor) as run:
        found = logits(model, inputs)
        assert run.report().visual_per_layer[3:] == [0, 0, 0]
    with MMA()(model, processor):
        assert not torch.allclose(found, logits(model, inputs), atol=1e-3)


def test_two_of_them_are_one_too_many():
    with pytest.raises(ConflictError, match="cannot run together"):
        Stack(MMA(), MMA(turns="first")).attach(tiny_model("llava", "sdpa"), tiny_processor("llava"))


def test_the_format_comes_from_the_template():
    """No token id is written down: another template, other spans."""
    processor = tiny_processor("qwen2_5_vl")
    found = ChatFormat.from_processor(processor)
    assert all(IMAGE_ID not in spelling for spelling in (*found.user, *found.assistant))


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("turns", "pictures"), [("first", 1), ("all_previous", 1), ("all_previous", 0)])
def test_a_later_turn_that_concerns_cached_ones_is_refused(turns, pictures):
    model, processor = tiny_model("llava"), tiny_processor("llava")
    image = processor.image_token
    first = processor(text=[f"USER: {image}what is it? ASSISTANT:"], images=[[tiny_image(1)]], return_tensors="pt")
    more = {"images": [[tiny_image(2)]]} if pictures else {}
    text = f" red USER: {image * pictures}and this? ASSISTANT:"
    second = processor(text=[text], return_tensors="pt", add_special_tokens=False, **more)
    length = first["input_ids"].shape[1] + second["input_ids"].shape[1]
    second["attention_mask"] = torch.ones(1, length, dtype=torch.long)
    with MMA(turns=turns)(model, processor), torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
        with pytest.raises(CacheError, match="all turns in one call"):
            model(**second, past_key_values=cache)


@pytest.mark.parametrize("turns", ["own", "first"])
def test_a_later_turn_of_text_goes_on(turns):
    model, processor = tiny_model("llava"), tiny_processor("llava")
    first = processor(
        text=[f"USER: {processor.image_token}what is it? ASSISTANT:"], images=[[tiny_image(1)]], return_tensors="pt"
    )
    second = processor(text=[" red USER: and now? ASSISTANT:"], return_tensors="pt", add_special_tokens=False)
    whole = {name: torch.cat([first[name], second[name]], dim=1) for name in ("input_ids", "attention_mask")}
    with MMA(turns=turns)(model, processor), torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
        found = model(input_ids=second["input_ids"], attention_mask=whole["attention_mask"], past_key_values=cache)
        alone = model(**whole, pixel_values=first["pixel_values"], use_cache=False)
    close(found.logits[0], alone.logits[0, -second["input_ids"].shape[1] :])


@pytest.mark.parametrize(
    ("stack", "message"),
    [
        (Stack(NAAViT(), MMA()), "attend in no layer"),
        (Stack(MMA(bidirectional_images=True), FreezeVisual()), "attend in no layer"),
        (Stack(NAAViT(layers=[0, 1, 2]), DyVTE(exit_layer=2), MMA()), "attend in no layer"),
        (Stack(MMA(), DyVTE(gate="light", candidate_layers=[1], recoverable=True)), "recoverable=False"),
    ],
    ids=str,
)
def test_stacks_that_leave_it_nothing_are_refused(stack, message):
    with pytest.raises(ConflictError, match=message):
        stack.attach(tiny_model("llava"), tiny_processor("llava"))
