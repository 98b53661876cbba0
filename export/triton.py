"""Triton's model configuration for an exported file: the graph's leading batch axes are all that its ONNX Runtime backend needs.

A file with dense NMS also gives a certificate (see `export.certificate`), which is listed, because Triton hands out only what its
configuration names. Its optional input cannot be: the backend refuses optional inputs of a model that batches. So such a file comes with
a second configuration, `NAME-continue`, which takes whole batches as they come and that input: an image whose `nms_converged` is false
goes there once more, with the `nms_state` that it was given as `nms_start`.

The CUDA provider's options go into `parameters`: the backend reads them there in every version, and later ones fill what is missing there
with their own defaults (an exhaustive search at every new shape), whatever the newer `gpu_execution_accelerator` says.
"""

from __future__ import annotations

from service.manifest import Manifest
from service.unsettled import NMS_CONVERGED, NMS_START, NMS_STATE

ON_CUDA = """\
# Of the CUDA provider. 1: heuristic search of convolution algorithms, where an exhaustive one stalls at every new shape.
parameters { key: "cudnn_conv_algo_search" value: { string_value: "1" } }
# 1: the arena grows by what is asked for; there are few shapes, and growing by powers of two only wastes memory.
parameters { key: "arena_extend_strategy" value: { string_value: "1" } }
# An fp32 file is computed in TF32 on newer GPUs unless Triton is started with NVIDIA_TF32_OVERRIDE=0 in its environment.
"""

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
  {{ name: "num_detections" data_type: TYPE_INT64 dims: [ 1 ] reshape: {{ shape: [ ] }} }}{certificate}
]
dynamic_batching {{ }}
version_policy: {{ latest: {{ num_versions: 1 }} }}
{cuda}{warmups}"""

CERTIFICATE = f""",
  {{{{ name: "{NMS_CONVERGED}" data_type: TYPE_BOOL dims: [ 1 ] reshape: {{{{ shape: [ ] }}}} }}}},
  {{{{ name: "{NMS_STATE}" data_type: TYPE_BOOL dims: [ {{width}} ] }}}}"""

WARMUP = """\
model_warmup {{
  name: "bucket_{height}x{width}"
  batch_size: 1
  inputs {{ key: "images" value: {{ data_type: TYPE_UINT8 dims: [ {height}, {width}, 3 ] zero_data: true }} }}
  inputs {{ key: "image_sizes_hw" value: {{ data_type: TYPE_INT64 dims: [ 2 ] zero_data: true }} }}
}}
"""

CONTINUE = f"""\
# For images whose {NMS_CONVERGED} is false. Put this file as config.pbtxt beside a copy of, or a link to, the version folder.
name: "{{name}}-continue"
backend: "onnxruntime"
max_batch_size: 0
input [
  {{{{ name: "images" data_type: TYPE_UINT8 dims: [ -1, -1, -1, 3 ] }}}},
  {{{{ name: "image_sizes_hw" data_type: TYPE_INT64 dims: [ -1, 2 ] }}}},
  {{{{ name: "{NMS_START}" data_type: TYPE_BOOL dims: [ -1, {{width}} ] optional: true }}}}
]
output [
  {{{{ name: "boxes" data_type: TYPE_FP32 dims: [ -1, {{count}}, 4 ] }}}},
  {{{{ name: "scores" data_type: TYPE_FP32 dims: [ -1, {{count}} ] }}}},
  {{{{ name: "labels" data_type: TYPE_INT64 dims: [ -1, {{count}} ] }}}},
  {{{{ name: "num_detections" data_type: TYPE_INT64 dims: [ -1 ] }}}},
  {{{{ name: "{NMS_CONVERGED}" data_type: TYPE_BOOL dims: [ -1 ] }}}},
  {{{{ name: "{NMS_STATE}" data_type: TYPE_BOOL dims: [ -1, {{width}} ] }}}}
]
{{cuda}}"""


def triton_config(manifest: Manifest, *, state_width: int | None = None, max_batch_size: int = 16) -> str:
    """`config.pbtxt` in protobuf's text form, with one warm-up request a bucket.

    Args:
        state_width: of a file with dense NMS, see `export.certificate.state_width`.
    """
    return TEMPLATE.format(
        name=manifest.name,
        max_batch_size=max_batch_size,
        count=manifest.detections_per_image,
        cuda=ON_CUDA,
        certificate="" if state_width is None else CERTIFICATE.format(width=state_width),
        warmups="".join(WARMUP.format(height=height, width=width) for height, width in manifest.input.buckets),
    )


def continue_config(manifest: Manifest, state_width: int) -> str:
    """The same for the model that finishes images without a certificate."""
    return CONTINUE.format(name=manifest.name, count=manifest.detections_per_image, width=state_width, cuda=ON_CUDA)
