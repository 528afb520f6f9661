"""Every environment variable that something reads is in `attnkit.environment`, and the other way round."""

import re
from pathlib import Path

import pytest

from attnkit.environment import VARIABLES
from attnkit.errors import CODES

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).name
# How a name is written where it is read, and any quoted name at all: it may be read through a variable.
READ = re.compile(
    r"""(?: environ\.get\( | environ\.setdefault\( | environ\[ | getenv\( )\s*["'](ATTNKIT_\w+)["']
      | \$ENV\{(ATTNKIT_\w+)\} | \$[({](ATTNKIT_\w+)[)}] | \$\$\{?(ATTNKIT_\w+)""",
    re.VERBOSE,
)
QUOTED = re.compile(r"""["'](ATTNKIT_\w+)["']""")


def names(pattern: re.Pattern[str], text: str) -> set[str]:
    return {name for match in pattern.finditer(text) for name in match.groups() if name}


def sources() -> list[Path]:
    """What may read the environment. CMake writes its own variables ``${X}``, as make does: only ``$ENV{X}`` counts."""
    folders = [ROOT / name for name in ("python", "csrc", "tests", "bench", "docs")]
    code = [p for d in folders for p in d.rglob("*") if p.suffix in (".py", ".cc", ".h", ".sh", ".cu")]
    return [ROOT / "Makefile", *(p for p in code if p.name not in ("environment.py", HERE))]


def test_every_variable_is_in_the_table() -> None:
    for path in sources():
        text = path.read_text(encoding="utf-8")
        unknown = (names(READ, text) | names(QUOTED, text)) - VARIABLES.keys()
        assert not unknown, f"{path.relative_to(ROOT)} reads {unknown}: add them to attnkit.environment"
    cmake = re.findall(r"\$ENV\{(ATTNKIT_\w+)\}", (ROOT / "CMakeLists.txt").read_text())
    assert set(cmake) <= VARIABLES.keys()


def test_every_variable_of_the_table_is_read() -> None:
    read = set().union(*(names(READ, path.read_text(encoding="utf-8")) for path in sources()))
    assert read >= VARIABLES.keys()


@pytest.mark.parametrize(
    "line",
    [
        'os.environ.get("ATTNKIT_NEW")', "os.environ['ATTNKIT_NEW']", 'os.getenv("ATTNKIT_NEW", "1")',
        'std::getenv("ATTNKIT_NEW")', "$(ATTNKIT_NEW)", "echo $$ATTNKIT_NEW", "set(x $ENV{ATTNKIT_NEW})",
    ],
)  # fmt: skip
def test_reads_are_found(line: str) -> None:
    assert names(READ, line) == {"ATTNKIT_NEW"}


def test_errors_of_bad_values_exist() -> None:
    assert {row.error for row in VARIABLES.values() if row.error} <= CODES.keys()
