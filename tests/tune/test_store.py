"""The store under everything that happens to files: damage, other processes, kill -9, no space, no permission, no home.

Run as a script it is the child of those tests.
"""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from attnkit.tune import store
from attnkit.tune.entry import Entry, Measurement, entry, merge, parse
from attnkit.tune.key import Key
from attnkit.tune.statistics import Interval
from attnkit.tune.store import Damaged, Folder, Pack, write_pack

KEY = Key(
    "cpu", "forward", "attnkit 1\nprogram", "float32", 64, 64, "highest", 1024, 2048,
    (("cores", "2"), ("isa", "avx512"), ("name", "a processor")), (("attnkit", "0"), ("compiler", "13")),
)  # fmt: skip
PROBLEM = {"shape": "1,8,8,1024,2048,64,64", "threads": 2}


def measurement(median: float, n: int = 9, rung: int = 0, **config: int) -> Measurement:
    return Measurement.of(config, rung, Interval(median, median * 0.99, median * 1.01, n), 1e-3 * median)


def some_entry(number: int = 0) -> Entry:
    """An entry whose content follows from its number, and so can be checked by who did not write it."""
    default = measurement(1.0, tile_q=96, tile_kv=64)
    return entry(
        replace(KEY, kv_bucket=number),
        PROBLEM,
        [default, measurement(0.5 + 1 / (number + 2), tile_q=48, tile_kv=64)],
    )


@pytest.fixture(autouse=True)
def _warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_warned", set())


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "store")


def file_of(folder: Folder) -> Path:
    assert folder.path is not None
    (path,) = folder.path.glob("*.json")
    return path


# --- what comes back ----------------------------------------------------------------------------------------


def test_what_was_put_is_found_and_nothing_else(folder: Folder) -> None:
    assert not folder.exists()
    assert folder.get(KEY) is None
    for number in range(20):
        assert folder.put(some_entry(number))
    for number in range(20):
        assert folder.get(some_entry(number).key) == some_entry(number)
    assert folder.get(replace(KEY, kv_bucket=21)) is None
    assert len(list(folder.entries())) == 20
    folder.remove(some_entry(3).key)
    assert folder.get(some_entry(3).key) is None


def test_measurements_of_one_key_come_together(folder: Folder) -> None:
    folder.put(entry(KEY, PROBLEM, [measurement(1.0, tile_q=96)]))
    folder.put(entry(KEY, PROBLEM, [measurement(0.9, tile_q=48)]))
    found = folder.get(KEY)
    assert found is not None
    assert {m.config for m in found.measurements} == {(("tile_q", 48),), (("tile_q", 96),)}
    folder.put(entry(KEY, PROBLEM, [measurement(0.8, tile_q=16)]), replace=True)
    found = folder.get(KEY)
    assert found is not None
    assert len(found.measurements) == 1


def test_every_part_of_a_key_counts() -> None:
    """A mutation of any component is another file; and all of them are mutated here."""
    mutated = [
        replace(KEY, **{f.name: getattr(KEY, f.name) + (1 if isinstance(getattr(KEY, f.name), int) else "x")})
        for f in fields(Key)
        if f.name not in ("device", "toolchain")
    ]
    for name in ("device", "toolchain"):
        pairs = getattr(KEY, name)
        for i, (field, value) in enumerate(pairs):
            mutated += [
                replace(KEY, **{name: (*pairs[:i], (field, value + "x"), *pairs[i + 1 :])}),
                replace(KEY, **{name: (*pairs[:i], *pairs[i + 1 :])}),
            ]
        mutated.append(replace(KEY, **{name: (*pairs, ("zzz", "more"))}))
    digests = {key.digest for key in mutated}
    assert len(digests) == len(mutated) > len(fields(Key))
    assert KEY.digest not in digests


def test_a_file_under_the_name_of_another_key_is_a_miss(folder: Folder) -> None:
    folder.put(some_entry(1))
    path, other = file_of(folder), some_entry(2).key
    path.rename(path.with_name(other.digest + ".json"))
    assert folder.get(other) is None
    assert [type(x) for x in folder.entries()] == [Damaged]


