"""Other people's servers around the same decoding and the same simulated device, each as its own documentation advises.

`python -m benchmarks.peers.<name> --port P` serves one. Files are named after the package that they need.
"""
