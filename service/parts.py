"""The parts of one running service, as routes find them: `request.app.state.parts`."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from fastapi import Request

from service.auth import KeyRing
from service.health import Health
from service.metrics import Metrics
from service.pipeline import Pipeline
from service.repository import Repository
from service.scheduler import Scheduler
from service.settings import Settings


@dataclass(frozen=True, slots=True)
class Parts:
    """Made by create_app, shared by every router."""

    settings: Settings
    metrics: Metrics
    scheduler: Scheduler
    repository: Repository
    pipeline: Pipeline
    health: Health
    api_keys: KeyRing | None
    admin_keys: KeyRing | None
    started_at: float = field(default_factory=time.time)

    def deadline(self, timeout_ms: int | None) -> float:
        """Latest moment for an answer to a request that comes now, on the monotonic clock."""
        limit_ms = self.settings.request_timeout_ms
        return time.monotonic() + min(timeout_ms or limit_ms, limit_ms) / 1e3

    async def why_not_ready(self) -> str | None:
        """Why no request should come here, or None: health's reason, or that nothing is served."""
        reason = await self.health.check_ready()
        if reason is None and not self.repository.served:
            return self.repository.why_nothing_is_served()
        return reason


def parts_of(request: Request) -> Parts:
    """The service that this request belongs to."""
    parts: Parts = request.app.state.parts
    return parts
