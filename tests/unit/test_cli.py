"""The commands: what they print, where they print it, and with which exit code."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import attnkit
from attnkit import backends
from attnkit.backends.cpu.engine import engine
from attnkit.bench import models, records, training
from attnkit.bench.architectures import TINY
from attnkit.bench.peers import Peer
from attnkit.bench.rows import Bar, Row, suites
from attnkit.bench.workloads import DTYPES, Shape, Workload
from attnkit.cli import options
from attnkit.cli.app import app
from attnkit.variants import dense

Cli = Callable[..., Result]
SHAPE = ("--shape", "1,2,1,256,320,16")


@pytest.fixture
def cli() -> Cli:
    def invoke(*arguments: str, code: int | None = 0, **extra: Any) -> Result:
        result = CliRunner().invoke(app, arguments, catch_exceptions=False, **extra)
        assert code in (None, result.exit_code), result.output
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
    assert (*suites, "variants", "models", "training", "generation", "learning") == options.SUITES
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


def test_bench_trains_a_model_and_times_others(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    small = training.Recipe(batch=1, context=16, width=16, layers=1)
    monkeypatch.setattr(training, "Recipe", partial(replace, small))
    monkeypatch.setattr(models, "Plan", partial(models.Plan, TINY, models.Lengths(9, 2, (1, 9), 1)))
    for suite, rows in (("training", ("--dtype", "float32")), ("models", ("--rows", "vit pre"))):
        out, plot = tmp_path / f"{suite}.json", tmp_path / f"{suite}.svg"
        options = ("--rounds", "1", "--threads", "1", "--json", str(out), "--plot", str(plot))
        said = cli("bench", "--suite", suite, *rows, *options, code=None).stdout
        document = records.read(out)
        assert all(bar["workload"] in said for bar in document["bars"])
        assert document["bars"]
        assert plot.is_file()
    assert [r["workload"] for r in document["runs"]] == ["vit prefill"]


@pytest.mark.parametrize(
    ("suite", "options"),
    [
        ("training", ("--variant", "causal")), ("training", ("--rows", "x")), ("training", ("--seconds", "1")),
        ("models", SHAPE), ("models", ("--rows", "no such model")),
    ],
)  # fmt: skip
def test_suites_of_models_refuse_what_they_do_not_have(
    cli: Cli, suite: str, options: tuple[str, ...]
) -> None:
    assert f"suite {suite} has no" in cli("bench", "--suite", suite, *options, code=2).stderr


def test_bench_json_on_stdout_is_json_and_nothing_else(cli: Cli) -> None:
    done = cli("bench", "--variant", "causal", *SHAPE, "--rounds", "1", "--json", "-")
    document = json.loads(done.stdout)
    assert records.problems(document) == []
    assert document["records"][0]["shape"]["skv"] == 320
    assert "speed-up" in done.stderr


def test_bench_says_which_bars_are_met(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    easy, hard = (
        Row(Workload("full", Shape.of(1, h, 32, 16)), bars=(Bar("torch", least=least),))
        for h, least in ((1, 1e-9), (2, 1e9))
    )
    monkeypatch.setitem(suites, "cpu", [easy, hard])
    out = tmp_path / "out.json"
    said = cli("bench", "--suite", "cpu", "--rounds", "1", "--json", str(out), code=1).stdout
    assert "1 of 2 bars met" in said
    assert [bar["met"] for bar in records.read(out)["bars"]] == [True, False]
    said = cli("bench", "--suite", "cpu", "--rounds", "1", "--rows", "h1 s32").stdout
    assert "1 of 1 bars met" in said


def test_bench_names_what_is_not_installed_once(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = Peer("absent", lambda: None, lambda w: None, lambda i: pytest.fail("prepared"), extra="peers")
    both = [Row(Workload("full", Shape.of(1, h, 32, 16)), (absent,)) for h in (1, 2)]
    monkeypatch.setitem(suites, "cpu", both)
    said = cli("bench", "--suite", "cpu", "--rounds", "1").stderr
    assert said.splitlines() == ["left out: absent on 2 rows: not installed: pip install 'attnkit[peers]'"]


def test_bench_draws_slopes(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [Row(Workload("causal", Shape.of(1, 1, s, 16)), ()) for s in (64, 128)]
    monkeypatch.setitem(suites, "scaling", rows)
    out = tmp_path / "s.svg"
    said = cli("bench", "--suite", "scaling", "--rounds", "1", "--plot", str(out), code=1).stdout
    assert "too few lengths" in said  # so that no bar is met
    assert "slope 2" in out.read_text(encoding="utf-8")


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
    assert "no block map" in cli("mask", str(path), code=1).stderr


def test_explain_a_file_whose_score_divides_by_a_buffer(cli: Cli, tmp_path: Path) -> None:
    """What the score may do wrong shows in a call; the blocks are the mask's."""
    path = tmp_path / "divided.txt"
    path.write_text("""attnkit 1
program (q: bhsd, k: bhsd, v: bhsd) buffers(b0: i32[1]) {
  o, lse = attend(q, k, v, scale = default) {
    score = s * float(q_idx // b0[h])
    mask = kv_idx <= q_idx
    normalizer = softmax
  }
  return o, lse
}
""")
    assert "blocks" in cli("explain", str(path)).stdout


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
    assert "on tiles: %13 = sub_gap %0 %2 %7 %8" in code


@pytest.mark.parametrize("stage", ["text", "ir", "bytecode"])
def test_dump_json(cli: Cli, stage: str) -> None:
    found = json.loads(cli("dump", "--variant", "window", "--stage", stage, "--json").stdout)
    assert found["stage"] == stage
    assert found["lines"]


# --- mask, and targets --------------------------------------------------------------------------------------

