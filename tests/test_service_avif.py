"""The true size of an AVIF: streams against the container's claims, on files made here and damaged here."""

from __future__ import annotations

import io
import random
import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from service_fakes import fake_service, run

from service.avif import check_streams, stream_sizes
from service.errors import BadImage, DetectorError, TooManyPixels
from service.images import ImageLimits, decode, probe

WIDTH, HEIGHT = 600, 400


def avif(width: int = WIDTH, height: int = HEIGHT, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height), (200, 30, 30, 100)[: len(mode)]).save(buffer, "AVIF", speed=10, **options)
    return buffer.getvalue()


def claiming(data: bytes, width: int, height: int) -> bytes:
    """The same streams behind another claim: every `ispe` is rewritten."""
    patched, at = bytearray(data), 0
    while (at := patched.find(b"ispe", at)) >= 0:
        struct.pack_into(">II", patched, at + 8, width, height)
        at += 4
    return bytes(patched)


@pytest.mark.parametrize(("width", "height"), [(64, 48), (601, 403), (48, 2000)])
@pytest.mark.parametrize("options", [{}, {"subsampling": "4:0:0"}, {"quality": 100, "subsampling": "4:4:4"}])
def test_the_stream_s_size_is_read(width: int, height: int, options: dict[str, object]) -> None:
    assert set(stream_sizes(avif(width, height, **options))) == {(height, width)}


def test_alpha_and_animation_are_streams_too() -> None:
    assert stream_sizes(avif(mode="RGBA")) == [(HEIGHT, WIDTH)] * 2
    moving = avif(save_all=True, append_images=[Image.new("RGB", (WIDTH, HEIGHT))])
    assert set(stream_sizes(moving)) == {(HEIGHT, WIDTH)}


@pytest.mark.data
def test_files_of_other_encoders(detection_data: Path) -> None:
    for path in sorted((detection_data / "awkward").glob("*.avif*")):
        with Image.open(path) as image:
            sizes = {image.size, image.size[::-1]}  # one is turned
        assert set(stream_sizes(path.read_bytes())) <= sizes, path.name


def test_a_small_claim_over_a_large_stream_is_refused_by_the_true_size() -> None:
    data, limits = claiming(avif(), 60, 40), ImageLimits(max_pixels=WIDTH * HEIGHT - 1)
    with Image.open(io.BytesIO(data)) as believed:
        assert believed.size == (60, 40)  # what the header says, which every other check goes by
    for ask in (lambda: check_streams(data, limits.max_pixels), lambda: probe(data, limits), lambda: decode(data, limits)):
        with pytest.raises(TooManyPixels, match=f"video stream has {WIDTH} x {HEIGHT}"):
            ask()
    assert probe(avif(), ImageLimits(max_pixels=WIDTH * HEIGHT)).stored_hw == (HEIGHT, WIDTH)


def test_over_http_it_is_413() -> None:
    async def scenario() -> None:
        async with fake_service(max_image_pixels=50_000) as (client, _, _):
            answer = await client.post("/v1/detect", content=claiming(avif(), 60, 40), headers={"content-type": "image/avif"})
            assert (answer.status_code, answer.json()["code"]) == (413, "too_many_pixels")
            answer = await client.post("/v1/detect", content=avif(200, 100), headers={"content-type": "image/avif"})
            assert answer.status_code == 200

    run(scenario())


def test_a_large_stream_is_refused_without_being_decoded() -> None:
    data = claiming(avif(8000, 8000), 60, 40)
    tracemalloc.start()
    try:
        with pytest.raises(TooManyPixels):
            decode(data, ImageLimits())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000


# -- by hand -------------------------------------------------------------------------------------------------------------------


def box(kind: bytes, *payload: bytes) -> bytes:
    body = b"".join(payload)
    return struct.pack(">I4s", 8 + len(body), kind) + body


