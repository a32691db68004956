"""From an uploaded file to pictures; what is too large, broken or of another kind is refused before it is decoded."""

from __future__ import annotations

import contextlib
import json
import math
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from mllm.demo.limits import Limits
from mllm.errors import InputError
from mllm.inputs import open_image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
#: for the file dialog; what counts is the content
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".pdf")
_DRAWING = threading.Semaphore(2)  # PDFs at the same time: each may use as much memory as the limits say
_ALLOWED = "Pictures (PNG, JPEG, WebP, GIF, BMP) and PDFs can be read."
#: how files begin that people confuse with pictures
_KNOWN = {
    b"PK\x03\x04": "a ZIP archive or an office document",
    b"\x1f\x8b": "a gzip archive",
    b"<svg": "an SVG drawing",
    b"<?xml": "an SVG drawing or another XML file",
}


@dataclass(frozen=True)
class Picture:
    """One picture or page.

    Attributes:
        image: RGB.
        name: what to call it.
        page: number of the page in its PDF, from 1; None for a picture.
    """

    image: Image.Image
    name: str
    page: int | None = None


def tidy_uploads(folder: Path, limits: Limits, now: float | None = None) -> None:
    """Remove uploads that are old; while the others take too much of the disk, the oldest first.

    Args:
        folder: where the server keeps them, one folder each.
        limits: ``upload_seconds``, ``upload_bytes``, and ``idle_seconds`` for configs that the page offers to save.
        now: seconds since the epoch, for tests.
    """
    now = time.time() if now is None else now
    found = []
    for path in folder.rglob("*"):
        try:
            status = path.lstat()
        except OSError:  # somebody else removed it
            continue
        if stat.S_ISREG(status.st_mode):
            found.append((status.st_ctime, status.st_size, path))
    held = sum(size for _, size, _ in found)
    for changed, size, path in sorted(found):
        most = limits.idle_seconds if path.suffix == ".yaml" else limits.upload_seconds
        if now - changed > most or held > limits.upload_bytes:
            path.unlink(missing_ok=True)
            held -= size
            if path.parent != folder:
                with contextlib.suppress(OSError):  # another file is in it
                    path.parent.rmdir()


def read_upload(path: str | Path, limits: Limits) -> list[Picture]:
    """The picture in a file, or the pages of a PDF.

    Raises:
        InputError: the file is missing, too large, broken, of another kind, or a PDF with too many pages; the message
            is made for the person who uploaded it.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(1024)
    except OSError as error:
        raise InputError(f"{path.name} is not there any more. Upload it again.") from error
    if not size:
        raise InputError(f"{path.name} is empty.")
    if size > limits.file_bytes:
        raise InputError(f"{path.name} has {size / 1e6:.0f} MB; at most {limits.file_bytes / 1e6:.0f} MB are read.")
    if b"%PDF-" in start:
        return _read_pdf(path, limits)
    for mark, kind in _KNOWN.items():
        if start.lstrip().startswith(mark):
            raise InputError(f"{path.name} is {kind}. {_ALLOWED}")
    return [Picture(_read_picture(path, limits), path.name)]


def _read_picture(path: Path, limits: Limits) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            # only the header is read here; formats that run other programs are not among these
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
    except UnidentifiedImageError as error:
        raise InputError(f"{path.name} is not a picture, or it is damaged. {_ALLOWED}") from error
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{path.name} has far too many pixels; at most {limits.pixels / 1e6:.0f} million are read. Scale it down."
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{path.name} is damaged or cut short. {_ALLOWED}") from error
    if width * height > limits.pixels:
        raise InputError(
            f"{path.name} is {width:,} x {height:,} pixels; at most {limits.pixels / 1e6:.0f} million are read. "
            "Scale it down first."
        )
    try:
        image = open_image(path)
    except InputError as error:  # its message names the whole path
        raise InputError(f"{path.name} is damaged or cut short. Save it again and upload it once more.") from error
    return shrink(image, limits.side)


def shrink(image: Image.Image, side: int) -> Image.Image:
    """The picture with no side longer than ``side``."""
    if max(image.size) <= side:
        return image
    scale = side / max(image.size)
    return image.resize([max(1, round(length * scale)) for length in image.size], reducing_gap=2.0)


def _read_pdf(path: Path, limits: Limits) -> list[Picture]:
    with _DRAWING, tempfile.TemporaryDirectory(prefix="mllm-pdf-") as folder:
        bounds = (limits.pages, limits.side, math.ceil(limits.pdf_seconds), limits.pdf_memory)
        command = [sys.executable, "-m", "mllm.demo.pdf_pages", str(path), folder, *map(str, bounds)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limits.pdf_seconds, check=False)
        except subprocess.TimeoutExpired as error:
            raise InputError(
                f"{path.name} takes longer than {limits.pdf_seconds:.0f} seconds to draw. Upload pictures of its pages."
            ) from error
        try:
            answer = json.loads(done.stdout)
        except ValueError as error:  # the process was ended
            raise InputError(
                f"{path.name} is damaged, or drawing it takes too much time or memory. Upload pictures of its pages."
            ) from error
        if "error" in answer:
            raise InputError(f"{path.name} {answer['error']}.")
        return [
            Picture(open_image(Path(folder) / f"{number}.png"), path.name, number + 1)
            for number in range(answer["pages"])
        ]
