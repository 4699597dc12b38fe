"""`GET /v1/methods`: how spans can be erased."""

from __future__ import annotations

from dataclasses import asdict

from kveraser.serve.api.routing import READING, Owner, Served, errors, router
from kveraser.serve.session_schemas import MethodReply, MethodsReply

routes = router("Sessions")


@routes.get("/v1/methods", responses=errors(*READING), summary="List the methods")
async def list_methods(service: Served, owner: Owner) -> MethodsReply:
    """The methods that this server can erase by, with the model and eraser that it has."""
    return MethodsReply(data=[MethodReply(**asdict(card)) for card in await service.methods()])
