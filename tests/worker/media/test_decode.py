"""The rules of decoding, each on a file of its kind that Pillow writes here."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from visq.errors import ImageTooLarge, ImageUndecodable
from worker.media.decode import decode

PIXELS = 1_000_000
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def colour(pixels: NDArray[np.uint8], x: int = 0, y: int = 0) -> tuple[int, ...]:
    return tuple(int(value) for value in pixels[y, x])


def near(found: tuple[int, ...], wanted: tuple[int, ...], within: int = 6) -> bool:
    return all(abs(a - b) <= within for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_every_format_gives_rgb_pixels_row_by_row(kind: str) -> None:
    image = Image.new("RGB", (40, 20), RED)
    image.paste(BLUE, (0, 10, 40, 20))
    pixels = decode(encoded(image, kind), PIXELS)
    assert pixels.shape == (20, 40, 3)
    assert pixels.dtype == np.uint8
    assert near(colour(pixels, 20, 2), RED)
    assert near(colour(pixels, 20, 18), BLUE)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_png_mode_is_read(mode: str) -> None:
    assert decode(encoded(Image.new(mode, (5, 3)), "PNG"), PIXELS).shape == (3, 5, 3)


def test_a_palette_shows_its_colours() -> None:
    image = Image.new("RGB", (4, 4), GREEN).quantize(8)
    assert image.mode == "P"
    assert colour(decode(encoded(image, "PNG"), PIXELS)) == GREEN


def test_a_cmyk_photograph_shows_its_colours() -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert near(colour(decode(encoded(image, "JPEG", quality=95), PIXELS)), RED)


def test_sixteen_bits_are_scaled_and_not_cut_off() -> None:
    samples = np.array([[0, 257 * 100, 257 * 200, 65535]], np.uint16)
    pixels = decode(encoded(Image.fromarray(samples), "PNG"), PIXELS)
    assert pixels[0, :, 0].tolist() == [0, 100, 200, 255]


def test_a_transparent_level_of_sixteen_bits_is_white() -> None:
    samples = np.array([[257 * 100, 257 * 50]], np.uint16)
    png = encoded(Image.fromarray(samples), "PNG", transparency=257 * 50)
    assert decode(png, PIXELS)[0, :, 0].tolist() == [100, 255]


def test_sixteen_bits_of_colour_are_scaled() -> None:
    row = b"\0" + struct.pack(">6H", 65535, 257 * 100, 0, 257 * 200, 257 * 7, 65535)

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    header = struct.pack(">2I5B", 2, 1, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    png += chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    pixels = decode(png, PIXELS)
    assert (colour(pixels, 0), colour(pixels, 1)) == ((255, 100, 0), (200, 7, 255))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_lies_on_white(kind: str) -> None:
    image = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    image.paste((0, 0, 0, 128), (8, 0, 16, 16))
    pixels = decode(encoded(image, kind, lossless=True), PIXELS)
    assert colour(pixels, 2, 2) == WHITE
    assert near(colour(pixels, 12, 2), (127, 127, 127))


def test_a_transparent_palette_entry_lies_on_white() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    for kind in ("PNG", "GIF"):
        pixels = decode(encoded(image, kind, transparency=0), PIXELS)
        assert colour(pixels, 0) == WHITE
        assert colour(pixels, 1) == BLUE


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "red_at"), [(1, "left"), (3, "right"), (6, "top"), (8, "bottom")]
)
def test_exif_orientation_is_applied(kind: str, orientation: int, red_at: str) -> None:
    image = Image.new("RGB", (64, 32), BLUE)
    image.paste(RED, (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode(encoded(image, kind, exif=exif), PIXELS)
    height, width, _ = pixels.shape
    assert (height, width) == ((32, 64) if orientation in (1, 3) else (64, 32))
    places = {
        "left": (2, height // 2),
        "right": (width - 3, height // 2),
        "top": (width // 2, 2),
        "bottom": (width // 2, height - 3),
    }
    reds = {place for place, at in places.items() if near(colour(pixels, *at), RED, 12)}
    assert red_at in reds
    assert {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}[red_at] not in reds


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_shows_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), shade) for shade in (RED, GREEN, BLUE)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)
    with Image.open(io.BytesIO(data)) as image:
        assert getattr(image, "n_frames", 1) == 3
    assert near(colour(decode(data, PIXELS), 8, 8), RED)


def test_a_phones_jpeg_of_several_pictures_shows_the_first() -> None:
    frames = [Image.new("RGB", (16, 16), shade) for shade in (RED, BLUE)]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert near(colour(decode(data, PIXELS), 8, 8), RED)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_more_pixels_than_the_limit_are_refused_by_the_header(kind: str) -> None:
    data = encoded(Image.new("RGB", (101, 100)), kind)
    assert decode(data, 10_100).shape == (100, 101, 3)
    with pytest.raises(ImageTooLarge, match="more than 10099 pixels"):
        decode(data, 10_099)


def test_a_small_file_that_claims_a_huge_picture_is_refused() -> None:
    data = bytearray(encoded(Image.new("RGB", (10, 10)), "PNG"))
    data[16:24] = struct.pack(">2I", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(ImageTooLarge):
        decode(bytes(data), 50_000_000)


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "ICO", "TGA", "PDF", "EPS", "JPEG2000", "AVIF"])
def test_other_formats_are_not_read(kind: str) -> None:
    data = encoded(Image.new("RGB", (32, 32), RED), kind)
    with pytest.raises(ImageUndecodable, match="BMP, GIF, JPEG, PNG, WEBP"):
        decode(data, PIXELS)


@pytest.mark.parametrize("data", [b"", b"\0", b"hello", b"<svg/>", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_what_is_no_picture_is_undecodable(data: bytes) -> None:
    with pytest.raises(ImageUndecodable):
        decode(data, PIXELS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_a_picture_cut_off_anywhere_is_undecodable_and_never_half_a_picture(kind: str) -> None:
    data = encoded(Image.effect_noise((64, 64), 80).convert("RGB"), kind)
    for end in range(1, len(data) * 9 // 10, max(1, len(data) // 40)):
        with pytest.raises(ImageUndecodable):
            decode(data[:end], PIXELS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_damaged_bytes_end_in_a_picture_or_a_typed_error(kind: str) -> None:
    data = encoded(Image.effect_noise((32, 32), 80).convert("RGB"), kind)
    random = np.random.default_rng(1)
    for _ in range(150):
        damaged = bytearray(data)
        for place in random.integers(0, len(data), 4):
            damaged[place] = random.integers(0, 256)
        try:
            pixels = decode(bytes(damaged), PIXELS)
        except (ImageUndecodable, ImageTooLarge):
            continue
        assert pixels.ndim == 3


def test_messages_are_ours_and_hold_no_addresses() -> None:
    with pytest.raises(ImageUndecodable) as raised:
        decode(b"not an image", PIXELS)
    assert "0x" not in str(raised.value)
    assert "BytesIO" not in str(raised.value)
