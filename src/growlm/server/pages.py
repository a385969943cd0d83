"""Pages: what a browser is given: `page/`, which asks the same paths as every client."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

_FILES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src data:; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_paths() -> APIRouter:
    paths = APIRouter(include_in_schema=False)
    for path, name in _FILES.items():
        paths.add_api_route(path, _giving(Path(__file__).parent / "page" / name), methods=["GET"])
    return paths


def _giving(file: Path) -> Callable[[], FileResponse]:
    """An endpoint without parameters."""

    def give() -> FileResponse:
        return FileResponse(file, headers=_HEADERS)

    return give
