"""Questions and answers are told apart by token ids as a plain reading of the text tells them apart."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, IMAGE_ID, tiny_image, tiny_processor, tiny_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import PreTrainedTokenizerFast

from mllm.compose import CHAT_TEMPLATE
from mllm.errors import ConfigError
from mllm.roles import ChatFormat, Roles

NAMES = ("system", "user_header", "question", "assistant_header", "answer")

# --- templates and tokenizers like those of real models ---------------------------------------------------------------

_CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ DEFAULT }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + ' ' }}"
    "{% elif m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m['content'] + END }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TEMPLATES = {
    "chatml": _CHATML.replace("DEFAULT", "''"),
    # a system prompt of its own where none is given
    "chatml, default system": _CHATML.replace("DEFAULT", r"'<|im_start|>system\nBe kind.<|im_end|>\n'"),
    "vicuna": _VICUNA.replace("END", "' '"),
    "vicuna, end token": _VICUNA.replace("END", "'</s>'"),
    # the end of an answer is written only where a question follows
    "vicuna, end between turns": _VICUNA.replace("END", "('' if loop.last else '</s>')"),
    "lines": "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}",
    # the mark of an answer is written behind every question, asked for or not; system prompts are refused
    "brackets": "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + '</s>' }}"
    "{% else %}{{ raise_exception('no system prompt') }}{% endif %}{% endfor %}",
}
#: how a reader sees a header in the text
HEADERS = {
    "chatml": ("<|im_start|>user\n", "<|im_start|>assistant\n"),
    "vicuna": ("USER: ", "ASSISTANT: "),
    "lines": ("### user:\n", "### assistant:\n"),
    "brackets": ("[INST] ", " [/INST] "),
    "tiny": ("USER: ", "ASSISTANT:"),
}
_CORPUS = [
    "<|im_start|>user\nwhat is that?\n\nwhy?<|im_end|>\n<|im_start|>assistant\nit is red.\nno.\n\n<|im_end|>\n",
    "USER: what is in the picture? ASSISTANT: a dog. 7. USER:  and now?\n ASSISTANT:  a cat.\n\n ASSISTANT: 7 ",
    "### user:\nwhat?\n### assistant:\nthat.\n### user:\n \nso\n### assistant:\n7 [INST] yes. [/INST] no [INST] ",
] * 4


@cache
def sentencepiece_like() -> PreTrainedTokenizerFast:
    """As Llama's: spaces become part of the word behind them, one is put in front, runs of spaces are joined."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    # nothing is learned across words, line breaks and punctuation; in use the text is not split at all
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁*[A-Za-z]+|▁+|\n|\d|[^\s\w▁]+"), "isolated")
    trained = _trained(tokenizer, "<s>")
    trained.backend_tokenizer.pre_tokenizer = None
    return trained


@cache
def qwen_like() -> PreTrainedTokenizerFast:
    """As Qwen's: bytes, and punctuation takes the line breaks behind it along."""
    split = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(tokenizer, None)


def _trained(tokenizer: Tokenizer, bos: str | None) -> PreTrainedTokenizerFast:
    special = ["<pad>", "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = [] if bos else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False, max_token_length=12
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", padding_side="left"
    )


TOKENIZERS = {"sentencepiece": sentencepiece_like, "qwen": qwen_like, "characters": lambda: tiny_tokenizer("llava")}


@cache
def prepared(tokenizer_name: str, template: str) -> tuple[PreTrainedTokenizerFast, ChatFormat]:
    tokenizer = copy.deepcopy(TOKENIZERS[tokenizer_name]())
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer, ChatFormat.from_processor(tokenizer)


# --- a plain reading of the text --------------------------------------------------------------------------------------


def read(text: str, headers: tuple[str, str]) -> tuple[list[str], list[int]]:
    """Role and turn of every character."""
    roles, turns, role, turn, place = [], [], "system", -1, 0
    while place < len(text):
        # the last header of a chat may lack its blank: the answer is to be generated
        at_end = {name: header.rstrip(" ") if text[place:] == header.rstrip(" ") else header
                  for name, header in zip(("user", "assistant"), headers, strict=True)}  # fmt: skip
        opened = next((name for name, header in at_end.items() if text.startswith(header, place)), None)
        if opened:
            turn += opened == "user"
            length = len(at_end[opened])
            roles += [f"{opened}_header"] * length
            role = "question" if opened == "user" else "answer"
        else:
            length = 1
            roles.append(role)
        turns += [turn] * length
        place += length
    return roles, turns