MEASUREMENTS = st.lists(
    st.builds(
        measurement,
        st.floats(0.5, 2.0),
        st.integers(3, 40),
        st.integers(0, 2),
        tile_q=st.sampled_from([16, 48, 96]),
        tile_kv=st.sampled_from([32, 64]),
    )
    | st.builds(lambda q, why: Measurement.refused({"tile_q": q, "tile_kv": 32}, why),
                st.sampled_from([16, 48]), st.sampled_from(["wrong", "slow"])),
    max_size=6,
)  # fmt: skip
ENTRIES = st.builds(lambda threads, ms: entry(KEY, {"threads": threads}, ms), st.integers(1, 2), MEASUREMENTS)


@given(ENTRIES, ENTRIES, ENTRIES)
def test_merging_is_a_law(a: Entry, b: Entry, c: Entry) -> None:
    assert merge(a, b) == merge(b, a)
    assert merge(merge(a, b), c) == merge(a, merge(b, c))
    assert merge(a, a) == a
    assert parse(a.line) == a


# --- damage -------------------------------------------------------------------------------------------------


def corrupted(content: bytes, rng: np.random.Generator) -> bytes:
    """One byte changed, or the end cut off, or something added."""
    at = int(rng.integers(len(content)))
    way = rng.integers(8)
    if way == 0:
        return content[:at]
    if way == 1:
        return content + bytes([int(rng.integers(256))])
    other = (content[at] + int(rng.integers(1, 256))) % 256
    return content[:at] + bytes([other]) + content[at + 1 :]


def all_are_misses(folder: Folder, count: int, rng: np.random.Generator) -> None:
    kept = some_entry()
    folder.put(kept)
    path = file_of(folder)
    whole = path.read_bytes()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(count):
            path.write_bytes(corrupted(whole, rng))
            assert folder.get(kept.key) is None
    assert len(said) == 1
    assert "damaged" in str(said[0].message)
    path.write_bytes(whole)
    assert folder.get(kept.key) == kept


def test_damage_is_a_miss(folder: Folder, rng: np.random.Generator) -> None:
    all_are_misses(folder, 1000, rng)


@pytest.mark.slow
@pytest.mark.shows
def test_all_damage_is_a_miss(folder: Folder, rng: np.random.Generator) -> None:
    all_are_misses(folder, 20_000, rng)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{}", b"null", b"[" * 100_000, b'{"entry": {}, "sha256": ""}', b"\xff\xfe", b"x" * (5 << 20), b"NaN",
        b'{"entry": null}',
    ],
)  # fmt: skip
def test_what_is_no_entry_is_a_miss(folder: Folder, content: bytes) -> None:
    folder.put(some_entry())
    file_of(folder).write_bytes(content)
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert folder.get(some_entry().key) is None
    assert [type(x) for x in folder.entries()] == [Damaged]
    assert folder.put(some_entry())
    assert folder.get(some_entry().key) == some_entry()


def test_a_right_checksum_does_not_make_an_entry() -> None:
    """What is checked is the content, too: numbers are numbers, and positive."""
    for ratio in (Interval(-1.0, 0.5, 2.0, 3), Interval(1, 0.5, 2.0, 3)):
        wrong = Measurement((("tile_q", 96),), 0, ratio, 1e-3)
        with pytest.raises(ValueError, match="not an entry"):
            parse(entry(KEY, PROBLEM, [wrong]).line)


