"""What comes and what happens: the README's table, row by row, then real files from other projects, and files that were damaged."""

from __future__ import annotations

import io
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter, JpegImagePlugin, TiffImagePlugin
from service_pictures import ACCEPTED, JPEG, LIMITS, REFUSED, Check, corners, encoded, exif, pixels, scene, see_through, swapped_profile

from service import decoding
from service.decoding import DRAFT_MARGIN, Decoded, decode_rgb
from service.errors import BadImage, DetectorError, EmptyBody, TooManyPixels, UnsupportedType

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")  # as the service itself does; pytest's own filters come first

ROOT = Path(__file__).resolve().parent.parent


def halved(hw: tuple[int, int]) -> tuple[int, int]:
    return max(1, hw[0] // 2), max(1, hw[1] // 2)


def outcome(data: bytes, target: Callable[[tuple[int, int]], tuple[int, int]] | None = None) -> Decoded | DetectorError:
    try:
        return decode_rgb(data, LIMITS, target)
    except DetectorError as error:
        return error


@pytest.mark.parametrize(("row", "data", "check"), ACCEPTED, ids=[row[0] for row in ACCEPTED])
def test_accepted(row: str, data: bytes, check: Check) -> None:
    assert check(data), corners(data)


@pytest.mark.parametrize(("row", "data", "error"), REFUSED, ids=[row[0] for row in REFUSED])
def test_refused(row: str, data: bytes, error: type[DetectorError]) -> None:
    with pytest.raises(error) as caught:
        decode_rgb(data, LIMITS)
    assert type(caught.value) is error
    assert len(caught.value.detail) > 20


def test_what_a_refused_thing_is_called() -> None:
    named = {row: data for row, data, error in REFUSED if error is UnsupportedType}
    for row, word in {"SVG": "SVG", "EPS": "PostScript", "HEIC": "HEIC", "Photoshop": "Photoshop", "text": "text", "icon": "icon"}.items():
        with pytest.raises(UnsupportedType, match=f"got .*{word}"):
            decode_rgb(named[row], LIMITS)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "JPEG2000", "PPM"])
def test_a_cut_picture_is_refused_in_words_about_the_picture(kind: str) -> None:
    whole = io.BytesIO()
    Image.new("RGB", (90, 60), "red").save(whole, kind)
    details = {came.detail for end in range(8, 200) if isinstance(came := outcome(whole.getvalue()[:end]), DetectorError)}
    assert details
    for detail in details:
        assert not re.search("unpack|buffer of|out of range|object|NoneType", detail.replace("decoder object", "")), detail


@pytest.mark.parametrize("bits", [12, 16])
def test_a_jpeg_of_more_than_8_bits_is_told_so(bits: int) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (90, 60)).save(stream, "JPEG")
    data = bytearray(stream.getvalue())
    data[data.index(b"\xff\xc0") + 4] = bits  # precision in the frame header
    with pytest.raises(BadImage, match=f"8 bits a sample, this one has {bits}; save it as"):
        decode_rgb(bytes(data), LIMITS)