def expected(text: str, offsets: list[tuple[int, int]], headers: tuple[str, str]) -> tuple[list[str], list[int]]:
    """Role and turn of every token, that of its visible text; a header's edge in a token of contents is contents."""
    roles, turns = read(text, headers)
    token_roles, token_turns = [], []
    for place, (left, right) in enumerate(offsets):
        if (left, right) == (0, 0):  # a start token
            token_roles.append("system")
            token_turns.append(-1)
            continue
        inserted = text[left:right].isspace() and offsets[place + 1 : place + 2] == [(left, right)]
        if left == right or inserted:  # a blank that stands for nothing in the text: what stands before it
            left, right = left - 1, left
        places = [k for k in range(left, right) if not text[k].isspace()] or list(range(left, right))
        content = [k for k in places if not roles[k].endswith("header")]
        place = (content or places)[-1]
        token_roles.append(roles[place])
        token_turns.append(turns[place])
    return token_roles, token_turns


def names(roles: Roles, row: int, valid: torch.Tensor) -> list[str]:
    """The one role of each valid token of a row; padding must have none."""
    masks = torch.stack([getattr(roles, name)[row] for name in NAMES])  # (5, S)
    assert torch.equal(masks.sum(dim=0), valid[row].long())
    return [NAMES[k] for k in masks[:, valid[row]].long().argmax(dim=0).tolist()]


# --- tests ------------------------------------------------------------------------------------------------------------

contents = st.text("ab é?.:7()\n\"'，中", min_size=1, max_size=8).filter(str.strip)
# the end token may stand behind answers, and a special token behind questions that end with a picture
endings = st.sampled_from(["", "", "</s>"])
chats = st.lists(st.tuples(*[st.tuples(contents, endings).map("".join)] * 2), min_size=1, max_size=4)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("tokenizer_name", ["sentencepiece", "qwen"])
@settings(max_examples=25, deadline=None)
@given(rows=st.lists(chats, min_size=1, max_size=3), system=st.booleans(), generate=st.booleans(), left=st.booleans())
@example(rows=[[("why?\n", "so.\n"), ("\nb ", "\n\na")], [(" 7", "  7 ")]], system=True, generate=False, left=True)
def test_random_chats_are_read_as_their_text(tokenizer_name, template, rows, system, generate, left):
    tokenizer, chat_format = prepared(tokenizer_name, template)
    texts = []
    for turns in rows:
        chat = [{"role": "system", "content": "be brief."}] if system and template != "brackets" else []
        for question, answer in turns:
            chat += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        chat = chat[:-1] if generate else chat
        texts.append(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generate))
    encoded = tokenizer(
        texts, padding=True, padding_side="left" if left else "right", return_offsets_mapping=True, return_tensors="pt"
    )
    valid = encoded["attention_mask"].bool()
    found = chat_format.roles(encoded["input_ids"], valid)
    for row, text in enumerate(texts):
        offsets = [tuple(pair) for pair in encoded["offset_mapping"][row][valid[row]].tolist()]
        token_roles, token_turns = expected(text, offsets, HEADERS[template.partition(",")[0]])
        tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"][row][valid[row]])
        assert list(zip(tokens, names(found, row, valid), strict=True)) == list(zip(tokens, token_roles, strict=True))
        assert found.turn[row][valid[row]].tolist() == token_turns
        assert (found.turn[row][~valid[row]] == -1).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("left", [True, False])
def test_families(family, left):
    """System prompts, images, several turns and text alone in one batch."""
    processor = tiny_processor(family)
    image = {"type": "image"}
    rows = [
        [("system", ["Be brief."]), ("user", [image, "What is it?"]), ("assistant", ["A dog."]), ("user", ["Why?\n"])],
        [("user", ["Is", image, " like", image, "?"]), ("assistant", ["no"]), ("user", ["so?"]), ("assistant", ["I"])],
        [("user", ["name a colour"])],
    ]
    texts = []
    for row in rows:
        chat = [
            {"role": role, "content": [part if part is image else {"type": "text", "text": part} for part in content]}
            for role, content in row
        ]
        texts.append(processor.apply_chat_template(chat, add_generation_prompt=row[-1][0] == "user"))
    inputs = processor(
        text=texts,
        images=[[tiny_image()], [tiny_image(1), tiny_image(2)], []],
        padding=True,
        padding_side="left" if left else "right",
        return_tensors="pt",
    )
    valid = inputs["attention_mask"].bool()
    chat_format = ChatFormat.from_processor(processor)
    found = chat_format.roles(inputs["input_ids"], valid)
    headers = HEADERS["chatml" if family in ("llava_onevision", "qwen2_5_vl") else "tiny"]
    for row in range(len(rows)):
        tokens = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][row][valid[row]])
        ends = torch.tensor([len(token) for token in tokens]).cumsum(0).tolist()
        offsets = list(zip([0, *ends[:-1]], ends, strict=True))
        token_roles, token_turns = expected("".join(tokens), offsets, headers)
        assert names(found, row, valid) == token_roles
        assert found.turn[row][valid[row]].tolist() == token_turns
    assert found.question[inputs["input_ids"] == IMAGE_ID].all()
    assert found.turn.amax(dim=1).tolist() == [1, 1, 0]
    assert found.answer.any(dim=1).tolist() == [True, True, False]


