"""HEAD wherever there is GET: load balancers and uptime monitors ask so. As pure ASGI."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class HeadMiddleware:
    """Answers HEAD as the application would answer GET, headers and status alike, and leaves the body out (RFC 9110, 9.3.2)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] != "HEAD":
            await self._app(scope, receive, _allowing_head(send))
            return

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.body":
                if message.get("more_body", False):
                    return
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        asked = {**scope, "method": "GET"}  # the server outside still sees HEAD, as do the access log and the metrics
        try:
            await self._app(asked, receive, _allowing_head(send_head))
        finally:
            if "route" in asked:
                scope["route"] = asked["route"]


def _allowing_head(send: Send) -> Send:
    """`Allow` of a 405 names HEAD beside GET."""

    async def send_allowed(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == 405:
            message["headers"] = [(name, _with_head(value) if name == b"allow" else value) for name, value in message.get("headers", ())]
        await send(message)

    return send_allowed


def _with_head(allow: bytes) -> bytes:
    methods = [method.strip() for method in allow.split(b",")]
    return b", ".join([*methods, b"HEAD"]) if b"GET" in methods and b"HEAD" not in methods else allow
