"""Reading, resizing, orienting and padding pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.data.images import ImageError, choose_bucket, pad_batch, padded_hw, read_rgb, resized_hw, upright_hw


@pytest.mark.parametrize(
    ("original_hw", "short", "long", "expected"),
    [
        ((480, 640), 384, 640, (384, 512)),
        ((640, 480), 384, 640, (512, 384)),
        ((300, 1200), 384, 640, (160, 640)),  # the long side decides
        ((10, 3000), 384, 640, (2, 640)),  # 2.13 rounds down
        ((4, 5), 2, 100, (2, 3)),  # 2.5 rounds up
        ((1, 5000), 384, 640, (1, 640)),
    ],
)
def test_resize_rule(original_hw: tuple[int, int], short: int, long: int, expected: tuple[int, int]) -> None:
    assert resized_hw(original_hw, short, long) == expected


def test_bucket_is_the_smallest_that_holds_the_picture() -> None:
    buckets = [(384, 640), (384, 512), (512, 384)]
    assert choose_bucket((384, 500), buckets) == (384, 512)
    assert choose_bucket((384, 513), buckets) == (384, 640)
    assert choose_bucket((400, 300), buckets) == (512, 384)
    assert choose_bucket((600, 610), buckets) == (608, 640)


def test_padding_is_right_and_bottom() -> None:
    images = [np.full((3, 5, 3), 7, np.uint8), np.full((4, 2, 3), 9, np.uint8)]
    assert padded_hw([(3, 5), (33, 2)]) == (64, 32)
    batch = pad_batch(images, (32, 32))
    assert batch.shape == (2, 32, 32, 3)
    assert (batch[0, :3, :5] == 7).all()
    assert batch[0].sum() == 3 * 5 * 3 * 7
    assert (batch[1, :4, :2] == 9).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, tmp_path: Path) -> None:
    upright = np.zeros((20, 30, 3), np.uint8)
    upright[:10, :15] = 255  # the bright quarter is at the top left for a person
    turn = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud}
    turn |= {5: lambda a: a.transpose(1, 0, 2), 6: np.rot90, 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: lambda a: np.rot90(a, 3)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    Image.fromarray(np.ascontiguousarray(turn[orientation](upright))).save(path, exif=exif)
    assert upright_hw(path) == (20, 30)
    np.testing.assert_array_equal(read_rgb(path), upright)
    part = read_rgb(path, size_hw=(3, 5), window=(0, 0, 10, 6))
    assert (part == 255).all()


def test_window_and_resize_are_pillows(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    path = tmp_path / "noise.png"
    Image.fromarray(pixels).save(path)
    expected = Image.fromarray(pixels).resize((21, 14), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(read_rgb(path, size_hw=(14, 21)), np.asarray(expected))
    cut = Image.fromarray(pixels).resize((10, 10), Image.Resampling.BILINEAR, box=(5.5, 2.25, 25.5, 22.25))
    np.testing.assert_array_equal(read_rgb(path, size_hw=(10, 10), window=(5.5, 2.25, 25.5, 22.25)), np.asarray(cut))


def test_reduced_jpeg_decoding_is_invisible(tmp_path: Path) -> None:
    y, x = np.mgrid[0:960, 0:1280]
    pixels = np.stack([x * 255 / 1280, y * 255 / 960, 127 + 120 * np.sin(x / 25) * np.cos(y / 31)], axis=-1).astype(np.uint8)
    path = tmp_path / "large.jpg"
    Image.fromarray(pixels).save(path, quality=95)
    whole = np.asarray(Image.open(path).convert("RGB").resize((160, 120), Image.Resampling.BILINEAR)).astype(int)
    reduced = read_rgb(path, size_hw=(120, 160)).astype(int)
    assert np.abs(whole - reduced).mean() < 0.6
    part = read_rgb(path, size_hw=(60, 80), window=(640, 480, 1280, 960)).astype(int)
    expected = Image.open(path).convert("RGB").resize((80, 60), Image.Resampling.BILINEAR, box=(640, 480, 1280, 960))
    assert np.abs(part - np.asarray(expected).astype(int)).mean() < 0.6


@pytest.mark.parametrize(("mode", "size"), [("L", (7, 5)), ("RGBA", (7, 5)), ("P", (7, 5)), ("1", (7, 5)), ("CMYK", (7, 5))])
def test_every_mode_becomes_rgb(mode: str, size: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    Image.new(mode, size).save(path)
    assert read_rgb(path).shape == (5, 7, 3)


def test_faults_have_a_kind_and_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="there is no file") as missing:
        read_rgb(tmp_path / "absent.png")
    assert missing.value.kind == "missing image"
    text = tmp_path / "text.jpg"
    text.write_text("this is no picture")
    with pytest.raises(ImageError, match=r"text\.jpg cannot be opened") as unreadable:
        upright_hw(text)
    assert unreadable.value.kind == "unreadable image"
    cut = tmp_path / "cut.png"
    Image.new("RGB", (60, 40), "red").save(cut)
    with pytest.raises(ImageError, match=r"cut\.png is 60 x 40, annotated as 40 x 60") as wrong:
        read_rgb(cut, expected_hw=(60, 40))
    assert wrong.value.kind == "wrong size"
    cut.write_bytes(cut.read_bytes()[:60])
    with pytest.raises(ImageError) as truncated:
        read_rgb(cut)
    assert truncated.value.kind == "truncated image"


@pytest.mark.data
def test_awkward_files_give_pixels_or_a_sentence(detection_data: Path) -> None:
    decoded, named = [], []
    for path in sorted((detection_data / "awkward").iterdir()):
        if path.name == "INDEX.tsv":
            continue
        try:
            shape = read_rgb(path, size_hw=(8, 8)).shape
        except ImageError as error:
            named.append(path.name in error.sentence)
        else:
            decoded.append(shape == (8, 8, 3))
    assert all(decoded)
    assert all(named)
    assert (len(decoded), len(named)) == (56, 25)  # as its README counts them
