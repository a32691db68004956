"""Join a vision tower and a Hugging Face language model into an ordinary LLaVA folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    ViTImageProcessor,
)

from mllm import towers
from mllm.errors import ConfigError
from mllm.towers import VisionTowerModel

IMAGE_TOKEN = "<image>"

#: turns in the form <|im_start|>role\n...<|im_end|>, a picture standing as one <image> on a line of its own
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}{{ '<image>\n' }}{% elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def compose(
    language_model: PreTrainedModel,
    tokenizer: Any,
    tower: VisionTowerModel,
    image_mean: tuple[float, float, float],
    image_std: tuple[float, float, float],
    projector: dict[str, Tensor] | None = None,
    chat_template: str = CHAT_TEMPLATE,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Build the model and its processor; ``save_pretrained`` of both into one folder makes a stock LLaVA checkpoint.

    Args:
        language_model: a decoder with a head, such as ``LlamaForCausalLM``; its weights are taken over.
        tokenizer: its tokenizer; gets the token ``<image>`` if it has none.
        tower: the vision tower; its weights are taken over.
        image_mean, image_std: per channel, what the tower expects of pictures scaled to 0..1.
        projector: weights ``linear_1.weight`` (text width, tower width), ``linear_1.bias``, ``linear_2.*``; random
            without.
        chat_template: Jinja template that writes a picture as ``<image>``.

    Raises:
        ConfigError: the projector's weights do not fit.
    """
    towers.register()
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    old = language_model.get_input_embeddings().num_embeddings
    if old < len(tokenizer):
        language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        embeddings = language_model.get_input_embeddings().weight
        with torch.no_grad():  # never read for pictures; the same on every machine
            embeddings[old:] = embeddings[:old].mean(dim=0)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=(tower.config.image_size // tower.config.patch_size) ** 2,
        tie_word_embeddings=language_model.config.tie_word_embeddings,
    )
    config.pad_token_id = tokenizer.pad_token_id
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.lm_head.load_state_dict(language_model.lm_head.state_dict())
    model.tie_weights()
    if projector is not None:
        target = model.model.multi_modal_projector
        wanted = {name: tuple(value.shape) for name, value in target.state_dict().items()}
        given = {name: tuple(value.shape) for name, value in projector.items()}
        if wanted != given:
            raise ConfigError(f"The projector's weights do not fit: given {given}, needed {wanted}.")
        target.load_state_dict({name: value.to(torch.float32) for name, value in projector.items()})
    model.generation_config = language_model.generation_config
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    size = tower.config.image_size
    processor = LlavaProcessor(
        image_processor=ViTImageProcessor(
            size={"height": size, "width": size}, image_mean=list(image_mean), image_std=list(image_std)
        ),
        tokenizer=tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy="full",
        chat_template=chat_template,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=0,
    )
    return model.eval(), processor


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: str | Path) -> None:
    """Write both into one folder."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
