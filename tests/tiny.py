"""Tiny random models of every family, real processors for them, and the inputs that tell techniques apart.

The models have what breaks assumptions in large ones: fewer key/value heads than heads, a head dimension that is not
``hidden / heads`` (llava), biased projections (OneVision, Qwen), anyres tiles with newline features, M-RoPE.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    BatchFeature,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    SiglipVisionConfig,
)

FAMILIES = ("llava", "llava_next", "llava_onevision", "qwen2_5_vl")
KINDS = ("one", "text", "batch", "two_images", "same_length_ragged", "image_only_start")

# --- vocabulary: control tokens, characters, then the multimodal tokens, as in real models --------------------------

VOCAB_SIZE = 160
_CONTROL = ["<pad>", "<unk>", "<s>", "</s>"]
_MULTIMODAL = 6
_CHARACTERS = ["\n", *map(chr, range(0x20, 0x7F)), *map(chr, range(0xC0, 0x100))]
_CHARACTERS = _CHARACTERS[: VOCAB_SIZE - len(_CONTROL) - _MULTIMODAL]
PAD_ID, UNK_ID, BOS_ID, EOS_ID = range(len(_CONTROL))
IM_START_ID, IM_END_ID, IMAGE_ID, VIDEO_ID, VISION_START_ID, VISION_END_ID = range(VOCAB_SIZE - _MULTIMODAL, VOCAB_SIZE)
SPECIAL_IDS = (*range(len(_CONTROL)), *range(VOCAB_SIZE - _MULTIMODAL, VOCAB_SIZE))

_LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT:' if message['role'] == 'assistant' else '' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% elif part['type'] == 'video' %}{{ '<video>\n' }}"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'IMAGE' }}"
    "{% elif part['type'] == 'video' %}{{ 'VIDEO' }}"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TEMPLATES = {
    "llava": _LLAVA_TEMPLATE,
    "llava_next": _LLAVA_TEMPLATE,
    "llava_onevision": _CHATML_TEMPLATE.replace("IMAGE", "<image>\n").replace("VIDEO", "<video>\n"),
    "qwen2_5_vl": _CHATML_TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>").replace(
        "VIDEO", "<|vision_start|><|video_pad|><|vision_end|>"
    ),
}

# --- shapes -----------------------------------------------------------------------------------------------------------

_PATCH = 8
_SIDE = {"llava": 32, "llava_next": 24, "llava_onevision": 24}  # pixels of a (square) tile
_PINPOINTS = {
    "llava_next": [[24, 48], [48, 24], [48, 48]],
    "llava_onevision": [[24, 24], [24, 48], [48, 24], [48, 48]],
}
_QWEN_PATCH, _QWEN_MERGE = 4, 2


def _check_family(family: str) -> None:
    if family not in FAMILIES:
        raise ValueError(f"family={family!r} is unknown; one of {', '.join(FAMILIES)}")


def _text_options(layers: int, hidden: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "pad_token_id": PAD_ID,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "tie_word_embeddings": False,
    }


def tiny_config(family: str, layers: int = 6) -> PreTrainedConfig:
    """The config that :func:`tiny_model` is built from."""
    _check_family(family)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    if family == "qwen2_5_vl":
        return Qwen2_5_VLConfig(
            # 8 rotary pairs a head, shared out over time, height and width
            text_config=_text_options(layers, hidden=64)
            | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}},
            vision_config={
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "patch_size": _QWEN_PATCH,
                "spatial_merge_size": _QWEN_MERGE,
                "window_size": 16,
                "fullatt_block_indexes": [1],
                "out_hidden_size": 64,
            },
            image_token_id=IMAGE_ID,
            video_token_id=VIDEO_ID,
            vision_start_token_id=VISION_START_ID,
            vision_end_token_id=VISION_END_ID,
        )
    vision |= {"image_size": _SIDE[family], "patch_size": _PATCH}
    if family == "llava":
        return LlavaConfig(
            vision_config=CLIPVisionConfig(**vision),
            text_config=LlamaConfig(**_text_options(layers, hidden=48), head_dim=16),
            image_token_index=IMAGE_ID,
            image_seq_length=(_SIDE[family] // _PATCH) ** 2,
        )
    if family == "llava_next":
        return LlavaNextConfig(
            vision_config=CLIPVisionConfig(**vision),
            text_config=MistralConfig(**_text_options(layers, hidden=64), sliding_window=None),
            image_token_index=IMAGE_ID,
            image_grid_pinpoints=_PINPOINTS[family],
        )
    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**vision, vision_use_head=False),
        text_config=Qwen2Config(**_text_options(layers, hidden=64)),
        image_token_index=IMAGE_ID,
        video_token_index=VIDEO_ID,
        image_grid_pinpoints=_PINPOINTS[family],
    )


# --- models -----------------------------------------------------------------------------------------------------------


def tiny_model(
    family: str, attn: str = "sdpa", seed: int = 0, layers: int = 6, *, fresh: bool = False
) -> PreTrainedModel:
    """A random float32 model of ``family`` in eval mode, about 0.2 M parameters.

    Args:
        family: one of :data:`FAMILIES`.
        attn: attention backend of the decoder and the vision tower.
        seed: of the weights.
        layers: decoder layers.
        fresh: build a new model; otherwise the same object is returned each time, which tests may only read.
    """
    if fresh:
        return _build(family, attn, seed, layers)
    return _cached(family, attn, seed, layers)


def _build(family: str, attn: str, seed: int, layers: int) -> PreTrainedModel:
    config = tiny_config(family, layers)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation=attn)
    _randomise(model, seed)
    return model.eval()


@cache
def _cached(family: str, attn: str, seed: int, layers: int) -> PreTrainedModel:
    return _build(family, attn, seed, layers)


@torch.no_grad()
def _randomise(model: nn.Module, seed: int) -> None:
    """Weights large enough that attention is peaked and images change the logits; stock initialisation is too small."""
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter: Tensor, std: float, mean: float = 0.0) -> None:
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + mean)

    for module in model.modules():
        is_norm = "Norm" in type(module).__name__
        for name, parameter in module.named_parameters(recurse=False):
            if is_norm and name == "weight":
                normal(parameter, 0.1, mean=1.0)
            elif isinstance(module, nn.Embedding):
                normal(parameter, 0.7)
            elif parameter.dim() >= 2:
                normal(parameter, 1.2 / math.sqrt(parameter[0].numel()))
            else:
                normal(parameter, 0.2)
    # greedy generation must not stop early nor produce placeholders, whose count a second forward would check
    model.lm_head.weight[list(SPECIAL_IDS)] = 0.0


# --- processors -------------------------------------------------------------------------------------------------------


def tiny_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """One token a character, padded on the left; encoding and decoding ASCII is lossless."""
    _check_family(family)
    image, video = ("<|image_pad|>", "<|video_pad|>") if family == "qwen2_5_vl" else ("<image>", "<video>")
    multimodal = ["<|im_start|>", "<|im_end|>", image, video, "<|vision_start|>", "<|vision_end|>"]
    words = [*_CONTROL, *_CHARACTERS, *multimodal]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in _CONTROL + multimodal])
    has_bos = family in ("llava", "llava_next")  # as Llama and Mistral tokenizers, unlike Qwen's
    if has_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS_ID)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens={"image_token": image, "video_token": video},
        clean_up_tokenization_spaces=False,
    )


@cache
def tiny_processor(family: str) -> ProcessorMixin:
    """The family's own processor over :func:`tiny_tokenizer`; shared between tests, which may only read it."""
    tokenizer = tiny_tokenizer(family)
    template = _TEMPLATES[family]
    if family == "qwen2_5_vl":
        patches = {
            "patch_size": _QWEN_PATCH,
            "merge_size": _QWEN_MERGE,
            "size": {"shortest_edge": 16 * 16, "longest_edge": 48 * 48},
        }
        return Qwen2_5_VLProcessor(
            image_processor=Qwen2VLImageProcessor(**patches),
            tokenizer=tokenizer,
            video_processor=Qwen2VLVideoProcessor(**patches),
            chat_template=template,
        )
    side = _SIDE[family]
    if family == "llava":
        return LlavaProcessor(
            image_processor=CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
            tokenizer=tokenizer,
            patch_size=_PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,  # the class token, which the model cuts off again
            chat_template=template,
        )
    if family == "llava_next":
        return LlavaNextProcessor(
            image_processor=LlavaNextImageProcessor(
                size={"shortest_edge": side},
                crop_size={"height": side, "width": side},
                image_grid_pinpoints=_PINPOINTS[family],
            ),
            tokenizer=tokenizer,
            patch_size=_PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
        )
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(
            size={"height": side, "width": side}, image_grid_pinpoints=_PINPOINTS[family]
        ),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size={"height": side, "width": side}),
        num_image_tokens=(side // _PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=template,
    )


