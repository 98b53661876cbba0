"""Training sees the colours that serving sees: profiles, transparency, many bits; on drawn pictures and on awkward real ones."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from service_pictures import ACCEPTED

from model.data.colour import to_srgb
from model.data.images import ImageError, read_rgb
from service.decoding import ImageLimits
from service.errors import DetectorError
from service.images import decode

LIMITS = ImageLimits(max_bytes=10**8, max_pixels=10**7)


def served(path: Path) -> np.ndarray:
    return np.asarray(decode(path.read_bytes(), LIMITS)).astype(np.int16)


def gradient(height: int = 40, width: int = 60) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (height + width)], axis=-1).astype(np.uint8)


def test_a_profile_is_applied(tmp_path: Path) -> None:
    """Lab comes back as the colours it was made from; sRGB under its own name and what is no profile change nothing."""
    image = Image.fromarray(gradient())
    lab = ImageCms.profileToProfile(image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB")
    assert isinstance(lab, Image.Image)
    assert np.abs(np.asarray(to_srgb(lab)).astype(int) - gradient()).mean() < 3  # there and back in 8 bits
    image.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(np.asarray(to_srgb(image)), gradient())
    image.info["icc_profile"] = b"no profile"
    assert np.array_equal(np.asarray(to_srgb(image)), gradient())


def test_what_is_transparent_is_white() -> None:
    rgba = np.concatenate([gradient(), np.zeros((40, 60, 1), np.uint8)], axis=-1)
    rgba[:, :30, 3] = 255
    made = np.asarray(to_srgb(Image.fromarray(rgba)))
    assert np.array_equal(made[:, :30], gradient()[:, :30])
    assert (made[:, 30:] == 255).all()


def test_sixteen_bits_are_scaled_and_not_cut() -> None:
    values = np.linspace(0, 65535, 50 * 70).reshape(50, 70).astype(np.uint16)
    made = np.asarray(to_srgb(Image.fromarray(values)))
    assert made.shape == (50, 70, 3)
    np.testing.assert_allclose(made[..., 0], values / 257, atol=1)


@pytest.mark.parametrize("data", [pytest.param(data, id=words) for words, data, _ in ACCEPTED])
def test_what_the_service_accepts_looks_the_same_in_training(data: bytes, tmp_path: Path) -> None:
    """Colour and orientation are written twice, since neither side may import the other: this holds them together."""
    path = tmp_path / "picture"
    path.write_bytes(data)
    ours, theirs = read_rgb(path).astype(np.int16), served(path)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 2


def test_real_awkward_pictures_look_the_same_in_training_and_serving(detection_data: Path) -> None:
    """All that both read: colours, and which way is up."""
    compared, differing = 0, []
    with (detection_data / "awkward" / "INDEX.tsv").open() as file:
        names = [row[0] for row in csv.reader(file, delimiter="\t")]
    for name in names:
        path = detection_data / "awkward" / name
        if not path.is_file():
            continue
        try:
            theirs = served(path)
            ours = read_rgb(path).astype(np.int16)
        except (DetectorError, ImageError):
            continue
        compared += 1
        if ours.shape != theirs.shape or np.abs(ours - theirs).mean() > 1:
            differing.append(name)
    assert compared > 30
    assert not differing


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "HSV", "YCbCr", "LA", "I", "F"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    made = to_srgb(Image.fromarray(gradient()).convert("L" if mode in ("I", "F", "LA") else "RGB").convert(mode))
    assert made.mode == "RGB"
    assert made.size == (60, 40)
