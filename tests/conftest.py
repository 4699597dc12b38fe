"""Fixtures. Session-scoped models are shared: nothing may inject an eraser into them or change their weights."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from kveraser.model.backbone import Backbone
from kveraser.session.session import Session
from tests.sessions import MESSAGES, TEXT
from tests.tiny import FAMILIES, ROTARY_FAMILIES, attach_random_eraser, tiny_backbone, tiny_tokenizer

# Tiny matrices gain nothing from threads, and the tests run in several processes.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reaches the network, whatever name it asks for."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def pytest_collection_finish() -> None:
    """What was imported stays to the end: full collections need not walk over it."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def own_objects() -> Iterator[None]:
    """`gc.collect` and `gc.get_objects` see only what the test makes: quick, and blind to what other tests left."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """What tests marked `anyio` run on."""
    return "asyncio"


@pytest.fixture(scope="session")
def backbones() -> dict[str, Backbone]:
    """One backbone a family, built when first asked for, without erasers."""

    class Built(dict[str, Backbone]):
        def __missing__(self, family: str) -> Backbone:
            self[family] = tiny_backbone(family)
            return self[family]

    return Built()


@pytest.fixture(params=FAMILIES)
def backbone_of_family(request: pytest.FixtureRequest, backbones: dict[str, Backbone]) -> Backbone:
    """The shared backbone of every family in turn."""
    return backbones[request.param]


@pytest.fixture(params=ROTARY_FAMILIES)
def rotary_backbone(request: pytest.FixtureRequest, backbones: dict[str, Backbone]) -> Backbone:
    """The shared backbone of every family with rotary positions in turn."""
    return backbones[request.param]


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    """A shared tiny Llama with a chat template, without an eraser."""
    return tiny_backbone()


@pytest.fixture(scope="session")
def plain_backbone() -> Backbone:
    """A shared tiny Llama without a chat template, without an eraser."""
    return tiny_backbone(chat=False)


@pytest.fixture(scope="session")
def erasing_backbone() -> Backbone:
    """A shared tiny Llama with a random eraser of the paper's layout."""
    backbone = tiny_backbone()
    attach_random_eraser(backbone)
    return backbone


@pytest.fixture(scope="session")
def chat_tokenizer() -> Any:
    """The tiny tokenizer with a chat template."""
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def plain_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer without a chat template."""
    return tiny_tokenizer(chat=False)


@pytest.fixture
def text_session(backbone: Backbone) -> Session:
    return Session(backbone, text=TEXT)


@pytest.fixture
def dialogue(backbone: Backbone) -> Session:
    return Session(backbone, messages=MESSAGES)


@pytest.fixture(params=["text", "messages", "plain"])
def session(request: pytest.FixtureRequest, backbone: Backbone, plain_backbone: Backbone) -> Session:
    """A document for a chat model, a conversation, and a document for a model without a template."""
    if request.param == "messages":
        return Session(backbone, messages=MESSAGES)
    return Session(plain_backbone if request.param == "plain" else backbone, text=TEXT)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny backbone, as `--model` and recipes take it."""
    folder = tmp_path_factory.mktemp("model")
    backbone = tiny_backbone()
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return str(folder)
