"""The smallest recipe, for the training loop's tests: the projector of a tiny LLaVA learns drawn scenes.

As a script it trains into a folder, in a process of its own that can be killed or be one of several.
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import save_file
from tiny import tiny_model, tiny_processor

from mllm.chats import collate, open_chats
from mllm.roles import ChatFormat
from mllm.training import Options, Recipe, TrainingConfig, answer_loss, train


class ProjectorOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    bias_rate: float = 1e-3


class Projector(Recipe):
    """Trains the two linear layers between vision tower and decoder; biases at a rate of their own."""

    def __init__(self, model: Any, processor: Any, options: Options) -> None:
        self.model, self.processor = model, processor
        self.format = ChatFormat.from_processor(processor)
        self.options = options.read(ProjectorOptions)
        self.projector = model.model.multi_modal_projector
        model.requires_grad_(False)
        self.projector.float().requires_grad_(True)

    def parameter_groups(self) -> list[dict[str, Any]]:
        named = list(self.projector.named_parameters())
        return [
            {"params": [p for name, p in named if name.endswith("weight")]},
            {"params": [p for name, p in named if name.endswith("bias")], "lr": self.options.bias_rate},
        ]

    def loss(self, batch: list[Any], step: int) -> tuple[torch.Tensor, dict[str, float]]:
        inputs = collate(self.processor, self.format, batch).to(self.model.device)
        loss, numbers = answer_loss(self.model, inputs)
        return loss, numbers | {"chats": float(len(batch))}

    def save(self, folder: Path) -> None:
        save_file(self.projector.state_dict(), folder / "projector.safetensors")


def recipe(model: Any, processor: Any, options: Options) -> Projector:
    """What ``Technique.training`` names."""
    return Projector(model, processor, options)


def tiny_recipe(seed: int = 0) -> Projector:
    model = tiny_model("llava", seed=seed, layers=2, fresh=True)
    return Projector(model, tiny_processor("llava"), Options())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--kill-in-step", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    made = tiny_recipe()
    loss = made.loss

    def deadly(batch: list[Any], step: int) -> Any:
        if step == arguments.kill_in_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(batch, step)

    made.loss = deadly
    config = TrainingConfig(steps=arguments.steps, batch_size=arguments.batch_size, lr=1e-2, save_seconds=0)
    train(made, open_chats("scenes"), arguments.out, config)


if __name__ == "__main__":
    main()
