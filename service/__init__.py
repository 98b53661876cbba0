"""The online service: pictures in over HTTP, batched onto ONNX Runtime, boxes out. Never imports torch, model or export."""

__version__ = "0.1.0"
