"""Retracted preference: the user wishes for something, changes their mind, and the first wish has to go."""

from __future__ import annotations

import random

from kveraser.training.tasks.passages import Passages
from kveraser.training.tasks.story import Story, scene_story
from kveraser.training.tasks.tables import Tables


def preference(rng: random.Random, tables: Tables, passages: Passages) -> Story:
    """The span is the message with the first wish; the new wish comes later and does not name the old one."""
    scene = rng.choice(tables.scenes["preference"])
    return scene_story(rng, tables, scene, ("message",), "User:")
