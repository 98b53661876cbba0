"""How large the pictures inside an AVIF file really are, read from the AV1 streams themselves.

The container claims a size (`ispe`) and the decoder believes the stream: a small claim over a large stream would pass every limit and be
decoded in full. So the sequence header of each stream is read before anything is decoded. Layout: ISO/IEC 14496-12 (boxes), 23008-12
(items), the AV1 specification 5.5 (sequence header). Everything is bounded, whatever the file says.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from service.errors import BadImage, TooManyPixels

MAX_BOXES = 20_000
MAX_DEPTH = 16
MAX_EXTENTS = 8_192
MAX_UNITS = 50_000
"""Open bitstream units of all streams together; one picture has about three."""
MAX_JOINED_BYTES_FACTOR = 2
"""Streams may lie in pieces; joining them may copy this many times the file."""

CONTAINERS = {b"moov": 0, b"trak": 0, b"mdia": 0, b"minf": 0, b"stbl": 0, b"iprp": 0, b"ipco": 0, b"meta": 4, b"stsd": 8, b"av01": 78}
"""Boxes of boxes, with the bytes of their own before the first child."""
MAX_SEQUENCE_HEADER_BYTES = 1_024
SEQUENCE_HEADER = 1

HW = tuple[int, int]


class _Malformed(Exception):
    """The file contradicts its own layout."""


def check_streams(data: bytes, max_pixels: int) -> None:
    """Hold every stream of an AVIF against the limit, before one is decoded.

    Raises:
        TooManyPixels: a stream is larger, whatever the container claims. BadImage: as `stream_sizes`.
    """
    height, width = max(stream_sizes(data), key=lambda hw: hw[0] * hw[1])
    if height * width > max_pixels:
        raise TooManyPixels(f"a picture may have {max_pixels} pixels, the AVIF's video stream has {width} x {height}; send it smaller")


def stream_sizes(data: bytes) -> list[HW]:
    """(height, width) that each AV1 sequence header in the file allows its frames: pictures, alpha planes, tiles, thumbnails.

    Raises:
        BadImage: no stream is found, or the container is broken or made of absurdly many parts.
    """
    try:
        sizes = _Reader(data).sizes()
    except (_Malformed, struct.error, IndexError) as error:
        raise BadImage(f"the AVIF container is truncated or corrupt: {error}") from error
    if not sizes:
        raise BadImage("the AVIF holds no AV1 sequence header, so its size is unknown; save it again")
    return sizes


@dataclass(frozen=True, slots=True)
class _Box:
    kind: bytes
    start: int
    end: int
    """Of the payload."""


@dataclass
class _Reader:
    """One file. Counts what it has looked at, so that no layout makes it run long."""

    data: bytes
    boxes: int = 0
    extents: int = 0
    units: int = 0
    joined: int = 0
    found: list[HW] = field(default_factory=list)

    def sizes(self) -> list[HW]:
        for box in self._walk(0, len(self.data)):
            if box.kind == b"meta":
                for stream in self._items(box):
                    self._read_units(stream)
            elif box.kind == b"stbl":
                self._read_units(self._first_sample(box))
            elif box.kind == b"av1C":
                self._read_units(memoryview(self.data)[box.start + 4 : box.end])
        return self.found

    def _walk(self, start: int, end: int, depth: int = 0) -> Iterator[_Box]:
        """Every box, children after their parents."""
        if depth > MAX_DEPTH:
            raise _Malformed(f"boxes in boxes, more than {MAX_DEPTH} deep")
        for box in self._children(start, end):
            yield box
            if box.kind in CONTAINERS:
                yield from self._walk(box.start + CONTAINERS[box.kind], box.end, depth + 1)

    def _children(self, start: int, end: int) -> Iterator[_Box]:
        at = start
        while at + 8 <= end:
            self.boxes += 1
            if self.boxes > MAX_BOXES:
                raise _Malformed(f"more than {MAX_BOXES} boxes")
            size, kind = struct.unpack_from(">I4s", self.data, at)
            head = 8
            if size == 1:
                size, head = struct.unpack_from(">Q", self.data, at + 8)[0], 16
            stop = end if size == 0 else at + size
            if start == 0:
                stop = min(stop, end)  # of a file that was cut off, the beginning may do; the decoder says so where it does not
            if stop < at + head or stop > end:
                raise _Malformed(f"a box of {size} bytes where {end - at} are left")
            yield _Box(kind, at + head, stop)
            at = stop

    def _by_kind(self, start: int, end: int, kinds: set[bytes]) -> dict[bytes, _Box]:
        """The direct children of some kinds. Two of a kind would let readers differ on which one counts."""
        found: dict[bytes, _Box] = {}
        for box in self._children(start, end):
            if box.kind in kinds and found.setdefault(box.kind, box) is not box:
                raise _Malformed(f"two {box.kind.decode('latin-1')} boxes where one may be")
        return found

    def _items(self, meta: _Box) -> Iterator[memoryview]:
        """The bytes of each AV1 item of a meta box."""
        children = self._by_kind(meta.start + CONTAINERS[b"meta"], meta.end, {b"iinf", b"iloc", b"idat"})
        if b"iinf" not in children or b"iloc" not in children:
            return
        coded, payload = set(self._coded_items(children[b"iinf"])), children.get(b"idat")
        for number, method, extents in self._locations(children[b"iloc"]):
            if number in coded:
                yield self._join(extents, method, payload)

    def _coded_items(self, iinf: _Box) -> Iterator[int]:
        """Numbers of the items that are AV1 streams."""
        for box in self._children(iinf.start + (6 if self.data[iinf.start] == 0 else 8), iinf.end):
            version = self.data[box.start]
            if box.kind == b"infe" and version in (2, 3):
                number, _, kind = struct.unpack_from(">HH4s" if version == 2 else ">IH4s", self.data, box.start + 4)
                if kind == b"av01":
                    yield number

    def _locations(self, iloc: _Box) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
        """Item number, construction method, and (offset, length) of its pieces."""
        reader = _Fields(self.data, iloc.start, iloc.end)
        version = reader.take(1)
        reader.take(3)
        sizes = reader.take(2)
        offset_size, length_size, base_size, index_size = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
        wide = 4 if version == 2 else 2
        for _ in range(reader.take(wide)):
            number = reader.take(wide)
            method = reader.take(2) & 15 if version else 0
            reader.take(2)
            base = reader.take(base_size)
            extents = []
            for _ in range(self._counted(reader.take(2))):
                reader.take(index_size if version else 0)
                extents.append((base + reader.take(offset_size), reader.take(length_size)))
            yield number, method, extents

    def _counted(self, extents: int) -> int:
        self.extents += extents + 1
        if self.extents > MAX_EXTENTS:
            raise _Malformed(f"more than {MAX_EXTENTS} pieces of streams")
        return extents

    def _join(self, extents: list[tuple[int, int]], method: int, payload: _Box | None) -> memoryview:
        if method > 1 or (method == 1 and payload is None):
            raise _Malformed("a stream lies where none can be")
        first, last = (payload.start, payload.end) if method == 1 and payload is not None else (0, len(self.data))
        view = memoryview(self.data)
        pieces = []
        for offset, length in extents:
            start = first + offset
            stop = start + length if length else last  # length 0: to the end
            pieces.append(view[start : min(stop, last)])
        if len(pieces) == 1:
            return pieces[0]
        self.joined += sum(len(piece) for piece in pieces)
        if self.joined > MAX_JOINED_BYTES_FACTOR * len(self.data):
            raise _Malformed("streams that share their bytes")
        return memoryview(b"".join(pieces))

    def _first_sample(self, stbl: _Box) -> memoryview:
        """Of a track of AV1: the only one that is decoded. Nothing of other tracks."""
        boxes = self._by_kind(stbl.start, stbl.end, {b"stsd", b"stco", b"co64", b"stsz"})
        entries, sizes, chunks = boxes.get(b"stsd"), boxes.get(b"stsz"), boxes.get(b"stco") or boxes.get(b"co64")
        if entries is None or sizes is None or chunks is None or (b"stco" in boxes and b"co64" in boxes):
            raise _Malformed("a track without one table of each kind")
        if all(box.kind != b"av01" for box in self._children(entries.start + CONTAINERS[b"stsd"], entries.end)):
            return memoryview(b"")
        offset: int = struct.unpack_from(">I" if chunks.kind == b"stco" else ">Q", self.data, chunks.start + 8)[0]
        common: int = struct.unpack_from(">I", self.data, sizes.start + 4)[0]
        size: int = common or struct.unpack_from(">I", self.data, sizes.start + 12)[0]
        return memoryview(self.data)[offset : offset + size]

    def _read_units(self, stream: memoryview) -> None:
        """Note the sequence headers among a stream's units; what makes no sense ends the stream, as it does for the decoder."""
        at = 0
        while at < len(stream):
            self.units += 1
            if self.units > MAX_UNITS:
                raise _Malformed(f"more than {MAX_UNITS} units of video")
            head = stream[at]
            at += 2 if head & 4 else 1
            size, at = _leb128(stream, at) if head & 2 else (len(stream) - at, at)
            if head & 0x80 or size > len(stream) - at:
                return
            if head >> 3 & 15 == SEQUENCE_HEADER:
                self.found.append(_frame_hw(stream[at : at + size]))
            at += size


