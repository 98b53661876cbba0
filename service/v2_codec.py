"""The Open Inference Protocol's bodies: JSON, then perhaps binary tensors in the JSON's order. Plain functions, for worker threads.

B elements of a batch. Numbers are little-endian and row-major; an element of BYTES is a 4-byte length and the data.
"""

from __future__ import annotations

import base64
import binascii
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from service.errors import BodyTooLarge, MalformedRequest

HEADER_LENGTH = "Inference-Header-Content-Length"
MAX_MENTIONS = 64
"""Most inputs or outputs that one request may name."""

NUMBER_TYPES: dict[str, np.dtype[Any]] = {
    "UINT8": np.dtype("u1"),
    "INT64": np.dtype("<i8"),
    "FP32": np.dtype("<f4"),
}
Tensor = list[bytes] | NDArray[Any]


class TensorSpec(NamedTuple):
    """A tensor as the model's metadata states it; -1 is any length, and the first is the batch."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A request that fits the model. `outputs` are (name, whether as binary) in the order asked for."""

    id: str | None
    timeout_us: int | None
    priority: int
    inputs: Mapping[str, Tensor]
    outputs: Sequence[tuple[str, bool]]

    @property
    def batch_size(self) -> int:
        """B of the first input."""
        return len(next(iter(self.inputs.values())))


class Encoded(NamedTuple):
    """An answer's body; the JSON part's length where binary tensors follow it."""

    body: bytes
    header_length: int | None


def parse_infer(
    body: bytes, header_length: str | None, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], max_batch: int
) -> InferRequest:
    """Read and check an inference request.

    Args:
        body: all of it, inflated.
        header_length: the value of Inference-Header-Content-Length; None: all of the body is JSON. "0": all of it is the only input's data.
        inputs, outputs: what the model takes and gives.
        max_batch: most elements of a batch.

    Raises:
        MalformedRequest: what was expected and what came. BodyTooLarge: a larger batch.
    """
    if header_length is not None and header_length.strip() == "0":
        return _raw_request(body, inputs, outputs)
    text, binary = _split(body, header_length)
    document = _object(_load(text), "the request")
    parameters = _object(document.get("parameters", {}), "'parameters'")
    request = InferRequest(
        id=_optional_text(document, "id"),
        timeout_us=_optional_count(parameters, "timeout"),
        priority=_optional_count(parameters, "priority") or 0,
        inputs=_read_inputs(_objects(document, "inputs"), binary, inputs, max_batch),
        outputs=_read_outputs(_objects(document, "outputs"), outputs, _flag(parameters, "binary_data_output")),
    )
    sizes = {name: len(tensor) for name, tensor in request.inputs.items()}
    if len(set(sizes.values())) != 1 or not request.batch_size:
        raise MalformedRequest(f"inputs need the same batch of at least 1, got {sizes}")
    return request


def encode_answer(
    request: InferRequest, model: str, version: str, tensors: Mapping[str, NDArray[Any]], specs: Sequence[TensorSpec]
) -> Encoded:
    """The answer's body: the outputs asked for, in their order, as JSON or binary as asked."""
    datatypes = {spec.name: spec.datatype for spec in specs}
    listed: list[dict[str, Any]] = []
    binary: list[bytes] = []
    for name, as_binary in request.outputs:
        tensor = np.ascontiguousarray(tensors[name], dtype=NUMBER_TYPES[datatypes[name]])
        entry: dict[str, Any] = {"name": name, "shape": list(tensor.shape), "datatype": datatypes[name]}
        if as_binary:
            binary.append(tensor.tobytes())
            entry["parameters"] = {"binary_data_size": len(binary[-1])}
        else:
            entry["data"] = tensor.ravel().tolist()
        listed.append(entry)
    document: dict[str, Any] = {"model_name": model, "model_version": version, "outputs": listed}
    if request.id is not None:
        document["id"] = request.id
    text = orjson.dumps(document)
    return Encoded(text + b"".join(binary), len(text)) if binary else Encoded(text, None)


