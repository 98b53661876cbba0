"""Request bodies: read within bounds of size and time, inflate, and take pictures and options out of raw bytes, forms and JSON.

Reading happens on the event loop; everything that touches all bytes of a body is a plain function for a worker thread.
"""

from __future__ import annotations

import base64
import binascii
import logging
import zlib
from dataclasses import dataclass, field
from email.message import Message
from typing import Any

import orjson
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser

from service.errors import BodyTooLarge, DetectorError, EmptyBody, MalformedRequest, UnsupportedType
from service.options import OPTION_NAMES

RAW_TYPES = ("application/octet-stream", "application/x-www-form-urlencoded", "")
"""Besides image/*. The second is what curl calls bytes whose type nobody named."""
MAX_FORM_FIELDS = 32
MAX_FORM_FIELD_BYTES = 4096
INFLATE_STEP_BYTES = 1 << 20

# It warns of every form that it refuses. Who sent one is told so, and lines that anybody can cause would fill the disk.
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)

Picture = bytes | DetectorError
"""A picture's bytes, or why they could not be had."""


@dataclass(slots=True)
class Parsed:
    """Pictures in order, and the options that came with them."""

    pictures: list[Picture] = field(default_factory=list)
    options: list[tuple[str, Any]] = field(default_factory=list)


def inflate(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """Undo Content-Encoding, never holding more than max_bytes of result.

    Raises:
        UnsupportedType: neither gzip nor deflate (zlib).
        BodyTooLarge: more than max_bytes come out.
        MalformedRequest: the stream is broken or ends early.
    """
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise UnsupportedType(f"Content-Encoding {encoding[:40]!r} is not understood; send gzip, deflate or none")
    stream = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # 32: gzip or zlib, by the header
    parts, total, pending = [], 0, body
    try:
        while pending and not stream.eof:
            part = stream.decompress(pending, INFLATE_STEP_BYTES)
            total += len(part)
            if total > max_bytes:
                raise BodyTooLarge(f"the body inflates to more than {max_bytes} bytes; send it smaller")
            parts.append(part)
            pending = stream.unconsumed_tail
    except zlib.error as error:
        raise MalformedRequest(f"the body is not valid {encoding}: {error}") from error
    if not stream.eof:
        raise MalformedRequest(f"the {encoding} body ends early; send all of it")
    return b"".join(parts)


def media_type(content_type: str) -> str:
    """The type without parameters, lower case; empty where none was sent."""
    return content_type.partition(";")[0].strip().lower()


def is_raw(content_type: str) -> bool:
    """Whether the body is the picture itself."""
    kind = media_type(content_type)
    return kind.startswith("image/") or kind in RAW_TYPES


def parse_body(body: bytes, content_type: str, *, name: str, max_pictures: int) -> Parsed:
    """Pictures and options out of a form or JSON.

    Args:
        body: the whole body.
        content_type: as sent.
        name: the field that holds pictures: "image" (one) or "images" (a list).
        max_pictures: more are refused.

    Raises:
        EmptyBody, MalformedRequest, BodyTooLarge, UnsupportedType.
    """
    kind = media_type(content_type)
    if not body:
        raise EmptyBody(f"expected a picture, {_expected(name)}, got an empty body")
    if kind == "multipart/form-data":
        parsed = _parse_form(body, content_type, name, max_pictures)
    elif kind == "application/json" or kind.endswith("+json"):
        parsed = _parse_json(body, name, max_pictures)
    else:
        raise UnsupportedType(f"Content-Type {kind[:60]!r} is not understood; send {_expected(name)}")
    if not parsed.pictures:
        raise MalformedRequest(f"no {name!r} in the body; send {_expected(name)}")
    return parsed


def _expected(name: str) -> str:
    raw = "the bytes of a picture as image/* or application/octet-stream, " if name == "image" else ""
    shape = '{"image": "<base64>"}' if name == "image" else '{"images": ["<base64>", ...]}'
    return f"{raw}multipart/form-data with the field {name!r}, or JSON {shape}"


def _parse_json(body: bytes, name: str, max_pictures: int) -> Parsed:
    try:
        document = orjson.loads(body)  # its own bound on depth is 1024
    except orjson.JSONDecodeError as error:
        raise MalformedRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise MalformedRequest(f"expected a JSON object, got {type(document).__name__}; send {_expected(name)}")
    value = document.pop(name, None)
    encoded = [value] if name == "image" and value is not None else value
    if not isinstance(encoded, list):
        raise MalformedRequest(f"no {name!r} of the right kind in the JSON; send {_expected(name)}")
    _check_count(len(encoded), max_pictures)
    return Parsed([_decode_base64(text, name) for text in encoded], list(document.items()))


def _decode_base64(text: object, name: str) -> Picture:
    if not isinstance(text, str):
        return MalformedRequest(f"{name!r} must hold base64 text, got {type(text).__name__}")
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text.encode("ascii").translate(None, b" \r\n\t"), validate=True)
    except (UnicodeEncodeError, binascii.Error) as error:
        return MalformedRequest(f"{name!r} is not valid base64: {error}")


