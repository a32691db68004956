"""Attach visual-token efficiency techniques to stock multimodal LLMs, detach them exactly, measure what they do.

from mllm import load, measure
from mllm.token_pruning import DyVTE

model, processor = load("default")
with DyVTE(exit_layer=0.5)(model) as run:
    model.generate(**inputs)
print(run.report())
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mllm.config import load_config
    from mllm.engine import Handle
    from mllm.layout import TokenLayout
    from mllm.loading import load
    from mllm.run import Report, Run
    from mllm.saving import load_techniques
    from mllm.technique import Stack, Technique, register
    from mllm.timing import measure

_HOMES = {
    "Handle": "engine",
    "Report": "run",
    "Run": "run",
    "Stack": "technique",
    "Technique": "technique",
    "TokenLayout": "layout",
    "load": "loading",
    "load_config": "config",
    "load_techniques": "saving",
    "measure": "timing",
    "register": "technique",
}

__all__ = [
    "Handle",
    "Report",
    "Run",
    "Stack",
    "Technique",
    "TokenLayout",
    "__version__",
    "load",
    "load_config",
    "load_techniques",
    "measure",
    "register",
]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import: only what is used is loaded
    if name not in _HOMES:
        raise AttributeError(f"module 'mllm' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"mllm.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
