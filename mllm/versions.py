"""What differs between the releases of transformers that this package runs on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

_OLD, _NEW = "past_key_values", "cache"

#: the argument and the output field that hold the key-value cache: ``past_key_values`` until 5.23, ``cache`` since 5.24
CACHE: str = _NEW if _NEW in {field.name for field in fields(BaseModelOutputWithPast)} else _OLD


def cache_of(kwargs: dict[str, Any]) -> Any:
    """The key-value cache among a call's arguments, by either name: callers may still use the old one; None without."""
    cache = kwargs.get(_NEW)
    return kwargs.get(_OLD) if cache is None else cache


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without the warning that peft reads a name which transformers gave up: nothing follows from it here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield
