"""What is special to URaG: pages and questions, choosing, pages that a later question gets back, early eviction."""

from __future__ import annotations

import itertools

import pytest
import torch
from contract import close, logits, text_rows, with_random_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Extras, decode, prompts
from safetensors.torch import save_file
from test_dyvte import continued, following, whole
from test_engine import pad_right
from tiny import FAMILIES, row, tiny_image, tiny_inputs, tiny_model, tiny_processor, visual_mask
from transformers import DynamicCache
from urag_reference import page_scores, pages_of, question_tokens

from mllm import Stack, load_techniques
from mllm.adapters import ModalityMutualAttention
from mllm.cost import ARCHITECTURES, ModelSpec, predict
from mllm.errors import ConfigError, ConflictError, InputError, LoadError
from mllm.layout import TokenLayout
from mllm.ragged import CACHE_STATE
from mllm.saving import LearnedWeights, fingerprint
from mllm.token_pruning import DyVTE, FreezeVisual, NAAViT, URaG, urag
from mllm.token_pruning.urag import maxsim

every_family = pytest.mark.parametrize("family", FAMILIES)
every_backend = pytest.mark.parametrize("attn", ["eager", "sdpa"])
SMALL = {"layer": 2, "hidden": 24, "width": 16}


def prepared(family="llava", attn="sdpa", kind="mixed"):
    model = tiny_model(family, attn)
    return model, tiny_processor(family), tiny_inputs(model, tiny_processor(family), kind)


def trained(model, seed=0, **arguments):
    """URaG with a head of random numbers."""
    return with_random_weights(Stack(URaG(**{**SMALL, **arguments})), model, seed).techniques[0]


def answer(model, inputs, **options):
    return model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, **options)


def outputs(technique, model, inputs, processor=None):
    """Logits of a call, and what URaG tells about it."""
    with technique(model, processor) as run:
        found = logits(model, inputs)
    return found, run.outputs["URaG"]


# --- pages and plain paths --------------------------------------------------------------------------------------------


@every_family
@every_backend
@pytest.mark.parametrize("arguments", [{"policy": "all"}, {"keep_pages": 5}, {"policy": "budget", "budget": 10_000}])
def test_keeping_all_pages_is_the_plain_model(family, attn, arguments):
    model, processor, inputs = prepared(family, attn)
    plain = logits(model, inputs)
    with trained(model, **arguments)(model, processor) as run:
        assert torch.equal(logits(model, inputs), plain)
        told = run.outputs["URaG"]
        assert told["kept"] == [[], [0], [0, 1, 2, 3, 4], [0, 1, 2]]
        scored = arguments.get("policy") == "all"
        assert [None if s is None else len(s) for s in told["scores"]] == ([None, 1, 5, 3] if scored else [None] * 4)
        generated = answer(model, inputs)
        assert run.report().exit_layer == [None, 5, 5, 5]
    assert torch.equal(generated, answer(model, inputs))


@every_family
@pytest.mark.parametrize("kind", ["mixed", "pages", "two_images", "same_length_ragged"])
def test_each_visual_token_belongs_to_one_page(family, kind, monkeypatch):
    model, processor, inputs = prepared(family, kind=kind)
    seen = []
    original = URaG._pages
    monkeypatch.setattr(URaG, "_pages", lambda self, *given: seen.append(original(self, *given)) or seen[-1])
    outputs(trained(model, policy="all"), model, inputs, processor)
    valid = inputs["attention_mask"].bool()
    assert torch.equal(seen[0] >= 0, visual_mask(model, inputs))
    for number, prompt in enumerate(prompts(model, inputs)):
        page = seen[0][number][valid[number]]
        found = [(page == n).nonzero()[:, 0].tolist() for n in range(int(page.max()) + 1)]
        assert found == pages_of(prompt)


@every_family
@every_backend
def test_dropping_a_page_is_hiding_its_keys_in_the_deep_layers(family, attn):
    """Whichever page is kept: the others run to the end in the reference, but nobody sees them from layer K on."""
    model, processor, inputs = prepared(family, attn, "pages")
    (prompt,) = prompts(model, inputs)
    pages, text = pages_of(prompt), ~prompt.visual
    for gold in range(len(pages)):
        found, told = outputs(trained(model, keep_pages=1, always_keep=(gold,)), model, inputs, processor)
        assert told["kept"] == [[gold]]
        hidden = prompt.visual.clone()
        hidden[pages[gold]] = False
        closed = hidden[None] & ~torch.eye(len(hidden), dtype=torch.bool)

        def hide(layer, closed=closed):
            return closed if layer >= SMALL["layer"] else torch.zeros_like(closed)

        with torch.no_grad():
            close(found[0][text], decode(model, prompt, extras=Extras(closed=hide)).logits[text])


@every_family
def test_scores_are_those_of_the_formula_whatever_stands_beside_them(family):
    model, processor, inputs = prepared(family)
    technique = trained(model, policy="all")
    _, told = outputs(technique, model, inputs, processor)
    _, right = outputs(technique, model, pad_right(inputs), processor)
    _, mean = outputs(trained(model, policy="all", normalise=True), model, inputs, processor)
    for number, prompt in enumerate(prompts(model, inputs)):
        question = question_tokens(model, prompt)
        scores = told["scores"][number]
        if not prompt.visual.any():
            assert scores is None
            continue
        with torch.no_grad():
            states = decode(model, prompt).states[SMALL["layer"]]
        wanted = torch.tensor(page_scores(technique, states, pages_of(prompt), question))
        assert told["question_tokens"][number] == len(question)
        _, alone = outputs(technique, model, row(inputs, number), processor)
        for found in (scores, alone["scores"][0], right["scores"][number], mean["scores"][number] * len(question)):
            assert found.dtype == torch.float32
            close(found, wanted)


