"""Tasks about the invented scenes of the tables: a value is stated twice, once correctly and once in the span."""

from __future__ import annotations

import random

from kveraser.training.tasks.passages import Passages
from kveraser.training.tasks.story import Story, scene_story
from kveraser.training.tasks.tables import Tables


def needle(rng: random.Random, tables: Tables, passages: Passages) -> Story:
    """Conflicting needle: the span is a document or list with the wrong value; the truth comes before or after it."""
    scene = rng.choice(tables.scenes["needle"])
    return scene_story(rng, tables, scene, ("page", "page", "records"), truth_first=rng.random() < 0.5)


def stale(rng: random.Random, tables: Tables, passages: Passages) -> Story:
    """Stale fact: the span is an outdated document; the newer one, which says so, comes before or after it."""
    scene = rng.choice(tables.scenes["stale"])
    return scene_story(rng, tables, scene, ("page", "records"), truth_first=rng.random() < 0.5)


def observation(rng: random.Random, tables: Tables, passages: Passages) -> Story:
    """Wrong tool result in an agent's transcript; another result, usually a later one, has the right value."""
    scene = rng.choice(tables.scenes["observation"])
    first = rng.random() < 0.3
    return scene_story(rng, tables, scene, ("json", "json", "records", "page"), "Tool:", first, recheck=True)


def preference(rng: random.Random, tables: Tables, passages: Passages) -> Story:
    """Retracted preference: the span is the first wish; a later message has the new one and does not name the old."""
    scene = rng.choice(tables.scenes["preference"])
    return scene_story(rng, tables, scene, ("message",), "User:")


def injection(rng: random.Random, tables: Tables, passages: Passages) -> Story:
    """Prompt injection: the span is a page or tool result with an instruction that the assistant partly obeys.

    The user or a trusted source states the truth, before or after.
    """
    scene = rng.choice(tables.scenes["injection"])
    return scene_story(rng, tables, scene, ("page", "page", "json"), "Tool:", truth_first=rng.random() < 0.5)
