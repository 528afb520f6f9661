"""Generated pages are current, every error code is explained, and the README's example runs."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = runpy.run_path(str(ROOT / "docs" / "generate.py"))["PAGES"]


@pytest.mark.parametrize("name", PAGES)
def test_generated_pages_are_current(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == PAGES[name](), "run: python docs/generate.py"


def test_measured_tables_are_those_of_the_result_files() -> None:
    update = runpy.run_path(str(ROOT / "bench" / "update_docs.py"))
    for name, (marker, table) in update["TABLES"].items():
        text = (ROOT / name).read_text()
        assert update["updated"](text, marker, table()) == text, "run: python bench/update_docs.py"


def test_readme_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code is not None
    exec(compile(code[1], "README.md", "exec"), {})  # noqa: S102 -- our own README
    assert "attnkit 1 calls" in capsys.readouterr().out


@pytest.mark.parametrize(
    "page", ["README.md", "docs/architecture.md", "docs/transformers.md", "docs/design/cpu-engine.md"]
)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    prose = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        if "://" not in target:
            assert (path.parent / target).exists(), target
