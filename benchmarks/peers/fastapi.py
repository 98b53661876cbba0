"""Plain FastAPI: what most people write first. One route, decoding and device in the thread pool, no batches."""

from __future__ import annotations

import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool

from benchmarks.peers.simulated import SimulatedDevice, answer_bytes, decode, port_argument

app = FastAPI()
device = SimulatedDevice()


def detect_one(body: bytes) -> bytes:
    """One picture alone on the device."""
    prepared = decode(body)
    device.run(1)
    return answer_bytes(prepared)


@app.post("/v1/detect")
async def detect(request: Request) -> Response:
    """A picture as the body."""
    return Response(await run_in_threadpool(detect_one, await request.body()), media_type="application/json")


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=port_argument(), log_level="warning")
