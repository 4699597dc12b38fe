"""Leaks of secrets of several kinds, asked for directly, indirectly, and by an adversary's search.

One context holds a secret of every kind, each referred to later without being repeated; a case erases one of them.
"""

from __future__ import annotations

import random
import string
from collections.abc import Mapping
from dataclasses import dataclass

from evaluation.suites.attack import Attack
from evaluation.suites.base import Made, Suite, SuiteSettings
from evaluation.suites.text import Filler, Placed, Woven, load_words, room_for_text, token_count, weave
from kveraser.measure.case import BenchCase, Cell, LeftOut
from kveraser.measure.probes import mentions
from kveraser.measure.questions import Query
from kveraser.text.spans import Characters
from kveraser.training.tasks.tables import Cast, fill, load_tables, substitute

ADVERSARIAL = "adversarial"
TASKS = ("number", "name", "sentence", "key", ADVERSARIAL)
SECRETS_UNTIL = 0.45
"""Secrets are in this first share of the context; references to them follow."""
LEAST_FILLER = 0.05
"""Minimum share of a context that is about no secret."""


@dataclass(frozen=True)
class Secret:
    """A secret of one kind, in words.

    Attributes:
        text: the secret itself.
        statement: the sentence that states it, which is erased.
        later: a sentence that refers to it.
        slots: `subject`, `secret`, `claim` (a sentence that reveals it), and its `opening` and `ending`.
    """

    kind: str
    text: str
    statement: str
    later: str
    slots: Mapping[str, str]


def make(settings: SuiteSettings) -> Made:
    """The cases of every length and task."""
    cases: list[BenchCase] = []
    left_out: list[LeftOut] = []
    for length in settings.lengths:
        cells = {task: Cell("leak", task, length=length) for task in settings.tasks}
        drawn = [_secrets(random.Random(f"{settings.seed}/leak/{length}/{index}")) for index in range(settings.cases)]
        stated = max(_stated(settings, secrets) for secrets in drawn)
        least = length - room_for_text(settings.tokenizer, length) + round(stated / (1 - LEAST_FILLER))
        if least > length:
            reason = f"a secret of every kind, and what refers to it, take {least} tokens"
            left_out += [LeftOut(cell, reason) for cell in cells.values()]
            continue
        for index, secrets in enumerate(drawn):
            woven = _woven(settings, secrets, length, index)
            for task, cell in cells.items():
                rng = random.Random(f"{settings.seed}/leak/{length}/{index}/{task}")
                secret = secrets[TASKS.index(task)]
                cases.append(
                    BenchCase(
                        id=f"leak/{task}/{length}/{index}",
                        cell=cell,
                        context=woven.text,
                        erase=(Characters(*woven.ranges[TASKS.index(task)]),),
                        queries=_queries(rng, secret, index),
                        attack=_attack(rng, secret) if task == ADVERSARIAL else None,
                    )
                )
    return Made(tuple(cases), tuple(left_out))


def _secrets(rng: random.Random) -> list[Secret]:
    """One of every kind, in the order of the tasks."""
    words, cast = load_words("leak"), Cast(rng, load_tables("heldout"))
    secrets: list[Secret] = []
    for kind in TASKS:
        text = _text(rng, cast, kind)
        while any(mentions(text, other.text) or mentions(other.text, text) for other in secrets):
            text = _text(rng, cast, kind)
        scene, slots = rng.choice(words["secrets"][kind]), {"town": cast.value("town").text, "secret": text}
        claim = fill(scene["claim"], slots)
        opening, _, _ = claim.partition(text)
        filled = {
            "subject": substitute(scene["subject"], slots),
            "secret": text,
            "claim": claim,
            "opening": opening.rstrip(' "'),
            "ending": claim[len(opening.rstrip(' "')) :].strip(),
        }
        statement, later = rng.choice(scene["statement"]), rng.choice(scene["later"])
        secrets.append(Secret(kind, text, fill(statement, slots), fill(later, slots), filled))
    return secrets


def _text(rng: random.Random, cast: Cast, kind: str) -> str:
    words = load_words("leak")
    if kind == "name":
        return cast.value("person").text
    if kind == "sentence":
        adjective, noun, verb, where = (rng.choice(words[sort]) for sort in ("adjective", "noun", "verb", "where"))
        return f"the {adjective} {noun} {verb} {where}"
    if kind == "key":
        characters = string.ascii_uppercase + string.digits
        return "-".join("".join(rng.choice(characters) for _ in range(4)) for _ in range(3))
    return str(rng.randrange(10_000, 100_000))


def _stated(settings: SuiteSettings, secrets: list[Secret]) -> int:
    """Tokens of the secrets and of what refers to them."""
    texts = [text for secret in secrets for text in (secret.statement, secret.later)]
    return sum(token_count(settings.tokenizer, f" {text}") for text in texts)


def _woven(settings: SuiteSettings, secrets: list[Secret], length: int, index: int) -> Woven:
    """The text; its first ranges are those of the secrets."""
    room = room_for_text(settings.tokenizer, length)
    rng = random.Random(f"{settings.seed}/leak/{length}/{index}/text")
    filler = Filler(rng, settings.passages, without=[secret.text for secret in secrets])
    pieces = filler.pieces(settings.tokenizer, room - _stated(settings, secrets))
    told = [Placed(secret.statement, rng.uniform(0, SECRETS_UNTIL) * room) for secret in secrets]
    later = [Placed(secret.later, rng.uniform(SECRETS_UNTIL, 1) * room) for secret in secrets]
    return weave(settings.tokenizer, pieces, [*told, *later])


def _queries(rng: random.Random, secret: Secret, index: int) -> tuple[Query, ...]:
    """A question that asks for the secret directly or, in every second case, indirectly.

    A case with an adversary has a direct question. The forced answer is the text that reveals the secret.
    """
    words = load_words("leak")
    if secret.kind == ADVERSARIAL or index % 2 == 0:
        return (
            Query(fill(rng.choice(words["direct"]), secret.slots), f"{secret.text}.", "leak", wrong=(secret.text,)),
        )
    ways = [*words["indirect"], words["listing"][secret.kind]]
    way = ways[index // 2 % len(ways)]
    question, answer = (substitute(way[part], secret.slots) for part in ("question", "answer"))
    return (Query(question, answer, "leak", wrong=(secret.text,)),)


def _attack(rng: random.Random, secret: Secret) -> Attack:
    parts: dict[str, list[str]] = load_words("leak")["attack"]
    openings, requests, forms = (
        tuple(substitute(text, secret.slots) for text in parts[part]) for part in ("openings", "requests", "forms")
    )
    return Attack(openings, requests, forms, secret.slots["claim"], secret.text, rng.randrange(2**32))


LEAK = Suite(
    name="leak",
    summary="secrets of several kinds, asked for openly, by a detour and by an adversary's search",
    tasks=TASKS,
    lengths=(256,),
    spans=(),
    make=make,
)
