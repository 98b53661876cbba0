"""Logs: one JSON object a line (or text for people), each with the request it belongs to. No header, query or body is ever written."""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

import orjson

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
trace_id: ContextVar[str | None] = ContextVar("trace_id", default=None)

LEVELS = ("debug", "info", "warning", "error")
ROOT_LOGGERS = ("service", "uvicorn")


class JsonFormatter(logging.Formatter):
    """time, level, logger, message, request_id and trace_id where known, `extra={"fields": {...}}`, an error's stack."""

    def format(self, record: logging.LogRecord) -> str:
        """One line; whatever cannot be JSON is written as text."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_context(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        return orjson.dumps(entry, default=str).decode()


class TextFormatter(logging.Formatter):
    """The same for a terminal."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """The message, then name=value of every field."""
        fields = {**_context(), **getattr(record, "fields", {})}
        return " ".join([super().format(record), *(f"{name}={value}" for name, value in fields.items())])


def _context() -> dict[str, str]:
    known = {"request_id": request_id.get(), "trace_id": trace_id.get()}
    return {name: value for name, value in known.items() if value is not None}


def configure_logs(level: str, log_format: str) -> None:
    """Send the service's and the server's records to stderr. Called once by the process, never by create_app."""
    handler = logging.StreamHandler(sys.stderr)
    for_people = log_format == "text" or (log_format == "auto" and sys.stderr.isatty())
    handler.setFormatter(TextFormatter() if for_people else JsonFormatter())
    for name in ROOT_LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
    logging.getLogger("uvicorn.access").handlers.clear()
    set_level(level)


def set_level(level: str) -> None:
    """Change the level of a running process.

    Raises:
        ValueError: not one of LEVELS.
    """
    if level not in LEVELS:
        raise ValueError(f"log level {level!r} is not one of {', '.join(LEVELS)}")
    logging.getLogger("service").setLevel(level.upper())
    # The server's own chatter says nothing that our records do not, and a line for each piece of garbage would let anybody fill the disk.
    logging.getLogger("uvicorn").setLevel(logging.ERROR)


def get_level() -> str:
    """The level in force."""
    return logging.getLevelName(logging.getLogger("service").getEffectiveLevel()).lower()
