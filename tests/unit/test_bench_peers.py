"""Suite cpu: its table, its bars, its peers, and the gradients that rows are checked with; no timing is tested."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attnkit.backends.cpu.engine import engine
from attnkit.bench import bars, checks, peers, records, report, runner, scaling
from attnkit.bench.ceilings import Burst, Ceilings
from attnkit.bench.measure import Interval
from attnkit.bench.rows import Bar, Row, select, suites
from attnkit.bench.workloads import Inputs, Shape, Workload, make_inputs
from attnkit.errors import error
from attnkit.variants import dense

TINY = Shape(1, 4, 2, 24, 24, 16, 16)
OUTSIDE = (peers.OPENVINO, peers.MHA, peers.GQA, peers.ZENTORCH, peers.LLAMA, peers.LLAMA_PRODUCTS)
CPU_ROWS = suites["cpu"]


def fake(name: str, compute: Callable[[Inputs], Any] | None = None, refuses: str | None = None) -> peers.Peer:
    """A peer that computes what attnkit's reference does, or what it is told to."""

    def prepare(inputs: Inputs) -> peers.Call:
        return peers.Call(lambda: compute(inputs)) if compute else peers.TORCH.prepare(inputs)

    return peers.Peer(name, lambda: "1", lambda workload: refuses, prepare)


def found(wrong: tuple[str, ...] = (), **times: float) -> bars.Found:
    rounds = {name: [t, 2 * t, t] for name, t in times.items()}  # round 2 is slow for everybody
    return bars.Found(rounds, Interval(0.9, 0.8, 1.0, 3), frozenset(wrong))


# --- the table ----------------------------------------------------------------------------------------------


def test_every_row_asks_for_something_that_it_measures() -> None:
    for row in CPU_ROWS:
        assert row.bars
        names = {peer.name for peer in row.peers}
        for bar in row.bars:
            assert (bar.least is None) != (bar.most is None)
            assert (bar.against == "beside") == (bar.most is not None) == (row.beside is not None)
            assert bar.against in {*names, "best", "ceiling", "beside"}
            if bar.stretch is not None:
                assert bar.stretch > bar.least if bar.most is None else 1 < bar.stretch < bar.most


def test_the_table_has_every_case_that_was_promised() -> None:
    counted = Counter((w.direction, w.dtype, w.grad) for w in (row.workload for row in CPU_ROWS))
    mods, small, pages = 9 * 2, 6, 2
    assert counted == {
        ("fwd", "float32", False): 4 + mods + 2 + 1 + small,
        ("fwd", "float32", True): small,
        ("fwd", "bfloat16", False): 8 + mods + 2 + 1,
        ("fwdbwd", "float32", False): 2 + small,
        ("fwdbwd", "bfloat16", False): 2,
        ("decode", "float32", False): 2 + pages,
        ("decode", "bfloat16", False): 2 + pages,
    }
    against_flex = {row.workload.variant for row in CPU_ROWS if peers.FLEX in row.peers}
    assert against_flex == {
        "causal_alibi", "causal_softcap", "document", "window", "prefix",
        "alibi", "softcap", "two_way_document", "two_way_window",
    }  # fmt: skip


@pytest.mark.parametrize("row", [*CPU_ROWS, *suites["kv"]], ids=lambda row: row.name)
def test_no_bar_names_a_peer_that_cannot_run_its_row(row: Row) -> None:
    named = {bar.against for bar in row.bars}
    able = [peer.name for peer in row.peers if peer.refuses(row.workload) is None]
    assert not named & {peer.name for peer in row.peers} - set(able)
    assert able or not row.peers


def test_rows_are_picked_by_parts_of_their_names() -> None:
    decode = select("cpu", patterns=["decode"])
    assert [row.workload.direction for row in decode] == ["decode"] * 8
    assert {row.name for row in select("cpu", patterns=["causal b1*fwdbwd bfloat16", "s32768*decode"])} == {
        "causal b1 h8 s4096 d64 fwdbwd bfloat16", "causal b1 h8 s4096 d128 fwdbwd bfloat16",
    }  # fmt: skip
    assert select("cpu", patterns=["no such row"]) == []


