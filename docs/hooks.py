"""The order of the site's pages. A page that is not named here, such as a new variant's, comes after those that are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SECTIONS = {
    "": [
        "index.md",
        "tutorial.md",
        "kv-cache.md",
        "transformers.md",
        "diffusers.md",
        "training.md",
        "tuning.md",
    ],
    "Variants": ["variants.md", "variants/*.md"],
    "Reference": ["ir.md", "operators.md", "errors.md", "env.md", "benchmarks.md"],
    "How it works": ["architecture.md", "*.md", "design/*.md"],
}


def navigation(docs: Path) -> list[Any]:
    """Every page below ``docs`` once, under the first line of `SECTIONS` that names it exactly, else by pattern."""
    named = {name for patterns in SECTIONS.values() for name in patterns}
    nav: list[Any] = []
    for title, patterns in SECTIONS.items():
        pages: list[str] = []
        for pattern in patterns:
            found = sorted(str(path.relative_to(docs)) for path in docs.glob(pattern))
            pages += [page for page in found if page == pattern or page not in named]
        nav += pages if not title else [{title: pages}] if pages else []
    return nav


def on_config(config: Any) -> None:
    """Called by mkdocs."""
    config.nav = navigation(Path(config.docs_dir))
