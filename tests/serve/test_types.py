"""What clients are shown of tokens and methods."""

from __future__ import annotations

import pytest

from kveraser.methods import METHODS
from kveraser.serve.embedded import TransformersEngine
from kveraser.serve.types import method_cards
from tests.served import METHOD, backbone, run, serving
from tests.tiny import attach_random_eraser, tiny_backbone

TEXT = "The ship left 🙂 at noon. The captain is Ada."
MESSAGES = [{"role": "user", "content": "Where is my parcel?"}, {"role": "assistant", "content": "In Rome."}]


def test_tokens_point_at_themselves_as_spans_do() -> None:
    async def work() -> None:
        async with serving() as service:
            made = await service.create("ada", text=TEXT)
            tokens = await service.tokens("ada", made.id)
            said = [token for token in tokens if token.content]
            assert "".join(token.text for token in said) == TEXT
            assert all(token.start < 0 for token in tokens if not token.content)
            first = next(place for place, token in enumerate(tokens) if token.text.endswith("c") and token.content)
            await service.erase("ada", made.id, [tokens[first].start, tokens[first + 2].end])
            after = await service.tokens("ada", made.id)
            erased = [place for place, token in enumerate(after) if not token.live]
            assert erased == [first, first + 1, first + 2]
            # An emoji is several tokens that share one character; what points at one of them points at all.
            shared = [token for token in tokens if (token.start, token.end) == (14, 15)]
            assert [token.text for token in shared] == ["🙂", *[""] * (len(shared) - 1)] and len(shared) > 1

    run(work())


def test_what_a_template_writes_around_messages_is_not_their_content() -> None:
    async def work() -> None:
        async with serving() as service:
            made = await service.create("ada", messages=MESSAGES)
            tokens = await service.tokens("ada", made.id)
            for index, message in enumerate(MESSAGES):
                own = [token for token in tokens if token.message == index]
                assert "".join(token.text for token in own if token.content) == message["content"]
                assert own[0].text == "<|im_start|>" and not own[0].content
                # The message as a whole, by its first and last token.
                await service.erase("ada", made.id, [[own[0].start, own[-1].end]])
                view = await service.view("ada", made.id, contents=True)
                assert message["content"] not in (view.text or "") and not view.messages[index].live
                await service.undo("ada", made.id)
            default = [token for token in tokens if token.message is None]
            assert "You are helpful." in "".join(token.text for token in default)
            assert not any(token.content for token in default)

    run(work())


def test_methods_are_those_that_serve_the_model() -> None:
    async def work() -> None:
        async with serving(engine=TransformersEngine(backbone(), METHOD)) as service:
            cards = {card.name: card for card in await service.methods()}
            assert cards["repair"].default and cards["repair"].parameters == {"window": 8, "per_span": 0.0}
            assert [card.name for card in cards.values() if card.default] == ["repair"]
            assert [card.name for card in cards.values() if card.exact] == ["recompute"]
            assert [card.name for card in cards.values() if not card.removes_text] == ["erratum"]
            assert "kveraser" not in cards and cards["mask"].parameters == {}
            assert cards["erratum"].parameters == {}, "words are no number"

    run(work())


@pytest.mark.parametrize(("family", "eraser", "missing"), [("gpt2", False, "shift"), ("llama", True, None)])
def test_methods_depend_on_model_and_eraser(family: str, eraser: bool, missing: str | None) -> None:
    model = tiny_backbone(family)
    if eraser:
        attach_random_eraser(model)
    engine = TransformersEngine(model)
    names = [card.name for card in method_cards(engine.methods())]
    assert ("kveraser" in names) is eraser and (missing is None or missing not in names)
    assert names[0] == ("recompute" if family == "gpt2" else "follow")
    assert not eraser or sorted(names) == sorted(METHODS)
    (window,) = [card.parameters["window"] for card in method_cards(["kveraser+repair"])]
    assert window is None


def test_a_server_that_chooses_by_itself_names_no_method() -> None:
    cards = method_cards(TransformersEngine(backbone(), "auto").methods())
    assert not any(card.default for card in cards) and "auto" not in [card.name for card in cards]
