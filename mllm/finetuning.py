"""Fine-tuning a model with a technique on: what ``mllm train`` does for techniques that learn nothing themselves.

The technique changes what the decoder computes; the decoder learns to live with it, through LoRA or in full. The result
is a folder that :func:`mllm.load` opens as a plain model, with the technique's own config beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from peft import LoraConfig, get_peft_model
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from mllm.chats import Chat, collate
from mllm.families import find_parts
from mllm.roles import ChatFormat
from mllm.saving import save_techniques
from mllm.technique import Stack
from mllm.training import Options, Recipe, answer_loss
from mllm.versions import quiet_peft

_ATTENTION, _ALL = "self_attn.(q|k|v|o)_proj", "(self_attn.(q|k|v|o)|mlp.(gate|up|down))_proj"


def add_lora(model: nn.Module, targets: str, rank: int, alpha: float | None = None, dropout: float = 0.0) -> nn.Module:
    """The model in a peft wrapper, frozen but for low-rank updates of the layers that the pattern ``targets`` names.

    ``alpha`` is twice the rank where it is not given.
    """
    alpha = 2 * rank if alpha is None else alpha
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets)
    with quiet_peft():
        return get_peft_model(model, config)


def save_lora(model: nn.Module, folder: Path) -> None:
    """Write the updates of :func:`add_lora`, for :func:`mllm.load`."""
    # nothing was added to the vocabulary: peft need not look for the base model's config to find that out
    model.save_pretrained(folder, save_embedding_layers=False)


class FinetuningOptions(BaseModel):
    """Options of fine-tuning.

    Attributes:
        method: ``"lora"``: low-rank updates of the decoder's linear layers; ``"full"``: the whole decoder.
        rank, alpha, dropout: of LoRA.
        targets: linear layers that LoRA updates: ``"all"`` of the decoder layers, or ``"attention"``.
        attach: False trains without the technique: the control with the same budget.
        gradient_checkpointing: compute activations again instead of keeping them.
    """

    model_config = ConfigDict(extra="forbid")

    method: Literal["lora", "full"] = "lora"
    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: Literal["all", "attention"] = "all"
    attach: bool = True
    gradient_checkpointing: bool = False


class Finetuning(Recipe):
    """Answer loss of the model with the technique on."""

    schema: ClassVar[type[FinetuningOptions]] = FinetuningOptions
    defaults: ClassVar[dict[str, Any]] = {"lr": 2e-4, "steps": 200, "batch_size": 2, "accumulation": 4}

    def __init__(self, model: nn.Module, processor: Any, options: Options) -> None:
        self.own = options.read(self.schema)
        self.stack = Stack(options.technique(**options.arguments)) if self.own.attach else Stack()
        self.processor, self.chat_format = processor, ChatFormat.from_processor(processor)
        model.requires_grad_(False)
        parts = find_parts(model)
        if self.own.method == "full":
            parts.text.float().requires_grad_(True)
            parts.model.lm_head.float()
            self.model = model
        else:
            inner = _ALL if self.own.targets == "all" else _ATTENTION
            targets = rf".*language_model\.layers\.\d+\.{inner}"
            self.model = add_lora(model, targets, self.own.rank, self.own.alpha, self.own.dropout)
        if self.own.gradient_checkpointing:
            parts.text.gradient_checkpointing_enable({"use_reentrant": False})
        parts.text.train()  # dropout of LoRA, and checkpointing
        self.handle = self.stack.attach(self.model, processor, freeze=False)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [parameter for parameter in self.model.parameters() if parameter.requires_grad]}]

    def loss(self, batch: list[Chat], step: int) -> tuple[Tensor, dict[str, float]]:
        model = find_parts(self.model).model
        inputs = collate(self.processor, self.chat_format, batch).to(model.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(next(model.parameters()).dtype)
        return answer_loss(model, inputs)

    def save(self, folder: Path) -> None:
        model = find_parts(self.model).model
        if self.stack.techniques:
            save_techniques(self.stack, folder, model, self.handle.modules)
        with torch.no_grad():
            if self.own.method == "full":
                model.save_pretrained(folder)
            else:
                save_lora(self.model, folder)
        self.processor.save_pretrained(folder)


def recipe(model: nn.Module, processor: Any, options: Options) -> Recipe:
    """The recipe of techniques whose model learns, see :mod:`mllm.training`."""
    return Finetuning(model, processor, options)
