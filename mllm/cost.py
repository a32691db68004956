"""What a decoder pass costs: FLOPs and key/value bytes, from shapes alone.

Counting rules, those of ShortV's equations 3 and 4 (https://arxiv.org/abs/2504.00502) with grouped-query attention:
2 FLOPs per multiply-add; the decoder layers only (no vision tower, no LM head, no norms or activations); attention
counts every query times every key that the layer holds, causal or not, which is also what
``torch.utils.flop_counter`` counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm.errors import ConfigError, LoadError

if TYPE_CHECKING:
    from mllm.technique import Stack


@dataclass(frozen=True)
class ModelSpec:
    """Shape of a decoder: layers, widths and heads."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @classmethod
    def from_config(cls, text_config: Any) -> ModelSpec:
        """Read the shape from a transformers text config."""
        heads = text_config.num_attention_heads
        return cls(
            layers=text_config.num_hidden_layers,
            hidden=text_config.hidden_size,
            intermediate=text_config.intermediate_size,
            heads=heads,
            kv_heads=getattr(text_config, "num_key_value_heads", None) or heads,
            head_dim=getattr(text_config, "head_dim", None) or text_config.hidden_size // heads,
        )


ARCHITECTURES: dict[str, ModelSpec] = {
    "llava-1.5-7b": ModelSpec(32, 4096, 11008, 32, 32, 128),
    "llava-1.5-13b": ModelSpec(40, 5120, 13824, 40, 40, 128),
    "llava-onevision-0.5b": ModelSpec(24, 896, 4864, 14, 2, 64),
    "llava-onevision-7b": ModelSpec(28, 3584, 18944, 28, 4, 128),
    "qwen2.5-vl-3b": ModelSpec(36, 2048, 11008, 16, 2, 128),
    "qwen2.5-vl-7b": ModelSpec(28, 3584, 18944, 28, 4, 128),
}


def resolve_architecture(name: str) -> ModelSpec:
    """Shape of a named architecture, of ``"default"``, or of a model folder with a ``config.json``.

    Raises:
        ConfigError: the name is neither a known architecture nor a folder.
        LoadError: the folder has no readable ``config.json``.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    if name == "default":
        from mllm.default_model import default_model_path

        folder = default_model_path()
        if folder is None:
            raise LoadError("The default model is not prepared on this machine. Run `mllm fetch-default` first.")
    else:
        folder = Path(name)
    if not folder.is_dir():
        raise ConfigError(
            f"Unknown architecture {name!r}. Known: {', '.join(ARCHITECTURES)}, default, or the path of a model folder."
        )
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    from mllm import towers

    towers.register()
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise LoadError(f"{folder} holds no readable config.json: {error}") from error
    return ModelSpec.from_config(config.get_text_config(decoder=True))


@dataclass(frozen=True)
class LayerWork:
    """Rows that one decoder layer processes, all batch rows together.

    Attributes:
        queries: rows that run the whole layer.
        scores: query-key pairs scored (queries times keys, summed over the batch).
        passive: rows that contribute keys and values only.
        passive_output: passive rows also run the output projection (EE-MLLM).
        passive_ffn: passive rows also run the FFN.
    """

    queries: int
    scores: int
    passive: int = 0
    passive_output: bool = False
    passive_ffn: bool = False

    def flops(self, spec: ModelSpec) -> int:
        """FLOPs of this layer."""
        output = spec.q_width * spec.hidden
        key_value = 2 * spec.hidden * spec.kv_width
        ffn = 3 * spec.hidden * spec.intermediate
        active = self.queries * (spec.hidden * spec.q_width + key_value + output + ffn)
        scores = 2 * self.scores * spec.q_width  # queries x keys, then weights x values
        passive = self.passive * (key_value + self.passive_output * output + self.passive_ffn * ffn)
        return 2 * (active + scores + passive)


@dataclass(frozen=True)
class Cost:
    """Predicted cost of one prefill; FLOPs as counted above, bytes of the key/value cache after it."""

    flops: int
    dense_flops: int
    kv_bytes: int
    dense_kv_bytes: int
    parameters: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "tflops": self.flops / 1e12,
            "dense_tflops": self.dense_flops / 1e12,
            "flops_ratio": self.flops / self.dense_flops,
            "kv_bytes": self.kv_bytes,
            "dense_kv_bytes": self.dense_kv_bytes,
            "parameters": self.parameters,
        }


def predict(
    stack: Stack,
    spec: ModelSpec,
    text_tokens: int,
    visual_tokens: int,
    batch: int = 1,
    bytes_per_value: int = 2,
    images: int = 1,
) -> Cost:
    """Cost of a prefill under ``stack`` without running anything.

    Args:
        stack: techniques; of one that decides by the input, the most that it may leave is counted.
        spec: the decoder's shape.
        text_tokens: text tokens per row.
        visual_tokens: visual tokens per row.
        batch: rows.
        bytes_per_value: size of one cached number, 2 for 16-bit.
        images: pictures among which the visual tokens of a row are divided.
    """
    if text_tokens < 1 or visual_tokens < 0 or batch < 1 or images < 1:
        raise ConfigError(
            f"text_tokens={text_tokens}, visual_tokens={visual_tokens}, batch={batch}, images={images}: "
            "at least 1 text token, 0 visual tokens, 1 row and 1 picture are needed."
        )
    stack.check(spec)
    total = text_tokens + visual_tokens
    own = sum(technique.extra_flops(spec, text_tokens, visual_tokens) for technique in stack.active(spec))
    dense = LayerWork(batch * total, batch * total * total).flops(spec) * spec.layers
    flops, keys = batch * own, 0
    for layer in range(spec.layers):
        visual = stack.visual_left(layer, spec, visual_tokens, images)
        length = text_tokens + visual
        policy = stack.visual_policy(layer, spec)
        passive = visual if policy is not None else 0
        queries = length - passive
        work = LayerWork(
            batch * queries,
            batch * queries * length,
            batch * passive,
            policy is not None and policy.own_value,
            policy is not None and policy.ffn,
        )
        flops += work.flops(spec)
        keys += batch * length
    per_key = 2 * spec.kv_width * bytes_per_value
    kept = sum(technique.extra_cache(spec, text_tokens, visual_tokens) for technique in stack.active(spec))
    cached = keys * per_key + batch * kept * bytes_per_value
    return Cost(flops, dense, cached, batch * total * spec.layers * per_key, stack.parameter_count(spec))
