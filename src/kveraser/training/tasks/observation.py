"""Wrong tool observation in the transcript of an agent."""

from __future__ import annotations

import random

from kveraser.training.tasks.passages import Passages
from kveraser.training.tasks.story import Story, scene_story
from kveraser.training.tasks.tables import Tables


def observation(rng: random.Random, tables: Tables, passages: Passages) -> Story:
    """The span is a tool result; another result, mostly a later one after somebody asked again, has the right value."""
    scene = rng.choice(tables.scenes["observation"])
    first = rng.random() < 0.3
    return scene_story(rng, tables, scene, ("json", "json", "records", "page"), "Tool:", first, recheck=True)
