"""The commands: what they print, where they print it, and with which exit code."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import attnkit
from attnkit import backends
from attnkit.backends.cpu.engine import engine
from attnkit.bench import records
from attnkit.bench.workloads import DTYPES, Shape, Workload, suites
from attnkit.cli import options
from attnkit.cli.app import app
from attnkit.variants import dense

Cli = Callable[..., Result]
SHAPE = ("--shape", "1,2,1,256,320,16")


@pytest.fixture
def cli() -> Cli:
    def invoke(*arguments: str, code: int = 0, **extra: Any) -> Result:
        result = CliRunner().invoke(app, arguments, catch_exceptions=False, **extra)
        assert result.exit_code == code, result.output
        return result

    return invoke


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.txt"
    path.write_text(dense.program(causal=True)[0])
    return path


# --- all commands -------------------------------------------------------------------------------------------


def test_help_is_a_manual(cli: Cli) -> None:
    said = cli("--help").stdout
    assert "Examples:" in said
    assert all(word in said for word in ("Exit status", "NO_COLOR", *options.VARIANTS))
    assert all(len(line) <= 80 for line in said.splitlines())


@pytest.mark.parametrize("command", app.commands)
def test_every_command_has_examples_and_json(cli: Cli, command: str) -> None:
    said = cli(command, "--help").stdout
    assert "Examples:" in said
    assert "--json" in said
    assert f"attnkit {command}" in said


def test_help_is_fast_because_it_imports_nothing_heavy() -> None:
    code = (
        "import sys; from attnkit.cli.app import app; app(['--help'], standalone_mode=False);"
        "print([m for m in ('torch', 'numpy', 'rich', 'matplotlib') if m in sys.modules], file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr.strip() == "[]"


def test_version(cli: Cli) -> None:
    assert attnkit.__version__ in cli("--version").stdout


def test_names_are_the_librarys() -> None:
    """They are written down twice, so that `--help` need not import the library."""
    assert tuple(dense.CASES) == options.VARIANTS
    assert tuple(suites) == options.SUITES
    assert options.DTYPES == DTYPES


# --- bench --------------------------------------------------------------------------------------------------


def test_bench_writes_records_and_a_plot(cli: Cli, tmp_path: Path) -> None:
    json_path, plot = tmp_path / "out.json", tmp_path / "out.svg"
    done = cli("bench", "--suite", "smoke", "--variant", "window", "--variant", "softcap", "--rounds", "1",
               "--threads", "1", "--json", str(json_path), "--plot", str(plot))  # fmt: skip
    document = records.read(json_path)
    assert {(r["variant"], r["backend"]) for r in document["records"]} == {
        ("window", "cpu"), ("window", "torch"), ("softcap", "cpu"),
    }  # fmt: skip
    assert plot.is_file()
    assert "window b1" in done.stdout
    assert "wrote" in done.stderr
    assert "left out: torch on softcap" in done.stderr


def test_bench_json_on_stdout_is_json_and_nothing_else(cli: Cli) -> None:
    done = cli("bench", "--variant", "causal", *SHAPE, "--rounds", "1", "--json", "-")
    document = json.loads(done.stdout)
    assert records.problems(document) == []
    assert document["records"][0]["shape"]["skv"] == 320
    assert "speed-up" in done.stderr


# --- explain, dump ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", options.VARIANTS)
def test_explain_every_variant(cli: Cli, variant: str) -> None:
    facts = json.loads(cli("explain", "--variant", variant, *SHAPE, "--json").stdout)
    assert facts["backend"] == "cpu"
    assert facts["config"]
    assert facts["rejected"]["reference"]
    tiles = sum(facts["blocks"].values())
    assert tiles == -(-256 // facts["config"]["tile_q"]) * -(-320 // facts["config"]["tile_kv"])
    least = attnkit.bench.workloads.Workload(
        variant, attnkit.bench.workloads.Shape(1, 2, 1, 256, 320, 16, 16)
    )
    assert least.flops <= facts["cost"]["flops"] <= 2 * 2 * 256 * 320 * 32
    attnkit.parse(facts["text"])


def test_explain_for_people(cli: Cli) -> None:
    said = cli("explain", "--variant", "causal", *SHAPE).stdout
    assert "causal runs on cpu, float32" in said
    assert all(word in said for word in ("config", "not on", "blocks", "cost", "kv_idx <= q_idx"))


def test_explain_agrees_with_the_python_function(cli: Cli) -> None:
    import torch

    facts = json.loads(cli("explain", "--variant", "causal", *SHAPE, "--json").stdout)
    q, k = torch.zeros(1, 2, 256, 16), torch.zeros(1, 1, 320, 16)
    (call,) = attnkit.explain(attnkit.attention, q, k, k, mask=attnkit.causal()).calls
    assert (facts["backend"], facts["config"], facts["blocks"]) == (call.backend, call.config, call.blocks)


def test_explain_a_file_whose_mask_reads_a_buffer(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "documents.txt"
    ids = dense.documents(8, 8, np.random.default_rng(0))
    path.write_text(dense.program(document=ids)[0])
    said = cli("explain", str(path)).stdout
    assert "no block counts: the mask reads a buffer" in said
    assert "no block map" in cli("dump", str(path), "--stage", "blocks", code=1).stderr


def test_dump_text_is_canonical_and_reads_back(cli: Cli, program: Path) -> None:
    text = cli("dump", str(program)).stdout
    assert text == attnkit.parse(program.read_text()).text
    assert cli("dump", "-", input=text).stdout == text


def test_dump_ir_and_bytecode(cli: Cli) -> None:
    ir = cli("dump", "--variant", "alibi", "--stage", "ir").stdout
    assert "float = var(s)" in ir
    assert ir.splitlines()[-1].startswith("score = %")
    code = cli("dump", "--variant", "alibi", "--stage", "bytecode").stdout
    assert "var_s" in code
    assert "load_f b0" in code


def test_dump_blocks_draws_the_mask(cli: Cli) -> None:
    done = cli(
        "dump", "--variant", "causal", "--stage", "blocks", "--shape", "1,1,1,64,64,16", "--block", "16"
    )
    assert done.stdout.splitlines()[1:] == ["+...", "#+..", "##+.", "###+"]
    found = json.loads(
        cli("dump", "--variant", "causal", "--stage", "blocks", "--shape", "1,1,1,64,64,16", "--block", "16",
            "--json").stdout
    )  # fmt: skip
    assert found["counts"] == {"empty": 6, "partial": 4, "full": 6}
    assert found["map"][1] == [2, 1, 0, 0]


@pytest.mark.parametrize("variant", options.VARIANTS)
def test_dump_blocks_is_sound(cli: Cli, variant: str) -> None:
    """No block said to be empty holds a pair, none said to be full lacks one."""
    shape = Shape(1, 2, 1, 100, 130, 16, 16)
    found = json.loads(
        cli("dump", "--variant", variant, "--stage", "blocks", "--shape", "1,2,1,100,130,16", "--block", "16",
            "--json").stdout
    )  # fmt: skip
    seen = dense.visible(shape.sq, shape.skv, **Workload(variant, shape).parameters)
    for i, row in enumerate(found["map"]):
        for j, kind in enumerate(row):
            block = seen[16 * i : 16 * i + 16, 16 * j : 16 * j + 16]
            assert kind == 1 or (block.all() if kind == 2 else not block.any())


@pytest.mark.parametrize("stage", ["text", "ir", "bytecode", "blocks"])
def test_dump_json(cli: Cli, stage: str) -> None:
    found = json.loads(cli("dump", "--variant", "window", "--stage", stage, "--json").stdout)
    assert found["stage"] == stage
    assert found["lines"]


# --- list, doctor -------------------------------------------------------------------------------------------


def test_list_is_complete_and_gives_reasons(cli: Cli) -> None:
    rows = json.loads(cli("list", "--json").stdout)
    assert {r["variant"] for r in rows} == set(dense.CASES)
    assert {r["backend"] for r in rows} == set(backends.names())
    assert all(r["supported"] == (not r["reasons"]) for r in rows)
    supported = {(r["backend"], r["direction"], r["dtype"]) for r in rows if r["supported"]}
    assert ("cpu", "fwd", "float32") in supported
    table = cli("list").stdout
    assert all(name in table for name in (*dense.CASES, "cpu fwd", "float32"))


def test_doctor_finds_this_environment_sound(cli: Cli) -> None:
    facts = json.loads(cli("doctor", "--json").stdout)
    assert facts["problems"] == []
    assert len(facts["threads"]["OpenMP"]) == 1
    assert facts["machine"]["isa"] in facts["machine"]["isa_levels"]
    said = cli("doctor").stdout
    assert "no problems found" in said
    assert "OpenMP" in said


def test_doctor_names_the_level_that_runs(cli: Cli, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNKIT_ISA", isa)
    facts = json.loads(cli("doctor", "--json").stdout)
    assert facts["machine"]["isa"] == facts["threads"]["ATTNKIT_ISA"] == isa
    assert isa in facts["machine"]["isa_levels"]
    assert facts["problems"] == []


def test_doctor_says_which_levels_there_are(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNKIT_ISA", "nonsense")
    engine.cache_clear()
    said = cli("doctor", code=1).stdout.replace("\n", " ")
    engine.cache_clear()
    assert "'nonsense' (environment variable ATTNKIT_ISA; allowed: scalar" in said


def test_doctor_reports_problems(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnkit.bench import doctor

    monkeypatch.setattr(doctor, "openmp_runtimes", lambda: ["/a/libgomp.so.1", "/b/libiomp5.so"])
    assert "several OpenMP runtimes" in cli("doctor", code=1).stdout
    assert json.loads(cli("doctor", "--json", code=1).stdout)["problems"]


# --- as a program -------------------------------------------------------------------------------------------


def test_pipes_get_plain_text(program: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "attnkit.cli", "explain", str(program)],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path), "PATH": ""},
    )  # fmt: skip
    assert "\x1b" not in run.stdout
    assert run.stderr == ""
