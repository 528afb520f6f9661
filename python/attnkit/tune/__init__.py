"""Which config a kernel runs with. Until a store of measurements exists, every field has its default."""

from __future__ import annotations

from attnkit.plan.spec import Config, Space


def default_config(space: Space) -> Config:
    """The config of an untuned kernel: the default of every field."""
    return {name: field.default for name, field in space.items()}
