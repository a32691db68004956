"""Renders a PDF in a process of its own: ``python -m mllm.demo.pdf_pages FILE FOLDER PAGES SIDE SECONDS BYTES``.

A hostile file may crash the parser, or make it use all memory or time; here it harms nothing but this process.
Prints one JSON object: ``{"pages": n}``, or ``{"error": reason}``. Pages are written as ``0.png``, ``1.png``...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def render(file: str, folder: str, pages: int, side: int) -> dict[str, object]:
    """Write the pages, at most ``side`` pixels long, unless there are more than ``pages``."""
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(file)
    except pypdfium2.PdfiumError as error:
        locked = "password" in str(error).lower()
        return {"error": "is protected by a password" if locked else "is damaged or no PDF"}
    count = len(document)
    if not count:
        return {"error": "has no pages"}
    if count > pages:
        return {"error": f"has {count:,} pages; at most {pages} are read. Upload only the pages that you ask about"}
    for number in range(count):
        page = document[number]
        width, height = page.get_size()
        if width <= 0 or height <= 0:
            return {"error": f"has a page without size (page {number + 1})"}
        # 2 is 144 dots an inch: small print stays readable, and no page gets longer than asked
        scale = min(2.0, side / max(width, height))
        if round(width * scale) < 1 or round(height * scale) < 1:
            return {"error": f"has a page that is too narrow to draw (page {number + 1})"}
        page.render(scale=scale).to_pil().convert("RGB").save(Path(folder) / f"{number}.png", compress_level=1)
        page.close()
    return {"pages": count}


def _limit(seconds: int, size: int) -> None:
    try:
        import resource
    except ImportError:  # Windows: the caller's clock still stops it
        return
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


if __name__ == "__main__":
    path, target, most, longest, time, memory = sys.argv[1:]
    _limit(int(time), int(memory))
    try:
        answer = render(path, target, int(most), int(longest))
    except MemoryError:
        answer = {"error": "needs too much memory to be drawn"}
    except Exception as problem:
        answer = {"error": f"cannot be drawn ({type(problem).__name__})"}
    print(json.dumps(answer))