def unit(width: int, height: int, *, reduced: bool = True) -> bytes:
    """A sequence header unit; the long form has timing, a decoder model and two operating points."""
    bits = "000" + "0" + ("1" + "00000" if reduced else "0")
    if not reduced:
        bits += "1" + "0" * 64 + "1" + "0001" + "000" + "1" + "00111" + "0" * 42  # uvlc of three zeros; delays of 8 bits
        bits += "1" + "00001"
        bits += "0" * 12 + "01000" + "1" + "1" + "0" * 17 + "1" + "0000"
        bits += "0" * 12 + "00111" + "0" + "0"
    bits += f"{15:04b}{15:04b}{width - 1:016b}{height - 1:016b}"
    bits += "0" * (-len(bits) % 8)
    body = int(bits, 2).to_bytes(len(bits) // 8, "big")
    return bytes([0x0A, len(body)]) + body


def meta(*locations: bytes, more: bytes = b"", method: int = 0) -> bytes:
    """A meta box with AV1 items 1, 2, ... each lying where its location says."""
    entries = b"".join(box(b"infe", b"\2\0\0\0", struct.pack(">HH", i, 0), b"av01") for i in range(1, len(locations) + 1))
    iinf = box(b"iinf", b"\0\0\0\0", struct.pack(">H", len(locations)), entries)
    rows = b"".join(struct.pack(">HHHH", i, method, 0, len(where) // 8) + where for i, where in enumerate(locations, start=1))
    iloc = box(b"iloc", b"\1\0\0\0", b"\x44\x00", struct.pack(">H", len(locations)), rows)
    return box(b"meta", b"\0\0\0\0", iinf, iloc, more)


FTYP = box(b"ftyp", b"avif", b"\0\0\0\0", b"avifmif1")


def laid_out(*streams: bytes, pieces: int = 1) -> bytes:
    """Streams in an mdat, each in some pieces."""

    def locations(first: int) -> list[bytes]:
        rows = []
        for stream in streams:
            step, row = -(-len(stream) // pieces), b""
            for at in range(0, len(stream), step):
                row += struct.pack(">II", first + at, min(step, len(stream) - at))
            rows.append(row)
            first += len(stream)
        return rows

    head = len(FTYP) + len(meta(*locations(0))) + 8
    return FTYP + meta(*locations(head)) + box(b"mdat", *streams)


def test_both_forms_of_the_header_several_items_and_pieces() -> None:
    assert stream_sizes(laid_out(unit(640, 480), unit(7, 30_000, reduced=False))) == [(480, 640), (30_000, 7)]
    assert stream_sizes(laid_out(unit(640, 480), unit(50, 60), pieces=3)) == [(480, 640), (60, 50)]
    assert stream_sizes(laid_out(b"\x12\x00" + unit(64, 48) + unit(9000, 9000))) == [(48, 64), (9000, 9000)]  # a second one behind
    inline = FTYP + meta(struct.pack(">II", 0, 99), more=box(b"idat", unit(320, 200)), method=1)
    assert stream_sizes(inline) == [(200, 320)]


def test_a_decoy_in_another_place_hides_nothing() -> None:
    honest = meta(struct.pack(">II", 0, 99), more=box(b"idat", unit(9000, 9000)), method=1)
    decoy = box(b"moov", box(b"trak", meta(struct.pack(">II", 0, 99), more=box(b"idat", unit(8, 8)), method=1)))
    assert set(stream_sizes(FTYP + decoy + honest)) == {(8, 8), (9000, 9000)}
    nested = meta(struct.pack(">II", 0, 99), more=box(b"iprp", box(b"idat", unit(8, 8))) + box(b"idat", unit(9000, 9000)), method=1)
    assert stream_sizes(FTYP + nested) == [(9000, 9000)]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (FTYP, "no AV1 sequence header"),
        (FTYP + meta(struct.pack(">II", 0, 99), more=2 * box(b"idat", unit(8, 8)), method=1), "two idat boxes"),
        (FTYP + meta(struct.pack(">II", 0, 99), method=1), "where none can be"),
        (FTYP + meta(struct.pack(">II", 0, 99), method=2), "where none can be"),
        (FTYP + box(b"moov", struct.pack(">I4s", 4, b"trak")), "a box of 4 bytes"),
        (FTYP + box(b"moov", b"\0\0\0\x64trak"), "a box of 100 bytes"),
        (FTYP + box(b"free") * 30_000, "more than 20000 boxes"),
        (laid_out(bytes([0x0A, 1, 0])), "ends early"),
        (laid_out(b"\x12\x00" * 60_000), "more than 50000 units"),
        (laid_out(*[unit(8, 8)] * 5_000), "more than 8192 pieces"),
        (laid_out(unit(8, 8))[:60], "truncated or corrupt"),
    ],
)
def test_broken_and_absurd_files_are_sentences(data: bytes, words: str) -> None:
    with pytest.raises(BadImage, match=words):
        stream_sizes(data)


def test_boxes_in_boxes_end() -> None:
    nested = b""
    for _ in range(2_000):
        nested = box(b"moov", nested)
    with pytest.raises(BadImage, match="16 deep"):
        stream_sizes(FTYP + nested)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), flips=st.integers(1, 12))
def test_damage_gives_an_answer_or_a_detector_error(seed: int, flips: int) -> None:
    source = random.Random(seed)
    data = bytearray(PICTURE)
    for _ in range(flips):
        data[source.randrange(min(len(data), 400))] = source.randrange(256)
    try:
        assert stream_sizes(bytes(data))
    except DetectorError:
        return


PICTURE = avif(64, 48, mode="RGBA")
