"""Generated pages are current, what the pages show runs, and the site builds strictly from the repository alone."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from attnkit.cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = runpy.run_path(str(ROOT / "docs" / "generate.py"))["PAGES"]


@pytest.mark.parametrize("name", PAGES)
def test_generated_pages_are_current(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == PAGES[name](), "run: python docs/generate.py"


def test_measured_tables_are_those_of_the_result_files() -> None:
    update = runpy.run_path(str(ROOT / "bench" / "update_docs.py"))
    for name, marker, table in update["TABLES"]:
        text = (ROOT / name).read_text()
        assert update["updated"](text, marker, table()) == text, "run: python bench/update_docs.py"


def test_readme_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code is not None
    exec(compile(code[1], "README.md", "exec"), {})  # noqa: S102 -- our own README
    assert "attnkit 1 calls" in capsys.readouterr().out


def test_links_of_the_readme_lead_somewhere() -> None:
    prose = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        assert "://" in target or (ROOT / target).exists(), target


@pytest.mark.parametrize("page", ["tutorial.md", "variants.md", "diffusers.md"])
def test_page_runs_and_prints_what_it_says(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python blocks share one namespace, a ``text`` block is what the block before it printed, ``sh`` are commands."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / page).read_text()
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert {"python", "text"} <= {language for language, _ in blocks} <= {"python", "text", "sh"}
    names: dict[str, object] = {}
    printed = ""
    try:
        for language, block in blocks:
            if language == "text":
                assert printed.strip() == block.strip()
            elif language == "python":
                with redirect_stdout(StringIO()) as out:
                    exec(compile(block, page, "exec"), names)  # noqa: S102 -- our own page
                printed = out.getvalue()
            else:
                for line in block.splitlines():
                    program, *arguments = shlex.split(line)
                    assert program == "attnkit"
                    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
                    assert done.exit_code == 0, done.output
                    assert done.stdout
    finally:
        torch.set_grad_enabled(True)


# --- the site ---------------------------------------------------------------------------------------------

OFFLINE = """
import socket, sys
def refuse(*args):
    raise OSError("the documentation is built without a network")
socket.socket.connect = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli()
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: every page in the navigation, every link and anchor leading somewhere."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-c", OFFLINE, "build", "--strict", "--site-dir", str(target)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return target


def test_site_has_every_page(site: Path) -> None:
    pages = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")]
    for page in pages:
        built = page.with_suffix("") / "index.html" if page.stem != "index" else page.with_suffix(".html")
        assert (site / built).exists(), page
    nav = runpy.run_path(str(ROOT / "docs" / "hooks.py"))["navigation"](ROOT / "docs")
    listed = [
        name for entry in nav for name in ([entry] if isinstance(entry, str) else next(iter(entry.values())))
    ]
    assert sorted(listed) == sorted(map(str, pages))


def test_navigation_finds_new_pages(tmp_path: Path) -> None:
    for name in ("index.md", "news.md", "variants.md", "variants/new.md", "design/new.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert runpy.run_path(str(ROOT / "docs" / "hooks.py"))["navigation"](tmp_path) == [
        "index.md",
        {"Variants": ["variants.md", "variants/new.md"]},
        {"How it works": ["news.md", "design/new.md"]},
    ]


def test_site_fetches_nothing(site: Path) -> None:
    """No script, style, font or picture comes from elsewhere; links to elsewhere may."""
    for page in site.rglob("*.html"):
        html = page.read_text()
        foreign = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//[^>]*>", html)
        foreign += re.findall(
            r"<link\b(?![^>]*rel=[\"']?canonical)[^>]*\bhref=[\"']?(?:https?:)?//[^>]*>", html
        )
        assert not foreign, page