def test_packs_lose_the_lines_that_are_damaged(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    write_pack(path, [some_entry(number) for number in (3, 1, 2)])
    assert [e.key.kv_bucket for e in Pack(path).entries() if isinstance(e, Entry)] == [1, 2, 3]
    lines = path.read_bytes().split(b"\n")
    lines[1] = lines[1].replace(b"tile_q", b"tile_Q")
    path.write_bytes(b"\n".join(lines))
    pack = Pack(path)
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert pack.get(some_entry(2).key) is None
    assert pack.get(some_entry(1).key) == some_entry(1)
    assert pack.get(some_entry(3).key) == some_entry(3)


# --- other processes ----------------------------------------------------------------------------------------


def spawn(job: str, path: Path, seed: int, count: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, job, str(path), str(seed), str(count)]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def put_and_get(path: Path, seed: int, count: int) -> None:
    """Puts and gets of a few keys that all processes share: what is found must be right."""
    folder, rng = Folder(path), np.random.default_rng(seed)
    for number in rng.integers(0, 20, count).tolist():
        expected = some_entry(number)
        assert folder.put(expected)
        assert folder.get(expected.key) == expected
        other = some_entry(int(rng.integers(0, 20)))
        assert folder.get(other.key) in (None, other)


def many_processes(path: Path, processes: int, count: int) -> None:
    children = [spawn("put_and_get", path, seed, count) for seed in range(processes)]
    for child in children:
        _, said = child.communicate(timeout=1200)
        assert child.returncode == 0, said.decode()
    folder = Folder(path)
    found = list(folder.entries())
    assert sorted(e.key.kv_bucket for e in found if isinstance(e, Entry)) == list(range(20))
    assert not folder.partial(older_than=-1)


def test_processes_share_a_folder(tmp_path: Path) -> None:
    many_processes(tmp_path, 4, 100)


@pytest.mark.slow
@pytest.mark.shows
def test_many_processes_share_a_folder(tmp_path: Path) -> None:
    many_processes(tmp_path, 64, 1000)


def write_for_ever(path: Path, seed: int, count: int) -> None:
    folder, number = Folder(path), seed
    while True:
        folder.put(some_entry(number % 50))
        number += 1


def kill_writers(path: Path, kills: int, rng: np.random.Generator) -> None:
    """A writer is killed at random points; only whole entries are left, and what gc collects.

    It is a fork of this process, without its threads: starting Python takes longer than all it writes.
    """
    folder, longest = Folder(path), 4e-3
    for i in range(kills):
        if (child := os.fork()) == 0:
            try:
                write_for_ever(path, i, 0)
            finally:
                os._exit(1)
        time.sleep(float(rng.uniform(0, longest)))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if not any(path.glob("*.json")):
            longest = min(1.5 * longest, 1.0)  # a busy machine: nobody has got as far as to write
    found = list(folder.entries())
    assert found
    assert all(isinstance(e, Entry) and e == some_entry(e.key.kv_bucket) for e in found)
    assert folder.partial() == []
    for partial in folder.partial(older_than=-1):
        partial.unlink()


def kill_in_a_process_of_its_own(path: Path, kills: int) -> None:
    child = spawn("kill_writers", path, 1, kills)
    _, said = child.communicate(timeout=1200)
    assert child.returncode == 0, said.decode()


def test_killed_writers_leave_whole_entries(tmp_path: Path) -> None:
    kill_in_a_process_of_its_own(tmp_path, 100)


@pytest.mark.slow
@pytest.mark.shows
def test_many_killed_writers_leave_whole_entries(tmp_path: Path) -> None:
    kill_in_a_process_of_its_own(tmp_path, 2000)


# --- no space, no permission, no home -----------------------------------------------------------------------


@pytest.fixture
def full() -> Iterator[None]:
    """No file may grow beyond some bytes: what a full disk does to a writer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def one_warning(put: Callable[[Entry], bool], match: str) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert not put(some_entry(1))
        assert not put(some_entry(2))
    assert len(said) == 1
    assert match in str(said[0].message)


@pytest.mark.usefixtures("full")
def test_no_space(folder: Folder) -> None:
    one_warning(folder.put, os.strerror(errno.EFBIG))
    assert folder.get(some_entry(1).key) is None
    assert not folder.partial(older_than=-1)


@pytest.mark.parametrize("failure", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_no_permission(folder: Folder, failure: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the operating system would say it; tests may run as somebody who may do everything."""

    def refuse(*args: object, **others: object) -> None:
        raise OSError(failure, os.strerror(failure))

    monkeypatch.setattr(store.tempfile, "mkstemp", refuse)
    one_warning(folder.put, os.strerror(failure))
    assert folder.get(some_entry(1).key) is None


def test_a_folder_that_may_not_be_looked_at(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **others: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    folder.put(some_entry(1))
    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "is_dir", refuse)
    assert folder.exists()
    with pytest.warns(RuntimeWarning, match="cannot be read"):
        assert folder.get(some_entry(1).key) is None
    assert folder.get(some_entry(1).key) is None, "and nothing more is said"


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("")
    folder = Folder(tmp_path / "store")
    one_warning(folder.put, "cannot be written")
    assert not folder.exists()


def test_no_home() -> None:
    folder = Folder(None)
    one_warning(folder.put, "no home folder")
    assert folder.get(KEY) is None
    assert not folder.exists()
    assert list(folder.entries()) == []


if __name__ == "__main__":
    job, path, seed, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    if job == "kill_writers":
        kill_writers(path, count, np.random.default_rng(seed))
    else:
        put_and_get(path, seed, count)
