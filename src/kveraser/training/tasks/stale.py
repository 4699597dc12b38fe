"""Stale retrieved fact: an old price list, a former director, a date that was moved."""

from __future__ import annotations

import random

from kveraser.training.tasks.passages import Passages
from kveraser.training.tasks.story import Story, scene_story
from kveraser.training.tasks.tables import Tables


def stale(rng: random.Random, tables: Tables, passages: Passages) -> Story:
    """The span is the outdated document; the newer one, which says that it is newer, stands before or after."""
    scene = rng.choice(tables.scenes["stale"])
    return scene_story(rng, tables, scene, ("page", "records"), truth_first=rng.random() < 0.5)