def save_tiny(family: str, path: str | Path, *, seed: int = 0, layers: int = 6) -> Path:
    """A folder with model and processor that the ``Auto...`` classes load."""
    path = Path(path)
    tiny_model(family, seed=seed, layers=layers, fresh=True).save_pretrained(path)
    tiny_processor(family).save_pretrained(path)
    return path


# --- inputs -----------------------------------------------------------------------------------------------------------

# "#" stands for an image. Two images are never adjacent: Qwen's processor and model would take them for one.
_PROMPTS = {
    "one": ["USER: see # what is it? ASSISTANT:"],
    "text": ["USER: name a colour ASSISTANT:"],
    "batch": [
        "USER: look # and say in one word what it shows ASSISTANT:",
        "see #\nwhy? A:",
        "#\nWhat is this? ASSISTANT:",
        "USER: name a colour ASSISTANT:",
    ],
    "two_images": ["USER: is # like the other # or not? ASSISTANT:", "USER: see # what is it? ASSISTANT:"],
    "same_length_ragged": [
        "USER: see # what is it? ASSISTANT:",
        "# USER: what is it? see ASSISTANT:",
        "USER: what is it? see # ASSISTANT:",
    ],
    "image_only_start": ["# what is it? ASSISTANT:"],
    "pages": ["USER: read # then # and # and # which one is it? ASSISTANT:"],
    "mixed": [
        "USER: name a colour ASSISTANT:",
        "USER: see # what is it? ASSISTANT:",
        "USER: 1 # 2 # 3 # 4 # 5 # on which page does it stand? ASSISTANT:",
        "USER: # or # or # so? ASSISTANT:",
    ],
}
# how the families with a ChatML template write the headers
_CHATML_HEADERS = {"USER: ": "<|im_start|>user\n", " ASSISTANT:": "<|im_end|>\n<|im_start|>assistant\n"}
# (width, height), taken in turn: a landscape, a portrait and a square image
_SIZES = [(40, 24), (24, 40), (32, 32)]