def test_equal_pages_keep_their_order():
    model, processor, inputs = prepared(kind="mixed")
    tensors = {name: torch.zeros(v.shape) for name, v in URaG(**SMALL).build(_spec(model)).state_dict().items()}
    for count in (1, 2, 4):
        technique = URaG(**SMALL, keep_pages=count).with_learned(LearnedWeights(tensors, fingerprint(model), "zeros"))
        _, told = outputs(technique, model, inputs, processor)
        assert told["scores"][2].tolist() == [0.0] * 5
        assert told["kept"][2] == list(range(count))


def _spec(model):
    return ModelSpec.from_config(model.config.get_text_config())


def test_tiles_of_one_image_are_one_page():
    """An image of several tiles is a page, and text between pages is kept."""
    model, processor = tiny_model("llava_next"), tiny_processor("llava_next")
    text = "USER: page 1: <image> page 2: <image> page 3: <image> which is it? ASSISTANT:"
    images = [tiny_image(n, size) for n, size in enumerate([(24, 24), (96, 96), (48, 24)])]
    inputs = processor(text=[text], images=images, return_tensors="pt")
    (prompt,) = prompts(model, inputs)
    sizes = [len(page) for page in pages_of(prompt)]
    assert len(sizes) == 3
    assert max(sizes) > 2 * min(sizes)
    with trained(model, keep_pages=2)(model, processor) as run:
        logits(model, inputs)
        kept = run.outputs["URaG"]["kept"][0]
        assert run.report().visual_per_layer == [sum(sizes)] * 2 + [sum(sizes[n] for n in kept)] * 4


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
def test_pictures_side_by_side_are_refused_where_it_matters(family):
    """Three pictures without anything between them are one page; a batch's count tells, also under generate."""
    model, processor = tiny_model(family), tiny_processor(family)
    texts = ["USER: <image><image><image> who? ASSISTANT:", "USER: <image> who? ASSISTANT:"]
    images = [[tiny_image(n) for n in range(3)], [tiny_image(4)]]
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
    message = r"4 pictures make 2 pages.*Page 2:"
    with trained(model, keep_pages=2)(model, processor):
        with pytest.raises(InputError, match=message):
            model(**inputs)
        with pytest.raises(InputError, match=message):
            answer(model, inputs)
    with trained(model, keep_pages=4)(model, processor):
        answer(model, inputs)  # nothing would have been dropped


# --- questions --------------------------------------------------------------------------------------------------------


def asked(model, processor, text, images, with_processor=True):
    """The tokens that are taken for the question, as text."""
    token = processor.image_token
    token = f"<|vision_start|>{token}<|vision_end|>" if model.config.model_type == "qwen2_5_vl" else token
    if model.config.model_type in ("llava_onevision", "qwen2_5_vl"):
        pairs = {"USER: ": "<|im_start|>user\n", " ASSISTANT:": "<|im_end|>\n<|im_start|>assistant\n"}
        for header, chatml in pairs.items():
            text = text.replace(header, chatml)
    pictures = [tiny_image(n) for n in range(images)]
    inputs = processor(text=[text.replace("#", token)], images=pictures, return_tensors="pt")
    found = []

    class Watcher(URaG):
        def _question(self, layout, page):
            found.append(super()._question(layout, page))
            return found[-1]

    technique = Watcher(**SMALL, policy="all")
    outputs(technique, model, inputs, processor if with_processor else None)
    return processor.tokenizer.decode(inputs["input_ids"][0][found[0][0]]).strip()


@every_family
@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("USER: # who is it? ASSISTANT:", "who is it?"),
        ("be kind USER: page 1: # page 2: # who? ASSISTANT:", "page 1:  who?"),  # labels between pages are none
        ("USER: # hi ASSISTANT: yes USER: who? ASSISTANT:", "who?"),
        ("USER: # hi ASSISTANT: yes USER: # who? ASSISTANT:", "who?"),
        ("USER: who is it? # ASSISTANT:", "who is it?"),  # the image stands behind the question
        ("USER: # who? ASSISTANT: so and so", "who?"),  # answers are no question
    ],
)
def test_the_question_is_the_last_turn_s_text(family, text, question):
    model, processor = tiny_model(family), tiny_processor(family)
    assert asked(model, processor, text, text.count("#")) == question


def test_without_a_processor_or_marks_it_is_all_text_behind_the_last_page():
    model, processor = tiny_model("llava"), tiny_processor("llava")
    assert asked(model, processor, "USER: a # b # who? ASSISTANT:", 2, False) == "who? ASSISTANT:"
    assert asked(model, processor, "a # b # who?", 2) == "who?"
    model, processor = tiny_model("qwen2_5_vl"), tiny_processor("qwen2_5_vl")
    text = asked(model, processor, "USER: a # b # who? ASSISTANT:", 2, False)
    assert text == "who?<|im_end|>\n<|im_start|>assistant"  # the block's own end token is none of it


