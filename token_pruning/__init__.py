"""Techniques that make the decoder do less for visual tokens."""

from mllm.token_pruning.dyvte import DyVTE
from mllm.token_pruning.urag import URaG
from mllm.token_pruning.visual_rows import EEMLLM, FreezeVisual, NAAViT

__all__ = ["EEMLLM", "DyVTE", "FreezeVisual", "NAAViT", "URaG"]