def tiny_image(seed: int = 0, size: tuple[int, int] = (40, 24)) -> Image.Image:
    """A picture of random coloured squares; ``size`` is (width, height)."""
    width, height = size
    blocks = np.random.default_rng(seed).integers(0, 256, (math.ceil(height / 4), math.ceil(width / 4), 3), np.uint8)
    pixels = blocks.repeat(4, axis=0).repeat(4, axis=1)[:height, :width]
    return Image.fromarray(pixels)


def tiny_inputs(model: PreTrainedModel, processor: ProcessorMixin, kind: str, seed: int = 0) -> BatchFeature:
    """What the processor makes of one of these (left-padded) batches.

    Args:
        model: decides which prompt format is used.
        processor: of the same family.
        kind: ``"one"`` image with text before and after; ``"text"`` only; ``"batch"`` of four rows: a long question, a
            short one, one that starts with the image, one without image; ``"two_images"`` in the first of two rows,
            with text between; ``"same_length_ragged"``: three rows of one length, the image at different places;
            ``"image_only_start"``: the image at position 0, without BOS; ``"pages"``: four images in one row;
            ``"mixed"``: a row of text, one with one image, one with five, one with three.
        seed: of the pictures; the text and all shapes stay the same.
    """
    if kind not in _PROMPTS:
        raise ValueError(f"kind={kind!r} is unknown; one of {', '.join(_PROMPTS)}")
    image = processor.image_token
    # the model needs no start token, and at position 0 it would be text before the image
    if model.config.model_type == "qwen2_5_vl" and kind != "image_only_start":
        image = f"<|vision_start|>{image}<|vision_end|>"
    prompts = _PROMPTS[kind]
    if model.config.model_type in ("llava_onevision", "qwen2_5_vl"):
        for header, chatml in _CHATML_HEADERS.items():
            prompts = [prompt.replace(header, chatml) for prompt in prompts]
    ragged = kind != "same_length_ragged"
    images, number = [], 0
    for prompt in prompts:
        images.append([])
        for _ in range(prompt.count("#")):
            size = _SIZES[number % len(_SIZES)] if ragged else _SIZES[0]
            images[-1].append(tiny_image(seed * 1000 + number, size))
            number += 1
    inputs = processor(
        text=[prompt.replace("#", image) for prompt in prompts],
        images=images if number else None,
        padding=True,
        add_special_tokens=kind != "image_only_start",
        return_tensors="pt",
    )
    if not ragged and not bool(inputs["attention_mask"].all()):
        raise ValueError("the rows of 'same_length_ragged' differ in length")
    return inputs


def visual_mask(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """(B, S) bool, True where the token stands for image features."""
    return inputs["input_ids"] == model.config.image_token_id


def images_per_row(inputs: Mapping[str, Any]) -> list[int]:
    """Images of each row, told apart by the text between them."""
    visual = (inputs["input_ids"] == IMAGE_ID).int()  # (B, S)
    starts = torch.nn.functional.pad(visual, (1, 0)).diff(dim=1) == 1  # (B, S)
    return starts.sum(dim=1).tolist()


def row(inputs: Mapping[str, Any], i: int) -> BatchFeature:
    """The ``i``-th row alone: without its padding, with just its images."""
    counts = images_per_row(inputs)
    keep = inputs["attention_mask"][i].bool()  # (S,)
    first, last = sum(counts[:i]), sum(counts[: i + 1])
    alone: dict[str, Tensor] = {}
    for name, value in inputs.items():
        if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            alone[name] = value[i : i + 1, keep]  # (1, S_i)
            continue
        if name == "batch_num_images":  # entries of rows with images; ends[k] images came up to and with entry k
            ends = value.cumsum(0)
            chosen = value[(ends > first) & (ends <= last)]
        elif name == "pixel_values" and "image_grid_thw" in inputs:  # Qwen: (patches of all images, patch values)
            ends = [0, *inputs["image_grid_thw"].prod(dim=1).cumsum(0).tolist()]
            _check_images(name, len(ends) - 1, counts)
            chosen = value[ends[first] : ends[last]]
        elif name in ("pixel_values", "image_sizes", "image_grid_thw"):  # one entry an image
            _check_images(name, len(value), counts)
            chosen = value[first:last]
        else:
            raise ValueError(f"row() does not know how to divide {name!r}")
        if last > first:  # a text-only row has no image arguments at all
            alone[name] = chosen
    return BatchFeature(alone)


def _check_images(name: str, found: int, counts: list[int]) -> None:
    if found != sum(counts):
        raise ValueError(f"{name} holds {found} images, but the rows have placeholders for {counts}")
