"""LitServe: two workers that decode, each with its batches, in front of the one device.

It takes no raw bodies, so pictures come as a form. It reads annotations unevaluated, so they must not be strings here.
"""

from typing import Annotated, Any

from fastapi import File, Response
from litserve import LitAPI, LitServer

from benchmarks.peers.simulated import DECODE_THREADS, MAX_BATCH_SIZE, SimulatedDevice, answer_bytes, decode, port_argument
from service.images import Prepared


class Detector(LitAPI):
    """Decoding and device in the worker process."""

    def setup(self, device: Any) -> None:
        self.simulated = SimulatedDevice()

    def decode_request(self, request: Annotated[bytes, File()]) -> Prepared:
        return decode(request)

    def batch(self, inputs: list[Prepared]) -> list[Prepared]:
        return list(inputs)  # the default stacks, which fails for pictures of several sizes

    def predict(self, x: list[Prepared]) -> list[Prepared]:
        self.simulated.run(len(x))
        return x

    def unbatch(self, output: list[Prepared]) -> list[Prepared]:
        return output

    def encode_response(self, output: Prepared) -> Response:
        return Response(answer_bytes(output), media_type="application/json")


if __name__ == "__main__":
    api = Detector(max_batch_size=MAX_BATCH_SIZE, batch_timeout=0.001, api_path="/v1/detect")
    LitServer(api, accelerator="cpu", workers_per_device=DECODE_THREADS, timeout=60).run(
        host="127.0.0.1", port=port_argument(), log_level="warning", generate_client_file=False
    )
