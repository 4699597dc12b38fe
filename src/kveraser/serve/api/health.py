"""`GET /health` and `GET /metrics`: whether the server is there, and what it counts."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Response

from kveraser.serve.api.routing import READING, Counted, Owner, Served, errors, router
from kveraser.serve.body import Reply
from kveraser.serve.metrics import CONTENT_TYPE

open_routes = APIRouter(tags=["Server"])
routes = router("Server")


class HealthReply(Reply):
    """The server is there. `status` holds the service's numbers: contexts, sessions, bytes, queue, streams."""

    object: Literal["health"] = "health"
    models: list[str]
    status: dict[str, float]


@open_routes.get("/health", responses=errors(400, 500), summary="Whether the server is there")
async def health(service: Served) -> HealthReply:
    """Answers while the server can; needs no key."""
    return HealthReply(models=[card.id for card in service.models()], status=dict(service.status()))


@routes.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {"description": "Prometheus' text format.", "content": {"text/plain": {"schema": {"type": "string"}}}},
        **errors(*READING),
    },
    summary="Metrics for Prometheus",
)
async def metrics(counted: Counted, owner: Owner) -> Response:
    """What the server counts."""
    return Response(counted.render(), headers={"Content-Type": CONTENT_TYPE})
