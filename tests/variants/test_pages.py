"""The programs on the families' pages are programs."""

import re
from pathlib import Path

import pytest

from attnkit.ir.text import parse

PAGES = sorted((Path(__file__).parents[2] / "docs" / "variants").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_programs_parse(page: Path) -> None:
    """Every block that starts as a program does."""
    texts = re.findall(r"^```\w*\n(attnkit 1\n.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert texts, "a page shows how its family is written"
    for text in texts:
        program = parse(text)
        assert parse(program.text) is program
