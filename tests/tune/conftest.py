"""Shared by the tests of tuning."""

import pytest

from attnkit.tune import pairs


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of next to nothing: what is measured does not matter, but that it is."""
    for name in ("_MIN_TURN_S", "_WARM_S", "_SETTLE_S"):
        monkeypatch.setattr(pairs, name, 1e-6)
