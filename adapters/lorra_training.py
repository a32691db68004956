"""How LoRRA is trained: first the visual learners, then everything with the router.

Stage 1 learns the visual learners, all added with weight 1 and without a router. Stage 2 starts from them and learns
both learners and the router; what the first stage computed is what the second one begins with. In both, the language
model and the projector can learn along through LoRA, each at a rate of its own; the folder then loads as a plain model
with these updates, and the learners beside it.

    mllm train lorra --option stage=1 --option projector_lr=1e-4 --out runs/lorra1
    mllm train lorra --option stage=2 --option start=runs/lorra1 --model runs/lorra1 --out runs/lorra2
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from mllm.adapters.lorra import LoRRA
from mllm.chats import Chat, collate
from mllm.errors import ConfigError
from mllm.families import find_parts
from mllm.finetuning import add_lora, save_lora
from mllm.roles import ChatFormat
from mllm.saving import LearnedWeights, check_base, no_weights, read_learned
from mllm.training import Options, Recipe, answer_loss

_DECODER = r"language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
_PROJECTOR = r"(multi_modal_projector\.linear_\d|visual\.merger\.mlp\.\d)"


class LoRRAOptions(BaseModel):
    """Options of training LoRRA.

    Attributes:
        stage: 1: visual learners, no router; 2: both learners and the router.
        start: folder of a first stage, for the second one.
        model_lr: peak rate of LoRA on the language model; None: it does not learn.
        projector_lr: the same for the projector.
        rank: of LoRA on the model.
        gradient_checkpointing: compute activations again instead of keeping them.
    """

    model_config = ConfigDict(extra="forbid")

    stage: Literal[1, 2] = 2
    start: str | None = None
    model_lr: float | None = Field(None, gt=0)
    projector_lr: float | None = Field(None, gt=0)
    rank: int = Field(16, ge=1)
    gradient_checkpointing: bool = False


class LoRRATraining(Recipe):
    """Answer loss with learners attached."""

    defaults: ClassVar[dict[str, Any]] = {"lr": 1e-3, "steps": 200, "batch_size": 2, "accumulation": 4}

    def __init__(self, model: nn.Module, processor: Any, options: Options) -> None:
        own = options.read(LoRRAOptions)
        arguments, start = dict(options.arguments), None
        if own.start is not None:
            saved, start = _first_stage(own, options)
            arguments = {**saved, **arguments}
        arguments["router"] = own.stage == 2
        self.processor, self.chat_format = processor, ChatFormat.from_processor(processor)
        model.requires_grad_(False)
        rates = {_DECODER: own.model_lr, _PROJECTOR: own.projector_lr}
        patterns = [pattern for pattern, rate in rates.items() if rate is not None]
        self.model = model
        if patterns:
            self.model = add_lora(model, rf".*({'|'.join(patterns)})", own.rank)
        self.handle = LoRRA(**arguments).attach(self.model, processor, freeze=False)
        (module,) = self.handle.modules
        module.float()
        if start is not None:
            check_base(start.base_model, model, own.start)
            _take_over(module, dict(start.tensors), own.start)
            if not saved["router"] and not self.handle.stack.techniques[0].double_add:
                # the fresh router gives each learner half; until now the visual ones were added whole
                for learners in module.values():
                    learners.visual.o.up.weight.data.mul_(2)
        module.requires_grad_(True)
        if own.stage == 1:
            for learners in module.values():
                learners.text.requires_grad_(False)
        if own.gradient_checkpointing:
            find_parts(model).text.gradient_checkpointing_enable({"use_reentrant": False})
            find_parts(model).text.train()  # it is asked for there
        self._rates = own

    def parameter_groups(self) -> list[dict[str, Any]]:
        own = [parameter for parameter in self.handle.parameters() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [{"params": own}]
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        inside = [parameter for name, parameter in named if ".language_model." in name]
        beside = [parameter for name, parameter in named if ".language_model." not in name]
        if inside:
            groups.append({"params": inside, "lr": self._rates.model_lr})
        if beside:
            groups.append({"params": beside, "lr": self._rates.projector_lr})
        return groups

    def loss(self, batch: list[Chat], step: int) -> tuple[Tensor, dict[str, float]]:
        model = find_parts(self.model).model
        inputs = collate(self.processor, self.chat_format, batch).to(model.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(next(model.parameters()).dtype)
        loss, numbers = answer_loss(model, inputs)
        if not loss.requires_grad:  # text alone, from which the first stage has nothing to learn
            loss = loss + 0 * sum(p.sum() for group in self.parameter_groups() for p in group["params"])
        return loss, numbers

    def save(self, folder: Path) -> None:
        self.handle.save_pretrained(folder)
        if self.model is not find_parts(self.model).model:
            save_lora(self.model, folder)
            self.processor.save_pretrained(folder)


def _first_stage(own: LoRRAOptions, options: Options) -> tuple[dict[str, Any], LearnedWeights]:
    """Arguments and weights to start from."""
    if own.stage == 1:
        raise ConfigError(f"start={own.start}: a first stage starts from nothing. Use stage=2.")
    saved, learned = read_learned(own.start, LoRRA.name)
    if learned is None:
        raise no_weights(own.start)
    if (Path(own.start) / "adapter_config.json").exists() and Path(options.model) != Path(own.start):
        raise ConfigError(
            f"start={own.start}: the model learned along there, so the second stage must go on with it: give "
            f"--model {own.start} instead of {options.model}."
        )
    return saved, learned


def _take_over(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Fill ``module`` with a first stage's learners; its router, where that has none, stays fresh."""
    wanted = {name: value.shape for name, value in module.state_dict().items()}
    given = {name: value.shape for name, value in tensors.items()}
    fresh = {name for name in wanted if name.endswith((".table", ".bias"))}
    wrong = sorted(name for name in {*wanted, *given} - (fresh - set(given)) if wanted.get(name) != given.get(name))
    if wrong:
        here, there = (tuple(shapes[wrong[0]]) if wrong[0] in shapes else "none" for shapes in (wanted, given))
        raise ConfigError(
            f"{source} does not fit the arguments of this stage: its {wrong[0]} is {there}, needed is {here}. Give the "
            "rank, layers and router_length that it was trained with, or leave them out."
        )
    module.load_state_dict(tensors, strict=False)


def recipe(model: nn.Module, processor: Any, options: Options) -> Recipe:
    """The recipe of ``mllm train lorra``, see :mod:`mllm.training`."""
    return LoRRATraining(model, processor, options)
