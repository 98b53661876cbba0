"""Bodies of the Open Inference Protocol, written by hand."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import httpx
from service_fakes import picture

LENGTH = "inference-header-content-length"
INFER, INFER_TENSOR = "/v2/models/blobs/infer", "/v2/models/blobs_tensor/infer"
Headers = dict[str, str | bytes]


def request_body(**changes: Any) -> dict[str, Any]:
    image = {"name": "IMAGE", "shape": [1, 1], "datatype": "BYTES", "data": [base64.b64encode(picture()).decode()]}
    return {"inputs": [image], **changes}


def tensor_body(**changes: Any) -> dict[str, Any]:
    pixels = {"name": "images", "shape": [1, 3, 4, 3], "datatype": "UINT8", "data": [200, 0, 0] * 12}
    sizes = {"name": "image_sizes_hw", "shape": [1, 2], "datatype": "INT64", "data": [3, 4]}
    return {"inputs": [{**pixels, **changes.pop("pixels", {})}, {**sizes, **changes.pop("sizes", {})}], **changes}


def binary_body(document: dict[str, Any], *tensors: bytes) -> tuple[bytes, Headers]:
    text = json.dumps(document).encode()
    return text + b"".join(tensors), {LENGTH: str(len(text))}


def picture_by_length(data: bytes, *, claimed: int | None = None, count: int = 1, size: int | None = None) -> tuple[bytes, Headers]:
    element = struct.pack("<I", len(data) if claimed is None else claimed) + data
    image = {
        "name": "IMAGE",
        "shape": [count, 1],
        "datatype": "BYTES",
        "parameters": {"binary_data_size": len(element) if size is None else size},
    }
    return binary_body({"inputs": [image]}, element)


async def post(client: httpx.AsyncClient, path: str, body: Any, headers: Headers | None = None) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await client.post(path, content=content, headers=headers or {})


def nested(depth: int) -> bytes:
    return b'{"inputs": [{"name": "images", "shape": [1, 1, 1, 3], "datatype": "UINT8", "data": ' + b"[" * depth + b"]" * depth + b"}]}"
