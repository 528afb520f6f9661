"""Tests that need a GPU: left out where there is none, and counted."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and item.path.name != "test_runner.py":
            item.add_marker("gpu")