def _check_count(count: int, max_pictures: int) -> None:
    if count > max_pictures:
        raise BodyTooLarge(f"at most {max_pictures} pictures in one request, got {count}; send several requests")


def _parse_form(body: bytes, content_type: str, name: str, max_pictures: int) -> Parsed:
    boundary = _header_parameter(content_type, "boundary")
    if not boundary:
        raise MalformedRequest("multipart/form-data without a boundary; let the client library write the Content-Type")
    collector = _FormCollector(name, max_pictures)
    try:
        parser = MultipartParser(boundary.encode("latin-1"), collector.callbacks())  # type: ignore[arg-type]
        parser.write(body)
        parser.finalize()
    except (FormParserError, UnicodeEncodeError) as error:
        raise MalformedRequest(f"the form cannot be read: {error}") from error
    if not collector.ended:
        raise MalformedRequest("the form ends before its closing boundary; send all of it")
    return collector.parsed


def _header_parameter(header: str, parameter: str) -> str | None:
    message = Message()
    message["Content-Type"] = header
    value = message.get_param(parameter)
    return value if isinstance(value, str) else None


class _FormCollector:
    """Gathers one form's parts: pictures under `name`, everything else an option, unless it is plainly a file."""

    def __init__(self, name: str, max_pictures: int) -> None:
        self.parsed = Parsed()
        self.ended = False
        self._name = name
        self._max_pictures = max_pictures
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._disposition = ""
        self._data = bytearray()

    def callbacks(self) -> dict[str, Any]:
        return {
            "on_part_begin": self._begin_part,
            "on_part_data": lambda data, start, end: self._data.extend(memoryview(data)[start:end]),
            "on_part_end": self._end_part,
            "on_header_field": lambda data, start, end: self._header_name.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header_value.extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_end": self._end,
        }

    def _begin_part(self) -> None:
        self._disposition, self._data = "", bytearray()

    def _end_header(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value.decode("utf-8", "replace")
        self._header_name.clear()
        self._header_value.clear()

    def _end_part(self) -> None:
        field_name = _header_parameter(self._disposition, "name") if self._disposition else None
        if field_name is None:
            raise MalformedRequest('a part of the form has no name; expected Content-Disposition: form-data; name="..."')
        if field_name == self._name:
            self.parsed.pictures.append(bytes(self._data))
            _check_count(len(self.parsed.pictures), self._max_pictures)
        else:
            self._add_option(field_name)

    def _add_option(self, field_name: str) -> None:
        large = len(self._data) > MAX_FORM_FIELD_BYTES
        if field_name not in OPTION_NAMES and (large or _header_parameter(self._disposition, "filename") is not None):
            raise MalformedRequest(f"the picture belongs in the form field {self._name!r}, got it in {field_name[:40]!r}")
        if large:
            raise BodyTooLarge(f"option {field_name!r} may have {MAX_FORM_FIELD_BYTES} bytes in a form, got {len(self._data)}")
        if len(self.parsed.options) >= MAX_FORM_FIELDS:
            raise BodyTooLarge(f"a form may have {MAX_FORM_FIELDS} fields besides pictures, this one has more; send only options")
        self.parsed.options.append((field_name, self._data.decode("utf-8", "replace")))

    def _end(self) -> None:
        self.ended = True
