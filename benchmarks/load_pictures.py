"""What the load tool sends: pictures of a folder or drawn ones, in several sizes, and broken ones on request."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

CONTENT_TYPES = {
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".png": "image/png",
    ".webp": "image/webp",
    ".bmp": "image/bmp",
    ".gif": "image/gif",
    ".tif": "image/tiff",
    ".tiff": "image/tiff",
}
DRAWN_SIZES_HW = ((480, 640), (640, 480), (360, 640), (512, 512), (768, 1024))
JPEG_QUALITY = 90


@dataclass(frozen=True, slots=True)
class Picture:
    """One body to post. `good` says whether the service should answer it with detections."""

    name: str
    content_type: str
    body: bytes
    good: bool = True


def read_pictures(folder: Path, *, limit: int = 200) -> list[Picture]:
    """The pictures of a folder and its subfolders, in order of path, `limit` at most.

    Raises:
        ValueError: the folder holds none.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in CONTENT_TYPES and path.is_file())
    if not paths:
        raise ValueError(f"{folder} holds no picture ({', '.join(sorted(CONTENT_TYPES))}); name another folder with --pictures")
    return [Picture(path.name, CONTENT_TYPES[path.suffix.lower()], path.read_bytes()) for path in paths[:limit]]


def draw_pictures(sizes_hw: Sequence[tuple[int, int]] = DRAWN_SIZES_HW, *, per_size: int = 4, seed: int = 0) -> list[Picture]:
    """JPEGs with the texture and the bytes of photographs (640 x 480: 80 to 110 KB), the same for the same seed."""
    rng = np.random.default_rng(seed)
    pictures = []
    for height, width in sizes_hw:
        for index in range(per_size):
            buffer = io.BytesIO()
            _draw_scene(height, width, rng).save(buffer, "JPEG", quality=JPEG_QUALITY)
            pictures.append(Picture(f"drawn-{width}x{height}-{index}.jpg", "image/jpeg", buffer.getvalue()))
    return pictures


def _draw_scene(height: int, width: int, rng: np.random.Generator) -> Image.Image:
    coarse = rng.integers(60, 200, (height // 32 + 2, width // 32 + 2, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        side = int(rng.integers(min(height, width) // 12, min(height, width) // 3))
        x, y = int(rng.integers(0, width - side)), int(rng.integers(0, height - side))
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        draw.ellipse((x, y, x + side, y + side), fill=colour)
    noise = rng.normal(0, 9, (height, width, 1))  # film grain: without it a JPEG is several times smaller than a photograph
    grained = np.clip(np.asarray(image.filter(ImageFilter.GaussianBlur(1)), dtype=np.float64) + noise, 0, 255)
    return Image.fromarray(grained.astype(np.uint8))


def resized_pictures(pictures: Sequence[Picture], sizes_wh: Sequence[tuple[int, int]]) -> list[Picture]:
    """Each picture once in each size, the next size for the next picture: a mix without multiplying the number."""
    mixed = []
    for index, picture in enumerate(pictures):
        width, height = sizes_wh[index % len(sizes_wh)]
        with Image.open(io.BytesIO(picture.body)) as image:
            buffer = io.BytesIO()
            image.convert("RGB").resize((width, height)).save(buffer, "JPEG", quality=JPEG_QUALITY)
        mixed.append(Picture(f"{width}x{height}-{picture.name}", "image/jpeg", buffer.getvalue()))
    return mixed


def bad_pictures(pictures: Sequence[Picture]) -> list[Picture]:
    """Bodies that no service can answer with boxes: cut off, overwritten, text, empty."""
    source = pictures[0]
    body = source.body
    middle = len(body) // 2
    return [
        Picture("cut-off", source.content_type, body[:middle], good=False),
        Picture("header-only", source.content_type, body[:20], good=False),
        Picture("text", "image/jpeg", b"this is not a picture\n" * 50, good=False),
        Picture("empty", "image/jpeg", b"", good=False),
    ]