def test_another_dtype_leaves_out_what_was_promised_of_one() -> None:
    chosen = select("cpu", dtype="bfloat16", seed=4)
    assert {row.workload.dtype for row in chosen} == {"bfloat16"}
    assert {row.workload.seed for row in chosen} == {4}
    assert {row.beside.seed for row in chosen if row.beside} == {4}
    assert len(chosen) == sum(row.workload.dtype == "bfloat16" for row in CPU_ROWS)
    assert {row.workload.dtype for row in select("quick", dtype="float16")} == {"float16"}


def test_work_of_a_training_step_and_of_long_rows() -> None:
    forward, step = (Workload("causal", TINY, direction=d) for d in ("fwd", "fwdbwd"))
    assert step.flops == 3.5 * forward.flops
    q, kv, o = 4 * 24 * 16, 2 * 2 * 24 * 16, 4 * 24 * 16
    assert step.min_bytes - forward.min_bytes == 4 * ((q + kv + 2 * o) + (q + kv))
    for shape in (Shape(2, 3, 1, 7, 12, 8, 8), Shape(1, 1, 1, 12, 7, 8, 8)):
        for variant in ("full", "causal"):
            w = Workload(variant, shape)
            counted = int(dense.visible(shape.sq, shape.skv, **w.parameters).sum())
            assert w.live_pairs == shape.b * shape.hq * counted


# --- bars ---------------------------------------------------------------------------------------------------


def test_best_is_the_fastest_peer_that_is_right() -> None:
    row = Row(Workload("full", TINY), bars=(Bar("best", least=1.5, stretch=2.5), Bar("torch", least=3.5)))
    best, torch = bars.judge(row, found(cpu=1.0, torch=3.0, quick=2.0, liar=0.5, wrong=("liar",)))
    assert (best["measured"]["median"], best["note"]) == (2.0, "quick")
    assert (best["met"], best["stretch_met"]) == (True, False)
    assert (torch["measured"]["median"], torch["met"], torch["stretch_met"]) == (3.0, False, None)


def test_limits_are_of_the_work_that_is_left() -> None:
    row = Row(
        Workload("window", Shape.of(1, 1, 2048, 16)),
        bars=(Bar("beside", most=1.4, stretch=1.2), Bar("ceiling", least=0.88, stretch=0.94)),
        beside=Workload("full", Shape.of(1, 1, 2048, 16)),
    )
    share = row.workload.live_pairs / row.beside.live_pairs  # type: ignore[union-attr]
    beside, ceiling = bars.judge(row, found(cpu=1.3 * share, beside=1.0))
    assert beside["measured"]["median"] == pytest.approx(1.3)
    assert (beside["met"], beside["stretch_met"]) == (True, False)
    assert (ceiling["measured"]["median"], ceiling["met"], ceiling["stretch_met"]) == (0.9, True, False)


@pytest.mark.parametrize(
    ("given", "refusal", "note"),
    [
        (None, "attnkit refuses: AK502", "attnkit refuses: AK502"),
        (found(cpu=1.0, torch=9.0, wrong=("cpu",)), None, "attnkit is wrong"),
        (found(cpu=1.0, torch=9.0, wrong=("torch",)), None, "torch is wrong"),
        (found(cpu=1.0), None, "torch did not run"),
    ],
)
def test_a_bar_without_a_measurement_is_not_met_and_says_why(given: Any, refusal: Any, note: str) -> None:
    (judged,) = bars.judge(
        Row(Workload("full", TINY), bars=(Bar("torch", least=1.0, stretch=2.0),)), given, refusal
    )
    assert (judged["measured"], judged["met"], judged["stretch_met"], judged["note"]) == (None, False, False, note)  # fmt: skip


def test_ceilings_that_were_not_probed_bind_only_where_memory_surely_does() -> None:
    burst = Burst({"float32": 400.0}, 40.0)
    assert burst.least_seconds("float32", 400 * 10**9, 1) == (1.0, "compute", 0.4)
    assert burst.least_seconds("bfloat16", 400 * 10**9, 1) is None
    assert burst.least_seconds("bfloat16", 1, 40 * 10**9) == (1.0, "memory", 40.0)
    both = Burst({"float32": 400.0, "bfloat16": 800.0}, 40.0)
    assert both.least_seconds("bfloat16", 400 * 10**9, 1) == (0.5, "compute", 0.8)


