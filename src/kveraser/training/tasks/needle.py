"""Conflicting needle: two documents state a value differently, and one of them has to go."""

from __future__ import annotations

import random

from kveraser.training.tasks.passages import Passages
from kveraser.training.tasks.story import Story, scene_story
from kveraser.training.tasks.tables import Tables


def needle(rng: random.Random, tables: Tables, passages: Passages) -> Story:
    """The span is a document or a list with the wrong statement; the right one stands before or after."""
    scene = rng.choice(tables.scenes["needle"])
    return scene_story(rng, tables, scene, ("page", "page", "records"), truth_first=rng.random() < 0.5)
