"""Whether this process should live and whether it should get requests: two questions with two answers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

EXIT_NO_MODEL = 3
EXIT_DEVICE_LOST = 4
EXIT_HUNG = 5

CANARY_TIMEOUT_S = 5.0

logger = logging.getLogger(__name__)


class Health:
    """Starting, ready, draining, or failed for good with an exit code."""

    def __init__(self, *, canary_seconds: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.exit_code: int | None = None
        self.draining = False
        self.ended = asyncio.Event()
        """Set when the process should stop: it failed for good."""
        self._settled = asyncio.Event()
        self._loaded = False
        self._failure: str | None = None
        self._canary_seconds = canary_seconds
        self._clock = clock
        self._last_good: float | None = None
        self._canary: asyncio.Task[str | None] | None = None
        self._run_canary: Callable[[], Awaitable[None]] | None = None

    def loaded(self, run_canary: Callable[[], Awaitable[None]]) -> None:
        """Every model is warm and checked. `run_canary` makes one inference, or raises."""
        self._loaded = True
        self._run_canary = run_canary
        self.saw_inference()
        self._settled.set()

    async def settled(self) -> None:
        """Wait until the service is loaded or has failed."""
        await self._settled.wait()

    def saw_inference(self) -> None:
        """A device answered just now. May be called on any thread."""
        self._last_good = self._clock()

    def fail(self, reason: str, exit_code: int) -> None:
        """Unready for good, and the process should end with this code."""
        if self._failure is None:
            self._failure, self.exit_code = reason, exit_code
            logger.critical("unready and leaving: %s", reason, extra={"fields": {"exit_code": exit_code}})
        self.ended.set()
        self._settled.set()

    @property
    def failure(self) -> str | None:
        """Why the process must end, if it must."""
        return self._failure

    def reason_not_ready(self) -> str | None:
        """Without a look at the device: why no request should come here, or None."""
        if self._failure is not None:
            return self._failure
        if self.draining:
            return "this replica is shutting down"
        if not self._loaded:
            return "models are being loaded and warmed up"
        return None

    async def check_ready(self) -> str | None:
        """The same with a look at the device: the last good inference is recent, or one is made now."""
        reason = self.reason_not_ready()
        if reason is not None or self._canary_seconds == 0 or self._age_s() <= self._canary_seconds:
            return reason
        if self._canary is None or self._canary.done():
            self._canary = asyncio.create_task(self._try_canary())
        return await asyncio.shield(self._canary)

    def _age_s(self) -> float:
        return self._clock() - self._last_good if self._last_good is not None else float("inf")

    async def _try_canary(self) -> str | None:
        assert self._run_canary is not None
        try:
            async with asyncio.timeout(CANARY_TIMEOUT_S):
                await self._run_canary()
        except TimeoutError:
            return f"the canary inference gave no answer in {CANARY_TIMEOUT_S:g} s"
        except Exception as error:
            return f"the canary inference failed: {error}"
        self.saw_inference()
        return None
