"""The page at the door's root: a folder of files, read once. It loads nothing from elsewhere, and may not."""

from __future__ import annotations

import hashlib
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from steer_server.http.errors import error_body
from steer_server.http.exchange import encode
from steer_server.http.origin import Gate
from steer_server.http.refused import RefusedError

_FOLDER = Path(__file__).with_name("page")
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # Asked for anew each time, by its ETag: modules of two versions must never meet.
    "cache-control": "no-cache",
}


def page_routes(gate: Gate) -> list[Route]:
    """One route for each file, and the root for index.html."""
    files = {f"/{path.name}": path for path in sorted(_FOLDER.iterdir()) if path.suffix in _TYPES}
    files["/"] = files.pop("/index.html")
    return [_route(gate, path, file) for path, file in files.items()]


def _route(gate: Gate, path: str, file: Path) -> Route:
    content = file.read_bytes()
    headers = _HEADERS | {"content-type": _TYPES[file.suffix], "etag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'}

    async def serve(request: Request) -> Response:
        try:
            gate.check(request.headers)
        except RefusedError as error:
            return Response(encode(error_body(error)), error.status, media_type="application/json")
        if request.headers.get("if-none-match") == headers["etag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers)

    return Route(path, serve, methods=["GET", "HEAD"])
