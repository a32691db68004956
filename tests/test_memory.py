"""Memory grows linearly with the prompt: no technique makes a tensor of length x length on the fast path."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mllm.cost import ModelSpec
from mllm.eval.bench_model import CHAT, SETTINGS, build_model, make_prompt, prepare

SPEC = ModelSpec(4, 32, 64, 4, 2, 8)
TEXT = 64


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model("llava-1.5-7b", SPEC, 4, "sdpa", torch.float32, torch.device("cpu"))


class Largest(TorchDispatchMode):
    """The largest storage that any operation returned, in numbers, and the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.size, self.function = 0, ""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                size = value.untyped_storage().nbytes() // value.element_size()
                if size > self.size:
                    self.size, self.function = size, f"{function} {tuple(value.shape)} {value.dtype}"
        return result


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", SETTINGS)
@torch.inference_mode()
def test_the_largest_tensor_grows_with_the_length(model, name, batch):
    setting, found = SETTINGS[name], []
    for visual in (960, 1984):
        prompt = make_prompt(model, visual, TEXT, batch, setting.pages)
        with prepare(setting, model, prompt.length)(model, CHAT), Largest() as seen:
            model.model(**prompt.inputs())
        found.append((seen.size, seen.function))
    assert found[1][0] <= 2.1 * found[0][0], found


@torch.inference_mode()
def test_what_would_grow_is_seen(model):
    """The counter is no decoration: eager attention makes scores of heads x length x length."""
    eager = build_model("llava-1.5-7b", SPEC, 4, "eager", torch.float32, torch.device("cpu"))
    prompt = make_prompt(eager, 960, TEXT, 1)
    with Largest() as seen:
        eager.model(**prompt.inputs())
    assert seen.size >= SPEC.heads * 1024 * 1024
