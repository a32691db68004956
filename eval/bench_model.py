"""What the bench runs on: a random model at a real shape, its prompts, and the settings that are measured."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mllm.adapters import LoRRA, ModalityMutualAttention
from mllm.cost import ModelSpec
from mllm.errors import ConfigError
from mllm.roles import ChatFormat
from mllm.saving import LearnedWeights, fingerprint
from mllm.technique import Stack, Technique, TrainedTechnique
from mllm.token_pruning import EEMLLM, DyVTE, FreezeVisual, NAAViT, URaG

PAGES, KEPT_PAGES = 20, 5
MIN_TEXT = PAGES + 4  # a header, a token between pages, a question, the answer's header
_IMAGE, _USER, _ASSISTANT, _FIRST, _VOCABULARY = 5, 6, 7, 10, 1000
#: how the bench's prompts mark questions and answers; what a processor's chat template would say
CHAT = ChatFormat(((_USER,),), ((_ASSISTANT,),))


# --- model ------------------------------------------------------------------------------------------------------------


def build_model(
    arch: str, spec: ModelSpec, layers: int, attn: str, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """A LLaVA with random weights, a decoder of this shape and a vision tower that is never run.

    Decoders of the Qwen family have biases in their projections; M-RoPE is left out, positions are plain.
    """
    text = {
        "vocab_size": _VOCABULARY,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": 1 << 17,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=8
        ),
        text_config=LlamaConfig(**text) if arch.startswith("llava-1.5") else Qwen2Config(**text),
        image_token_index=_IMAGE,
    )
    config._attn_implementation = attn
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with device:
            model = LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False)


def twin(model: nn.Module) -> nn.Module:
    """A second model object on the same weights: it stays plain while techniques are attached to the first."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


# --- prompts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """One prompt, the same layout in all rows of the batch, random contents.

    Attributes:
        ids: (B, S) long.
        features: (B, V, D) what the projector would have made of the pictures.
        pages: first and last (exclusive) column of each picture, in order.
    """

    ids: Tensor
    features: Tensor
    pages: tuple[tuple[int, int], ...]

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    @property
    def visual(self) -> int:
        return self.features.shape[1]

    def inputs(self) -> dict[str, Any]:
        """Arguments of the multimodal base model, pictures encoded beforehand as ``generate`` does."""
        pictures = self.features.unflatten(1, (len(self.pages), -1)).flatten(0, 1)  # (B * pages, tokens, D)
        encoded = {"image": BaseModelOutputWithPooling(pooler_output=tuple(pictures))}
        return {"input_ids": self.ids, "mm_encoder_outputs": encoded, "use_cache": True}

    def text_inputs(self) -> dict[str, Any]:
        """The same without pictures."""
        columns = [n for n in range(self.length) if not any(start <= n < stop for start, stop in self.pages)]
        return {"input_ids": self.ids[:, columns], "use_cache": True}


def make_prompt(model: nn.Module, visual: int, text: int, batch: int, pages: int = 1, seed: int = 0) -> Prompt:
    """``visual`` tokens in pictures of one size with text before, between and behind them, ``text`` tokens in all.

    Raises:
        ConfigError: too little text, or fewer visual tokens than pictures.
    """
    if text < MIN_TEXT or visual < pages:
        raise ConfigError(
            f"text_tokens={text}, visual_tokens={visual}: at least {MIN_TEXT} and {pages} are needed, since {pages} "
            "pictures stand apart."
        )
    weight = model.lm_head.weight
    generator = torch.Generator().manual_seed(seed)
    size = visual // pages
    before = (text - (pages - 1)) // 2
    ids = torch.randint(_FIRST, _VOCABULARY, (batch, text + size * pages), generator=generator)  # (B, S)
    spans = tuple((before + n * (size + 1), before + n * (size + 1) + size) for n in range(pages))
    for start, stop in spans:
        ids[:, start:stop] = _IMAGE
    ids[:, 0], ids[:, -1] = _USER, _ASSISTANT
    features = torch.randn(batch, size * pages, weight.shape[1], generator=generator) * 0.02
    return Prompt(ids.to(weight.device), features.to(weight.device, weight.dtype), spans)


# --- settings ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What is measured under one name.

    Attributes:
        make: the stack, from the number of layers and of tokens.
        pages: pictures of the prompt.
        reuse: the picture was asked about before.
        work: which hand-written loop does the same work, see :mod:`mllm.eval.bench_oracle`.
    """

    make: Callable[[int, int], Stack]
    work: str
    pages: int = 1
    reuse: bool = False


def _half(layers: int) -> int:
    return layers // 2 - 1


SETTINGS: dict[str, Setting] = {
    "neutral": Setting(lambda layers, _: Stack(DyVTE(exit_layer=layers - 1)), "dense"),
    "exit_half": Setting(lambda layers, _: Stack(DyVTE(exit_layer=_half(layers))), "dense"),
    "exit_learned": Setting(lambda layers, _: Stack(DyVTE(gate="light")), "dense"),
    "freeze_all": Setting(lambda layers, _: Stack(FreezeVisual()), "policy"),
    "naavit_all": Setting(lambda layers, _: Stack(NAAViT()), "policy"),
    "ee_all": Setting(lambda layers, _: Stack(EEMLLM()), "policy"),
    "naavit_exit": Setting(lambda layers, _: Stack(NAAViT(), DyVTE(exit_layer=_half(layers))), "policy"),
    "naavit_reuse": Setting(lambda layers, _: Stack(NAAViT(image_cache=1)), "reuse", reuse=True),
    "urag_20_to_5": Setting(
        lambda layers, _: Stack(URaG(layer=min(6, _half(layers) + 1), keep_pages=KEPT_PAGES)), "pages", PAGES
    ),
    "mma": Setting(lambda *_: Stack(ModalityMutualAttention()), "opened"),
    "lorra": Setting(lambda _, length: Stack(LoRRA(router_length=length + 256)), "learners"),
}


def prepare(setting: Setting, model: nn.Module, length: int, seed: int = 0) -> Stack:
    """The setting's stack with random learned parts; gates let rows go at half depth, the earlier ones do not."""
    spec = ModelSpec.from_config(model.config.text_config)
    return Stack(
        *(_learned(technique, model, spec, seed) for technique in setting.make(spec.layers, length).techniques)
    )


def _learned(technique: Technique, model: nn.Module, spec: ModelSpec, seed: int) -> Technique:
    if not isinstance(technique, TrainedTechnique) or not technique.learns:
        return technique
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(value.shape, generator=generator) * 0.02
        for name, value in technique.build(spec).state_dict().items()
    }
    for name, value in tensors.items():
        if isinstance(technique, DyVTE) and name.endswith("w2.bias"):
            leaves = float(name.split(".")[1]) >= _half(spec.layers)
            value.copy_(torch.tensor([0.0, 20.0] if leaves else [20.0, 0.0]))
    return technique.with_learned(LearnedWeights(tensors, fingerprint(model), "random"))