def _raw_request(body: bytes, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> InferRequest:
    """The body is the only input's data: one picture, without a length before it. The answer is all binary."""
    if len(inputs) != 1 or inputs[0].datatype != "BYTES":
        raise MalformedRequest(f"{HEADER_LENGTH} 0 needs a model with one BYTES input; name the inputs in JSON before the data")
    if not body:
        raise MalformedRequest(f"{HEADER_LENGTH} is 0, so the body must be a picture, and it is empty")
    return InferRequest(None, None, 0, {inputs[0].name: [body]}, [(spec.name, True) for spec in outputs])


def _split(body: bytes, header_length: str | None) -> tuple[bytes, memoryview]:
    """The JSON part and what follows it."""
    if header_length is None:
        return body, memoryview(b"")
    if not (header_length.isascii() and header_length.strip().isdigit() and len(header_length) < 20):
        raise MalformedRequest(f"{HEADER_LENGTH} must be a number of bytes, got {header_length[:40]!r}")
    length = int(header_length)
    if length > len(body):
        raise MalformedRequest(f"{HEADER_LENGTH} is {length}, but the body has {len(body)} bytes")
    return body[:length], memoryview(body)[length:]


def _load(text: bytes) -> object:
    try:
        return orjson.loads(text)  # its own bound on depth is 1024
    except orjson.JSONDecodeError as error:
        raise MalformedRequest(f"the request is not valid JSON: {error}; binary tensors need {HEADER_LENGTH}") from error


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MalformedRequest(f"{what} must be a JSON object, got {type(value).__name__}")
    return value


def _objects(document: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    listed = document.get(key, [])
    if not isinstance(listed, list) or len(listed) > MAX_MENTIONS:
        raise MalformedRequest(f"{key!r} must be a list of at most {MAX_MENTIONS} objects")
    return [_object(entry, f"every entry of {key!r}") for entry in listed]


def _optional_text(document: Mapping[str, Any], key: str) -> str | None:
    value = document.get(key)
    if value is not None and not isinstance(value, str):
        raise MalformedRequest(f"{key!r} must be text, got {type(value).__name__}")
    return value


def _optional_count(document: Mapping[str, Any], key: str) -> int | None:
    value = document.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise MalformedRequest(f"{key!r} must be a number from 0, got {str(value)[:40]!r}")
    return value


def _flag(document: Mapping[str, Any], key: str) -> bool:
    value = document.get(key, False)
    if not isinstance(value, bool):
        raise MalformedRequest(f"{key!r} must be true or false, got {str(value)[:40]!r}")
    return value


def _named(entry: Mapping[str, Any], specs: Sequence[TensorSpec], seen: Sequence[str], kind: str) -> TensorSpec:
    """The spec of an entry's name. An entry that asks for a place in shared memory, or for what only other servers do, is refused."""
    name = entry.get("name")
    spec = next((spec for spec in specs if spec.name == name), None)
    if spec is None:
        raise MalformedRequest(f"the model has no {kind} {str(name)[:60]!r}; it has {', '.join(spec.name for spec in specs)}")
    if spec.name in seen:
        raise MalformedRequest(f"{kind} {spec.name!r} comes twice; name it once")
    parameters = _object(entry.get("parameters", {}), f"'parameters' of {spec.name!r}")
    for unoffered in ("shared_memory_region", "classification"):
        if unoffered in parameters:
            raise MalformedRequest(f"{unoffered!r} of {spec.name!r} is not offered; send and take the tensor in the body")
    return spec


def _read_outputs(entries: Sequence[dict[str, Any]], specs: Sequence[TensorSpec], binary: bool) -> list[tuple[str, bool]]:
    """What to answer with; everything where nothing is named."""
    wanted: list[tuple[str, bool]] = []
    for entry in entries:
        spec = _named(entry, specs, [name for name, _ in wanted], "output")
        parameters = entry.get("parameters", {})
        wanted.append((spec.name, _flag(parameters, "binary_data") if "binary_data" in parameters else binary))
    return wanted or [(spec.name, binary) for spec in specs]


def _read_inputs(entries: Sequence[dict[str, Any]], binary: memoryview, specs: Sequence[TensorSpec], max_batch: int) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for entry in entries:
        spec = _named(entry, specs, list(tensors), "input")
        shape = _read_shape(entry, spec, max_batch)
        size = _optional_count(entry.get("parameters", {}), "binary_data_size")
        if size is None:
            tensors[spec.name] = _from_json(entry.get("data"), spec, shape)
            continue
        if "data" in entry:
            raise MalformedRequest(f"input {spec.name!r} has both 'data' and 'binary_data_size'; send one")
        if size > len(binary):
            raise MalformedRequest(f"input {spec.name!r} claims {size} bytes of binary data, {len(binary)} are left")
        tensors[spec.name] = _from_binary(binary[:size], spec, shape)
        binary = binary[size:]
    if len(binary):
        raise MalformedRequest(f"{len(binary)} bytes are left after the last input")
    missing = [spec.name for spec in specs if spec.name not in tensors]
    if missing:
        raise MalformedRequest(f"the model needs input {missing[0]!r}")
    return tensors


def _read_shape(entry: Mapping[str, Any], spec: TensorSpec, max_batch: int) -> tuple[int, ...]:
    datatype, shape = entry.get("datatype"), entry.get("shape")
    if datatype != spec.datatype:
        raise MalformedRequest(f"input {spec.name!r} is {spec.datatype}, got {str(datatype)[:40]!r}")
    if not isinstance(shape, list) or not _fits(shape, spec.shape):
        raise MalformedRequest(f"input {spec.name!r} has shape {list(spec.shape)}, where -1 is any length, got {str(shape)[:80]}")
    if shape[0] > max_batch:
        raise BodyTooLarge(f"a request may hold {max_batch} pictures, got {shape[0]}; send several requests")
    return tuple(shape)


def _fits(shape: Sequence[object], wanted: Sequence[int]) -> bool:
    return len(shape) == len(wanted) and all(
        type(length) is int and length >= 0 and expected in (-1, length) for length, expected in zip(shape, wanted, strict=True)
    )


def _from_binary(data: memoryview, spec: TensorSpec, shape: tuple[int, ...]) -> Tensor:
    if spec.datatype == "BYTES":
        return _split_elements(data, spec, math.prod(shape))
    dtype = NUMBER_TYPES[spec.datatype]
    needed = math.prod(shape) * dtype.itemsize
    if len(data) != needed:
        raise MalformedRequest(f"input {spec.name!r} of shape {list(shape)} needs {needed} bytes, got {len(data)}")
    return np.frombuffer(data, dtype).reshape(shape)


def _split_elements(data: memoryview, spec: TensorSpec, count: int) -> list[bytes]:
    elements: list[bytes] = []
    at = 0
    while at + 4 <= len(data) and len(elements) < count:
        (length,) = struct.unpack_from("<I", data, at)
        if length > len(data) - at - 4:
            raise MalformedRequest(f"element {len(elements)} of {spec.name!r} claims {length} bytes, {len(data) - at - 4} are left")
        elements.append(bytes(data[at + 4 : at + 4 + length]))
        at += 4 + length
    if len(elements) != count or at != len(data):
        raise MalformedRequest(
            f"input {spec.name!r} needs {count} elements, each a 4-byte little-endian length and the data; "
            f"got {len(elements)} in {at} of {len(data)} bytes"
        )
    return elements


def _from_json(data: object, spec: TensorSpec, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(data, list):
        raise MalformedRequest(f"input {spec.name!r} needs 'data' as a list, or 'binary_data_size' and binary data")
    if spec.datatype == "BYTES":
        return _decode_texts(data, spec, math.prod(shape))
    try:
        numbers = np.array(data)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise MalformedRequest(f"'data' of input {spec.name!r} is no array of numbers: {str(error)[:80]}") from error
    limits = np.iinfo(NUMBER_TYPES[spec.datatype])  # all inputs are whole numbers
    if numbers.size != math.prod(shape) or numbers.ndim not in (1, len(shape)):
        raise MalformedRequest(f"input {spec.name!r} of shape {list(shape)} needs {math.prod(shape)} numbers, got {numbers.size}")
    if numbers.size and (numbers.dtype.kind not in "iu" or numbers.min() < limits.min or numbers.max() > limits.max):
        raise MalformedRequest(f"input {spec.name!r} holds whole numbers from {limits.min} to {limits.max}")
    return numbers.astype(NUMBER_TYPES[spec.datatype]).reshape(shape)


def _decode_texts(data: Sequence[object], spec: TensorSpec, count: int) -> list[bytes]:
    """Pictures as base64, since JSON carries text only."""
    texts = [text for entry in data for text in (entry if isinstance(entry, list) else [entry])]
    if len(texts) != count:
        raise MalformedRequest(f"input {spec.name!r} needs {count} elements, got {len(texts)}")
    try:
        return [base64.b64decode(text, validate=True) for text in texts]  # type: ignore[arg-type]
    except (TypeError, ValueError, binascii.Error) as error:
        raise MalformedRequest(f"in JSON input {spec.name!r} is base64 text ({str(error)[:80]}); or send it as binary data") from error
