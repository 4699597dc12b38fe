"""Prompt injection: a retrieved page or tool result gives the assistant orders, and it partly obeys."""

from __future__ import annotations

import random

from kveraser.training.tasks.passages import Passages
from kveraser.training.tasks.story import Story, scene_story
from kveraser.training.tasks.tables import Tables


def injection(rng: random.Random, tables: Tables, passages: Passages) -> Story:
    """The span is the page with the order; the user or a trusted source states what is right, before or after."""
    scene = rng.choice(tables.scenes["injection"])
    return scene_story(rng, tables, scene, ("page", "page", "json"), "Tool:", truth_first=rng.random() < 0.5)
