"""Triton's model configuration for an exported file: the graph's leading batch axes are all that its ONNX Runtime backend needs."""

from __future__ import annotations

from service.manifest import Manifest

TEMPLATE = """\
# For Triton's ONNX Runtime backend: put this file one level up, beside the version folders.
name: "{name}"
backend: "onnxruntime"
max_batch_size: {max_batch_size}
input [
  {{ name: "images" data_type: TYPE_UINT8 dims: [ -1, -1, 3 ] }},
  {{ name: "image_sizes_hw" data_type: TYPE_INT64 dims: [ 2 ] }}
]
output [
  {{ name: "boxes" data_type: TYPE_FP32 dims: [ {count}, 4 ] }},
  {{ name: "scores" data_type: TYPE_FP32 dims: [ {count} ] }},
  {{ name: "labels" data_type: TYPE_INT64 dims: [ {count} ] }},
  {{ name: "num_detections" data_type: TYPE_INT64 dims: [ 1 ] reshape: {{ shape: [ ] }} }}
]
dynamic_batching {{ }}
version_policy: {{ latest: {{ num_versions: 1 }} }}
{warmups}"""

WARMUP = """\
model_warmup {{
  name: "bucket_{height}x{width}"
  batch_size: 1
  inputs {{ key: "images" value: {{ data_type: TYPE_UINT8 dims: [ {height}, {width}, 3 ] zero_data: true }} }}
  inputs {{ key: "image_sizes_hw" value: {{ data_type: TYPE_INT64 dims: [ 2 ] zero_data: true }} }}
}}
"""


def triton_config(manifest: Manifest, *, max_batch_size: int = 16) -> str:
    """`config.pbtxt` in protobuf's text form, with one warm-up request a bucket."""
    warmups = "".join(WARMUP.format(height=height, width=width) for height, width in manifest.input.buckets)
    return TEMPLATE.format(name=manifest.name, max_batch_size=max_batch_size, count=manifest.detections_per_image, warmups=warmups)
