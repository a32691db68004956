"""Loading stock models: plain transformers objects, ready for batches."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mllm.errors import ConfigError, LoadError, UnsupportedModelError
from mllm.families import FAMILIES, find_parts
from mllm.saving import CONFIG_NAME, locate
from mllm.versions import quiet_peft

ATTENTION_BACKENDS = ("sdpa", "eager")
#: these run the plain model alone: techniques refuse them
_PLAIN_BACKENDS = ("flash_attention_2", "flex_attention")
_ADAPTER = "adapter_config.json"
#: where a folder says how pictures are prepared
_PREPARATION = ("preprocessor_config.json", "processor_config.json")
#: the model ``tiny``, which comes with this package
TINY = Path(__file__).parent / "weights" / "tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware; without, they are 70 to 100 times slower."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return False  # differs between chips and is not reliably told: float32 is always right
    flags = Path("/proc/cpuinfo")
    return flags.exists() and any(flag in flags.read_text() for flag in ("avx512_bf16", "amx_bf16"))


def pick_device(device: str = "auto") -> torch.device:
    """The device to run on: ``"auto"`` takes a GPU where there is one."""
    if device != "auto":
        try:
            found = torch.device(device)
        except RuntimeError as error:
            raise ConfigError(f"device={device!r} is not one torch knows: 'auto', 'cpu', 'cuda'...") from error
        usable = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
        if found.type in usable and not usable[found.type]():
            raise ConfigError(f"device={device!r}: no usable GPU here. Use 'auto' or 'cpu'.")
        if found.type == "cuda" and (found.index or 0) >= (count := torch.cuda.device_count()):
            raise ConfigError(f"device={device!r}: the last GPU here is 'cuda:{count - 1}'.")
        return found
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Number format to load weights in: ``"auto"`` is bfloat16 where the device computes in it, else float32."""
    if dtype == "auto":
        if device.type == "cpu":
            return torch.bfloat16 if cpu_has_bfloat16() else torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not one of: auto, {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def check_attention(attn: str | None) -> None:
    """Raise ConfigError for an attention backend that no model is loaded with."""
    if attn is not None and attn not in (*ATTENTION_BACKENDS, *_PLAIN_BACKENDS):
        raise ConfigError(
            f"attn={attn!r} is not one of: {', '.join(ATTENTION_BACKENDS)}. Without techniques also: "
            f"{', '.join(_PLAIN_BACKENDS)}."
        )


def load(
    name_or_path: str | Path, attn: str | None = None, dtype: str = "auto", device: str = "auto", **kwargs: Any
) -> tuple[nn.Module, Any]:
    """Load a supported multimodal model and its processor, both stock transformers objects.

    Args:
        name_or_path: a model folder, a hub name, or a model that comes with this package: ``"default"``, prepared on
            first use (``mllm fetch-default`` does it beforehand), or ``"tiny"``, which is small enough to be committed
            and knows drawn pictures only. A folder with a LoRA adapter, as fine-tuning writes it, loads the model that
            the adapter names and merges the adapter into it; ``"default/documents"`` is one that comes along.
        attn: attention backend, ``"sdpa"`` (the default) or ``"eager"``; the techniques of this version are exact on
            these two and refuse ``"flash_attention_2"`` and ``"flex_attention"``, which run the plain model alone.
        dtype: ``"auto"``, ``"float32"``, ``"bfloat16"`` or ``"float16"``; auto is bfloat16 where the hardware has it,
            else float32.
        device: ``"auto"`` (a GPU where there is one), ``"cpu"``, ``"cuda"``...
        kwargs: passed to ``from_pretrained``.

    Returns:
        The model in eval mode, and its processor with left padding, as batched generation needs.

    Raises:
        LoadError: nothing loadable is there, or the checkpoint has no weights or only pickled ones.
        UnsupportedModelError: a model of another family.
        ConfigError: an unknown backend or dtype, an unknown device or one that is not here.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText, AutoProcessor

    check_attention(attn)
    target = pick_device(device)
    weights_dtype = pick_dtype(dtype, target)
    source = str(name_or_path)
    if (locate(source) / _ADAPTER).exists():
        return _load_adapted(source, attn, dtype, device, kwargs)
    if source == "default":
        from mllm.default_model import fetch_default

        source = str(fetch_default())
    elif source == "tiny":
        source = str(TINY)
    _read_config(source)
    try:
        model, loading = AutoModelForImageTextToText.from_pretrained(
            source,
            dtype=weights_dtype,
            attn_implementation=attn or "sdpa",
            use_safetensors=True,
            output_loading_info=True,
            **kwargs,
        )
        processor = AutoProcessor.from_pretrained(source)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise LoadError(f"{source} cannot be loaded: {error}") from error
    if loading["missing_keys"]:
        names = sorted(loading["missing_keys"])
        raise LoadError(
            f"{source} lacks {len(names)} of the model's weights ({', '.join(names[:3])}...); they would be random. "
            "The checkpoint is incomplete or belongs to another model."
        )
    find_parts(model)
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return _named(model, str(name_or_path)).to(target).eval(), processor


def model_config(name_or_path: str | Path) -> Any:
    """The transformers config that :func:`load` would find, read without any weights.

    Returns:
        None for ``"default"`` while it is not prepared on this machine.

    Raises:
        LoadError, UnsupportedModelError: what :func:`load` would refuse as well.
    """
    source = str(name_or_path)
    while (locate(source) / _ADAPTER).exists():
        source = _adapter_base(locate(source))
    if source == "default":
        from mllm.default_model import default_model_path

        folder = default_model_path()
        return None if folder is None else _read_config(str(folder))
    return _read_config(str(TINY) if source == "tiny" else source)


def _read_config(source: str) -> Any:
    """The config of a model folder or a hub name, after a look at whether the rest is there."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    from mllm import towers

    towers.register()
    if Path(source).is_dir():
        _check_folder(Path(source))
    elif Path(source).exists() or Path(source).is_absolute() or source.startswith("."):
        raise LoadError(
            f"{source} is not a model folder. Give a folder with a config.json, a hub name, 'default' or 'tiny'."
        )
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise LoadError(f"{source} has no config that transformers can read: {error}") from error
    if config.model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"{source} is a {config.model_type!r} model. Supported model types: {', '.join(FAMILIES)}."
        )
    return config


