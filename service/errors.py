"""What can go wrong for a client: one class an answer, each with its HTTP status, a stable code and a way out.

Statuses and codes are part of the API. `detail` always says what was expected, what came and what to do.
"""

from __future__ import annotations

from typing import ClassVar


class DetectorError(Exception):
    """A request that gets an error answer. Subclasses fix `status`, `code` and `title`."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"
    title: ClassVar[str] = "Internal error"

    def __init__(self, detail: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after_s = retry_after_s
        self.counted = False
        """Whether metrics have seen it."""


class EmptyBody(DetectorError):
    status, code, title = 400, "empty_body", "Empty body"


class MalformedRequest(DetectorError):
    status, code, title = 400, "malformed_request", "Malformed request"


class Unauthorised(DetectorError):
    status, code, title = 401, "unauthorised", "Unauthorised"


class Forbidden(DetectorError):
    status, code, title = 403, "forbidden", "Forbidden"


class ModelNotFound(DetectorError):
    status, code, title = 404, "model_not_found", "Model not found"


class NotFound(DetectorError):
    status, code, title = 404, "not_found", "Not found"


class MethodNotAllowed(DetectorError):
    status, code, title = 405, "method_not_allowed", "Method not allowed"


class SlowBody(DetectorError):
    status, code, title = 408, "slow_body", "Body came too slowly"


class BodyTooLarge(DetectorError):
    status, code, title = 413, "too_large", "Body too large"


class TooManyPixels(DetectorError):
    status, code, title = 413, "too_many_pixels", "Image has too many pixels"


class UnsupportedType(DetectorError):
    status, code, title = 415, "unsupported_type", "Unsupported type"


class BadImage(DetectorError):
    status, code, title = 422, "bad_image", "Image cannot be decoded"


class BadOption(DetectorError):
    status, code, title = 422, "bad_option", "Option not understood"


class LoadFailed(DetectorError):
    """A version was not taken into service; the one before it still answers."""

    status, code, title = 409, "load_failed", "Version not loaded"


class HeadersTooLarge(DetectorError):
    status, code, title = 431, "headers_too_large", "Headers too large"


class QueueFull(DetectorError):
    status, code, title = 429, "queue_full", "Overloaded"


class WouldMissDeadline(DetectorError):
    """Refused on entry: the estimated wait is longer than the request may take."""

    status, code, title = 429, "deadline", "Overloaded"


class InferenceFailed(DetectorError):
    """The device failed on this image alone."""

    status, code, title = 500, "inference_failed", "Inference failed"


class NotReady(DetectorError):
    status, code, title = 503, "not_ready", "Not ready"


class Draining(DetectorError):
    status, code, title = 503, "draining", "Shutting down"


class DeadlineExceeded(DetectorError):
    """Accepted, but not answered in time."""

    status, code, title = 504, "deadline_exceeded", "Deadline exceeded"