@every_family
def test_embeddings_are_read_like_ids(family):
    """Without ids there are no turns, but pages and their markers are found."""
    model, _, inputs = prepared(family, kind="pages")
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    if family == "qwen2_5_vl":
        rest["position_ids"] = torch.arange(embeds.shape[1]).expand(3, 1, -1)
        inputs = {**inputs, "position_ids": rest["position_ids"]}
    technique = trained(model, keep_pages=2, page_markers="drop")
    with technique(model):
        by_ids = logits(model, inputs)
        with torch.no_grad():
            by_embeddings = model(**rest, inputs_embeds=embeds).logits
    assert torch.equal(by_ids, by_embeddings)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_pages_without_a_question_are_refused(family):
    model, processor = tiny_model(family), tiny_processor(family)
    token = "<image>" if family == "llava" else "<|vision_start|><|image_pad|><|vision_end|>"
    texts = [f"USER: {token} or {token} who? ASSISTANT:", f"who? {token} or {token}"]
    images = [[tiny_image(n) for n in range(2)]] * 2
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
    for known in (None, processor):
        with trained(model, keep_pages=1)(model, known), pytest.raises(InputError, match=r"row 1 .*no question"):
            model(**inputs)
    with trained(model, keep_pages=2)(model, processor):
        model(**inputs)  # nothing to choose
    if family == "qwen2_5_vl":  # a turn of pages alone
        text = f"<|im_start|>user\n{token}{token}<|im_end|>\n<|im_start|>assistant\n"
        inputs = processor(text=[text], images=images[0], return_tensors="pt")
        with trained(model, keep_pages=1)(model, processor), pytest.raises(InputError, match="last user turn"):
            model(**inputs)


# --- choosing ---------------------------------------------------------------------------------------------------------


numbers = st.integers(-3, 3).map(float)
documents = st.lists(st.tuples(numbers, st.integers(0, 4)), min_size=1, max_size=7)


def naive_choice(technique, scores, sizes):
    """Every set of pages is looked at, and the rule says which is the right one."""
    count = len(sizes)
    always = {page + count if page < 0 else page for page in technique.always_keep}
    real = {page for page in range(count) if sizes[page] > 0}
    always &= real
    if technique.policy == "all":
        return real
    if technique.policy == "threshold":
        return always | {page for page in real if scores[page] >= technique.threshold}
    better = {page: sum((scores[p], -p) > (scores[page], -page) for p in real - always) for page in real - always}
    if technique.policy == "topk":
        room = technique.keep_pages - len(always)
        return always | {page for page, rank in better.items() if rank < room}
    kept = set(always)
    for rank in range(len(better)):
        (page,) = (page for page, r in better.items() if r == rank)
        if sum(sizes[p] for p in kept) + sizes[page] <= technique.budget:
            kept.add(page)
    return kept


@settings(max_examples=300, deadline=None)
@given(
    documents,
    st.sampled_from(["topk", "threshold", "budget", "all"]),
    st.integers(1, 8),
    numbers,
    st.integers(1, 14),
    st.lists(st.integers(-8, 8), max_size=3),
)
def test_choices_equal_a_naive_reading_of_the_rule(document, policy, keep_pages, threshold, budget, always_keep):
    scores, sizes = [score for score, _ in document], [size for _, size in document]
    technique = URaG(
        policy=policy,
        keep_pages=keep_pages,
        threshold=threshold if policy == "threshold" else None,
        budget=budget if policy == "budget" else None,
        always_keep=always_keep,
    )
    chosen = technique.choose(scores, sizes)
    assert chosen == naive_choice(technique, scores, sizes)
    if not technique.decides(sizes):  # what is not scored would have been kept
        assert chosen == {page for page, size in enumerate(sizes) if size}
    if policy == "budget" and not always_keep:
        assert sum(sizes[page] for page in chosen) <= budget


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 4), st.integers(1, 40), st.randoms())
def test_late_interaction_equals_loops(batch, length, tokens, pages, held, random):
    generator = torch.Generator().manual_seed(random.randrange(2**31))
    question, vectors = (torch.randn(batch, n, 5, generator=generator) for n in (length, tokens))
    page = torch.randint(-1, pages, (batch, tokens), generator=generator)
    is_asked = torch.rand(batch, length, generator=generator) < 0.7
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(urag, "_SCORES", held)
        found = maxsim(question, is_asked, vectors, page, pages)
    for b, p in itertools.product(range(batch), range(pages)):
        own = [v for v in range(tokens) if page[b, v] == p]
        wanted = 0.0
        for q in is_asked[b].nonzero()[:, 0].tolist():
            cosines = [float(torch.cosine_similarity(question[b, q], vectors[b, v], dim=0)) for v in own]
            wanted += max(cosines, default=-float("inf"))
        assert float(found[b, p]) == pytest.approx(wanted, abs=1e-5)


def test_gradients_of_late_interaction():
    """Only the best token of each page gets one; pages without tokens do no harm; autocast does not touch scores."""
    question = torch.randn(1, 2, 4, requires_grad=True)
    vectors = torch.randn(1, 5, 4, requires_grad=True)
    page = torch.tensor([[0, 0, 2, 2, -1]])
    with torch.autocast("cpu", torch.bfloat16):
        scores = maxsim(question, torch.ones(1, 2, dtype=torch.bool), vectors, page, 3)
    exact = maxsim(question.double().float(), torch.ones(1, 2, dtype=torch.bool), vectors, page, 3)
    assert torch.equal(scores, exact)
    assert scores[0, 1] == -float("inf")
    (scores[0, 0] - scores[0, 2]).backward()
    assert torch.isfinite(vectors.grad).all()
    assert torch.isfinite(question.grad).all()
    assert (vectors.grad[0, 4] == 0).all()


