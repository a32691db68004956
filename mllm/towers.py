"""Any timm or open_clip image encoder as a vision tower of a stock Hugging Face LLaVA model.

The tower returns a square grid of feature vectors, one per visual token: feature maps of chosen depths, resized to the
grid of the first of them and concatenated. It is registered with ``AutoConfig`` and ``AutoModel`` under its own model
type, so that a LLaVA folder that names it saves and loads like any other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from mllm.errors import ConfigError

LIBRARIES = ("timm", "open_clip")


class VisionTowerConfig(PreTrainedConfig):
    """Config of a :class:`VisionTowerModel`.

    Args:
        library: ``"timm"`` or ``"open_clip"``.
        architecture: its name there, such as ``"tf_efficientnet_lite0"`` or ``"ViT-B-16"``.
        image_size: side of the square input in pixels.
        levels: which intermediate feature maps to take, as the library counts them (-1: the deepest); the first one
            sets the grid.
        final: also take the map that the encoder itself ends with.
        normalize: scale each map to zero mean and unit variance over its channels, so that none drowns the others.
        hidden_size: channels of the result; filled in by :meth:`for_architecture`.
        patch_size: pixels per token along a side; filled in by :meth:`for_architecture`.
    """

    model_type = "mllm_vision_tower"

    def __init__(
        self,
        library: str = "timm",
        architecture: str = "tf_efficientnet_lite0",
        image_size: int = 224,
        levels: list[int] | tuple[int, ...] = (-1,),
        final: bool = False,
        normalize: bool = True,
        hidden_size: int = 0,
        patch_size: int = 0,
        **kwargs: Any,
    ) -> None:
        self.library = library
        self.architecture = architecture
        self.image_size = image_size
        self.levels = list(levels)
        self.final = final
        self.normalize = normalize
        self.hidden_size = hidden_size
        self.patch_size = patch_size
        super().__init__(**kwargs)

    @classmethod
    def for_architecture(cls, **kwargs: Any) -> VisionTowerConfig:
        """A config whose ``hidden_size`` and ``patch_size`` are read off the architecture, by one pass of zeros.

        Raises:
            ConfigError: the library or the architecture is unknown, or the grid is not square or does not divide the
                picture.
        """
        config = cls(**kwargs)
        tower = VisionTowerModel(config).eval()
        with torch.no_grad():
            grid = tower.grid(torch.zeros(1, 3, config.image_size, config.image_size))  # (1, C, H, W)
        if grid.shape[2] != grid.shape[3] or config.image_size % grid.shape[2]:
            raise ConfigError(
                f"{config.architecture} turns {config.image_size} pixels into a grid of {tuple(grid.shape[2:])}; LLaVA "
                "processors need a square grid that divides the picture. Choose another image_size or level."
            )
        config.hidden_size, config.patch_size = grid.shape[1], config.image_size // grid.shape[2]
        return config


class VisionTowerModel(PreTrainedModel):
    """An image encoder that returns (B, tokens, hidden_size) as its only hidden state."""

    config: VisionTowerConfig
    config_class = VisionTowerConfig
    main_input_name = "pixel_values"
    base_model_prefix = "tower"
    # the encoder attends in its own way, whichever backend the decoder runs on
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__(config)
        self.encoder = _build(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The libraries initialise their own modules."""

    def grid(self, pixel_values: Tensor) -> Tensor:
        """(B, C, H, W) chosen feature maps, concatenated on the grid of the first."""
        levels = list(self.config.levels)
        # processors give float32; like other towers, take it whatever the weights are stored in
        pixel_values = pixel_values.to(next(self.encoder.parameters()).dtype)
        if self.config.library == "timm" or hasattr(self.encoder, "trunk"):
            encoder = getattr(self.encoder, "trunk", self.encoder)
            last, maps = encoder.forward_intermediates(pixel_values, indices=None, output_fmt="NCHW")
            maps = [maps[level] for level in levels]
            if self.config.final:
                if last.ndim != 4:
                    raise ConfigError(f"{self.config.architecture} does not end with a feature map: use final=False.")
                maps.append(last)
        else:
            output = self.encoder.forward_intermediates(
                pixel_values, indices=None, output_fmt="NCHW", intermediates_only=True
            )
            if self.config.final:
                raise ConfigError("open_clip encoders end with a pooled vector, not a map: use final=False.")
            maps = [output["image_intermediates"][level] for level in levels]
        if self.config.normalize:
            maps = [_normalize(feature_map) for feature_map in maps]
        size = maps[0].shape[-2:]
        maps = [m if m.shape[-2:] == size else nn.functional.interpolate(m, size=size, mode="bilinear") for m in maps]
        return torch.cat(maps, dim=1)

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        """Encode (B, 3, image_size, image_size) pictures."""
        features = self.grid(pixel_values).flatten(2).transpose(1, 2)  # (B, H * W, C)
        return BaseModelOutput(last_hidden_state=features, hidden_states=(features,))


def _normalize(feature_map: Tensor) -> Tensor:
    channels = feature_map.shape[1]
    rows = feature_map.permute(0, 2, 3, 1)  # (B, H, W, C)
    return nn.functional.layer_norm(rows, (channels,)).permute(0, 3, 1, 2)


def _build(config: VisionTowerConfig) -> nn.Module:
    if config.library == "timm":
        import timm

        if not timm.is_model(config.architecture):
            close = timm.list_models(f"*{config.architecture.split('_')[0]}*")[:5]
            raise ConfigError(
                f"timm has no architecture {config.architecture!r}. Similar: {', '.join(close) or 'none'}."
            )
        sized = {"img_size": config.image_size} if "vit" in config.architecture else {}
        return timm.create_model(config.architecture, pretrained=False, num_classes=0, **sized)
    if config.library == "open_clip":
        import open_clip

        known = open_clip.list_models()
        if config.architecture not in known:
            raise ConfigError(
                f"open_clip has no architecture {config.architecture!r}. Known: {', '.join(known[:8])}..."
            )
        settings = open_clip.get_model_config(config.architecture)
        vision = open_clip.CLIPVisionCfg(**{**settings["vision_cfg"], "image_size": config.image_size})
        from open_clip.model import _build_vision_tower

        return _build_vision_tower(settings["embed_dim"], vision, settings.get("quick_gelu", False))
    raise ConfigError(f"library={config.library!r} is not one of: {', '.join(LIBRARIES)}.")


def register() -> None:
    """Make the tower known to ``AutoConfig`` and ``AutoModel``; doing it twice is harmless."""
    AutoConfig.register(VisionTowerConfig.model_type, VisionTowerConfig, exist_ok=True)
    AutoModel.register(VisionTowerConfig, VisionTowerModel, exist_ok=True)
