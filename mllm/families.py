"""Model families: where the decoder lies in a stock model, and which tokens stand for visual input.

A family is a row of :data:`FAMILIES`. Adding one means adding a row and running ``tests/contract.py`` on a tiny model.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from mllm.errors import UnsupportedModelError


@dataclass(frozen=True)
class Family:
    """What the engine must know about a ``model_type`` that the config does not say uniformly."""

    model_type: str
    #: config attributes that hold the ids of the visual placeholder tokens
    token_ids: tuple[str, ...] = ("image_token_id",)
    #: forward arguments that carry visual input into this call
    visual_arguments: tuple[str, ...] = ("pixel_values",)
    #: config attributes that hold the ids of text tokens which open and close a visual block
    marker_ids: tuple[str, ...] = ()
    #: forward argument with one entry for each picture
    picture_argument: str = "pixel_values"


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llava"),
        Family("llava_next"),
        Family("llava_onevision", ("image_token_id", "video_token_id"), ("pixel_values", "pixel_values_videos")),
        Family(
            "qwen2_5_vl",
            ("image_token_id", "video_token_id"),
            ("pixel_values", "pixel_values_videos"),
            ("vision_start_token_id", "vision_end_token_id"),
            "image_grid_thw",
        ),
    )
}


@dataclass(frozen=True)
class Parts:
    """The modules of one stock model that the engine hooks."""

    family: Family
    model: nn.Module  # ...ForConditionalGeneration
    base: nn.Module  # the multimodal model that merges image features into the text embeddings
    text: nn.Module  # the decoder stack
    layers: nn.ModuleList
    token_ids: tuple[int, ...]
    marker_ids: tuple[int, ...] = ()

    @property
    def text_config(self):
        return self.model.config.get_text_config(decoder=True)

    @property
    def attention(self) -> str:
        """Name of the attention backend the decoder runs, such as ``"sdpa"``."""
        return self.text.config._attn_implementation


def find_parts(model: nn.Module) -> Parts:
    """Locate the decoder of a stock multimodal model (a peft wrapper around one is looked through).

    Raises:
        UnsupportedModelError: the model's ``model_type`` is none of :data:`FAMILIES`.
    """
    if hasattr(model, "get_base_model"):  # peft
        model = model.get_base_model()
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    family = FAMILIES.get(model_type)
    base = getattr(model, "model", None)
    text = getattr(base, "language_model", None)
    if family is None or not isinstance(getattr(text, "layers", None), nn.ModuleList):
        raise UnsupportedModelError(
            f"{type(model).__name__} (model_type {model_type!r}) is not supported. "
            f"Supported model types: {', '.join(FAMILIES)}, as ...ForConditionalGeneration. "
            "Load the checkpoint with mllm.load(), or add a row to mllm/families.py."
        )
    token_ids, marker_ids = (
        tuple(found for name in names if (found := getattr(model.config, name, None)) is not None)
        for names in (family.token_ids, family.marker_ids)
    )
    return Parts(family, model, base, text, text.layers, token_ids, marker_ids)
