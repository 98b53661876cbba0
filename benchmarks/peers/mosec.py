"""mosec: decoding in its own worker processes, batches on one more, joined by its Rust front."""

from __future__ import annotations

import sys

from mosec import Server, Worker

from benchmarks.peers.simulated import DECODE_THREADS, MAX_BATCH_SIZE, SimulatedDevice, answer_bytes, decode, port_argument
from service.images import Prepared

MAX_WAIT_MS = 1  # the shortest that it takes; its default of 10 would cost each lone request as much


class Decoder(Worker):
    """Body to pixels."""

    def deserialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: bytes) -> Prepared:
        return decode(data)


class Detector(Worker):
    """A batch of pixels to answers."""

    def __init__(self) -> None:
        super().__init__()
        self.device = SimulatedDevice()

    def forward(self, data: list[Prepared]) -> list[bytes]:
        self.device.run(len(data))
        return [answer_bytes(prepared) for prepared in data]

    def serialize(self, data: bytes) -> bytes:
        return data


if __name__ == "__main__":
    sys.argv[1:] = ["--address", "127.0.0.1", "--port", str(port_argument()), "--log-level", "warning"]
    server = Server()
    server.append_worker(Decoder, num=DECODE_THREADS, route="/v1/detect")
    server.append_worker(Detector, max_batch_size=MAX_BATCH_SIZE, max_wait_time=MAX_WAIT_MS, route="/v1/detect")
    server.run()
