"""From pictures and questions to model inputs, with errors that say which picture or prompt is wrong."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from mllm.errors import InputError

MAX_PIXELS = 100_000_000  # decoded, before it is scaled: 400 MB of RGBA
MAX_SIDE = 4096  # what a processor is handed; larger pictures are scaled down to it
_DECODING = threading.Lock()


def open_image(source: str | Path | IO[bytes] | Image.Image) -> Image.Image:
    """Read a picture as 8-bit RGB, upright, transparent parts on white, no side above 4096 pixels.

    Raises:
        InputError: it is missing, empty, truncated, no picture at all, or too large to decode.
    """
    if isinstance(source, Image.Image):
        try:
            return to_rgb(source)
        except (OSError, SyntaxError) as error:  # it was opened, and is read only now
            raise InputError(f"{getattr(source, 'filename', '') or 'The picture'} is damaged: {error}") from error
    name = str(source if isinstance(source, str | Path) else getattr(source, "name", "The picture"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is below
            with Image.open(source) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise InputError(
                        f"{name} has {width} x {height} pixels; at most {MAX_PIXELS:,} are read. Scale it down first."
                    )
                return to_rgb(image)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{name} does not exist.") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is empty or not a picture that Pillow reads (PNG, JPEG, WebP...).") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{name} is damaged or cut short: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB version of any Pillow image: 16-bit is scaled, CMYK converted, alpha laid on white."""
    if 0 in image.size:
        raise InputError(f"The picture is {image.size[0]} x {image.size[1]} pixels. Give one with at least one pixel.")
    with _DECODING:
        # lmms-eval tells Pillow, for the whole process, to fill up what is missing of a file
        before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            image.load()
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        # 16-bit grey is scaled to 8; Pillow's own convert would clip it to white
        top = 65535.0 if image.mode.startswith("I") else max(image.getextrema()[1], 1.0)
        image = image.convert("F").point(lambda value: value * (255.0 / top)).convert("L")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    image = image.convert("RGB")
    if max(image.size) > MAX_SIDE:
        scale = MAX_SIDE / max(image.size)
        image = image.resize([max(1, round(side * scale)) for side in image.size], reducing_gap=2.0)
    return image


def chat_inputs(
    processor: Any, prompts: Sequence[str], images: Sequence[Sequence[Image.Image | str | Path]] | None = None
) -> Any:
    """One user turn per prompt, pictures first, as a left-padded batch.

    Args:
        processor: from :func:`mllm.load`.
        prompts: one question per row; none may be empty.
        images: pictures of each row (may be empty lists); None: text only.

    Returns:
        BatchFeature with ``input_ids`` and ``attention_mask`` (B, S), and pixel values where there are pictures.

    Raises:
        InputError: an empty prompt, an unreadable picture, or not one list of pictures for each prompt.
    """
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise InputError(f'prompts={prompts!r}: a list of texts is needed, e.g. ["What is in the picture?"].')
    if images is not None and not (_is_list(images) and all(map(_is_list, images))):
        raise InputError('pictures: one list per prompt, e.g. [["photo.jpg"]]; [] for a prompt without any.')
    images = [[] for _ in prompts] if images is None else images
    if not prompts or len(images) != len(prompts):
        raise InputError(f"{len(prompts)} prompts and {len(images)} lists of pictures: give one list per prompt.")
    for number, prompt in enumerate(prompts):
        if not prompt.strip():
            raise InputError(f"Prompt {number} is empty. Ask something, such as 'What is in the picture?'.")
    pictures = [[open_image(image) for image in row] for row in images]
    conversations = [
        [{"role": "user", "content": [*({"type": "image"} for _ in row), {"type": "text", "text": prompt}]}]
        for prompt, row in zip(prompts, pictures, strict=True)
    ]
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in conversations]
    return encode(processor, texts, pictures)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def encode(
    processor: Any, texts: Sequence[str], images: Sequence[Sequence[Image.Image]], padding_side: str = "left"
) -> Any:
    """Prompts that contain image placeholders already, with the pictures of each, as a padded batch.

    Raises:
        InputError: a prompt with more or fewer placeholders than pictures.
    """
    token = processor.image_token
    for number, (text, row) in enumerate(zip(texts, images, strict=True)):
        if (found := text.count(token)) != len(row):
            raise InputError(
                f"Prompt {number} holds {found} image placeholders ({token}) for {len(row)} pictures. "
                "Write one placeholder per picture, or let chat_inputs() place them."
            )
    pictures = [list(row) for row in images] if any(images) else None  # nested: processors count per prompt
    return processor(text=list(texts), images=pictures, padding=True, padding_side=padding_side, return_tensors="pt")
