"""Ray Serve: one replica that decodes in threads and batches with serve.batch, behind Ray's HTTP proxy."""

from __future__ import annotations

import asyncio
import signal
from concurrent.futures import ThreadPoolExecutor

import ray
from ray import serve
from ray.serve.config import HTTPOptions
from starlette.requests import Request
from starlette.responses import Response

from benchmarks.peers.simulated import DECODE_THREADS, MAX_BATCH_SIZE, SimulatedDevice, answer_bytes, decode, port_argument
from service.images import Prepared


@serve.deployment(max_ongoing_requests=256)
class Detector:
    """Decoding, batching and device in one replica, as one device has one."""

    def __init__(self) -> None:
        self.device = SimulatedDevice()
        self.decoders = ThreadPoolExecutor(DECODE_THREADS)
        self.device_thread = ThreadPoolExecutor(1)

    @serve.batch(max_batch_size=MAX_BATCH_SIZE, batch_wait_timeout_s=0.0)
    async def infer(self, prepared: list[Prepared]) -> list[bytes]:
        await asyncio.get_running_loop().run_in_executor(self.device_thread, self.device.run, len(prepared))
        return [answer_bytes(one) for one in prepared]

    async def __call__(self, request: Request) -> Response:
        prepared = await asyncio.get_running_loop().run_in_executor(self.decoders, decode, await request.body())
        return Response(await self.infer(prepared), media_type="application/json")


if __name__ == "__main__":
    port = port_argument()
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=128 << 20, _node_ip_address="127.0.0.1", log_to_driver=False)
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
    serve.run(Detector.bind(), route_prefix="/v1/detect")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()
