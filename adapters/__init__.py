"""Techniques that change what attention sees, or add small trained parts."""

from mllm.adapters.lorra import LoRRA
from mllm.adapters.mma import ModalityMutualAttention

__all__ = ["LoRRA", "ModalityMutualAttention"]
