"""Pictures and prompts that users really have, and those that cannot work."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from tiny import FAMILIES, tiny_image, tiny_model, tiny_processor

from mllm.errors import InputError
from mllm.inputs import MAX_SIDE, chat_inputs, encode, open_image
from mllm.token_pruning import EEMLLM, DyVTE, FreezeVisual, NAAViT


def test_plain_pictures_are_unchanged(tmp_path):
    image = tiny_image(0, (40, 24))
    image.save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), np.asarray(image))


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 32768], [65535, 257]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    image = open_image(tmp_path / "deep.png")
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image)[..., 0].astype(int) - np.array([[0, 128], [255, 1]])).max() <= 1


def test_cmyk(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    red, green, blue = np.asarray(open_image(tmp_path / "print.jpg"))[0, 0].astype(int)
    assert red > 200
    assert max(green, blue) < 60


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_become_white(tmp_path, mode):
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 255, 255))
    image.convert(mode).save(tmp_path / "alpha.png")
    pixels = np.asarray(open_image(tmp_path / "alpha.png"))
    assert pixels[3, 3].tolist() == [255, 255, 255]
    assert pixels[0, 0].tolist() != [255, 255, 255]


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "phone.jpg", exif=exif)
    assert open_image(tmp_path / "phone.jpg").size == (10, 20)


def test_a_panorama_is_scaled_down(tmp_path):
    Image.new("RGB", (20_000, 30), "red").save(tmp_path / "wide.png")
    image = open_image(tmp_path / "wide.png")
    assert image.size == (MAX_SIDE, 6)


def png_bytes() -> bytes:
    buffer = io.BytesIO()
    tiny_image(0, (64, 64)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"picture\.png does not exist"),
        (b"", r"picture\.png is empty or not a picture"),
        (b"not a picture at all", r"picture\.png is empty or not a picture"),
        (png_bytes()[:200], r"picture\.png is damaged or cut short"),
    ],
    ids=["missing", "empty", "text", "truncated"],
)
def test_unreadable_pictures(tmp_path, content, message):
    path = tmp_path / "picture.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_image(path)


def test_what_is_missing_is_not_made_up(monkeypatch):
    """lmms-eval sets this switch of Pillow when it is imported."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for source in (io.BytesIO(png_bytes()[:200]), Image.open(io.BytesIO(png_bytes()[:200]))):
        with pytest.raises(InputError, match="damaged"):
            open_image(source)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_bombs_are_refused_before_decoding(tmp_path, monkeypatch):
    Image.new("1", (20_000, 6_000)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(InputError, match=r"^[^:]*bomb\.png has 20000 x 6000 pixels; at most 100,000,000"):
        open_image(tmp_path / "bomb.png")


def test_zero_sized_pictures():
    with pytest.raises(InputError, match="0 x 5 pixels"):
        open_image(Image.new("RGB", (0, 5)))


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_picture_or_an_input_error(content):
    try:
        image = open_image(io.BytesIO(content))
    except InputError:
        return
    assert image.mode == "RGB"


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_damaged_pngs_are_a_picture_or_an_input_error(data):
    content = bytearray(png_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(8, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = open_image(io.BytesIO(bytes(content)))
    except InputError:
        return
    assert image.mode == "RGB"


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_empty_prompts(prompt):
    with pytest.raises(InputError, match="Prompt 1 is empty"):
        chat_inputs(tiny_processor("llava"), ["What is it?", prompt])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("placeholders", "images"), [(0, 1), (2, 1), (1, 0)])
def test_placeholders_and_pictures_must_agree(family, placeholders, images):
    processor = tiny_processor(family)
    text = "see " + f"{processor.image_token} or " * placeholders + "what?"
    with pytest.raises(InputError, match=f"holds {placeholders} image placeholders .* for {images} pictures"):
        encode(processor, [text], [[tiny_image()] * images])


@pytest.mark.parametrize("images", ["a.png", ["a.png"], [tiny_image()], tiny_image()])
def test_a_flat_list_of_pictures(images):
    with pytest.raises(InputError, match=r'pictures: one list per prompt, e\.g\. \[\["photo\.jpg"\]\]'):
        chat_inputs(tiny_processor("llava"), ["What?"], images)


@pytest.mark.parametrize("prompts", ["What?", ["What?", None]])
def test_prompts_are_a_list_of_texts(prompts):
    with pytest.raises(InputError, match=r'prompts=.*: a list of texts is needed, e\.g\. \["What is in the picture'):
        chat_inputs(tiny_processor("llava"), prompts)


def test_lists_of_pictures_must_match_the_prompts():
    with pytest.raises(InputError, match="1 prompts and 2 lists"):
        chat_inputs(tiny_processor("llava"), ["What?"], [[], []])


@pytest.mark.parametrize("family", FAMILIES)
def test_chat_inputs_make_a_batch_that_runs(family):
    model, processor = tiny_model(family), tiny_processor(family)
    pictures = [[tiny_image()], [], [tiny_image(1), tiny_image(2)]]
    inputs = chat_inputs(processor, ["What is it?", "Hello", "Same?"], pictures)
    assert inputs["attention_mask"][:, -1].all()  # padding is on the left
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "technique", [DyVTE(exit_layer=2), NAAViT(), EEMLLM(), FreezeVisual()], ids=lambda technique: technique.name
)
def test_a_batch_of_text_alone(family, technique):
    model, processor = tiny_model(family), tiny_processor(family)
    inputs = chat_inputs(processor, ["Hello", "What is the capital of France?"])
    plain = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with technique(model) as run:
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), plain)
    assert run.flops == run.dense_flops
