"""Search and measurement: what is measured, in which order, and what is left of it when it is interrupted."""

import itertools
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from attnkit.errors import AttnkitError
from attnkit.plan.space import Config, Field, Space, configs, default_config
from attnkit.testing.inputs import Dims
from attnkit.tune import campaign, cost, pairs, rig, search, tuner
from attnkit.tune.choose import choose, noise
from attnkit.tune.entry import Entry, Measurement, entry
from attnkit.tune.key import Key
from attnkit.tune.problem import Problem, problem, recalled
from attnkit.tune.search import ROUNDS, exhaustive, halving
from attnkit.tune.statistics import Interval
from attnkit.tune.store import Folder

SPACE: Space = {
    "tile_q": Field("schedule", 96, (16, 32, 48, 64, 96)),
    "tile_kv": Field("numeric", 64, (32, 64, 96, 128)),
}
KEY = Key("cpu", "forward", "", "float32", 64, 64, "highest", 1, 1, (), ())
EVERY = list(configs(SPACE))
SMALL = Dims(1, 2, 1, 40, 70, 16, 16)


class Simulated:
    """A machine on which every config takes the time that it should, give or take."""

    def __init__(self, times: dict[int, float], jitter: float = 0.0, seed: int = 0) -> None:
        self.times, self.jitter, self.rng = times, jitter, np.random.default_rng(seed)
        self.jobs: list[tuple[int, int]] = []

    def __call__(self, job: tuple[Config, int]) -> Measurement:
        config, rung = job
        number = EVERY.index(config)
        self.jobs.append((number, rung))
        wanted = self.times.get(number, 1.2) if number else 1.0
        n = ROUNDS[rung]
        ratios = wanted * np.exp(self.rng.normal(0, self.jitter, n)) if self.jitter else np.full(n, wanted)
        lo, hi = (ratios.min(), ratios.max()) if n < 6 else np.quantile(ratios, [0.2, 0.8])
        return Measurement.of(
            config, rung, Interval(float(np.median(ratios)), float(lo), float(hi), n), 1e-3 * wanted
        )


def searched(
    strategy: search.Strategy, machine: Simulated, known: Entry | None = None, limit: int = 10**6
) -> Entry:
    found = known or entry(KEY, {})
    while limit and (job := strategy(EVERY, found)) is not None:
        found = found.with_(machine(job))
        limit -= 1
    return found


# --- the search ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [halving, exhaustive])
@pytest.mark.parametrize("best", [0, 1, 7, 19])
def test_the_best_is_found(strategy: search.Strategy, best: int) -> None:
    found = searched(strategy, Simulated({best: 0.7, 3: 0.9, 4: 0.85}))
    assert choose(SPACE, found) == EVERY[best or 4]


def test_halving_measures_much_less() -> None:
    times = {i: 0.7 + 0.02 * i for i in range(1, 20)}
    rounds = []
    for strategy in (halving, exhaustive):
        machine = Simulated(times)
        searched(strategy, machine)
        rounds.append(sum(ROUNDS[rung] for _, rung in machine.jobs))
    assert rounds[0] < 0.6 * rounds[1]


@pytest.mark.parametrize("field", ["tile_q", "tile_kv"])
@pytest.mark.parametrize("gain", [0.01, 0.04, 0.06])
def test_other_bits_have_to_be_worth_it(field: str, gain: float) -> None:
    """A schedule is taken for more than 2 %, other numeric fields for more than 5 %."""
    config = default_config(SPACE) | {field: 32}
    found = searched(exhaustive, Simulated({EVERY.index(config): 1 - gain}))
    worth = gain > (0.02 if SPACE[field].kind == "schedule" else 0.05)
    assert choose(SPACE, found) == (config if worth else default_config(SPACE))


def test_where_nothing_is_faster_the_first_rung_is_the_last() -> None:
    machine = Simulated({})
    found = searched(halving, machine)
    assert {rung for _, rung in machine.jobs} == {0}
    assert choose(SPACE, found) == default_config(SPACE)


