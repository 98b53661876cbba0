"""Checkpoint to one verified ONNX graph. Imports `model` for the network and `service` to verify as it will be served."""