def _adapter_base(folder: Path) -> str:
    """The model that a LoRA adapter names as its base."""
    try:
        base = json.loads((folder / _ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise LoadError(f"{folder / _ADAPTER} cannot be read: {error}. Save the adapter again.") from error
    if not base or Path(base) == folder:
        raise LoadError(f"{folder / _ADAPTER} does not name the model that it belongs to (base_model_name_or_path).")
    return str(base)


def _named(model: nn.Module, name: str) -> nn.Module:
    """Let the model say the name that it was asked for by: peft writes it into adapters, for whoever loads them."""
    model.name_or_path = model.config.name_or_path = name
    return model


def _load_adapted(
    name: str, attn: str | None, dtype: str, device: str, kwargs: dict[str, Any]
) -> tuple[nn.Module, Any]:
    """The base model of a peft adapter with the adapter merged in: a plain model again.

    Pictures are prepared as the adapter's folder says, where it says so: it may have learned from larger ones.
    """
    folder = locate(name)
    if folder == locate("default/lora"):
        raise LoadError(f"{name} is merged into the default model already. Load 'default'.")
    try:
        from peft import PeftModel
    except ImportError as error:
        raise LoadError(f"{folder} is a LoRA adapter: it needs peft. pip install 'mllm-efficiency[train]'.") from error
    if not (folder / "adapter_model.safetensors").exists():
        raise LoadError(f"{folder} has {_ADAPTER} but no adapter_model.safetensors. Save the adapter again.")
    base = _adapter_base(folder)
    model, processor = load(base, attn, dtype, device, **kwargs)
    try:
        with quiet_peft():
            merged = PeftModel.from_pretrained(model, folder).merge_and_unload()
    except (RuntimeError, ValueError) as error:
        raise LoadError(f"The adapter in {folder} does not fit {base}: {error}") from error
    if any((folder / file).exists() for file in _PREPARATION):
        processor.image_processor = type(processor.image_processor).from_pretrained(folder)
    return _named(merged, name).eval(), processor


def _check_folder(folder: Path) -> None:
    """Say what is wrong with a model folder before transformers stumbles over it."""
    if not (folder / "config.json").exists():
        if (folder / CONFIG_NAME).exists():
            raise LoadError(
                f"{folder} is a technique folder: load the base model, then load_techniques({str(folder)!r}), or write "
                f"`weights: {folder}` under the technique in a config."
            )
        raise LoadError(f"{folder} has no config.json: it is not a transformers model folder.")
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if pickled:
        raise LoadError(
            f"{folder} holds its weights as pickle ({pickled[0]}), which can run code when opened, and is refused. "
            "Convert it to safetensors with save_pretrained on a machine that trusts it."
        )
    raise LoadError(f"{folder} has no weights (*.safetensors) beside its config.json.")
