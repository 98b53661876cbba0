"""The online service: pictures in over HTTP, batched onto ONNX Runtime, boxes out. Never imports torch, model or export."""

import os

__version__ = "0.1.0"

# ONNX Runtime reads this when it is imported. Its wheels keep usage events under the home folder and send them to their makers; a
# service asks no other host for anything. ORT_DISABLE_TELEMETRY=0 in the environment leaves it to ONNX Runtime.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