def test_dot_products_are_probed_where_there_are_any(isa_name: str) -> None:
    before = engine().current_isa()
    engine().set_isa(isa_name)
    try:
        assert engine().fma_gflops(1, 10_000) > 0
        dot = engine().bf16_gflops(1, 10_000)
        ceilings = Ceilings(1)
        ceilings.burst()
    finally:
        engine().set_isa(before)
    assert (
        (dot is not None) == ("bfloat16" in ceilings.best.gflops) == (isa_name in {"avx512bf16", "avx512amx"})
    )


# --- gradients ----------------------------------------------------------------------------------------------


def step_of(inputs: Inputs, spoil: Callable[[list[Any]], None] = lambda grads: None) -> Any:
    """A training step in float64 by torch, with something spoilt in it."""
    import torch

    def step(do: Any) -> tuple[Any, ...]:
        o = peers.TORCH.prepare(inputs).run()
        grads = list(torch.autograd.grad(o, (inputs.q, inputs.k, inputs.v), do))
        spoil(grads)
        return (o, *grads)

    return step


@pytest.mark.parametrize("variant", ["full", "causal", "window", "causal_alibi", "document"])
def test_gradients_are_compared_with_the_equation(variant: str) -> None:
    inputs = make_inputs(Workload(variant, Shape(2, 4, 2, 70, 70, 16, 16), direction="fwdbwd"))
    found_error = checks.Check(inputs).gradients(step_of(inputs))
    assert found_error["rows"] < 70
    assert found_error["rel_fro"] < 1e-6


@pytest.mark.parametrize("which", [0, 1, 2], ids=["dq", "dk", "dv"])
def test_a_wrong_gradient_is_noticed_wherever_it_is(which: int) -> None:
    inputs = make_inputs(Workload("causal", Shape.of(1, 2, 70, 16), direction="fwdbwd"))
    check = checks.Check(inputs)
    unsampled = next(i for i in range(70) if i not in check.rows)

    def spoil(grads: list[Any]) -> None:
        grads[which][0, 1, unsampled] += 0.5

    assert checks.is_wrong(check.gradients(step_of(inputs, spoil)), "float32")


def test_softcap_is_in_the_expected_gradients() -> None:
    """A central difference of the float64 equation along a random direction."""
    import torch

    inputs = make_inputs(Workload("causal_softcap", Shape(1, 2, 1, 20, 20, 8, 8), direction="fwdbwd"))
    check = checks.Check(inputs)
    do = torch.zeros_like(inputs.do)
    do[:, :, check.rows] = inputs.do[:, :, check.rows]
    grads = check._naive_gradients(do[:, :, check.rows])
    rng = np.random.default_rng(0)
    given = [t.detach().double().numpy() for t in (inputs.q, inputs.k, inputs.v)]
    along = [rng.standard_normal(x.shape) for x in given]

    def loss(sign: float) -> float:
        o, _ = dense.naive(
            *(x + sign * 1e-5 * a for x, a in zip(given, along, strict=True)), **inputs.workload.parameters
        )
        return float((o * do.double().numpy()).sum())

    slope = sum(float((g * a).sum()) for g, a in zip(grads, along, strict=True))
    assert slope == pytest.approx((loss(1) - loss(-1)) / 2e-5, rel=1e-6)


# --- peers --------------------------------------------------------------------------------------------------


def test_folding_heads_is_the_same_problem() -> None:
    inputs = make_inputs(Workload("full", Shape(2, 6, 2, 5, 33, 16, 8), direction="decode"))
    call = peers.FOLDED.prepare(inputs)
    found_error = checks.Check(inputs).output(call.output(call.run()))
    assert found_error["rel_fro"] < 1e-6
    assert peers.FOLDED.refuses(Workload("causal", TINY))


