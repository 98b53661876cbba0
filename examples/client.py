"""A small client for the detection service, to copy into your program. Needs httpx and nothing of this project.

    python -m pip install httpx
    python examples/client.py --url http://127.0.0.1:8000 picture.jpg another.png

In a program:

    with Detector("http://127.0.0.1:8000") as detector:
        answer = detector.detect(Path("picture.jpg"), score_threshold=0.6)
        for found in answer.detections:
            print(found.class_name, found.score, found.box)

`AsyncDetector` has the same methods as coroutines. Both wait and try again when the service is busy (429) or not ready (503), for as long
as its Retry-After says, and when the connection fails. Boxes are x1, y1, x2, y2 in pixels of the picture as a person sees it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

try:
    import httpx
except ModuleNotFoundError:
    if __name__ != "__main__":
        raise
    sys.exit("this client needs httpx: python -m pip install httpx")

Picture = Path | bytes
Options = str | int | float | Sequence[str] | None

RETRIED_STATUSES = (429, 503)
MAX_WAIT_S = 60.0
"""Longest pause before one retry, whatever the server asks for."""


@dataclass(frozen=True)
class Detection:
    """One object."""

    box: tuple[float, float, float, float]
    class_name: str
    class_id: int
    score: float


@dataclass(frozen=True)
class Answer:
    """What was found in one picture, best first."""

    model: str
    version: str
    width: int
    height: int
    detections: tuple[Detection, ...]
    timing_ms: dict[str, float]


class DetectorError(Exception):
    """The service said no. `code` tells the kind, `detail` what to do, `request_id` finds the request in the service's log."""

    def __init__(self, status: int, code: str, detail: str, request_id: str | None = None) -> None:
        super().__init__(f"{status} {code}: {detail}")
        self.status, self.code, self.detail, self.request_id = status, code, detail, request_id


