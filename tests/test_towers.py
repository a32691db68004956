"""Vision towers of any architecture inside stock LLaVA models, and the builder around them."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_image, tiny_tokenizer
from transformers import AutoConfig, AutoModel, AutoProcessor, LlamaConfig, LlamaForCausalLM
from transformers import LlavaForConditionalGeneration as Llava

from mllm import load, towers
from mllm.compose import compose, save
from mllm.errors import ConfigError
from mllm.inputs import chat_inputs
from mllm.token_pruning import DyVTE
from mllm.towers import VisionTowerConfig, VisionTowerModel

CNN = {"library": "timm", "architecture": "tf_efficientnet_lite0", "image_size": 64, "levels": [3, 4], "final": True}
VIT = {"library": "timm", "architecture": "vit_tiny_patch16_224", "image_size": 64, "levels": [-1]}
OPEN_CLIP = {"library": "open_clip", "architecture": "ViT-B-32", "image_size": 64, "levels": [1]}
OPEN_CLIP_TIMM = {"library": "open_clip", "architecture": "MobileCLIP-S1", "image_size": 64, "levels": [-1]}


@pytest.mark.parametrize(
    ("options", "tokens", "width"),
    [(CNN, 16, 112 + 320 + 1280), (VIT, 16, 192), (OPEN_CLIP, 4, 768), (OPEN_CLIP_TIMM, 4, 512)],
    ids=["timm cnn", "timm vit", "open_clip", "open_clip on timm"],
)
def test_any_architecture_becomes_a_grid_of_tokens(options, tokens, width):
    torch.manual_seed(0)
    config = VisionTowerConfig.for_architecture(**options)
    assert (config.hidden_size, (config.image_size // config.patch_size) ** 2) == (width, tokens)
    tower = VisionTowerModel(config).eval()
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        output = tower(pixels)
        alone = tower(pixels[1:])
    assert output.last_hidden_state.shape == (2, tokens, width)
    assert output.hidden_states[-1] is output.last_hidden_state
    torch.testing.assert_close(alone.last_hidden_state[0], output.last_hidden_state[1], atol=1e-4, rtol=1e-4)


def test_tokens_keep_their_place():
    """A change in one corner of the picture changes that corner's token most."""
    torch.manual_seed(0)
    tower = VisionTowerModel(VisionTowerConfig.for_architecture(**{**VIT, "levels": [0]})).eval()
    pixels = torch.randn(1, 3, 64, 64)
    changed = pixels.clone()
    changed[..., 48:, 48:] += 3
    with torch.no_grad():
        difference = (tower(pixels)[0] - tower(changed)[0]).norm(dim=-1)[0]  # (16,)
    assert difference.argmax() == 15


@pytest.mark.parametrize("options", [CNN, VIT, OPEN_CLIP], ids=["timm cnn", "timm vit", "open_clip"])
def test_float32_pictures_go_into_a_bfloat16_tower(options):
    """What a processor returns, moved to the model's device only: machines with bfloat16 load models in it."""
    tower = VisionTowerModel(VisionTowerConfig.for_architecture(**options)).to(torch.bfloat16).eval()
    with torch.no_grad():
        assert tower(torch.randn(1, 3, 64, 64)).last_hidden_state.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"library": "keras"}, r"library='keras' is not one of: timm, open_clip"),
        ({"architecture": "tf_efficientnet_lite99"}, r"timm has no architecture 'tf_efficientnet_lite99'"),
        ({"library": "open_clip", "architecture": "ViT-Z-1"}, r"open_clip has no architecture 'ViT-Z-1'"),
        ({**OPEN_CLIP, "final": True}, r"use final=False"),
        ({**CNN, "image_size": 72}, r"grid that divides"),
    ],
)
def test_what_cannot_be_built(options, message):
    with pytest.raises(ConfigError, match=message):
        VisionTowerConfig.for_architecture(**options)


def test_registering_twice_is_harmless():
    towers.register()
    towers.register()
    assert AutoConfig.for_model("mllm_vision_tower").model_type == "mllm_vision_tower"
    assert isinstance(AutoModel.from_config(VisionTowerConfig.for_architecture(**VIT)), VisionTowerModel)


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer("llava")
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(text), tokenizer, VisionTowerModel(VisionTowerConfig.for_architecture(**CNN))


MEAN_STD = ((0.5,) * 3, (0.5,) * 3)


def test_a_composed_model_is_an_ordinary_folder(parts, tmp_path):
    model, processor = compose(*parts, *MEAN_STD)
    save(model, processor, tmp_path)
    again = Llava.from_pretrained(tmp_path).eval()
    inputs = chat_inputs(AutoProcessor.from_pretrained(tmp_path), ["What is it?", "Hi"], [[tiny_image()], []])
    assert int((inputs["input_ids"] == again.config.image_token_id).sum()) == 16
    assert inputs["attention_mask"][:, -1].all()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_a_composed_model_takes_techniques(parts, tmp_path):
    save(*compose(*parts, *MEAN_STD), tmp_path)
    model, processor = load(tmp_path, dtype="float32", device="cpu")
    inputs = chat_inputs(processor, ["What is it?"], [[tiny_image()]])
    with DyVTE(exit_layer=0)(model) as run:
        model.generate(**inputs, max_new_tokens=2)
    assert run.report().visual_per_layer == [16, 0, 0]


def test_the_parts_are_taken_over(parts):
    language_model, _, tower = parts
    model, _ = compose(*parts, *MEAN_STD)
    assert torch.equal(model.lm_head.weight[:160], language_model.lm_head.weight[:160])
    for name, value in tower.state_dict().items():
        assert torch.equal(value, model.model.vision_tower.state_dict()[name])


def test_a_projector_that_does_not_fit(parts):
    with pytest.raises(ConfigError, match=r"do not fit: given .*\(2, 2\).*needed .*linear_1"):
        compose(*parts, *MEAN_STD, projector={"linear_1.weight": torch.zeros(2, 2)})
