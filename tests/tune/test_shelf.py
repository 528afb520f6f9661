"""What people do with entries: look, merge, diff, verify, carry, tidy; and the commands that do it."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from attnkit import backends
from attnkit.backends import Fingerprint
from attnkit.cli.app import app
from attnkit.plan.space import default_config
from attnkit.testing.inputs import Dims
from attnkit.tune import lookup, pairs, shelf, tuner
from attnkit.tune.entry import Entry, Measurement, entry
from attnkit.tune.problem import Problem, problem
from attnkit.tune.statistics import Interval
from attnkit.tune.store import Folder, Pack, write_pack

Cli = Callable[..., Result]
SMALL = ("--shape", "1,2,1,40,70,16")


@pytest.fixture(autouse=True)
def _stores(quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("ATTNKIT_TUNE_STORE", str(tmp_path / "user"))
    monkeypatch.setattr(lookup, "_HERE", tmp_path / "nowhere" / "attnkit")
    lookup.shipped.cache_clear()
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)  # the command sets variables for libraries that are not loaded yet
    lookup.shipped.cache_clear()


@pytest.fixture
def cli() -> Cli:
    def invoke(*arguments: str | Path, code: int = 0) -> Result:
        result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
        assert result.exit_code == code, result.output
        return result

    return invoke


def asked(q_heads: int = 2, q_len: int = 40) -> Problem:
    return problem("causal", Dims(1, q_heads, 1, q_len, 70, 16, 16), threads=2)


def made(of: Problem, median: float = 0.5, width: float = 0.01, **config: int) -> Entry:
    """An entry in which a config takes so much of the default's time."""
    default = default_config(tuner.tuned_space(of, "cpu"))
    measured = [
        Measurement.of(default, 2, Interval(1.0, 0.99, 1.01, 25), 1e-3),
        Measurement.of(
            default | config, 2, Interval(median, median - width, median + width, 25), 1e-3 * median
        ),
    ]
    return entry(tuner.key_of_problem(of, "cpu"), of.facts, measured)


@pytest.fixture
def user(tmp_path: Path) -> Folder:
    folder = Folder(tmp_path / "user")
    folder.put(made(asked(), tile_q=32))
    folder.put(made(asked(q_len=200), median=0.99, tile_q=48))
    return folder


# --- the library --------------------------------------------------------------------------------------------


def test_a_summary_says_what_is_chosen_and_what_it_gains() -> None:
    found = shelf.summary(made(asked(), tile_q=32))
    assert found.changed == {"tile_q": 32}
    assert found.gain is not None
    assert found.gain.median == 2.0
    assert found.gain.lo < 2.0 < found.gain.hi
    assert shelf.summary(made(asked(), median=0.99, tile_q=32)).changed == {}


def test_merging_places_in_any_order(tmp_path: Path) -> None:
    places = [Folder(tmp_path / name) for name in "abc"]
    places[0].put(made(asked(), tile_q=32))
    places[1].put(made(asked(), median=0.4, tile_q=48))
    places[2].put(made(asked(q_len=200), tile_q=16))
    found = shelf.merged(places)
    assert {e.line for e in found} == {e.line for e in shelf.merged(reversed(places))}
    chosen = {e.key.q_bucket: shelf.summary(e).changed for e in found}
    assert chosen == {64: {"tile_q": 48}, 256: {"tile_q": 16}}


@pytest.mark.parametrize(
    ("first", "second", "covered"),
    [
        ({"median": 0.50, "tile_q": 32}, {"median": 0.50, "tile_q": 48}, False),  # neither knows the other's
        ({"median": 0.99, "tile_q": 32}, {"median": 0.95, "tile_q": 32}, True),
        ({"median": 0.99, "tile_q": 32}, {"median": 0.50, "tile_q": 32}, False),
    ],
)
def test_differences(first: Any, second: Any, covered: bool, tmp_path: Path) -> None:
    a, b = Folder(tmp_path / "a"), Folder(tmp_path / "b")
    a.put(made(asked(), **first))
    b.put(made(asked(), **second))
    keys, (found,) = shelf.differences(a, b)
    assert keys == 1
    assert found.covered == covered
    assert shelf.differences(a, a) == (1, [])
    keys, (found,) = shelf.differences(a, Folder(tmp_path / "none"))
    assert (found.b, found.covered) == (None, False)


