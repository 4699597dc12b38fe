"""`GET /v1/models`: which models there are."""

from __future__ import annotations

from kveraser.serve.api.routing import READING, Owner, Served, errors, router
from kveraser.serve.errors import UnknownModel
from kveraser.serve.replies import ModelReply, ModelsReply
from kveraser.serve.service import Service
from kveraser.serve.types import ModelCard

routes = router("OpenAI")


def check_model(service: Service, name: str) -> ModelCard:
    """The model of this name.

    Raises:
        UnknownModel: the server has none.
    """
    cards = service.models()
    for card in cards:
        if card.id == name:
            return card
    raise UnknownModel(
        f"this server has no model {name[:200]!r}: it has {', '.join(card.id for card in cards)}", param="model"
    )


def _reply(card: ModelCard) -> ModelReply:
    return ModelReply(id=card.id, created=card.created, context_length=card.context_length)


@routes.get("/v1/models", responses=errors(*READING), summary="List the models")
async def list_models(service: Served, owner: Owner) -> ModelsReply:
    """The models of this server."""
    return ModelsReply(data=[_reply(card) for card in service.models()])


@routes.get("/v1/models/{model:path}", responses=errors(*READING, 404), summary="One model")
async def one_model(model: str, service: Served, owner: Owner) -> ModelReply:
    """A model by its name."""
    return _reply(check_model(service, model))