@every_family
def test_policies_in_the_decoder(family):
    """Rows of a batch keep pages by threshold or budget, and what is kept is what runs and is cached."""
    model, processor, inputs = prepared(family)
    _, told = outputs(trained(model, policy="all", normalise=True), model, inputs, processor)
    scores = [[] if s is None else s.tolist() for s in told["scores"]]
    middle = sorted(score for some in scores for score in some)[4]
    sizes = [[len(page) for page in pages_of(prompt)] for prompt in prompts(model, inputs)]
    budget = max(size for row_sizes in sizes for size in row_sizes) + 1
    cases = {
        "threshold": {"policy": "threshold", "threshold": middle, "normalise": True},
        "none": {"policy": "threshold", "threshold": 1.01, "normalise": True},
        "last": {"policy": "threshold", "threshold": 1.01, "normalise": True, "always_keep": (-1,)},
        "budget": {"policy": "budget", "budget": budget},
    }
    for name, arguments in cases.items():
        with trained(model, **arguments)(model, processor) as run:
            logits(model, inputs)
            kept = run.outputs["URaG"]["kept"]
            deep = [sum(row_sizes[page] for page in pages) for row_sizes, pages in zip(sizes, kept, strict=True)]
            assert run.report().visual_per_layer[2:] == [max(deep)] * 4
        if name == "threshold":
            assert kept == [[page for page, score in enumerate(some) if score >= middle] for some in scores]
        elif name == "budget":
            assert all(total <= budget for total in deep)
            assert all(kept[number] for number in (1, 2, 3))
        else:
            assert kept == ([[], [], [], []] if name == "none" else [[], [0], [4], [2]])


@pytest.mark.parametrize("marks", ["keep", "drop"])
def test_markers_beside_a_dropped_page(marks):
    model, processor, inputs = prepared("qwen2_5_vl", kind="pages")
    start, end = model.config.vision_start_token_id, model.config.vision_end_token_id
    with trained(model, keep_pages=2, page_markers=marks)(model, processor) as run:
        found = logits(model, inputs)
        kept = run.outputs["URaG"]["kept"][0]
        output = answer(model, inputs, return_dict_in_generate=True)
    (prompt,) = prompts(model, inputs)
    ids, pages = prompt.ids.tolist(), pages_of(prompt)
    gone = {token for number, page in enumerate(pages) if number not in kept for token in page}
    if marks == "drop":
        gone |= {n for n, token in enumerate(ids) if token == start and n + 1 in gone}
        gone |= {n for n, token in enumerate(ids) if token == end and n - 1 in gone}
        assert len(gone) == sum(len(page) + 2 for number, page in enumerate(pages) if number not in kept)
    assert output.past_key_values.layers[3].get_seq_length() == len(ids) - len(gone) + 2
    stays = torch.tensor([n not in gone for n in range(len(ids))])

    def keep(layer, states, alive):
        return stays if layer == 2 else torch.ones_like(alive)

    with torch.no_grad():
        wanted = decode(model, prompt, extras=Extras(keep=keep)).logits
    text = stays & ~prompt.visual
    close(found[0][text], wanted[text])


# --- later turns ------------------------------------------------------------------------------------------------------


def talk(model, processor, technique, calls):
    """Logits, outputs and cache of some calls on one cache."""
    cache = DynamicCache(config=model.config.get_text_config())
    found, told = [], []
    with technique(model, processor) as run, torch.no_grad():
        for call in calls:
            found.append(model(**call, past_key_values=cache).logits)
            told.append(run.outputs.get("URaG"))
            assert [layer.get_seq_length() for layer in cache.layers] == run.report().cache_lengths
    return found, told, cache, run


def by_hand(model, technique, prompt, turns, starts, kept=None):
    """Logits of a conversation in which each turn ranks the pages so far, and the pages that entered layer K in it.

    A row sees, from layer K on, the pages that entered with its own turn or before. Page rows have the turn in which
    they entered.

    Args:
        turns: numbers of the user turns that ask anew.
        starts: first column of each call.
        kept: pages of each turn, where the head does not decide.
    """
    pages, layer = pages_of(prompt), technique.layer
    states = decode(model, prompt).states[layer]
    entered: dict[int, int] = {}
    for number, turn in enumerate(turns):
        stop = starts[number + 1] if number + 1 < len(starts) else len(prompt.ids)
        known = [page for page in pages if page[-1] < stop]
        scores = page_scores(technique, states, known, question_tokens(model, prompt, turn))
        best = sorted(range(len(known)), key=lambda page: (-scores[page], page))[: technique.keep_pages]
        for page in best:
            entered.setdefault(page, number)
    columns = torch.arange(len(prompt.ids))
    time = (columns[:, None] >= torch.tensor(starts)).sum(dim=1) - 1  # (S,)
    alive = torch.ones_like(prompt.visual)
    for number, page in enumerate(pages):
        alive[page] = number in entered
        time[page] = entered.get(number, 0)
    hidden = (time[None] > time[:, None]) & prompt.visual[None]  # (S, S)

    def closed(at):
        return hidden if at >= layer else torch.zeros_like(hidden)

    def keep(at, states, before):
        return alive if at == layer else torch.ones_like(before)

    return decode(model, prompt, extras=Extras(closed=closed, keep=keep)).logits, entered