class Detector:
    """A client for threads and scripts. One object keeps its connections; it may be shared by threads.

    Args:
        url: where the service is.
        api_key: where the service asks for one.
        timeout_s: of one try.
        tries: at most, for one request.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout_s: float = 30.0, tries: int = 5) -> None:
        self._http = httpx.Client(base_url=url, headers=_headers(api_key), timeout=timeout_s)
        self._tries = tries

    def detect(self, picture: Picture, **options: Options) -> Answer:
        """Find objects in one picture.

        Args:
            picture: a file, or the bytes of one.
            options: score_threshold, max_detections, classes, model, timeout_ms, priority.

        Raises:
            DetectorError: the service refused the picture or an option, or was too busy for too long.
            httpx.TransportError: it could not be reached.
        """
        return _answer(self._post("/v1/detect", content=_read(picture), headers=_RAW, params=_parameters(options)).json())

    def detect_many(self, pictures: Sequence[Picture], **options: Options) -> list[Answer | DetectorError]:
        """The same for many pictures in one request: an answer or an error for each, in order."""
        return _answers(self._post("/v1/detect/batch", files=_form(pictures), params=_parameters(options)).json())

    def draw(self, picture: Picture, *, media_type: str = "image/jpeg", **options: Options) -> bytes:
        """The picture with boxes and labels drawn, as image/jpeg, image/png or image/webp."""
        parameters = _parameters({**options, "format": "image"})
        return self._post("/v1/detect", content=_read(picture), headers={**_RAW, "Accept": media_type}, params=parameters).content

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _post(self, path: str, **request: Any) -> httpx.Response:
        for left in range(self._tries - 1, -1, -1):
            try:
                response = self._http.post(path, **request)
            except httpx.TransportError:
                if not left:
                    raise
                time.sleep(_pause_s(None, self._tries - left))
                continue
            if response.status_code not in RETRIED_STATUSES or not left:
                return _checked(response)
            time.sleep(_pause_s(response.headers.get("retry-after"), self._tries - left))
        raise ValueError("tries must be at least 1")


class AsyncDetector:
    """The same for asyncio."""

    def __init__(self, url: str, *, api_key: str | None = None, timeout_s: float = 30.0, tries: int = 5) -> None:
        self._http = httpx.AsyncClient(base_url=url, headers=_headers(api_key), timeout=timeout_s)
        self._tries = tries

    async def detect(self, picture: Picture, **options: Options) -> Answer:
        """As Detector.detect."""
        data = await asyncio.to_thread(_read, picture)
        return _answer((await self._post("/v1/detect", content=data, headers=_RAW, params=_parameters(options))).json())

    async def detect_many(self, pictures: Sequence[Picture], **options: Options) -> list[Answer | DetectorError]:
        """As Detector.detect_many."""
        form = await asyncio.to_thread(_form, pictures)
        return _answers((await self._post("/v1/detect/batch", files=form, params=_parameters(options))).json())

    async def draw(self, picture: Picture, *, media_type: str = "image/jpeg", **options: Options) -> bytes:
        """As Detector.draw."""
        data, parameters = await asyncio.to_thread(_read, picture), _parameters({**options, "format": "image"})
        return (await self._post("/v1/detect", content=data, headers={**_RAW, "Accept": media_type}, params=parameters)).content

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def _post(self, path: str, **request: Any) -> httpx.Response:
        for left in range(self._tries - 1, -1, -1):
            try:
                response = await self._http.post(path, **request)
            except httpx.TransportError:
                if not left:
                    raise
                await asyncio.sleep(_pause_s(None, self._tries - left))
                continue
            if response.status_code not in RETRIED_STATUSES or not left:
                return _checked(response)
            await asyncio.sleep(_pause_s(response.headers.get("retry-after"), self._tries - left))
        raise ValueError("tries must be at least 1")


_RAW = {"Content-Type": "application/octet-stream"}


def _headers(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def _read(picture: Picture) -> bytes:
    return picture.read_bytes() if isinstance(picture, Path) else picture


def _form(pictures: Sequence[Picture]) -> list[tuple[str, tuple[str, bytes]]]:
    return [("images", (f"picture-{number}", _read(picture))) for number, picture in enumerate(pictures)]


def _parameters(options: dict[str, Options]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _pause_s(retry_after: str | None, tried: int) -> float:
    """What the server asked for, in seconds or as a date, or else a pause that doubles; and a little more, so that clients spread."""
    wait_s = 0.1 * 2.0**tried
    if retry_after is not None:
        with contextlib.suppress(ValueError):  # nonsense is no answer
            wait_s = float(retry_after) if retry_after.strip().isdigit() else _seconds_until(retry_after)
    return float(min(max(wait_s, 0.0), MAX_WAIT_S)) + random.uniform(0, 0.25)


def _seconds_until(date: str) -> float:
    moment = parsedate_to_datetime(date)
    return (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds()


def _checked(response: httpx.Response) -> httpx.Response:
    if response.is_success:
        return response
    try:
        raise _error(response.json())
    except (ValueError, KeyError, TypeError):  # something between here and the service answered
        raise DetectorError(response.status_code, "http_error", response.text[:200]) from None


def _error(problem: dict[str, Any]) -> DetectorError:
    return DetectorError(problem["status"], problem["code"], problem["detail"], problem.get("request_id"))


def _answer(document: dict[str, Any]) -> Answer:
    model, image = document["model"], document["image"]
    detections = tuple(
        Detection(tuple(found["box"]), found["class"], found["class_id"], found["score"]) for found in document["detections"]
    )
    return Answer(model["name"], model["version"], image["width"], image["height"], detections, document["timing_ms"])


def _answers(document: dict[str, Any]) -> list[Answer | DetectorError]:
    return [_error(entry["error"]) if "error" in entry else _answer(entry) for entry in document["results"]]


def main() -> int:
    """Print what is found in each picture. Returns the exit status: 1 where some picture has no answer."""
    parser = argparse.ArgumentParser(description="Ask a running detection service.")
    parser.add_argument("pictures", nargs="+", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key")
    parser.add_argument("--score-threshold", type=float)
    arguments = parser.parse_args()
    failed = 0
    with Detector(arguments.url, api_key=arguments.api_key) as detector:
        for path in arguments.pictures:
            try:
                answer = detector.detect(path, score_threshold=arguments.score_threshold)
            except httpx.TransportError as error:
                print(f"{arguments.url} does not answer: {error}; is the service running there? `make serve` starts it", file=sys.stderr)
                return 1
            except (DetectorError, OSError) as error:
                print(f"{path}: {error}", file=sys.stderr)
                failed += 1
                continue
            print(f"{path}: {len(answer.detections)} found by {answer.model}@{answer.version} in {answer.timing_ms['total']} ms")
            for found in answer.detections:
                print(f"  {found.class_name:12} {found.score:.2f}  {' '.join(f'{edge:8.1f}' for edge in found.box)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
