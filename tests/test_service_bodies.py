from __future__ import annotations

import base64
import contextlib
import gzip
import json
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.bodies import inflate, is_raw, parse_body
from service.errors import BodyTooLarge, EmptyBody, MalformedRequest, UnsupportedType

BOUNDARY = "xYzZy"
FORM = f"multipart/form-data; boundary={BOUNDARY}"


def form(*parts: tuple[str, bytes], files: tuple[str, ...] = ("image", "images", "picture")) -> bytes:
    """Parts under the names in `files` have a filename, as clients give one to a file and not to a value."""
    body = b""
    for name, data in parts:
        filename = '; filename="a.jpg"' if name in files else ""
        body += f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{filename}\r\n\r\n'.encode() + data + b"\r\n"
    return body + f"--{BOUNDARY}--\r\n".encode()


def parse(body, content_type="application/json", name="image", max_pictures=3):
    return parse_body(body, content_type, name=name, max_pictures=max_pictures)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@given(st.binary(max_size=3000))
def test_a_form_gives_back_the_bytes_that_went_in(data):
    if f"--{BOUNDARY}".encode() in data:
        return
    parsed = parse(form(("image", data), ("score_threshold", b"0.3")), FORM)
    assert parsed.pictures == [data]
    assert parsed.options == [("score_threshold", "0.3")]


@given(st.binary(max_size=3000))
def test_json_gives_back_the_bytes_that_went_in(data):
    parsed = parse(json.dumps({"image": b64(data), "max_detections": 5}).encode())
    assert parsed.pictures == [data]
    assert parsed.options == [("max_detections", 5)]


def test_base64_with_line_breaks_and_as_a_data_url():
    wrapped = base64.encodebytes(b"x" * 200).decode()
    assert parse(json.dumps({"image": wrapped}).encode()).pictures == [b"x" * 200]
    assert parse(json.dumps({"image": "data:image/png;base64," + b64(b"abc")}).encode()).pictures == [b"abc"]


def test_many_pictures_keep_their_order_and_a_bad_one_its_place():
    parsed = parse(json.dumps({"images": [b64(b"one"), "!!!", 5]}).encode(), name="images")
    assert parsed.pictures[0] == b"one"
    assert [type(p) for p in parsed.pictures[1:]] == [MalformedRequest, MalformedRequest]
    assert parse(form(("images", b"1"), ("images", b"2")), FORM, name="images").pictures == [b"1", b"2"]


@pytest.mark.parametrize("body", [form(*[("images", b"x")] * 4), json.dumps({"images": ["eA=="] * 4}).encode()])
def test_too_many_pictures(body):
    kind = FORM if body.startswith(b"--") else "application/json"
    with pytest.raises(BodyTooLarge, match="at most 3 pictures"):
        parse(body, kind, name="images")


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b"null", b"5", b'{"image": null}', b'{"images": []}', b"{}", b"[" * 100_000, b"\xff\xfe" * 100, b'{"a":' * 90_000]
)
def test_json_that_holds_no_picture_is_malformed(body):
    with pytest.raises(MalformedRequest):
        parse(body)


@pytest.mark.parametrize("body", [b'{"image": 5}', b'{"image": "!!!!"}', '{"image": "é"}'.encode()])
def test_json_whose_picture_is_no_base64(body):
    assert isinstance(parse(body).pictures[0], MalformedRequest)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (form(("image", b"x"))[:-10], FORM),
        (form(("image", b"x")), "multipart/form-data"),
        (b"no boundary at all", FORM),
        (form(("picture", b"x")), FORM),
        (b"--" + BOUNDARY.encode() + b"\r\n\r\nnameless\r\n--" + BOUNDARY.encode() + b"--\r\n", FORM),
        (form(("image", b"x")), "multipart/form-data; boundary=ü"),
    ],
)
def test_broken_forms_are_malformed(body, kind):
    with pytest.raises(MalformedRequest):
        parse(body, kind)


def test_a_form_field_cannot_be_endless():
    with pytest.raises(BodyTooLarge, match="option 'model' may have 4096 bytes in a form, got 10000"):
        parse(form(("image", b"x"), ("model", b"m" * 10_000)), FORM)
    with pytest.raises(BodyTooLarge, match="may have 32 fields"):
        parse(form(*[(f"f{n}", b"x") for n in range(50)]), FORM)


@pytest.mark.parametrize(("name", "wrong"), [("image", "file"), ("image", "images"), ("images", "image")])
@pytest.mark.parametrize("size", [10, 100_000])
def test_a_picture_under_a_wrong_name_is_told_the_right_one(name, wrong, size):
    words = f"the picture belongs in the form field '{name}', got it in '{wrong}'"
    with pytest.raises(MalformedRequest, match=words):
        parse(form((wrong, b"x" * size), files=(wrong,)), FORM, name=name)
    if size > 4096:  # nobody writes so long a value: a picture, whether its client named the file or not
        with pytest.raises(MalformedRequest, match=words):
            parse(form((wrong, b"x" * size), files=()), FORM, name=name)


def test_an_option_may_come_out_of_a_file():
    parsed = parse(form(("image", b"x"), ("classes", b"WBC"), files=("image", "classes")), FORM)
    assert parsed.options == [("classes", "WBC")]


def test_empty_and_unknown():
    with pytest.raises(EmptyBody):
        parse(b"")
    with pytest.raises(UnsupportedType, match="'text/plain'"):
        parse(b"hello", "text/plain; charset=utf-8")


@pytest.mark.parametrize(
    ("content_type", "raw"),
    [
        ("image/jpeg", True),
        ("IMAGE/PNG; q=1", True),
        ("application/octet-stream", True),
        ("", True),
        ("application/json", False),
        (FORM, False),
    ],
)
def test_which_bodies_are_the_picture_itself(content_type, raw):
    assert is_raw(content_type) is raw


@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
@given(data=st.binary(max_size=5000))
def test_inflate_undoes_compression(encoding, compress, data):
    assert inflate(compress(data), encoding, 5000) == data


@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_a_bomb_is_stopped_at_the_limit(encoding, compress):
    bomb = compress(bytes(50_000_000))
    with pytest.raises(BodyTooLarge, match="1000000 bytes"):
        inflate(bomb, encoding, 1_000_000)


@given(st.binary(max_size=300))
def test_any_bytes_inflate_or_are_refused(data):
    for encoding in ("gzip", "deflate"):
        with contextlib.suppress(MalformedRequest, BodyTooLarge):
            inflate(data, encoding, 1000)


def test_cut_streams_and_unknown_encodings():
    with pytest.raises(MalformedRequest, match="ends early"):
        inflate(gzip.compress(b"x" * 1000)[:-12], "gzip", 5000)
    with pytest.raises(UnsupportedType, match="'br'"):
        inflate(b"x", "br", 10)


def test_a_broken_form_is_no_line_in_the_log(caplog):
    with pytest.raises(MalformedRequest, match="the form cannot be read: Expected boundary"):
        parse(b"no boundary at all", FORM)
    assert caplog.records == []
