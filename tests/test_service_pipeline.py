"""The way of one image through the house, where no route shows it."""

from __future__ import annotations

import os
import sys
import threading

import pytest
from service_fakes import fake_service, run

from service.pipeline import DECODE_NICENESS

LEAST_URGENT = 19


@pytest.mark.skipif(sys.platform != "linux", reason="only there a thread has its own niceness")
def test_decoders_step_back_and_nobody_else() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    async def test() -> None:
        own = niceness()
        async with fake_service() as (_, app, _runtime):
            assert await app.state.parts.pipeline.compute(niceness) == min(own + DECODE_NICENESS, LEAST_URGENT)
            assert niceness() == own

    run(test())
