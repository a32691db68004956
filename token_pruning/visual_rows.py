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
"""

from __future__ import annotations

from typing import ClassVar

from mllm.cost import ModelSpec
from mllm.technique import Layers, Technique, VisualPolicy, check_layers, register


class _VisualRows(Technique):
    """A policy for visual rows on some layers.

    Args:
        layers: ``"all"``, a list of layer numbers from 0, or ``"start:stop"``. An empty list changes nothing.

    Raises:
        ConfigError: a layer does not exist in the model that it is attached to.
    """

    policy: ClassVar[VisualPolicy]

    layers: Layers = "all"

    def check(self, spec: ModelSpec) -> None:
        check_layers(self.layers, spec, self.name)

    def is_neutral(self, spec: ModelSpec) -> bool:
        return not self.layers

    def visual_policy(self, layer: int, spec: ModelSpec) -> VisualPolicy | None:
        return self.policy if self.layers == "all" or layer in self.layers else None


@register
class NAAViT(_VisualRows):
    """No attention among visual tokens: visual rows skip queries, scores and output. Takes ``layers``."""

    name: ClassVar[str] = "NAAViT"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.02458"
    policy: ClassVar[VisualPolicy] = VisualPolicy(own_value=False, ffn=True)


@register
class EEMLLM(_VisualRows):
    """EE-MLLM: each visual row attends to itself alone. Takes ``layers``."""

    name: ClassVar[str] = "EEMLLM"
    paper: ClassVar[str] = "https://arxiv.org/abs/2408.11795"
    policy: ClassVar[VisualPolicy] = VisualPolicy(own_value=True, ffn=True)


@register
class FreezeVisual(_VisualRows):
    """ShortV's freeze: visual rows pass through unchanged, no attention and no FFN. Takes ``layers``."""

    name: ClassVar[str] = "FreezeVisual"
    paper: ClassVar[str] = "https://arxiv.org/abs/2504.00502"
    policy: ClassVar[VisualPolicy] = VisualPolicy(own_value=False, ffn=False)