@every_family
@every_backend
def test_a_later_question_ranks_all_pages_again(family, attn):
    """Newly chosen pages enter the deep layers from the states they were left with; the others stay."""
    model, processor, inputs = prepared(family, attn, "mixed")
    length = inputs["input_ids"].shape[1]
    more = following(family, 4)
    third = following(family, 4, _said(family, " no USER: the first of them all, or the last? ASSISTANT:"))
    masks = [inputs["attention_mask"]]
    for extra in (more, third):
        masks.append(torch.cat([masks[-1], torch.ones_like(extra)], dim=1))
    changed = 0
    for seed in range(4):
        technique = trained(model, seed=seed, keep_pages=1, recoverable=True)
        with torch.no_grad():
            model(**inputs)  # Qwen keeps the offset of its positions from the last prompt
        calls = [inputs, continued(model, more, masks[1]), continued(model, third, masks[2])]
        found, told, cache, _ = talk(model, processor, technique, calls)
        both = {**inputs, "input_ids": torch.cat([inputs["input_ids"], more, third], 1), "attention_mask": masks[2]}
        for number, prompt in enumerate(prompts(model, whole(model, both))):
            pad = length - int(inputs["attention_mask"][number].sum())
            starts = [0, length - pad, length + more.shape[1] - pad]
            with torch.no_grad():
                wanted, entered = by_hand(model, technique, prompt, (-3, -2, -1), starts)
            for turn in range(3):
                assert told[turn]["kept"][number] == sorted(page for page, when in entered.items() if when <= turn)
            changed += any(entered.values())
            text = ~prompt.visual
            together = torch.cat([logits[number] for logits in found])[pad:]
            close(together[text], wanted[text])
        # decoding goes on from there
        token = torch.full((4, 1), 30)
        mask = torch.cat([masks[2], torch.ones_like(token)], dim=1)
        with technique(model, processor), torch.no_grad():
            one = model(**continued(model, token, mask), past_key_values=cache).logits
        longer = {**both, "input_ids": torch.cat([both["input_ids"], token], 1), "attention_mask": mask}
        for number, prompt in enumerate(prompts(model, whole(model, longer))):
            pad = length - int(inputs["attention_mask"][number].sum())
            with torch.no_grad():
                starts = [0, length - pad, length + more.shape[1] - pad]
                wanted, _ = by_hand(model, technique, prompt, (-3, -2, -1), starts)
            close(one[number, 0], wanted[-1])
    assert changed, "no later question chose another page"


def _said(family, text):
    if family in ("llava", "llava_next"):
        return text
    return text.replace(" USER: ", "<|im_end|>\n<|im_start|>user\n").replace(
        " ASSISTANT:", "<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("marks", ["keep", "drop"])
@pytest.mark.parametrize("family", ["llava", "llava_onevision"])
def test_new_pages_in_a_later_turn_compete_with_the_old_ones(family, marks):
    model, processor = tiny_model(family), tiny_processor(family)
    texts = ["USER: <image> or <image> who? ASSISTANT:", " so USER: and <image> or <image> now? ASSISTANT:"]
    if family == "llava_onevision":
        pairs = {"USER: ": "<|im_start|>user\n", " ASSISTANT:": "<|im_end|>\n<|im_start|>assistant\n"}
        for header, chatml in pairs.items():
            texts = [text.replace(header, chatml) for text in texts]
    images = [tiny_image(n, (24, 24)) for n in range(4)]
    options = {"return_tensors": "pt"}
    given = [processor(text=[texts[n]], images=images[2 * n : 2 * n + 2], **options) for n in range(2)]
    if family == "llava":
        given[1] = processor(text=[texts[1]], images=images[2:], add_special_tokens=False, **options)
    both = processor(text=["".join(texts)], images=images, **options)
    start = given[0]["input_ids"].shape[1]
    assert torch.equal(torch.cat([call["input_ids"] for call in given], 1), both["input_ids"])
    (prompt,) = prompts(model, both)
    when = set()
    for seed in range(8):
        technique = trained(model, seed=seed, keep_pages=1, recoverable=True, page_markers=marks)
        calls = [given[0], {**given[1], "attention_mask": both["attention_mask"]}]
        found, told, _, _ = talk(model, processor, technique, calls)
        with torch.no_grad():
            wanted, entered = by_hand(model, technique, prompt, (-2, -1), [0, start])
        assert [told[0]["kept"], told[1]["kept"]] == [[[p for p in entered if entered[p] == 0]], [sorted(entered)]]
        text = ~prompt.visual
        close(torch.cat([logits[0] for logits in found])[text], wanted[text])
        when |= set(entered.items())
    assert any(page >= 2 and turn == 1 for page, turn in when)


def test_markers_go_and_come_back_with_their_page():
    model, processor, inputs = prepared("qwen2_5_vl", kind="pages")
    more = following("qwen2_5_vl", 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], dim=1)
    with torch.no_grad():
        model(**inputs)
    (prompt,) = prompts(model, inputs)
    sizes = [len(page) + 2 for page in pages_of(prompt)]
    text = len(prompt.ids) - sum(sizes)
    for seed in range(6):
        technique = trained(model, seed=seed, keep_pages=1, recoverable=True, page_markers="drop")
        _, told, cache, _ = talk(model, processor, technique, [inputs, continued(model, more, mask)])
        kept = told[1]["kept"][0]
        assert cache.layers[3].get_seq_length() == text + sum(sizes[page] for page in kept) + more.shape[1]


def test_without_it_the_first_choice_stays():
    model, processor, inputs = prepared(kind="pages")
    more = following("llava", 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], dim=1)
    found, told, cache, run = talk(
        model, processor, trained(model, keep_pages=1), [inputs, continued(model, more, mask)]
    )
    assert told[0] is told[1]
    assert not getattr(cache, CACHE_STATE).store
    (prompt,) = prompts(
        model, {**inputs, "input_ids": torch.cat([inputs["input_ids"], more], 1), "attention_mask": mask}
    )
    stays = ~prompt.visual
    stays[pages_of(prompt)[told[0]["kept"][0][0]]] = True

    def keep(layer, states, alive):
        return stays if layer == 2 else torch.ones_like(alive)

    with torch.no_grad():
        wanted = decode(model, prompt, extras=Extras(keep=keep)).logits
    close(found[1][0], wanted[-more.shape[1] :])
    report = run.report()
    assert report.kv_bytes < report.dense_kv_bytes