@given(st.integers(0, 60), st.integers(0, 3))
def test_a_search_that_was_stopped_goes_on(stopped: int, seed: int) -> None:
    """Whatever was measured is not measured again, and a finished search asks for nothing."""
    machine = Simulated({i: 0.8 + 0.01 * i for i in range(1, 20)}, jitter=0.02, seed=seed)
    found = searched(halving, machine, limit=stopped)
    found = searched(halving, machine, known=found)
    assert len(machine.jobs) == len(set(machine.jobs))
    assert halving(EVERY, found) is None


def test_searches_of_noisy_machines_agree_and_are_never_worse_than_the_default() -> None:
    """On a machine whose rounds are off by 5 %, without and with something to gain."""
    for times in ({}, {5: 0.8}):
        choices = []
        for seed in range(30):
            found = searched(
                halving, Simulated(dict.fromkeys(range(20), 1.0) | times, jitter=0.05, seed=seed)
            )
            choices.append(EVERY.index(choose(SPACE, found)))
        assert choices.count(5 if times else 0) >= 28, choices


def test_noise_is_what_the_default_differs_from_itself() -> None:
    machine = Simulated({0: 1.0, 1: 0.5}, jitter=0.2)
    found = searched(halving, machine)
    assert noise(found, default_config(SPACE)) > 0.02


# --- pairs --------------------------------------------------------------------------------------------------


class Clock:
    """Time passes in its sleeps alone: what stands in for the module `time`."""

    def __init__(self) -> None:
        self._now = 0.0

    def perf_counter(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += seconds

    def sleeper(self, *seconds: float) -> pairs.Run:
        """Takes each of these times in turn."""
        turns = itertools.cycle(seconds)
        return lambda: self.sleep(next(turns))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pairs, "time", clock)
    return clock


def test_ratios_are_those_of_the_times(clock: Clock) -> None:
    found = pairs.paired(clock.sleeper(2e-3), clock.sleeper(1e-3), 9)
    assert found.ratio.median == pytest.approx(0.5)
    assert found.ratio.n <= 9
    assert found.seconds == pytest.approx(1e-3)


def test_times_that_contradict_each_other_are_asked_again(clock: Clock) -> None:
    found = pairs.paired(clock.sleeper(1.0), clock.sleeper(*[0.5] * 4, *[1.5] * 4), 9)
    assert found.ratio.n > 9


def test_a_hopeless_rival_is_given_up_soon(clock: Clock) -> None:
    assert pairs.paired(clock.sleeper(1e-3), clock.sleeper(3e-3), 40).ratio.n == 3


# --- the rig ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("variant", ["causal", "document", "alibi_softcap"])
def test_every_config_is_right(variant: str, direction: campaign.Direction, dtype: str) -> None:
    asked = problem(variant, SMALL, dtype=dtype, direction=direction, threads=2)
    space = tuner.tuned_space(asked, "cpu")
    ready = rig.CpuRig(asked)
    for config in cost.candidates(space, asked)[:12]:
        assert ready.wrong(config) == ""
        ready.run(config)()