def test_a_broken_fax_writes_nothing_into_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    stream, page = io.BytesIO(), Image.new("1", (320, 200), 1)
    page.paste(0, (40, 30, 250, 170))
    page.rotate(20, fillcolor=1).save(stream, "TIFF", compression="group4")
    data = bytearray(stream.getvalue())
    with Image.open(io.BytesIO(data)) as whole:
        assert isinstance(whole, TiffImagePlugin.TiffImageFile)
        start, length = whole.tag_v2[TiffImagePlugin.STRIPOFFSETS][0], whole.tag_v2[TiffImagePlugin.STRIPBYTECOUNTS][0]
    data[start + length // 2 : start + length // 2 + 8] = b"\x01" * 8
    outcome(bytes(data))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_resizing_before_turning_shows_the_same(orientation: int) -> None:
    """The cheap order, against turning first."""
    smooth = scene().filter(ImageFilter.GaussianBlur(3))
    stored = smooth.transpose(Image.Transpose.ROTATE_90) if orientation == 6 else smooth
    decoded = decode_rgb(encoded(stored, "PNG", exif=exif(orientation)), LIMITS, lambda hw: (hw[0] // 2, hw[1] // 2))
    whole = decode_rgb(encoded(stored, "PNG", exif=exif(orientation)), LIMITS)
    expected = whole.image.resize((whole.original_hw[1] // 2, whole.original_hw[0] // 2), Image.Resampling.BILINEAR)
    assert decoded.original_hw == whole.original_hw
    assert np.abs(np.asarray(decoded.image, np.int16) - np.asarray(expected, np.int16)).max() <= 1


def test_scaled_jpeg_decoding_moves_nothing(detection_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the whole decode: less than half a level on average and a hundredth of a pixel of shift."""

    def small(margin: float) -> list[NDArray[np.float64]]:
        monkeypatch.setattr("service.decoding.DRAFT_MARGIN", margin)
        return [np.asarray(decode_rgb(path.read_bytes(), LIMITS, lambda hw: (hw[0] // 5, hw[1] // 5)).image, np.float64) for path in paths]

    paths = [
        *sorted((detection_data / "bccd/JPEGImages").glob("*.jpg"))[:15],
        *sorted((detection_data / "coco128/val2017").glob("*.jpg"))[:15],
    ]
    drafted, whole = small(DRAFT_MARGIN), small(1000)
    assert any(not np.array_equal(a, b) for a, b in zip(drafted, whole, strict=True)), "nothing was drafted"
    assert np.mean([np.abs(a - b).mean() for a, b in zip(drafted, whole, strict=True)]) < 0.5
    for a, b in zip(drafted, whole, strict=True):
        down, right = np.gradient(b.mean(axis=2))
        shift = np.linalg.lstsq(np.stack([right.ravel(), down.ravel()], axis=1), (b - a).mean(axis=2).ravel(), rcond=None)[0]
        assert np.abs(shift).max() < 0.02


def jpegs() -> dict[str, bytes]:
    small = Image.effect_noise((1900, 1301), 90)
    colour = Image.merge("RGB", [small, small.rotate(90).resize(small.size), small.transpose(Image.Transpose.FLIP_TOP_BOTTOM)])
    kinds = {"4:2:0": {"subsampling": 2}, "4:4:4": {"subsampling": 0}, "4:2:2": {"subsampling": 1}, "progressive": {"progressive": True}}
    return {name: encoded(colour, "JPEG", quality=80, **options) for name, options in kinds.items()} | {"grey": encoded(small, "JPEG")}


@pytest.mark.parametrize("divisor", [2, 5, 9, 20])
@pytest.mark.parametrize(("kind", "data"), jpegs().items(), ids=jpegs())
def test_the_quick_way_through_a_jpeg_gives_pillows_picture(kind: str, data: bytes, divisor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole picture, and at 1/2, 1/4 and 1/8 of its size, which has odd sides."""

    def decoded() -> NDArray[np.uint8]:
        return decode_rgb(data, LIMITS, lambda hw: (hw[0] // divisor, hw[1] // divisor)).pixels

    calls: list[bool] = []
    usual = decoding._decode_ordinary_jpeg

    def noted(data: bytes, image: JpegImagePlugin.JpegImageFile) -> NDArray[np.uint8] | None:
        found = usual(data, image)
        calls.append(found is not None)
        return found

    monkeypatch.setattr(decoding, "_decode_ordinary_jpeg", noted)
    quick = decoded()
    assert calls == [True]
    monkeypatch.setattr(decoding, "_decode_ordinary_jpeg", lambda *_: None)
    assert np.array_equal(quick, decoded())


def test_a_faulty_jpeg_is_pillows_to_judge() -> None:
    whole = jpegs()["4:2:0"]
    junk = whole[:-2] + b"\xff\x01\x02\x03" + whole[-2:]  # a warning of libjpeg's; Pillow reads on
    assert decode_rgb(junk, LIMITS, lambda hw: (hw[0] // 2, hw[1] // 2)).original_hw == (1301, 1900)
    with pytest.raises(BadImage):
        decode_rgb(whole[: len(whole) // 2], LIMITS, lambda hw: (hw[0] // 2, hw[1] // 2))


def test_real_exif_files(detection_data: Path) -> None:
    folder = detection_data / "exif_orientation"
    expected = json.loads((folder / "expected.json").read_text())["files"]
    upright = {name: pixels((folder / name).read_bytes()) for name in expected}
    assert len(upright) == 16
    for name, facts in expected.items():
        assert upright[name].shape == (facts["upright_height"], facts["upright_width"], 3), name
        assert np.abs(upright[name] - upright[facts["upright_same_as"]]).mean() < 18, name


AWKWARD_ERRORS = {
    EmptyBody: ["zero_byte.jpg"],
    TooManyPixels: ["Bad_reallybig.bmp", "decompression_bomb.gif", "huge_header_100000x100000.png"],
    UnsupportedType: [
        "circle.svg", "hopper.ico", "hopper.psd", "negative_size.ppm", "rainbow-451x461.heic", "text_renamed.jpg", "xcrn0g04.png",
        "zero_bb.eps",
    ],
    BadImage: [
        "broken.png", "broken_data_stream.png", "chunk_no_fctl.png", "gradient_ls.jpg", "iphone_basi0g01.png", "monkey12.jpg",
        "no_palette.gif", "orientation_rectangle.jpg", "oss-fuzz-36829.jpeg", "png_decompression_dos.png", "s01n3p01.png", "soi_only.jpg",
        "tRNS_null_1x1.png", "truncated_end_chunk.png", "truncated_jpeg.jpg", "ultrahdr.jpg", "xd9n2c08.png", "xdtn0g01.png",
        "zero_width.gif",
    ],
}  # fmt: skip


def test_awkward_files(detection_data: Path) -> None:
    """Files that broke other decoders: a picture of the size that the index states, or exactly the error above, and quickly."""
    index = (detection_data / "awkward/INDEX.tsv").read_text().splitlines()[1:]
    errors = {name: error for error, names in AWKWARD_ERRORS.items() for name in names}
    assert len(index) >= 81
    for line in index:
        name, *_, verdict = line.split("\t")
        started = time.monotonic()
        data = (detection_data / "awkward" / name).read_bytes()
        came, resized = outcome(data), outcome(data, halved)
        assert getattr(came, "original_hw", type(came)) == getattr(resized, "original_hw", type(resized)), name
        if isinstance(came, Decoded):
            height, width = came.original_hw
            assert name not in errors, name
            assert f"as RGB {width}x{height}" in verdict or f"as RGB {height}x{width}" in verdict, name
        else:
            assert type(came) is errors.get(name), f"{name}: {came.detail}"
        assert time.monotonic() - started < 5, name


def seeds_of_every_format() -> list[bytes]:
    rows = {row: data for row, data, _ in ACCEPTED}
    wanted = (
        "progressive JPEG", "CMYK JPEG with Adobe's inversion", "MPO (two photos in one JPEG)", "palette PNG", "animated PNG",
        "animated WebP", "EXIF orientation 6 in WEBP", "animated GIF", "BMP", "L*a*b* TIFF", "1-bit TIFF, CCITT G4", "PPM", "AVIF",
        "JPEG 2000", "ICC profile, converted to sRGB",
    )  # fmt: skip
    return [rows[row] for row in wanted] + [JPEG] * 3


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Flip, overwrite, cut, repeat or splice a few places."""
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(damaged))
        match rng.randrange(5):
            case 0:
                damaged[at] ^= 1 << rng.randrange(8)
            case 1:
                damaged[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\0\1", rng.randbytes(4)])
            case 2:
                del damaged[at : at + rng.randint(1, 64)]
            case 3:
                damaged[at:at] = damaged[at : at + rng.randint(1, 64)]
            case _:
                damaged[at] = rng.randrange(256)
        if not damaged:
            return b"\0"
    return bytes(damaged)


def fuzz(count: int, seed: int) -> None:
    rng, sources = random.Random(seed), seeds_of_every_format()
    for number in range(count):
        data = mutate(rng.choice(sources), rng)
        started = time.monotonic()
        came = outcome(data, halved if number % 2 else None)
        assert isinstance(came, Decoded) or 400 <= came.status < 500, f"seed {seed}, case {number}"
        assert time.monotonic() - started < 20, f"seed {seed}, case {number}"


def test_damaged_pictures() -> None:
    fuzz(400, seed=1)


@pytest.mark.slow
def test_ten_thousand_damaged_pictures() -> None:
    fuzz(10_000, seed=2)


def test_threads_do_not_disturb_each_other() -> None:
    profiled = encoded(scene(), "PNG", icc_profile=swapped_profile())
    jobs = [JPEG, profiled, encoded(scene("CMYK"), "JPEG"), encoded(see_through(), "WEBP"), encoded(scene(), "AVIF")] * 40
    expected = [pixels(data) for data in jobs[:5]] * 40
    with ThreadPoolExecutor(8) as pool:
        for found, wanted in zip(pool.map(pixels, jobs), expected, strict=True):
            assert np.array_equal(found, wanted)


BYTES_PER_PIXEL = 20
"""As the README states it: most memory that decoding takes, times the pixels of the picture."""

PEAK_SCRIPT = """
import sys
from pathlib import Path
from service.decoding import ImageLimits, decode_rgb
def kib(field):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
data, small = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2]).read_bytes()
limits, target = ImageLimits(), (lambda hw: (312, 416)) if sys.argv[3] == "prepare" else None
decode_rgb(small, limits, target)
Path("/proc/self/clear_refs").write_text("5")
before = kib("VmRSS")
width, height = decode_rgb(data, limits, target).original_hw
print((kib("VmHWM") - before) * 1024 / (width * height))
"""


def large(name: str, mode: str, **options: object) -> bytes:
    noise = Image.effect_noise((300, 250), 60).resize((2400, 2000), Image.Resampling.NEAREST)
    image = noise.convert(mode)
    if mode == "RGBA":
        image.putalpha(noise)
    return encoded(image, name, **options)


MEMORY_HUNGRY: list[tuple[str, Callable[[], bytes]]] = [
    ("JPEG", lambda: large("JPEG", "RGB")),
    ("progressive JPEG", lambda: large("JPEG", "CMYK", progressive=True)),
    ("PNG with alpha, turned", lambda: large("PNG", "RGBA", exif=exif(6), compress_level=1)),
    ("WebP with alpha", lambda: large("WEBP", "RGBA", lossless=True, method=0, quality=0)),
    ("AVIF with alpha", lambda: large("AVIF", "RGBA", speed=10, subsampling="4:4:4")),
    ("JPEG 2000", lambda: large("JPEG2000", "RGB", quality_mode="rates", quality_layers=[40])),
    ("TIFF, turned", lambda: large("TIFF", "RGB", exif=exif(6), compression="tiff_deflate")),
    ("GIF", lambda: large("GIF", "P")),
]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("use", ["prepare", "decode"])
@pytest.mark.parametrize(("row", "make"), MEMORY_HUNGRY, ids=[row for row, _ in MEMORY_HUNGRY])
def test_peak_memory(row: str, make: Callable[[], bytes], use: str, tmp_path: Path) -> None:
    big, small = tmp_path / "big", tmp_path / "small"
    big.write_bytes(make())
    small.write_bytes(JPEG)
    command = [sys.executable, "-c", PEAK_SCRIPT, str(big), str(small), use]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    per_pixel = float(done.stdout)
    assert per_pixel < BYTES_PER_PIXEL
    if row == "JPEG" and use == "prepare":
        assert per_pixel < 2.5, "scaled decoding saves the memory too"
