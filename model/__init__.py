"""Faster R-CNN in PyTorch: network, data, training and evaluation. Never imports service or export."""