@pytest.mark.parametrize("variant", dense.CASES)
def test_flex_functions_say_the_same_as_the_family(variant: str) -> None:
    """Called on every pair of indices, as FlexAttention does; compiling is another test."""
    import torch

    from attnkit.bench.peers import flex

    w = Workload(variant, Shape(1, 4, 4, 20, 33, 8, 8))
    score, mask = flex.mods(w)
    h, q, kv = torch.meshgrid(torch.arange(4), torch.arange(20), torch.arange(33), indexing="ij")
    seen = torch.ones(4, 20, 33, dtype=torch.bool) if mask is None else mask(0, h, q, kv)
    assert (seen.numpy() == dense.visible(20, 33, **w.parameters)).all()
    s = torch.linspace(-30, 30, 4 * 20 * 33, dtype=torch.float64).reshape(4, 20, 33)
    cap = w.parameters.get("softcap")
    expected = s.numpy() if cap is None else cap * np.tanh(s.numpy() / cap)
    expected = expected + dense.added_bias(20, 33, **w.parameters)
    np.testing.assert_allclose((s if score is None else score(s, 0, h, q, kv)).numpy(), expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["causal_alibi", "softcap", "document", "prefix", "two_way_window"])
def test_flex_compiled_computes_the_same(variant: str) -> None:
    import torch

    inputs = make_inputs(Workload(variant, Shape(1, 4, 2, 160, 160, 16, 16)))
    with torch.no_grad():
        call = peers.FLEX.prepare(inputs)
        assert checks.Check(inputs).output(call.output(call.run()))["rel_fro"] < 1e-5
    assert call.config["compile_ms"] > 0


@pytest.mark.peers
@pytest.mark.parametrize("peer", OUTSIDE, ids=lambda peer: peer.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("variant", "shape", "direction"),
    [
        ("full", Shape.of(2, 4, 160, 32), "fwd"),
        ("causal", Shape.of(2, 4, 160, 32), "fwd"),
        ("full", Shape(2, 6, 2, 1, 200, 32, 32), "decode"),
    ],
    ids=["full", "causal", "decode"],
)
def test_outside_peers_compute_the_same_or_refuse(
    peer: peers.Peer, dtype: str, variant: str, shape: Shape, direction: Any
) -> None:
    """Deselected where a library is not installed: `make peers` installs them."""
    import torch

    w = Workload(variant, shape, direction, dtype)
    if peer.refuses(w) is not None:
        assert dtype != "float32" or peer in (peers.GQA, peers.LLAMA, peers.LLAMA_PRODUCTS)
        return
    inputs = make_inputs(w)
    with torch.no_grad():
        call = peer.prepare(inputs)
        assert not checks.is_wrong(checks.Check(inputs).output(call.output(call.run())), dtype)


def in_blocks(x: Any, codec: str) -> Any:
    """What llama.cpp's codes of x mean, by their definition: blocks of 32 channels share a float16 step."""
    blocks = x.double().numpy().reshape(*x.shape[:-1], -1, 32)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    step = np.abs(largest) / 127 if codec == "int8" else largest / -8
    codes = np.rint(blocks / step) if codec == "int8" else np.minimum(15, np.floor(blocks / step + 8.5)) - 8
    return (codes * step.astype(np.float16)).reshape(x.shape)


@pytest.mark.peers
@pytest.mark.parametrize("peer", [peers.LLAMA, peers.LLAMA_PRODUCTS], ids=lambda peer: peer.name)
@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_codes_of_llama_cpp(peer: peers.Peer, codec: str) -> None:
    workload = Workload("full", Shape(2, 4, 2, 1, 704, 64, 32), "decode", "bfloat16", pages=0, codec=codec)
    inputs = make_inputs(workload)
    call = peer.prepare(inputs)
    assert call.meant is not None
    k, v = call.meant()
    expected_v = in_blocks(inputs.v, codec) if peer is peers.LLAMA else inputs.v.double().numpy()
    for found_codes, expected in ((k, in_blocks(inputs.k, codec)), (v, expected_v)):
        away = np.abs(found_codes.double().numpy() - expected) > 1e-6
        assert away.mean() < 1e-3  # a tie of float32 that is none in float64
    error = checks.Check(inputs, (k, v)).output(call.output(call.run()))
    assert error["rel_fro"] < 1e-2  # it rounds the query to codes of 8 bits too
    assert peer.refuses(dataclasses.replace(workload, codec="int2"))
    assert peer.refuses(dataclasses.replace(workload, pages=16))


@pytest.mark.parametrize("peer", OUTSIDE, ids=lambda peer: peer.name)
def test_outside_peers_refuse_what_they_cannot_express(peer: peers.Peer) -> None:
    for w in (
        Workload("alibi", TINY),
        Workload("window", TINY),
        Workload("full", TINY, dtype="float64"),
        Workload("causal", TINY, direction="fwdbwd"),
        Workload("full", TINY, grad=True),
        Workload("causal", Shape(1, 2, 2, 8, 16, 16, 16)),
    ):
        assert peer.refuses(w), w.name