def test_kept_vectors_and_states_are_booked():
    model, processor, inputs = prepared(kind="pages")
    plain = talk(model, processor, trained(model, keep_pages=1), [inputs])[3].report()
    _, _, cache, run = talk(model, processor, trained(model, keep_pages=1, recoverable=True), [inputs])
    store = getattr(cache, CACHE_STATE).store["0.URaG"]
    kept = store["vectors"].nbytes + store["page"].nbytes + store["stash"].nbytes
    assert run.report().kv_bytes == plain.kv_bytes + kept
    assert run.report().cache_lengths == plain.cache_lengths


def test_generate_in_a_later_turn_and_guesses_are_no_question():
    model, processor, inputs = prepared(kind="pages")
    for guesses in ({}, {"prompt_lookup_num_tokens": 2}):
        for seed in range(3):
            technique = trained(model, seed=seed, keep_pages=1, recoverable=True)
            with technique(model, processor) as run:
                first = model.generate(
                    **inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, **guesses
                )
                assert len(run.outputs["URaG"]["kept"][0]) == 1
                ids = torch.cat([first.sequences, following("llava", 1)], dim=1)
                said = model.generate(
                    input_ids=ids,
                    past_key_values=first.past_key_values,
                    max_new_tokens=3,
                    min_new_tokens=3,
                    do_sample=False,
                    return_dict_in_generate=True,
                    output_logits=True,
                )
                kept = run.outputs["URaG"]["kept"][0]
            full = said.sequences[:, :-1]
            (prompt,) = prompts(model, {**inputs, "input_ids": full, "attention_mask": torch.ones_like(full)})
            with torch.no_grad():
                # the first answer's last token is read with the second question
                wanted, entered = by_hand(model, technique, prompt, (-2, -1), [0, first.sequences.shape[1] - 1])
            assert kept == sorted(entered)
            close(torch.stack(said.logits, dim=1)[0], wanted[-3:])


def test_beams_and_samples():
    model, processor, inputs = prepared()
    with trained(model, keep_pages=1, recoverable=True)(model, processor):
        assert torch.equal(answer(model, inputs, num_beams=3), answer(model, inputs, num_beams=3, use_cache=False))
        answer(model, inputs, num_beams=2, num_return_sequences=2)


# --- early eviction ---------------------------------------------------------------------------------------------------


@every_family
@every_backend
def test_early_keys_of_dropped_pages_are_forgotten(family, attn):
    """Prompt logits are the same; answer tokens see dropped pages in layer 0 alone."""
    model, processor, inputs = prepared(family, attn)
    length = inputs["input_ids"].shape[1]
    usual, told = outputs(trained(model, keep_pages=1), model, inputs, processor)
    with trained(model, keep_pages=1, evict_early=True)(model, processor) as run:
        text = text_rows(model, inputs)
        assert torch.equal(logits(model, inputs)[text], usual[text])
        output = answer(model, inputs, return_dict_in_generate=True, output_logits=True)
        lengths = [layer.get_seq_length() for layer in output.past_key_values.layers]
        assert lengths == run.report().cache_lengths
        assert run.outputs["URaG"]["kept"] == told["kept"]
    assert lengths[0] == length + 2
    assert len(set(lengths[1:])) == 1
    for number, prompt in enumerate(prompts(model, inputs)):
        start = len(prompt.ids)
        for token in output.sequences[number, length:-1]:
            prompt = prompt.append(model.get_input_embeddings().weight[token])
        gone = prompt.visual.clone()
        for page in told["kept"][number]:
            gone[pages_of(prompt)[page]] = False
        late = torch.arange(len(gone)) >= start

        def closed(layer, late=late, gone=gone):
            return (late[:, None] & gone) if layer == 1 else torch.zeros(len(gone), len(gone), dtype=torch.bool)

        def keep(layer, states, alive, gone=gone):
            return ~gone if layer == 2 else torch.ones_like(alive)

        with torch.no_grad():
            wanted = decode(model, prompt, extras=Extras(closed=closed, keep=keep)).logits
        close(torch.stack(output.logits, dim=1)[number], wanted[start - 1 :])


# --- stacks, arguments, costs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_beside_others(attn):
    """Pages that see their question, and pages that pass layers without attention, are chosen as in the reference."""
    model, processor, inputs = prepared("llava", attn, "pages")
    (prompt,) = prompts(model, inputs)
    question = question_tokens(model, prompt)
    technique = trained(model, keep_pages=1)
    opened = torch.zeros(len(prompt.ids), len(prompt.ids), dtype=torch.bool)
    visual, ids = prompt.visual, processor.tokenizer.convert_ids_to_tokens(prompt.ids.tolist())
    header = next(n for n in range(len(ids)) if ids[n : n + 10] == list("ASSISTANT:"))
    for query in visual.nonzero()[:, 0].tolist():
        opened[query, query + 1 : header + 10] = ~visual[query + 1 : header + 10]
    for others, options, policy in (
        ([ModalityMutualAttention()], {"opened": opened}, {}),
        ([NAAViT()], {}, {"policy": "naavit"}),
        ([FreezeVisual(layers="3:5")], {}, {"policy": "freeze", "policy_layers": (3, 4)}),
    ):

        def keep(layer, states, alive):
            stays = torch.ones_like(alive)
            if layer == 2:
                pages = pages_of(prompt)
                scores = page_scores(technique, states, pages, question)
                for number, page in enumerate(pages):
                    stays[page] = number == max(range(len(pages)), key=lambda p: (scores[p], -p))
            return stays

        with Stack(*others, technique)(model, processor):
            found = logits(model, inputs)
        with torch.no_grad():
            wanted = decode(model, prompt, extras=Extras(keep=keep, **options), **policy).logits
        close(found[0][~visual], wanted[~visual])


