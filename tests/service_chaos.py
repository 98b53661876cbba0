"""A process whose device misbehaves: `python tests/service_chaos.py PORT hang|lost`. It works once, then does as told."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from service_fakes import FakeRuntime, make_settings, until_ready  # noqa: E402

from service import logs  # noqa: E402
from service.app import create_app  # noqa: E402
from service.device_errors import DeviceLost  # noqa: E402
from service.server import make_server, serve  # noqa: E402

BAD_HEIGHT = 160
"""Pictures in the portrait bucket make the device misbehave."""


def main(port: int, how: str) -> int:
    warm = False

    def misbehave(images: object) -> None:
        if not warm or images.shape[1] != BAD_HEIGHT:  # type: ignore[attr-defined]
            return
        if how == "hang":
            time.sleep(3600)
        raise DeviceLost("CUDA failure 700: an illegal memory access was encountered")

    runtime = FakeRuntime()
    runtime.before_run = misbehave
    settings = make_settings(host="127.0.0.1", port=port, watchdog_seconds=1)
    logs.configure_logs("info", "json")
    app = create_app(settings, runtime=runtime)
    server = make_server(app, settings)

    async def run() -> None:
        nonlocal warm
        serving = asyncio.ensure_future(serve(server))
        await until_ready(app)
        warm = True
        await serving

    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        runner.run(run())
    return server.exit_code


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2]))
