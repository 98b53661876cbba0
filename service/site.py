"""The pages for people: playground, dashboard, API. Their own files only, and a policy that lets a browser load nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

PAGES = Path(__file__).resolve().parent / "pages"
PAGE_FILES = {"/": "index.html", "/dashboard": "dashboard.html", "/docs": "docs.html"}

CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'self'",
        "img-src 'self' blob: data:",
        "media-src 'self' blob: mediastream:",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
PAGE_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
    "cache-control": "no-cache",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
}


class _PageFiles(StaticFiles):
    """Files of the pages, asked for anew at each visit so that a new release shows at once; unchanged ones cost a 304."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(PAGE_HEADERS)
        return response


def page_router(paths: Iterable[str] = PAGE_FILES) -> APIRouter:
    """The pages, or those at the given paths. They are small and read once."""
    router = APIRouter(include_in_schema=False)
    for path in paths:
        file = PAGE_FILES[path]
        html = (PAGES / file).read_bytes()

        async def page(html: bytes = html) -> Response:
            return Response(html, media_type="text/html; charset=utf-8", headers=PAGE_HEADERS)

        router.add_api_route(path, page, methods=["GET"], response_class=Response, name=file)
    return router


def page_files() -> Mount:
    """/static."""
    return Mount("/static", _PageFiles(directory=PAGES), name="static")