def test_learned_exits_after_pages_came_back():
    """DyVTE's gates decide about pages that URaG brings back as about others."""
    model, processor, inputs = prepared(kind="pages")
    gate = with_random_weights(Stack(DyVTE(gate="light", hidden=8, min_exit_layer=3)), model).techniques[0]
    more = following("llava", 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], dim=1)
    stack = Stack(trained(model, keep_pages=1, recoverable=True), gate)
    found, told, _, _ = talk(model, processor, stack, [inputs, continued(model, more, mask)])
    assert told[1]["kept"]
    assert torch.isfinite(found[1]).all()


def test_stacks_that_cannot_work_are_refused():
    model, processor, _ = prepared()
    for others, message in (
        ([ModalityMutualAttention()], "pages see the question.*recoverable=False"),
        ([DyVTE(gate="light", recoverable=True)], "both bring rows of an earlier turn back"),
        ([URaG(layer=3)], "both choose the pages"),
        ([NAAViT(image_cache=2)], "image_cache"),
        ([DyVTE(exit_layer=1)], "leaves no visual tokens after layer 1"),
    ):
        with pytest.raises(ConflictError, match=message):
            Stack(URaG(**SMALL, recoverable=True), *others).attach(model, processor)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": 0}, r"layer=0.*greater than or equal to 1"),
        ({"layer": 1.5}, r"layer=1.5"),
        ({"keep_pages": 0}, r"keep_pages=0"),
        ({"policy": "best"}, r"policy='best'.*'topk', 'threshold', 'budget' or 'all'"),
        ({"policy": "threshold"}, r"needs a threshold"),
        ({"threshold": 0.5}, r"policy='topk' with threshold=0.5.*no other policy takes one"),
        ({"policy": "budget"}, r"needs a budget"),
        ({"policy": "budget", "budget": 0}, r"budget=0"),
        ({"always_keep": [0.5]}, r"always_keep"),
        ({"recoverable": True, "evict_early": True}, r"evict_early=True forgets.*Switch one of them off"),
        ({"keep": 5}, r"keep=5.*Arguments of URaG: .*keep_pages"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        URaG(**arguments)


def test_layers_by_number_or_share_of_the_depth():
    assert URaG(layer=0.2).first_visual_layer(ARCHITECTURES["qwen2.5-vl-3b"]) == 7
    assert URaG(layer=0.01).first_visual_layer(ARCHITECTURES["qwen2.5-vl-3b"]) == 1
    with pytest.raises(ConfigError, match=r"layer=6, but this model has 6 layers.*Give 1 to 5"):
        URaG().attach(tiny_model("llava"))


def test_recoverable_pages_need_the_processor():
    with pytest.raises(ConfigError, match="Attach it with the processor"):
        URaG(**SMALL, recoverable=True).attach(tiny_model("llava"))


def test_the_paper_s_head_and_prediction():
    spec = ARCHITECTURES["qwen2.5-vl-3b"]
    parameters = [
        sum(p.numel() for p in URaG().build(ARCHITECTURES[f"qwen2.5-vl-{n}"]).parameters()) for n in ("3b", "7b")
    ]
    assert parameters == [2_622_976, 4_195_840]
    few = predict(Stack(URaG()), spec, 64, 20 * 512, images=20)
    assert 0.3 < few.flops / few.dense_flops < 0.45
    assert few.kv_bytes / few.dense_kv_bytes == pytest.approx((6 + 30 * (64 + 5 * 512) / (64 + 20 * 512)) / 36)
    assert predict(Stack(URaG()), spec, 64, 512, images=1).kv_bytes == predict(Stack(), spec, 64, 512).kv_bytes
    capped = predict(Stack(URaG(policy="budget", budget=2560)), spec, 64, 20 * 512, images=20)
    assert capped.kv_bytes == few.kv_bytes
    unknown = predict(Stack(URaG(policy="threshold", threshold=0.3)), spec, 64, 20 * 512, images=20)
    assert unknown.kv_bytes == unknown.dense_kv_bytes


def test_prediction_is_at_least_the_run_and_close():
    model, processor = tiny_model("llava"), tiny_processor("llava")
    text = "USER:" + " <image>" * 6 + " who? ASSISTANT:"
    inputs = processor(text=[text], images=[tiny_image(n) for n in range(6)], return_tensors="pt")
    visual = int(visual_mask(model, inputs).sum())
    with trained(model, keep_pages=2)(model, processor) as run:
        logits(model, inputs)
    length = inputs["input_ids"].shape[1]
    predicted = predict(Stack(URaG(**SMALL, keep_pages=2)), _spec(model), length - visual, visual, images=6)
    assert run.flops <= predicted.flops <= 1.1 * run.flops


def test_memory_of_scores_is_bounded(monkeypatch):
    """No tensor of question tokens times page tokens is held once the limit is lower."""
    model, processor, inputs = prepared(kind="pages")
    expected = outputs(trained(model, policy="all"), model, inputs, processor)[1]["scores"][0]
    sizes = []
    original = torch.Tensor.scatter_reduce

    def watched(self, dim, index, src, reduce):
        sizes.append(src.numel())
        return original(self, dim, index, src, reduce)

    monkeypatch.setattr(torch.Tensor, "scatter_reduce", watched)
    monkeypatch.setattr(urag, "_SCORES", 64)
    found = outputs(trained(model, policy="all"), model, inputs, processor)[1]["scores"][0]
    close(found, expected)
    assert max(sizes) <= 64


@every_backend
def test_bfloat16_scores_are_float32(attn):
    exact, processor, inputs = prepared("llava", attn)
    half = tiny_model("llava", attn, fresh=True).to(torch.bfloat16)
    _, wanted = outputs(trained(exact, policy="all"), exact, inputs, processor)
    _, found = outputs(trained(exact, policy="all"), half, inputs.copy().to(torch.bfloat16), processor)
    for one, other in zip(found["scores"], wanted["scores"], strict=True):
        if other is not None:
            assert one.dtype == torch.float32
            torch.testing.assert_close(one, other, atol=0.15, rtol=0.05)


def test_a_layout_without_markers_has_pages_alone():
    layout = TokenLayout(torch.tensor([[False, True, True, False, True]]), torch.ones(1, 5, dtype=torch.bool))
    assert URaG(page_markers="drop")._pages(layout, None).tolist() == [[-1, 0, 0, -1, 1]]


# --- weights ----------------------------------------------------------------------------------------------------------


def released(model, hidden=24, width=16):
    """A head in the authors' layout, beside tensors of the language model."""
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "0.weight": (hidden, _spec(model).hidden),
        "0.bias": (hidden,),
        "2.weight": (width, hidden),
        "2.bias": (width,),
    }
    return {f"proj_layer.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_released_heads_load(tmp_path):
    model, processor, inputs = prepared("qwen2_5_vl", kind="pages")
    tensors = released(model)
    beside = {"model.norm.weight": torch.ones(4), "visual.x": torch.ones(4), "lm_head.weight": torch.ones(4)}
    save_file(tensors | beside, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"model.embed_tokens.weight": torch.ones(4)}, tmp_path / "model-00002-of-00002.safetensors")
    found = []
    for source in (tensors, {**tensors, **beside}, tmp_path / "model-00001-of-00002.safetensors", tmp_path):
        technique = URaG.from_released(source, layer=2, policy="all")
        assert (technique.hidden, technique.width) == (24, 16)
        handle = technique.attach(model, processor)
        assert torch.equal(handle.modules[0].first.weight, tensors["proj_layer.0.weight"])
        assert torch.equal(handle.modules[0].second.bias, tensors["proj_layer.2.bias"])
        logits(model, inputs)
        found.append(handle.run.outputs["URaG"]["scores"][0])
        handle.save_pretrained(tmp_path / "saved")
        handle.detach()
    assert all(torch.equal(scores, found[0]) for scores in found)
    with URaG.from_pretrained(tmp_path / "saved")(model, processor) as run:
        logits(model, inputs)
        assert torch.equal(run.outputs["URaG"]["scores"][0], found[0])
    # the head itself, as a plain nn.Sequential gives it
    plain = torch.nn.Sequential(torch.nn.Linear(_spec(model).hidden, 24), torch.nn.GELU(), torch.nn.Linear(24, 16))
    plain.load_state_dict({name.removeprefix("proj_layer."): value for name, value in tensors.items()})
    states = torch.randn(3, _spec(model).hidden)
    module = URaG.from_released(tensors).build(_spec(model))
    URaG.from_released(tensors).learned.load_into(module, model)
    assert torch.equal(module(states), plain(states))


