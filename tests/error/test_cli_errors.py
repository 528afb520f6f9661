"""What goes wrong on the command line is one line on stderr: exit 1 for a problem, 2 for usage, never a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from attnkit.cli.app import app, one_line
from attnkit.errors import CODES, error


def run(*arguments: str, **extra: str) -> Result:
    return CliRunner().invoke(app, arguments, **extra)


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("explain",),
        ("explain", "no-such-file"),
        ("explain", "--variant", "nonsense"),
        ("explain", "--variant", "causal", "--shape", "1,2,3"),
        ("explain", "--variant", "causal", "--shape", "1,8,3,64,64,16"),
        ("explain", "--variant", "causal", "--shape", "1,1,1,0,64,16"),
        ("explain", "--variant", "causal", "--shape", "a,b,c,d,e,f"),
        ("explain", "--variant", "causal", "--dtype", "float8"),
        ("explain", "-", "--variant", "causal"),
        ("dump", "--variant", "causal", "--stage", "assembly"),
        ("mask", "--variant", "causal", "--block", "0"),
        ("mask", "--variant", "causal", "--block", "16,a"),
        ("mask", "--variant", "causal", "--block", "1,2,3"),
        ("mask", "--variant", "causal", "--head", "8"),
        ("mask", "--variant", "causal", "--mask", "causal"),
        ("mask", "--mask", "causal &"),
        ("mask", "--mask", "nonsense"),
        ("mask", "--mask", "0 < kv_idx < 3"),
        ("mask", "--mask", "q_idx.real"),
        ("mask", "--mask", "(lambda: 1)()"),
        ("mask", "--mask", "__import__('os')"),
        ("mask", "--mask", "causal()()"),
        ("mask", "--mask", "q_idx == 1 // 0"),
        ("mask", "--mask", "window()"),
        ("bench", "--suite", "nonsense"),
        ("bench", "--suite", "quick", "--variant", "softcap"),
        ("bench", "--suite", "cpu", "--rows", "no such row"),
        ("bench", "--threads", "0"),
        ("bench", "--rounds", "0"),
        ("bench", "--seconds", "-1"),
        ("bench", "--plot", "picture.txt"),
        ("bench", "--json", "."),
        ("list", "extra"),
        ("doctor", "--fast"),
    ],
    ids=" ".join,
)
def test_usage_errors_exit_with_2(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error: " in result.stderr


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "AK103"),
        ("attnkit 99\n", "AK105"),
        ("attnkit 1\nprogramme", "AK103"),
        ("import os; os.system('true')", "AK103"),
        ("attnkit 1\nprogram (q: bhsd, k: bhsd, v: bhsd) {\n  \xe9\n}", "AK102"),
        ("x" * 300_000, "AK101"),
    ],
    ids=["empty", "version", "syntax", "code", "not ascii", "long"],
)
@pytest.mark.parametrize("command", ["explain", "dump"])
def test_bad_program_is_one_line_with_its_code(command: str, text: str, code: str) -> None:
    result = run(command, "-", input=text)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"Error: {code}: ")
    assert result.stderr.count("\n") == 1


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "noise"
    path.write_bytes(bytes(range(256)))
    result = run("dump", str(path))
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: AK1")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("explain", "--variant", "causal", "--shape", "1,1,1,16,16,4097"), "AK502"),
        (("explain", "--variant", "causal", "--backend", "abacus"), "AK501"),
        (("mask", "--mask", "q_idx + kv_idx"), "AK305"),
        (("mask", "--mask", "window(-3)"), "AK401"),
        (("mask", "--mask", "q_idx // kv_idx == 0"), "AK605"),
        (("bench", "--variant", "causal", "--shape", "1,1,1,16,16,4097"), "AK502"),
    ],
    ids=["head dim", "backend", "no mask", "window", "division", "bench"],
)
def test_what_cannot_be_done_is_one_line(arguments: tuple[str, ...], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_unwritable_output_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "out.json")
    result = run("bench", "--variant", "full", "--shape", "1,1,1,16,16,16", "--rounds", "1", "--json", out)
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr
    assert "Error: " in result.stderr


@pytest.mark.parametrize("code", CODES)
def test_every_error_fits_on_one_line(code: str) -> None:
    line = one_line(error(code, where="a\nb", given="x", allowed="y", hint="z"))
    assert line.startswith(f"{code}: {CODES[code].summary}; at: a b; given: x")
    assert "\n" not in line


@pytest.mark.parametrize(
    ("hidden", "arguments", "extra"),
    [
        ("click", ["--help"], "attnkit[cli]"),
        ("rich", ["list"], "attnkit[cli]"),
        ("torch", ["bench"], "attnkit[torch]"),
    ],
)
def test_missing_packages_name_the_extra(hidden: str, arguments: list[str], extra: str) -> None:
    code = f"""
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
sys.argv = ["attnkit", *{arguments!r}]
from attnkit.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert extra in done.stderr
    assert "Traceback" not in done.stderr
