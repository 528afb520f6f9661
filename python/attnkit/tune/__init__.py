"""Which config a kernel runs with: what was measured, kept in a store, else the default of every field."""

from __future__ import annotations

from attnkit.plan.space import default_config

__all__ = ["default_config"]