def test_wrong_released_heads_are_named(tmp_path):
    model = tiny_model("qwen2_5_vl")
    tensors = released(model)

    def but(**changes):
        changed = {**tensors, **{f"proj_layer.{name.replace('_', '.')}": value for name, value in changes.items()}}
        return {name: value for name, value in changed.items() if value is not None}

    lora = {name.replace(".weight", ".base_layer.weight"): value for name, value in tensors.items()}
    for source, message in (
        (but(**{"2_bias": None}), r"missing proj_layer\.2\.bias; unexpected nothing"),
        (but(**{"4_weight": torch.ones(2, 2)}), r"missing nothing; unexpected proj_layer\.4\.weight"),
        ({**tensors, "head.weight": torch.ones(1)}, r"unexpected head\.weight"),
        (lora, r"missing proj_layer\.0\.weight.*unexpected .*base_layer.*merge LoRA"),
        (but(**{"2_weight": torch.ones(16, 23)}), r"proj_layer\.2\.weight has another shape.*\(16, 23\)"),
        (but(**{"0_bias": torch.ones(7)}), r"proj_layer\.0\.bias has another shape"),
        (but(**{"2_weight": torch.ones(16)}), r"proj_layer\.2\.weight has another shape"),
    ):
        with pytest.raises(LoadError, match=message):
            URaG.from_released(source)
    with pytest.raises(LoadError, match="Leave them out"):
        URaG.from_released(tensors, hidden=25)
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(LoadError, match="cannot be read"):
        URaG.from_released(tmp_path / "broken.safetensors")
    for nothing in (tmp_path / "none", tmp_path / "head.pth"):
        with pytest.raises(LoadError, match=r"no \.safetensors file"):
            URaG.from_released(nothing)
    with pytest.raises(LoadError, match="do not fit this model"):
        URaG.from_released(tensors, layer=2).attach(tiny_model("llava"))  # another width


def test_heads_save_and_load_with_another_policy(tmp_path):
    model, processor, inputs = prepared(kind="pages")
    handle = trained(model, keep_pages=2).attach(model, processor)
    handle.save_pretrained(tmp_path)
    handle.detach()
    assert load_techniques(tmp_path, model) == Stack(trained(model, keep_pages=2))
    again = URaG.from_pretrained(tmp_path, keep_pages=1, recoverable=True)
    _, told = outputs(again, model, inputs, processor)
    _, wanted = outputs(trained(model, keep_pages=1), model, inputs, processor)
    assert told["kept"] == wanted["kept"]
    with pytest.raises(LoadError, match="do not fit this model and these arguments"):
        URaG.from_pretrained(tmp_path, hidden=25).attach(model)
    with pytest.raises(LoadError, match="asks for layers 6; this model has layers 5"):
        URaG.from_pretrained(tmp_path).attach(tiny_model("llava", layers=5))