class _Fields:
    """Big-endian numbers one after the other."""

    def __init__(self, data: bytes, at: int, end: int) -> None:
        self._data, self._at, self._end = data, at, end

    def take(self, size: int) -> int:
        if self._at + size > self._end:
            raise _Malformed("a table that ends early")
        value = int.from_bytes(self._data[self._at : self._at + size], "big")
        self._at += size
        return value


class _Bits:
    """Bits, the highest of each byte first."""

    def __init__(self, data: memoryview) -> None:
        head = data[:MAX_SEQUENCE_HEADER_BYTES]
        self._value, self._left = int.from_bytes(head, "big"), 8 * len(head)

    def take(self, count: int) -> int:
        if count > self._left:
            raise _Malformed("a sequence header that ends early")
        self._left -= count
        return self._value >> self._left & ((1 << count) - 1)

    def skip_uvlc(self) -> None:
        zeros = 0
        while not self.take(1):
            zeros += 1
        if zeros < 32:
            self.take(zeros)


def _leb128(stream: memoryview, at: int) -> tuple[int, int]:
    """A number of up to eight bytes, least significant first, and where it ends."""
    value = 0
    for index in range(8):
        byte = stream[at + index]
        value |= (byte & 0x7F) << 7 * index
        if not byte & 0x80:
            return value, at + index + 1
    raise _Malformed("a length of more than eight bytes")


def _frame_hw(header: memoryview) -> HW:
    """max_frame_height and max_frame_width of a sequence header (AV1 5.5.1)."""
    bits = _Bits(header)
    bits.take(3)  # profile
    bits.take(1)  # still picture
    if bits.take(1):  # reduced header
        bits.take(5)  # level
    else:
        _skip_timing_and_operating_points(bits)
    width_bits, height_bits = bits.take(4) + 1, bits.take(4) + 1
    width, height = bits.take(width_bits) + 1, bits.take(height_bits) + 1
    return height, width


def _skip_timing_and_operating_points(bits: _Bits) -> None:
    delay_bits = 0
    if bits.take(1):  # timing info
        bits.take(64)
        if bits.take(1):  # equal picture interval
            bits.skip_uvlc()
        if bits.take(1):  # decoder model info
            delay_bits = bits.take(5) + 1
            bits.take(32 + 5 + 5)
    initial_delay = bits.take(1)
    for _ in range(bits.take(5) + 1):
        bits.take(12)
        if bits.take(5) > 7:  # level
            bits.take(1)
        if delay_bits and bits.take(1):
            bits.take(2 * delay_bits + 1)
        if initial_delay and bits.take(1):
            bits.take(4)
