"""Example questions with pictures that are drawn when the server starts: nothing to fetch, nothing to license."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from mllm.drawn import document_samples, reading_samples, scene_samples


def write_examples(folder: Path) -> list[tuple[str, dict[str, object]]]:
    """Draw the pictures into ``folder``; a label and what the question box is filled with, for each example."""
    folder.mkdir(parents=True, exist_ok=True)
    scene = next(s for s in scene_samples("test", 7, 40) if s.turns[0].kind == "shape")
    scene.images[0].save(folder / "shapes.png")
    digit = next(s for s in reading_samples("test", 7, 40) if s.turns[0].kind == "digit")
    digit.images[0].save(folder / "digit.png")
    pair = [s.images[0] for s in scene_samples("test", 11, 2)]
    for name, image in zip(("left.png", "right.png"), pair, strict=True):
        image.save(folder / name)
    document = next(iter(document_samples("test", 2, 1, pages=(3,))))
    _write_pdf(document.images, folder / "report.pdf")
    made = [
        ("Shapes", scene.turns[0].question, ["shapes.png"]),
        ("Yes or no", f"Is there a {scene.turns[0].answer}?", ["shapes.png"]),
        ("Read", digit.turns[0].question, ["digit.png"]),
        ("Two pictures", "How many shapes are there?", ["left.png", "right.png"]),
        ("PDF", document.turns[0].question, ["report.pdf"]),
    ]
    return [(label, {"text": text, "files": [str(folder / file) for file in files]}) for label, text, files in made]


def _write_pdf(pages: tuple[Image.Image, ...], path: Path) -> None:
    first, *rest = pages
    first.save(path, save_all=True, append_images=rest, resolution=72)
