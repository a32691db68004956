"""DyVTE: all visual tokens leave the decoder after one layer (https://arxiv.org/abs/2411.19628).

The paper's observation: in deeper layers the text rows have already taken what they need from the image, so every
visual row can leave at once. Layers up to ``exit_layer`` run on text and visual rows; the layers above run on text rows
alone, at their original positions, and cache no visual keys or values:

    rows of layer l  =  text + visual   for l <= exit_layer
                        text            for l >  exit_layer

With a fixed ``exit_layer`` this is Visual Tokens Withdrawal (https://arxiv.org/abs/2405.05803). The learned gate that
picks the layer for each sample is not part of this version.

When not to use it: open captioning and reading tasks lose far more than multiple choice does; measure those.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

from pydantic import Field, Strict
from torch import Tensor

from mllm.cost import ModelSpec
from mllm.errors import ConfigError
from mllm.technique import LayerView, Technique, register


@register
class DyVTE(Technique):
    """Visual tokens leave after ``exit_layer``.

    Args:
        exit_layer: last layer that sees visual tokens, counted from 0; or a fraction of the depth between 0 and 1:
            0.5 on 32 layers is the end of the 16th, layer 15. The model's last layer changes nothing.

    Raises:
        ConfigError: the layer does not exist in the model that it is attached to.
    """

    name: ClassVar[str] = "DyVTE"
    paper: ClassVar[str] = "https://arxiv.org/abs/2411.19628"

    exit_layer: Annotated[int, Strict(), Field(ge=0)] | Annotated[float, Strict(), Field(gt=0, lt=1)]

    def last_visual_layer(self, spec: ModelSpec) -> int:
        if isinstance(self.exit_layer, int):
            return self.exit_layer
        return max(math.floor(self.exit_layer * spec.layers + 0.5), 1) - 1

    def check(self, spec: ModelSpec) -> None:
        if self.last_visual_layer(spec) >= spec.layers:
            raise ConfigError(
                f"DyVTE: exit_layer={self.exit_layer}, but this model has {spec.layers} layers "
                f"(0 to {spec.layers - 1}). Give one of these, or a fraction of the depth such as 0.5."
            )

    def is_neutral(self, spec: ModelSpec) -> bool:
        return self.last_visual_layer(spec) == spec.layers - 1

    def keep(self, view: LayerView) -> Tensor | None:
        if view.layer != self.last_visual_layer(view.spec) + 1:
            return None
        return view.alive & ~view.layout.visual  # (B, S)