@pytest.mark.parametrize("tokenizer_name", TOKENIZERS)
def test_the_default_model_s_template(tokenizer_name):
    tokenizer = copy.deepcopy(TOKENIZERS[tokenizer_name]())
    tokenizer.chat_template = CHAT_TEMPLATE
    chat_format = ChatFormat.from_processor(tokenizer)
    assert tokenizer.convert_ids_to_tokens(chat_format.end) == ["<|im_end|>"]
    chat = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so."}]
    ids = torch.tensor(tokenizer(tokenizer.apply_chat_template(chat, tokenize=False))["input_ids"])[None]
    found = chat_format.roles(ids, torch.ones_like(ids, dtype=torch.bool))
    assert tokenizer.decode(ids[found.question]).strip() == "why?<|im_end|>"
    assert tokenizer.decode(ids[found.answer]).strip() == "so.<|im_end|>"


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("chatml", "<|im_end|>"),
        ("vicuna", None),
        ("vicuna, end token", "</s>"),
        ("vicuna, end between turns", "</s>"),
        ("brackets", "</s>"),
        ("lines", None),
    ],
)
def test_end_tokens(template, end):
    tokenizer, chat_format = prepared("sentencepiece", template)
    assert tokenizer.convert_ids_to_tokens(chat_format.end) == ([end] if end else [])


def test_padding_that_looks_like_a_header_is_none():
    tokenizer, chat_format = prepared("qwen", "chatml")
    ids = torch.tensor([[*chat_format.user[0], *tokenizer("hello")["input_ids"]]])
    valid = torch.ones_like(ids, dtype=torch.bool)
    assert chat_format.roles(ids, valid).turn.max() == 0
    valid[:, 0] = False
    found = chat_format.roles(ids, valid)
    assert found.turn.max() == -1
    assert torch.equal(found.system, valid)


def test_nothing_waits_for_the_device():
    """Tensors without values have nothing to wait for: reading one back on the host would raise."""
    _, chat_format = prepared("qwen", "chatml")
    with FakeTensorMode():
        ids = torch.zeros(2, 40, dtype=torch.long)
        found = chat_format.roles(ids, ids == 0)
        assert found.answer.shape == (2, 40)
        with pytest.raises(DataDependentOutputException):
            bool(found.answer.any())


def test_a_sequence_shorter_than_any_header():
    _, chat_format = prepared("qwen", "chatml")
    ids = torch.full((2, 1), 9)
    found = chat_format.roles(ids, torch.ones_like(ids, dtype=torch.bool))
    assert found.system.all()
    assert not found.answer.any()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "writes nothing of its own"),
        ("{% for m in messages %}{{ '> ' + m['content'] + '\n' }}{% endfor %}", "writes nothing of its own"),
        ("{{ messages[0]['content'] }}", "does not render a question, an answer and another question"),
        ("{{ raise_exception('no') }}", "does not render a question, an answer and another question"),
    ],
)
def test_templates_that_do_not_tell_turns_apart(template, message):
    tokenizer = tiny_tokenizer("llava")
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=message):
        ChatFormat.from_processor(tokenizer)


def test_slow_tokenizers_are_refused():
    with pytest.raises(ConfigError, match="Load a fast tokenizer"):
        ChatFormat.from_processor(object())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_closes_a_turn(family):
    """End tokens, and what stands between them and the next header."""
    processor = tiny_processor(family)
    chat = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", "what?"), ("assistant", "a dog"), ("user", "why?"))
    ]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor.tokenizer([text, "a" * len(text)], return_tensors="pt", padding=True)
    roles = ChatFormat.from_processor(processor).roles(inputs["input_ids"], inputs["attention_mask"].bool())
    closing = inputs["input_ids"][0][roles.closing[0]]
    assert processor.tokenizer.decode(closing) == ("<|im_end|>\n" * 3 if "<|im_end|>" in text else "")
    assert not roles.closing[1].any()
    padded = roles.padded(2)
    assert torch.equal(padded.closing[:, 2:], roles.closing)
    assert not padded.closing[:, :2].any()
