"""Makes ``lmms-eval --model mllm`` work: the entry point of the group ``lmms_eval.models``."""

from lmms_eval.models.registry_v2 import ModelManifest


def mllm_manifest() -> ModelManifest:
    """What lmms-eval must know to load our model by name."""
    return ModelManifest(model_id="mllm", chat_class_path="mllm.eval.lmms_model.MllmLmms")
