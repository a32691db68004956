"""NAAViT, EE-MLLM and ShortV's freeze: what visual rows may skip in a layer.

Text rows attend to everything before them as always. Visual rows V of layer l, normed V' = RMSNorm(V), always offer
their keys and values K(V'), W_V(V'), and then do

    technique      attention                    FFN
    NAAViT         none                         V + FFN(RMSNorm(V))       https://arxiv.org/abs/2502.02458 (pilot study)
    EE-MLLM        V + O(W_V(V'))  (own value)  V + FFN(RMSNorm(V))       https://arxiv.org/abs/2408.11795
    freeze         none                         none                      https://arxiv.org/abs/2504.00502 (ShortV)

EE-MLLM's rule is causal attention in which each visual row may only see itself: softmax over one key is 1. Visual rows
here see neither each other nor the text before them, so their keys and values depend on the image alone.

When not to use them: NAAViT and EE-MLLM were trained with the rule on; switched on in every layer of a model trained
without it, they cost accuracy. Choose few layers, or fine-tune.
The cache keeps all visual keys: decoding stays as it is.

With the rule on from layer 0 on, keys and values of an image are a function of the image and its positions. ``NAAViT``
and ``EEMLLM`` with ``image_cache=n`` keep those of the last n images: the next question about one of them computes its
text rows alone (the vision tower still runs; with gradients enabled nothing is kept). ``run.image_cache`` tells hits
and bytes; ``run.image_cache.clear()`` forgets all images.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, Strict

from mllm.cost import ModelSpec
from mllm.errors import ConfigError
from mllm.technique import Layers, Technique, VisualPolicy, check_layers, register


class _VisualRows(Technique):
    """A policy for visual rows on some layers.

    Args:
        layers: ``"all"``, a list of layer numbers from 0, or ``"start:stop"``. An empty list changes nothing.

    Raises:
        ConfigError: a layer does not exist in the model that it is attached to.
    """

    policy: ClassVar[VisualPolicy]
    training: ClassVar[str | None] = "mllm.finetuning:recipe"

    layers: Layers = "all"

    def check(self, spec: ModelSpec) -> None:
        check_layers(self.layers, spec, self.name)

    def is_neutral(self, spec: ModelSpec) -> bool:
        return not self.layers

    def visual_policy(self, layer: int, spec: ModelSpec) -> VisualPolicy | None:
        return self.policy if self.layers == "all" or layer in self.layers else None


class _ReusableRows(_VisualRows):
    """A policy under which the keys and values of an image can serve the next question.

    Args:
        layers: as above.
        image_cache: images whose keys and values are kept, the last ones used; 0 keeps none. Needs ``layers="all"``.
    """

    image_cache: Annotated[int, Strict(), Field(ge=0)] = 0

    def check(self, spec: ModelSpec) -> None:
        super().check(spec)
        if self.image_cache and self.layers != "all":
            raise ConfigError(
                f"{self.name}: image_cache={self.image_cache} with layers={list(self.layers)}: in the other layers "
                "image rows see the text before them, so their keys depend on the prompt. "
                'Use layers="all" or image_cache=0.'
            )

    def excludes(self, other: Technique) -> str | None:
        if self.image_cache and other.by_input:
            return (
                f"{other.name} decides by the question how far image rows go, while image_cache keeps rows that went "
                "as far as the first question let them. Use image_cache=0."
            )
        return None


@register
class NAAViT(_ReusableRows):
    """No attention among visual tokens: visual rows skip queries, scores and output.

    Takes ``layers`` and ``image_cache``.
    """

    name: ClassVar[str] = "NAAViT"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.02458"
    policy: ClassVar[VisualPolicy] = VisualPolicy(own_value=False, ffn=True)


@register
class EEMLLM(_ReusableRows):
    """EE-MLLM: each visual row attends to itself alone. Takes ``layers`` and ``image_cache``."""

    name: ClassVar[str] = "EEMLLM"
    paper: ClassVar[str] = "https://arxiv.org/abs/2408.11795"
    policy: ClassVar[VisualPolicy] = VisualPolicy(own_value=True, ffn=True)


@register
class FreezeVisual(_VisualRows):
    """ShortV's freeze: visual rows pass through unchanged, no attention and no FFN. Takes ``layers``."""

    name: ClassVar[str] = "FreezeVisual"
    paper: ClassVar[str] = "https://arxiv.org/abs/2504.00502"
    policy: ClassVar[VisualPolicy] = VisualPolicy(own_value=False, ffn=False)