# --- runs ---------------------------------------------------------------------------------------------------


def test_run_judges_checks_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(inputs: Inputs) -> peers.Call:
        if inputs.workload.dtype == "float16":
            raise error("AK502", where="dtype")
        return peers.CPU.prepare(inputs)

    own = dataclasses.replace(peers.CPU, prepare=prepare)
    monkeypatch.setattr(runner, "HOST", runner.Place(own=own))

    def breaks(inputs: Inputs) -> Any:
        raise RuntimeError("no such kernel\nand more")

    rivals = (fake("right"), fake("liar", lambda i: i.q * 0), fake("broken", breaks), fake("shy", refuses="will not"))  # fmt: skip
    asked = (
        Bar("best", least=1e-9),
        Bar("liar", least=1e-9),
        Bar("broken", least=1e-9),
        Bar("beside", most=1e9),
    )
    one = Row(Workload("causal", TINY), rivals, asked, beside=Workload("full", TINY))
    refused = Row(Workload("full", TINY, dtype="float16"), rivals, (Bar("ceiling", least=0.5),))
    document = runner.run([one, refused], rounds=2, threads=2)
    assert records.problems(document) == []
    assert [r["backend"] for r in document["records"]] == ["cpu", "right", "liar"]
    assert [(b["met"], b["note"]) for b in document["bars"][:4]] == [
        (True, "right"), (False, "liar is wrong"), (False, "broken did not run"), (True, f"{one.beside.name}, per live pair"),
    ]  # fmt: skip
    assert "AK502" in document["bars"][4]["note"]
    assert {s["backend"]: s["reason"] for s in document["skipped"]}[
        "broken"
    ] == "RuntimeError: no such kernel"
    assert {s["reason"] for s in document["skipped"] if s["backend"] == "shy"} == {"will not"}
    assert json.loads(records.dumps(document)) == document
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as capture:
        console.print(report.bars_table(document))
    assert "2 of 5 bars met" in capture.get()
    assert "best: right" in capture.get()


def test_run_takes_gradients_and_rotates_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "HOST", runner.Place(own=fake("cpu")))  # whatever the engine can do
    seen: list[int] = []

    def watched(inputs: Inputs) -> Any:
        seen.append(inputs.k.data_ptr())
        return peers.TORCH.prepare(inputs).run()

    shape = Shape(1, 4, 2, 1, 64, 16, 16)
    rows = [
        Row(Workload("full", shape, "decode"), (fake("watched", watched),)),
        Row(Workload("causal", TINY, "fwdbwd")),
        Row(Workload("full", TINY, grad=True)),
    ]
    document = runner.run(rows, rounds=1, threads=2)
    assert len(set(seen)) == 4
    assert runner.wrong(document) == []
    assert [(r["workload"].split(" ", 4)[4], r["backend"]) for r in document["records"]] == [
        ("d16 decode", "cpu"), ("d16 decode", "watched"), ("d16 fwdbwd", "cpu"), ("d16 fwdbwd", "torch"),
        ("d16 grad", "cpu"), ("d16 grad", "torch"),
    ]  # fmt: skip


def test_who_keeps_codes_is_checked_against_what_they_mean() -> None:
    def prepare(inputs: Inputs, told: bool) -> peers.Call:
        k, v = (t.round(decimals=0) for t in (inputs.k, inputs.v))
        call = peers.TORCH.prepare(dataclasses.replace(inputs, k=k, v=v))
        return dataclasses.replace(call, meant=(lambda: (k, v)) if told else None)

    says, silent = (
        dataclasses.replace(fake(name), prepare=partial(prepare, told=told))
        for name, told in (("says", True), ("silent", False))
    )
    workload = Workload("full", TINY, dtype="bfloat16", pages=0, codec="int8")
    document = runner.run([Row(workload, (says, silent))], rounds=1)
    wrong = {r["backend"]: checks.is_wrong(r["error"], "bfloat16") for r in document["records"]}
    assert wrong == {"cpu": False, "says": False, "silent": True}