class Broken:
    """A CPU backend whose kernels with some tile are off by a factor."""

    def __init__(self, backend: rig.Any, field: str, factor: float) -> None:
        self._backend, self._field, self._factor = backend, field, factor

    def __getattr__(self, name: str) -> object:
        return getattr(self._backend, name)

    def build(self, spec: object, config: Config) -> object:
        kernel = self._backend.build(spec, config)
        if config[self._field] == self._backend.space(spec)[self._field].default:
            return kernel
        factor = self._factor

        class Off:
            def __call__(self, q: rig.Any, k: rig.Any, v: rig.Any, o: rig.Any, *rest: rig.Any) -> None:
                kernel(q, k, v, o, *rest)
                o.array *= factor

            def backward(self, *arguments: rig.Any) -> None:
                kernel.backward(*arguments)
                arguments[10].array *= factor

        return Off()


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    ("factor", "said"),
    [(1.01, "from the default"), (1 + 2e-5, "relative error"), (float("nan"), "from the default")],
)
def test_a_wrong_kernel_is_refused_and_never_timed(
    direction: campaign.Direction, factor: float, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    field = "tile_kv" if direction == "forward" else "backward_tile_kv"
    assert said in refusal(direction, field, factor, monkeypatch)


def test_a_schedule_that_changes_a_bit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "its bits" in refusal("forward", "tile_q", 1 + 1e-6, monkeypatch)


def refusal(direction: campaign.Direction, field: str, factor: float, monkeypatch: pytest.MonkeyPatch) -> str:
    asked = problem("causal", SMALL, direction=direction)
    broken = Broken(rig.backends.get("cpu"), field, factor)
    monkeypatch.setattr(rig.backends, "get", lambda name: broken)
    space = tuner.tuned_space(asked, "cpu")
    other = next(v for v in space[field].values if v != space[field].default and v < 64)
    measure = tuner.Measure(asked, space, None)
    found = measure(({**default_config(space), field: other}, 0))
    assert found.ratio is None
    return found.wrong


def test_what_an_entry_remembers_is_enough_to_measure_again() -> None:
    for variant in ("causal", "document"):
        asked = problem(variant, SMALL, dtype="bfloat16", direction="backward", threads=2)
        again = recalled(asked.spec, "backward", asked.facts)
        assert again is not None
        assert again.name == asked.name
        assert all(np.array_equal(a, b) for a, b in zip(asked.buffers, again.buffers, strict=True))
    captured = problem("document", SMALL)
    assert recalled(captured.spec, "forward", {**captured.facts, "variant": ""}) is None
    assert recalled(captured.spec, "forward", {}) is None


# --- the cost model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_candidates_are_different_and_begin_with_the_default(direction: campaign.Direction) -> None:
    for dims in (SMALL, Dims(1, 8, 8, 2048, 2048, 64, 64), Dims(1, 32, 8, 1, 8192, 128, 128)):
        asked = problem("full", dims, direction=direction, threads=2)
        space = tuner.tuned_space(asked, "cpu")
        found = cost.candidates(space, asked)
        assert found[0] == default_config(space)
        assert len({tuple(c.values()) for c in found}) == len(found) <= len(list(configs(space)))
        assert found == cost.candidates(space, replace(asked))


def test_what_is_longer_than_the_sequence_is_one_config() -> None:
    asked = problem("full", Dims(1, 2, 2, 1, 100, 16, 16))
    space = tuner.tuned_space(asked, "cpu")
    found = cost.candidates(space, asked)
    assert {c["tile_q"] for c in found} == {96}
    assert {c["split_kv"] for c in found} == {1024}


# --- a whole entry ------------------------------------------------------------------------------------------


def tuned(folder: Folder, asked: Problem, **how: rig.Any) -> tuple[Entry, bool, int]:
    count = 0

    def progress(found: Entry, candidates: int) -> None:
        nonlocal count
        count += 1

    found, complete = tuner.tune(asked, folder, progress=progress, **how)
    return found, complete, count


@pytest.mark.usefixtures("quick")
def test_tuning_twice_measures_once(tmp_path: Path) -> None:
    folder, asked = Folder(tmp_path), problem("causal", SMALL)
    found, complete, count = tuned(folder, asked)
    assert complete
    assert count >= len(found.measurements) > 4
    assert folder.get(found.key) == found
    assert tuned(folder, asked)[1:] == (True, 0)
    assert tuned(folder, asked, again=True)[2] > 0
    other = problem("causal", SMALL._replace(q_heads=4))
    assert tuned(folder, other)[2] > 0, "the same bucket, measured on another problem"


@pytest.mark.usefixtures("quick")
def test_a_spent_budget_leaves_what_was_measured(tmp_path: Path) -> None:
    folder, asked = Folder(tmp_path), problem("causal", SMALL)
    found, complete, count = tuned(folder, asked, until=0.0)
    assert not complete
    assert count == len(found.measurements) == 0
    assert tuned(folder, asked)[1]


@pytest.mark.usefixtures("quick")
def test_without_a_place_to_write_tuning_still_works(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match="not kept"):
        found, complete, _ = tuned(Folder(tmp_path / "file"), problem("causal", SMALL))
    assert complete
    assert found.measurements


def test_what_cannot_be_tuned_says_so() -> None:
    with pytest.raises(AttnkitError, match="cannot be tuned") as raised:
        tuner.key_of_problem(problem("causal", SMALL), "reference")
    assert raised.value.code == "AK501"


# --- campaigns ----------------------------------------------------------------------------------------------

CAMPAIGN = """
name = "small"
seconds = 100

[[cases]]
variants = ["causal", "mine"]
shapes = ["1,2,1,40,70,16", "1,2,1,1,70,16,8"]
dtypes = ["float32", "bfloat16"]

[[cases]]
variants = ["causal"]
shapes = ["1,2,1,40,70,16"]
directions = ["backward"]

[programs]
mine = '''
attnkit 1
program (q: bhsd, k: bhsd, v: bhsd) {
  o, lse = attend(q, k, v, scale = default) {
    mask = kv_idx <= q_idx
    normalizer = softmax
  }
  return o, lse
}
'''
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(CAMPAIGN)
    return path


def test_a_campaign_is_every_combination(file: Path) -> None:
    found = campaign.load(file)
    assert (found.name, found.seconds) == ("small", 100)
    assert len(found.cases) == 9
    shares: Sequence[campaign.Case] = [c for rank in range(4) for c in found.shard(rank, 4).cases]
    assert sorted(shares) == sorted(found.cases)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[[cases]]", "[cases", "TOML"), ("seconds = 100", "seconds = -1", "seconds"), ('"causal", "mine"', '"casual"', "variants"),
        ("1,2,1,40,70,16", "1,2,3,40,70,16", "shapes"), ('"bfloat16"', '"int8"', "dtypes"), ('"backward"', '"sideways"', "directions"),
        ("name =", "title =", "title"), ('dtypes = ["float32", "bfloat16"]', 'dtypes = "float32"', "dtypes"),
        ("seconds = 100", 'strategy = "luck"', "strategy"), ("[[cases]]", "[[case]]", "case"),
    ],
)  # fmt: skip
def test_wrong_campaigns(file: Path, old: str, new: str, said: str) -> None:
    file.write_text(CAMPAIGN.replace(old, new))
    with pytest.raises(AttnkitError, match=said) as raised:
        campaign.load(file)
    assert raised.value.code == "AK401"


def test_a_campaign_without_cases(file: Path) -> None:
    file.write_text('name = "none"\n')
    with pytest.raises(AttnkitError, match="cases"):
        campaign.load(file)


def test_shipped_campaigns_are_valid() -> None:
    folder = Path(__file__).parents[2] / "autotune" / "campaigns"
    for path in folder.glob("*.toml"):
        for case in campaign.load(path).cases:
            assert case.problem(2).name


@pytest.mark.usefixtures("quick")
def test_a_campaign_fills_a_store(file: Path, tmp_path: Path) -> None:
    folder, asked = Folder(tmp_path / "store"), campaign.load(file)
    said: list[float] = []
    results = campaign.run(asked, folder, threads=2, progress=lambda what, fraction: said.append(fraction))
    assert all(r.complete for r in results)
    assert said[-1] == 1.0
    assert len(list(folder.entries())) == 9
    assert sum(r.measured for r in campaign.run(asked, folder, threads=2)) == 0


@pytest.mark.slow
@pytest.mark.shows
def test_workers_share_a_campaign(file: Path, tmp_path: Path) -> None:
    folder = Folder(tmp_path / "store")
    results = campaign.run(campaign.load(file), folder, threads=1, workers=2)
    assert all(r.complete for r in results)
    assert len(list(folder.entries())) == 9


def command(file: Path, store: Path, *more: str) -> list[str]:
    options = ["tune", "--campaign", str(file), "--store", str(store), "--threads", "1", "--json"]
    return [sys.executable, "-m", "attnkit", *options, *more]


@pytest.mark.slow
@pytest.mark.shows
def test_a_killed_campaign_loses_at_most_one_measurement(
    file: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Killed again and again, it comes to its end; every measurement that a run had finished is still there afterwards."""
    store = tmp_path / "store"
    known = 0
    for _ in range(4):
        child = subprocess.Popen(command(file, store), stdout=subprocess.DEVNULL)
        time.sleep(float(rng.uniform(1.0, 3.0)))
        child.send_signal(signal.SIGKILL)
        child.wait()
        found = [e for e in Folder(store).entries() if isinstance(e, Entry)]
        now = sum(m.rung + 1 for e in found for m in e.measurements)
        assert len(found) == len(list(Folder(store).entries()))
        assert now >= known
        known = now
    done = subprocess.run(command(file, store), capture_output=True, text=True, check=True)
    assert '"complete": false' not in done.stdout
    again = subprocess.run(command(file, store), capture_output=True, text=True, check=True)
    assert "0 measurements" in again.stderr
