"""The ASGI application: routes, middleware and the files of the playground."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, JSONResponse
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from kveraser.demo.documents import load_documents
from kveraser.serve.access import PAGE_PATH, Access, Gate, Keys, Limits
from kveraser.serve.api import chat, completions, health, methods, models, sessions
from kveraser.serve.api.observed import Observed
from kveraser.serve.api.refusals import error_response, of_http, of_validation
from kveraser.serve.metrics import Metrics
from kveraser.serve.service import Service

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
"""Host names of the loopback interface."""

PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "font-src 'self'; connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
"""The page loads only its own files, runs no inline scripts, and can't be framed."""

DESCRIPTION = (
    "OpenAI-compatible answers from cached conversations whose history can be edited cheaply, and sessions that are "
    "edited by hand."
)


@dataclass(frozen=True)
class Settings:
    """Settings of the HTTP server.

    Attributes:
        keys: the API keys; if empty, all requests belong to one anonymous owner.
        limits: per key.
        most_bytes: maximum size of a request body.
        body_seconds: time limit for receiving a body.
        hosts: accepted host names; None: any.
        page: folder of the playground; it may be missing.
    """

    keys: Keys = field(default_factory=Keys)
    limits: Limits = field(default_factory=Limits)
    most_bytes: int = 16 * 2**20
    body_seconds: float = 60.0
    hosts: frozenset[str] | None = LOOPBACK
    page: Path = Path(__file__).parent / "page"


class _Page(StaticFiles):
    """The playground's files."""

    async def check_config(self) -> None:
        if not Path(str(self.directory)).is_dir():
            raise HTTPException(404)

    async def get_response(self, path: str, scope: Scope) -> Response:
        try:
            response = await super().get_response(path, scope)
        except ValueError as error:
            # The path contains characters that no file name can have.
            raise HTTPException(404) from error
        response.headers.update(PAGE_HEADERS)
        return response


def create_app(service: Service, settings: Settings | None = None) -> FastAPI:
    """Create the ASGI application, which closes the service on shutdown."""
    settings = settings or Settings()
    metrics = Metrics(service.status)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await service.close()

    app = FastAPI(
        title="kveraser",
        version="1",
        description=DESCRIPTION,
        lifespan=lifespan,
        # These pages load scripts from other servers.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        # Recorded exceptions would contain text from clients.
        telemetry={"logs": False, "auto_configure": False},
        exception_handlers={HTTPException: _refuse_http, RequestValidationError: _refuse_body},
    )
    app.state.service, app.state.metrics = service, metrics
    app.state.most_bytes, app.state.body_seconds = settings.most_bytes, settings.body_seconds
    for module in (chat, completions, models, methods, sessions, health):
        app.include_router(module.routes)
    app.include_router(health.open_routes)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        index = settings.page / "index.html"
        if not index.is_file():
            raise HTTPException(404)
        return FileResponse(index, headers=PAGE_HEADERS)

    @app.get(PAGE_PATH + "examples.json", include_in_schema=False)
    def examples() -> Response:
        return JSONResponse([asdict(document) for document in load_documents()], headers=PAGE_HEADERS)

    app.mount(PAGE_PATH.rstrip("/"), _Page(directory=settings.page, check_dir=False))
    # The middleware added last runs first.
    app.add_middleware(Access, keys=settings.keys, gate=Gate(settings.limits), hosts=settings.hosts)
    app.add_middleware(Observed, metrics=metrics)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


async def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_response(of_http(error, request.method, request.url.path), error.headers)


async def _refuse_body(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(of_validation(error))


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's OpenAPI document without status 422, which this server never returns."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        for operations in document["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        for unused in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(unused, None)
        app.openapi_schema = document
    return app.openapi_schema