SMALL = ("--shape", "2,2,1,100,130,16", "--block", "16")


def test_mask_draws_the_blocks(cli: Cli) -> None:
    arguments = ("mask", "--variant", "causal", "--shape", "1,1,1,64,64,16", "--block", "16")
    said = cli(*arguments).stdout.splitlines()
    assert said[:4] == ["+...", "#+..", "##+.", "###+"]
    assert said[4] == "causal: 64 queries x 64 keys, 4 x 4 blocks of 16 x 16"
    assert said[5] == ". empty 6, + partial 4, # full 6; density 62.50 % (of every head)"
    found = json.loads(cli(*arguments, "--json").stdout)
    assert found["counts"] == {"empty": 6, "partial": 4, "full": 6}
    assert found["runs"][2] == [[0, 2, "full"], [2, 3, "partial"]]


@pytest.mark.parametrize("variant", options.VARIANTS)
def test_mask_is_sound(cli: Cli, variant: str) -> None:
    """No block said to be empty holds a pair, none said to be full lacks one."""
    shape = Shape(2, 2, 1, 100, 130, 16, 16)
    found = json.loads(cli("mask", "--variant", variant, *SMALL, "--json").stdout)
    seen = dense.visible(shape.sq, shape.skv, **Workload(variant, shape).parameters)
    kinds = np.full((7, 9), "empty", dtype="<U7")
    for row, runs in zip(kinds, found["runs"], strict=True):
        for first, end, kind in runs:
            row[first:end] = kind
    for (i, j), kind in np.ndenumerate(kinds):
        block = seen[16 * i : 16 * i + 16, 16 * j : 16 * j + 16]
        assert kind == "partial" or (block.all() if kind == "full" else not block.any())


def test_mask_says_which_head_is_drawn(cli: Cli) -> None:
    arguments = ("mask", "--mask", "kv_idx <= q_idx - 32 * h", *SMALL)
    first, second = (cli(*arguments, "--head", str(h)).stdout for h in (0, 1))
    assert first.splitlines()[:2] == ["+........", "#+......."]
    assert second.splitlines()[:3] == [".........", ".........", "+........"]
    assert "(of 2 heads together)" in first
    assert "drawn: batch entry 0, head 1" in second
    assert "drawn" not in cli("mask", "--variant", "causal", *SMALL).stdout


def test_large_masks_are_drawn_small(cli: Cli) -> None:
    said = cli("mask", "--variant", "causal", "--shape", "1,1,1,1048576,1048576,64").stdout.splitlines()
    assert said[0] == "+" + "." * 95 or len(said[0]) <= 96
    assert "# full 33,550,336; density 50.01 %" in said[-1]


EXPRESSIONS = {
    "causal": "kv_idx <= q_idx + (kv_len - q_len)",
    "causal(align='top_left')": "kv_idx <= q_idx",
    "window(3, None) | ~prefix(5)": "(kv_idx >= q_idx + (kv_len - q_len) - 3) | ~(kv_idx < 5)",
    "abs(q_idx - kv_idx) % 4 == -h // 2": "abs(q_idx - kv_idx) % 4 == -h // 2",
    "min(q_idx, 7) * 0.5 < float(b)": "float(min(q_idx, 7)) * 0.5 < float(b)",
    "where(h == 1, q_len > 3, false_) ": None,
}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_masks_as_expressions(cli: Cli, expression: str) -> None:
    wanted = EXPRESSIONS[expression]
    if wanted is None:
        assert "unknown name 'false_'" in cli("dump", "--mask", expression, code=2).stderr
    else:
        assert f"mask = {wanted}\n" in cli("dump", "--mask", expression).stdout


def test_functions_in_python_files(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text("""
import torch
import attnkit as ak
ids = torch.arange(64) // 20
cap = ak.param("cap", 16.0)
def near(b, h, q_idx, kv_idx):
    return (ids[q_idx] == ids[kv_idx]) & ((q_idx - kv_idx).abs() < cap)
def bias(s, b, h, q_idx, kv_idx):
    return s + q_idx
local = ak.block_mask(ak.window(3), 1, 1, 64, 64)
nothing = 3
""")
    shape = ("--shape", "1,1,1,64,64,16", "--block", "16")
    assert cli("mask", f"{path}:near", *shape).stdout.splitlines()[:4] == ["#+..", "+++.", ".+++", "..++"]
    assert cli("mask", f"{path}:local", *shape).stdout.splitlines()[:2] == ["+...", "++.."]
    assert "blocks" in cli("explain", f"{path}:near", *shape[:2]).stdout
    assert "score = s + float(q_idx)" in cli("dump", f"{path}:bias").stdout
    assert "has no function nothing" in cli("mask", f"{path}:nothing", code=2).stderr
    assert "No such file" in cli("mask", f"{tmp_path}/other.py:near", code=2).stderr


# --- list, doctor -------------------------------------------------------------------------------------------


def test_list_is_complete_and_gives_reasons(cli: Cli) -> None:
    rows = json.loads(cli("list", "--json").stdout)
    assert {r["variant"] for r in rows} == set(dense.CASES)
    assert {r["backend"] for r in rows} == set(backends.names())
    assert all(r["supported"] == (not r["reasons"]) for r in rows)
    supported = {(r["backend"], r["direction"], r["dtype"]) for r in rows if r["supported"]}
    assert {
        ("cpu", way, dtype) for way in ("fwd", "bwd") for dtype in ("float32", "bfloat16", "float16")
    } < supported
    assert ("cpu", "fwd", "float64") not in supported
    assert ("reference", "bwd", "float64") in supported
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
        [sys.executable, "-m", "attnkit", "explain", str(program)],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path), "PATH": ""},
    )  # fmt: skip
    assert "\x1b" not in run.stdout
    assert run.stderr == ""
