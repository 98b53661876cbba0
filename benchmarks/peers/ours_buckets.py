"""This project's service again, for a model of five input shapes: only pictures of one shape share a batch, which no peer minds."""

from __future__ import annotations

import sys

from benchmarks.peers.ours import main
from benchmarks.peers.simulated import FIVE_BUCKETS, SPEC

if __name__ == "__main__":
    sys.exit(main(SPEC.model_copy(update={"buckets": FIVE_BUCKETS})))
