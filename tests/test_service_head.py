"""HEAD, as load balancers ask: the same status and headers as GET, and no body."""

from __future__ import annotations

import asyncio
import socket

import httpx
import pytest
from service_fakes import FakeRuntime, fake_service, make_settings, run, running, sample

from service.app import create_app, create_operations_app

PATHS = [
    "/", "/dashboard", "/docs", "/healthz", "/readyz", "/metrics", "/openapi.json", "/static/style.css", "/v1/models", "/v1/models/blobs",
    "/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/blobs", "/v2/models/blobs/ready", "/v2/models/stats",
]  # fmt: skip
CHANGING = {"x-request-id", "date", "content-length", "last-modified", "etag"}


def steady(response: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in response.headers.items() if name not in CHANGING}


@pytest.mark.parametrize("path", PATHS)
def test_head_is_get_without_its_body(path: str) -> None:
    async def scenario() -> None:
        async with fake_service() as (client, app, _):
            got, head = await client.get(path), await client.head(path)
            assert (got.status_code, head.status_code) == (200, 200), got.text
            assert (len(got.content) > 0, head.content) == (True, b"")
            assert steady(head) == steady(got)
            if path != "/metrics":  # it counts the requests before it
                assert head.headers["content-length"] == str(len(got.content))
            if path == "/healthz":
                counted = "detector_http_request_duration_seconds_count"
                assert sample(app, counted, route="/healthz", method="HEAD", status="200") == 1

    run(scenario())


def test_errors_have_no_body_either_and_what_only_posts_stays_so() -> None:
    async def scenario() -> None:
        async with fake_service() as (client, app, _):
            assert [(r.status_code, r.content) for r in (await client.head("/nothing"), await client.head("/v1/models/nothing"))] == [
                (404, b"")
            ] * 2
            for path in ("/v1/detect", "/v1/detect/batch", "/v2/models/blobs/infer", "/v2/repository/index"):
                refused = await client.head(path)
                assert (refused.status_code, refused.content, refused.headers["allow"]) == (405, b"", "POST")
            assert (await client.delete("/healthz")).headers["allow"] == "GET, HEAD"
            app.state.parts.health.draining = True
            assert (await client.head("/readyz")).status_code == 503
            assert (await client.head("/healthz")).status_code == 200

    run(scenario())


def test_on_the_operations_port_too() -> None:
    async def scenario() -> None:
        app = create_app(make_settings(operations_port=9090), runtime=FakeRuntime())
        async with running(app):
            operations = create_operations_app(app.state.parts)
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app=operations), base_url="http://operations") as client:
                assert [(await client.head(path)).status_code for path in ("/healthz", "/readyz", "/metrics", "/dashboard")] == [200] * 4

    run(scenario())


def test_over_a_socket_nothing_follows_the_headers() -> None:
    """The next answer on the connection starts where a client expects it."""
    import uvicorn

    async def scenario() -> None:
        app = create_app(make_settings(), runtime=FakeRuntime())
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on"))
            serving = asyncio.create_task(server.serve([listener]))
            while not server.started:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            writer.write(b"HEAD /healthz HTTP/1.1\r\nHost: x\r\n\r\n" + b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            raw = await reader.read()
            writer.close()
            server.should_exit = True
            await serving
        assert raw.count(b"HTTP/1.1 200 OK") == 2
        head, _, rest = raw.partition(b"\r\n\r\n")
        assert b"content-length: 14" in head
        assert rest.startswith(b"HTTP/1.1 200 OK")
        assert raw.endswith(b'{"alive":true}')

    run(scenario())
