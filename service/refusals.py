"""Why the scheduler refuses or gives up an image, as errors with a sentence for the client."""

from __future__ import annotations

from service.errors import DeadlineExceeded, Draining, NotReady


def not_started() -> NotReady:
    return NotReady("the scheduler has not started; ask again in a moment", retry_after_s=1.0)


def draining() -> Draining:
    return Draining("this replica is shutting down and takes no new images; ask another one or try again", retry_after_s=1.0)


def batch_lost() -> NotReady:
    return NotReady("the device that held this image is lost; other devices go on, send it again", retry_after_s=1.0)


def device_lost() -> NotReady:
    return NotReady("the device of this replica is lost; ask another replica or try again after its restart", retry_after_s=5.0)


def too_late(when: str) -> DeadlineExceeded:
    return DeadlineExceeded(f"the request's time ran out {when}; allow more with timeout_ms or send less at once")