def test_verifying(user: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    ratio = Interval(1.5, 1.4, 1.6, 25)
    monkeypatch.setattr(tuner, "paired", lambda *a: pairs.Paired(ratio, 1e-3))
    slower, default = sorted(shelf.verify(shelf.whole(user), None), key=lambda v: v.entry.key.q_bucket)
    assert (slower.ratio, slower.holds) == (ratio, False)
    assert (default.ratio, default.holds) == (None, True)
    of = made(asked(), tile_q=32)
    foreign = replace(of, key=replace(of.key, device=(("name", "another"),)))
    captured = replace(of, key=replace(of.key, program="attnkit 1\nnonsense"))
    for each, said in ((foreign, "another device"), (captured, "AK10")):
        (verdict,) = shelf.verify([each], None)
        assert said in verdict.problem
        assert not verdict.holds


def test_collecting(user: Folder) -> None:
    assert user.path is not None
    old = made(asked(q_len=1000), tile_q=16)
    user.put(replace(old, key=replace(old.key, toolchain=(("attnkit", "0"),))))
    partial = user.path / ".partial-x"
    partial.write_text("half")
    os.utime(partial, (0, 0))
    (user.path / "x.json").write_text("damage")
    assert {p.name for p in shelf.collect(user)} == {".partial-x", "x.json"}
    assert len(shelf.whole(user)) == 3
    assert len(shelf.collect(user, stale=True)) == 1
    assert len(shelf.whole(user)) == 2
    assert shelf.collect(user, stale=True) == []


# --- the commands -------------------------------------------------------------------------------------------


def test_tuning_once_and_again(cli: Cli, tmp_path: Path) -> None:
    first = cli("tune", "--variant", "causal", *SMALL, "--threads", "1", "--json")
    (found,) = json.loads(first.stdout)
    assert found["complete"]
    assert found["measured"] >= found["known"] > 4
    again = cli("tune", "--variant", "causal", *SMALL, "--threads", "1")
    assert "0 measurements" in again.stderr
    assert "causal b1 h2/1 s40x70 d16 float32 forward" in again.stdout
    listed = cli("tune", "--variant", "causal", *SMALL, "--threads", "1", "--list", "--json")
    (row,) = json.loads(listed.stdout)
    assert row["measured"] == found["known"]
    assert (
        cli(
            "tune", "--variant", "causal", *SMALL, "--threads", "1", "--again", "--seconds", "0"
        ).stderr.count("unfinished")
        == 1
    )


def test_an_exported_pack_serves_another_store_without_measuring(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (
        "tune",
        "--variant",
        "causal",
        "--variant",
        "full",
        *SMALL,
        "--direction",
        "forward",
        "--direction",
        "backward",
        "--threads",
        "1",
    )
    cli(*options)
    pack = tmp_path / "pack.jsonl"
    cli("cache", "export", pack)
    assert len(pack.read_text().splitlines()) == 4
    monkeypatch.setenv("ATTNKIT_TUNE_STORE", str(tmp_path / "empty"))
    cli("cache", "import", pack)
    assert "0 measurements" in cli(*options).stderr
    again = tmp_path / "again.jsonl"
    cli("cache", "export", again)
    assert again.read_bytes() == pack.read_bytes()
    cli("cache", "diff", pack, tmp_path / "empty")


def test_shards_together_are_the_campaign(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = (
        "tune",
        "--variant",
        "causal",
        "--variant",
        "full",
        "--variant",
        "softcap",
        *SMALL,
        "--threads",
        "1",
        "--json",
    )
    counts = []
    for rank in range(2):
        found = cli(*options, "--shard", f"{rank}/2", "--store", tmp_path / f"rank{rank}")
        counts.append(len(json.loads(found.stdout)))
    assert counts == [2, 1]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert len(json.loads(cli(*options).stdout)) == 1
    cli("cache", "merge", tmp_path / "rank0", tmp_path / "rank1", "--into", tmp_path / "both")
    assert len(shelf.whole(Folder(tmp_path / "both"))) == 3


def test_looking_at_entries(cli: Cli, user: Folder) -> None:
    assert "tile_q=32" in cli("cache", "ls").stdout
    rows = json.loads(cli("cache", "ls", "--json").stdout)
    assert {row["chosen"] for row in rows} == {"tile_q=32", "default"}
    tuned = next(row for row in rows if row["chosen"] != "default")
    shown = cli("cache", "show", tuned["digest"][:12]).stdout
    assert all(word in shown for word in ("tile_q=32", "kv_idx <=", "0.500", "cores"))
    assert json.loads(cli("cache", "show", tuned["digest"], "--json").stdout)["key"]["backend"] == "cpu"
    assert "no entries" in cli("cache", "show", "zz", code=1).stderr
    assert "no entries" in cli("cache", "verify", "zz", code=1).stderr
    assert "2 entries" in cli("cache", "show", "", code=1).stderr


def test_damage_is_told_and_collected(cli: Cli, user: Folder, tmp_path: Path) -> None:
    assert user.path is not None
    damaged = next(user.path.glob("*.json"))
    damaged.write_text("x")
    found = json.loads(cli("cache", "verify", "--json", code=1).stdout)
    assert [d["where"] for d in found["damaged"]] == [str(damaged)]
    pack = tmp_path / "p.jsonl"
    write_pack(pack, shelf.whole(user))
    pack.write_text(pack.read_text() + "x\n")
    assert "damaged" in cli("cache", "import", pack, code=1).stdout
    assert str(damaged) in cli("cache", "gc").stdout
    assert shelf.damaged(user) == []


def test_verify_measures_again(cli: Cli, user: Folder) -> None:
    result = CliRunner().invoke(app, ["cache", "verify"], catch_exceptions=False)
    assert result.exit_code in (0, 1), "its time on this machine is anybody's guess"
    assert "the default" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("tune",), ("tune", "--variant", "causal", "--campaign", __file__), ("tune", "--campaign", __file__, "--dtype", "float32"),
        ("tune", "--variant", "causal", "--shard", "2/2"), ("tune", "--variant", "causal", "--shard", "x"), ("cache", "merge"),
        ("cache", "diff", "nowhere", "nowhere"), ("tune", "--variant", "casual"),
    ],
)  # fmt: skip
def test_wrong_usage(cli: Cli, arguments: tuple[str, ...]) -> None:
    cli(*arguments, code=2)


@pytest.mark.parametrize("shape", ["1,2,3", "1,3,2,4,4,8", "a"])
def test_wrong_shapes(cli: Cli, shape: str) -> None:
    assert "AK401" in cli("tune", "--variant", "causal", "--shape", shape, code=1).stderr


def test_every_cache_command_has_examples_and_json(cli: Cli) -> None:
    group: Any = app.commands["cache"]
    for name in group.commands:
        said = cli("cache", name, "--help").stdout
        assert "Examples:" in said
        assert "--json" in said


def test_the_cpu_backend_takes_part() -> None:
    prints = lookup.fingerprint(backends.get("cpu"))
    assert prints is not None
    assert set(prints.device) == {"name", "model", "isa", "cores"}
    assert lookup.fingerprint(backends.get("reference")) is None
    assert lookup.slug(prints).replace("-", "").isalnum()


def test_shipped_packs_are_whole_and_named_after_their_device() -> None:
    folder = Path(__file__).parents[2] / "autotune" / "packs"
    for path in folder.glob("*.jsonl"):
        pack = Pack(path)
        assert shelf.damaged(pack) == []
        found = shelf.whole(pack)
        assert [e.line for e in found] == path.read_text(encoding="ascii").splitlines()
        for each in found:
            prints = Fingerprint(dict(each.key.device), dict(each.key.toolchain))
            assert path.stem == lookup.slug(prints)
            assert shelf.summary(each).config, "it chooses from today's space"