def test_what_torch_computes_is_not_counted_as_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnkit.ops import report as ops_report

    real = ops_report.explain

    def standing_in(call: Any) -> Any:
        told = real(call)
        return dataclasses.replace(told, calls=(dataclasses.replace(told.calls[0], backend="torch"),))

    monkeypatch.setattr(ops_report, "explain", standing_in)
    document = runner.run([Row(Workload("full", TINY), bars=(Bar("torch", least=1.0),))], rounds=1)
    assert document["records"] == []
    assert "AK502" in document["bars"][0]["note"]


def test_grad_rows_want_gradients_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "HOST", runner.Place(own=fake("cpu")))
    for w in (Workload("full", TINY), Workload("full", TINY, grad=True)):
        got: list[bool] = []

        def watched(inputs: Inputs, got: list[bool] = got) -> Any:
            o = peers.TORCH.prepare(inputs).run()
            got.append(o.requires_grad)
            return o

        runner.run([Row(w, (fake("watched", watched),))], rounds=1)
        assert set(got) == {w.grad}


# --- scaling ------------------------------------------------------------------------------------------------


def grown(time: Callable[[int], float], memory: Callable[[int], int | None]) -> records.Document:
    """A result file of suite scaling whose times and memory are these functions of the length."""
    rows = [
        {"backend": "cpu", "variant": "causal", "direction": row.workload.direction, "dtype": "float32",
         "shape": dataclasses.asdict(row.workload.shape), "peak_bytes": memory(row.workload.shape.sq),
         "time_ms": {"median": time(row.workload.shape.sq)}}
        for row in suites["scaling"]
    ]  # fmt: skip
    return {"machine": {}, "records": rows[::-1]}


def test_slopes_of_a_power_law() -> None:
    for entry in scaling.judge(grown(lambda s: 3e-6 * s**2 + 0.05, lambda s: 5000 + 300 * s)):
        assert entry["met"], entry
        expected = {"time slope": 2.0, "memory slope": 1.0}.get(entry["against"], 1.0)
        assert entry["measured"]["median"] == pytest.approx(expected, abs=0.02)
        assert entry["measured"]["lo"] <= entry["measured"]["median"] <= entry["measured"]["hi"]
        assert entry["workload"].endswith("4096 to 65536")


def test_a_cliff_and_quadratic_memory_are_not_accepted() -> None:
    cliff = scaling.judge(grown(lambda s: s**2 * (1 if s < 16384 else 1.6), lambda s: s * s))
    assert [(e["against"], e["met"]) for e in cliff[:3]] == [
        ("time slope", False), ("memory slope", False), ("steepest doubling of time over 4", False),
    ]  # fmt: skip
    assert cliff[2]["measured"]["median"] == pytest.approx(1.6)
    unread = scaling.judge(grown(lambda s: s**2, lambda s: None))
    assert [e["met"] for e in unread[:3]] == [True, False, True]


def test_scaling_is_drawn(tmp_path: Path) -> None:
    document = grown(lambda s: s**2, lambda s: s * 1000)
    scaling.plot(document, [tmp_path / "a" / "s.svg"])
    assert "slope 2.00" in (tmp_path / "a" / "s.svg").read_text(encoding="utf-8")


def test_scaling_runs_over_growing_lengths_in_both_directions() -> None:
    lengths = {
        d: [row.workload.shape.sq for row in suites["scaling"] if row.workload.direction == d]
        for d in ("fwd", "fwdbwd")
    }
    assert lengths["fwd"] == lengths["fwdbwd"] == [1024, 2048, 4096, 8192, 16384, 32768, 65536]


# --- caches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pages", "shuffled"), [(0, False), (16, False), (16, True)])
def test_workloads_in_a_cache(pages: int, shuffled: bool) -> None:
    """The same numbers as without one, in each of the caches that decoding goes through."""
    workload = Workload(
        "full", Shape(2, 4, 2, 1, 70, 16, 8), direction="decode", pages=pages, shuffled=shuffled
    )
    plain = peers.CPU.prepare(make_inputs(dataclasses.replace(workload, pages=None, shuffled=False))).run()
    assert torch.equal(peers.CPU.prepare(make_inputs(workload)).run(), plain)
    assert workload.name.endswith("pages of 16 shuffled" if shuffled else "pages of 16" if pages else "cache")
