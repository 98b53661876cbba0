"""A running service as an evaluation sees it: which model answers, and its detections for the bytes of a picture. Standard library only."""

from __future__ import annotations

import http.client
import json
import random
import socket
import ssl
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import numpy as np

from model.metrics.predictions import Prediction

SCHEMES = ("http", "https")
BUSY = (429, 503, 504)
"""Answers after which another try makes sense; the first two say when."""
REFUSED = (400, 413, 415, 422)
"""Answers that are about the picture."""
TRANSPORT_TRIES = 4
DEFAULT_PAUSE_S = 1.0
MAX_DETECTIONS = 10_000


class RemoteError(RuntimeError):
    """The service cannot be evaluated, as a sentence that says why."""


class PictureRefused(RemoteError):
    """The service does not take this picture."""


@dataclass(frozen=True)
class RemoteModel:
    """The version that answers."""

    name: str
    version: str
    class_names: tuple[str, ...]
    detections_per_image: int

    @property
    def reference(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class RemoteAnswer:
    """One picture's detections, the seconds that its last try took here, and the milliseconds of each stage there."""

    prediction: Prediction
    seconds: float
    stages_ms: dict[str, float]


def is_url(target: str) -> bool:
    """Whether a target is a service rather than a file."""
    return target.startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


class RemoteDetector:
    """A client that waits when the service is busy, as long as it says. May be shared by threads; each has its own connection.

    Args:
        url: where the service is, with a prefix of the path if it has one.
        model: `name` or `name@version`; None takes the service's first.
        timeout_s: of one try.
        patience_s: how long a busy service is asked again for one picture.

    Raises:
        ValueError: not a URL.
    """

    def __init__(
        self, url: str, *, model: str | None = None, api_key: str | None = None, timeout_s: float = 60.0, patience_s: float = 120.0
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in SCHEMES or not parts.hostname:
            raise ValueError(f"expected http://HOST[:PORT] or https://HOST[:PORT], got {url!r}")
        self._url, self._parts, self._model = url, parts, model
        self._headers = {"content-type": "application/octet-stream", "accept": "application/json"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._timeout_s, self._patience_s = timeout_s, patience_s
        self._local = threading.local()
        self._lock = threading.Lock()
        self._connections: list[http.client.HTTPConnection] = []
        self._closed = threading.Event()
        self._described: RemoteModel | None = None
        self.retries = 0
        """Tries that a busy service or a broken connection cost."""

    def describe(self) -> RemoteModel:
        """The version that answers, asked for once.

        Raises:
            RemoteError: no such service, model or version, or no right to ask.
        """
        if self._described is None:
            name, _, version = (self._model or "").partition("@")
            if not name:
                listed = self._ask("GET", "/v1/models")["models"]
                if not listed:
                    raise RemoteError(f"{self._url} serves no model")
                name = listed[0]["name"]
            found = self._ask("GET", f"/v1/models/{quote(name, safe='')}")
            wanted = version or found["version"]
            served = {entry["version"]: entry for entry in found["versions"]}
            if wanted not in served:
                raise RemoteError(f"{self._url} serves {name}@{', @'.join(served)}, not @{wanted}")
            entry = served[wanted]
            self._described = RemoteModel(name, wanted, tuple(entry["class_names"]), entry["detections_per_image"])
        return self._described

    def detect(self, data: bytes) -> RemoteAnswer:
        """Every detection of a picture that the model gives, down to its own floor, in the original frame.

        Raises:
            PictureRefused: the picture's fault. RemoteError: the service's, or another version answered than described.
        """
        model = self.describe()
        options: dict[str, int | str] = {"score_threshold": 0, "max_detections": min(model.detections_per_image, MAX_DETECTIONS)}
        if self._model is not None:
            options["model"] = self._model
        answer, seconds = self._ask_timed("POST", f"/v1/detect?{urlencode(options)}", data)
        if (answer["model"]["name"], answer["model"]["version"]) != (model.name, model.version):
            raise RemoteError(
                f"{model.reference} answered at first and {answer['model']['name']}@{answer['model']['version']} now: "
                f"the service changed versions during the evaluation; name one with --model {model.reference}"
            )
        return RemoteAnswer(_prediction(answer["detections"]), seconds, answer["timing_ms"])

    def close(self) -> None:
        """Close every thread's connection. What another thread still asks ends at once with a RemoteError."""
        self._closed.set()
        with self._lock:
            for connection in self._connections:
                with suppress(OSError):  # the other side was faster
                    if connection.sock is not None:
                        connection.sock.shutdown(socket.SHUT_RDWR)  # a thread that reads from it wakes up
                connection.close()

    def _ask(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        return self._ask_timed(method, path, body)[0]

    def _ask_timed(self, method: str, path: str, body: bytes | None = None) -> tuple[dict[str, Any], float]:
        give_up = time.monotonic() + self._patience_s
        while True:
            started = time.perf_counter()
            status, retry_after, payload = self._exchange(method, path, body)
            seconds = time.perf_counter() - started
            if status == 200:
                return _document(payload, self._url), seconds
            if status not in BUSY:
                refused = method == "POST" and status in REFUSED
                raise (PictureRefused if refused else RemoteError)(f"{self._url} answered {status}: {_detail(payload)}")
            pause_s = _pause_s(retry_after)
            if time.monotonic() + pause_s > give_up:
                raise RemoteError(f"{self._url} was busy for {self._patience_s:g} s, at last {status}: {_detail(payload)}")
            self._pause(pause_s)

    def _exchange(self, method: str, path: str, body: bytes | None) -> tuple[int, str | None, bytes]:
        """Status, Retry-After and body of one try; a connection that breaks, as idle ones may, is made anew."""
        for left in range(TRANSPORT_TRIES - 1, -1, -1):
            self._check_open()
            connection = self._connection()
            try:
                connection.request(method, self._parts.path.rstrip("/") + path, body, self._headers)
                response = connection.getresponse()
                return response.status, response.getheader("retry-after"), response.read()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if not left:
                    raise RemoteError(f"{self._url} cannot be reached: {error or type(error).__name__}") from error
            self._pause(0.1 * 2 ** (TRANSPORT_TRIES - left))
        raise AssertionError("the loop returns or raises")

    def _connection(self) -> http.client.HTTPConnection:
        known: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if known is not None:
            return known
        assert self._parts.hostname is not None  # checked on entry
        if self._parts.scheme == "https":
            context = ssl.create_default_context()
            made: http.client.HTTPConnection = http.client.HTTPSConnection(
                self._parts.hostname, self._parts.port, timeout=self._timeout_s, context=context
            )
        else:
            made = http.client.HTTPConnection(self._parts.hostname, self._parts.port, timeout=self._timeout_s)
        self._local.connection = made
        with self._lock:
            self._connections.append(made)
        return made

    def _pause(self, seconds: float) -> None:
        with self._lock:
            self.retries += 1
        self._closed.wait(seconds)
        self._check_open()

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise RemoteError(f"{self._url} is asked no more")


def _prediction(detections: list[dict[str, Any]]) -> Prediction:
    return Prediction(
        boxes=np.array([found["box"] for found in detections], np.float32).reshape(-1, 4),
        scores=np.array([found["score"] for found in detections], np.float32),
        labels=np.array([found["class_id"] for found in detections], np.int64),
    )


def _document(payload: bytes, url: str) -> dict[str, Any]:
    try:
        document = json.loads(payload)
    except ValueError as error:
        raise RemoteError(f"{url} answered no JSON; is it this project's service?") from error
    if not isinstance(document, dict):
        raise RemoteError(f"{url} answered {type(document).__name__} where an object was expected; is it this project's service?")
    return document


def _detail(payload: bytes) -> str:
    """The sentence of a problem document, or the beginning of whatever came instead."""
    try:
        return str(json.loads(payload)["detail"])
    except (ValueError, KeyError, TypeError):
        return payload[:200].decode("utf-8", "replace")


def _pause_s(retry_after: str | None) -> float:
    """What the service asks for in whole seconds, and a little more so that the threads do not come back together."""
    asked = float(retry_after) if retry_after is not None and retry_after.strip().isdigit() else DEFAULT_PAUSE_S
    return asked + random.uniform(0, 0.1)
