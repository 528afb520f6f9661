"""Which config a call runs with, and where it says it comes from."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import attnkit as ak
from attnkit import backends, runtime
from attnkit.backends.cpu.engine import engine
from attnkit.errors import AttnkitError
from attnkit.ir.text import parse
from attnkit.ops import warm
from attnkit.plan.space import Direction, default_config, of_direction
from attnkit.plan.spec import KernelSpec
from attnkit.tune import lookup, pairs
from attnkit.tune.entry import Entry, Measurement, entry
from attnkit.tune.key import key_of
from attnkit.tune.statistics import Interval
from attnkit.tune.store import Folder, write_pack
from attnkit.variants import dense

TEXT = dense.program()[0]
CPU = backends.get("cpu")
SPEC = KernelSpec(parse(TEXT), "float32", 16, 16)


def forget() -> None:
    """Every kernel is prepared again."""
    runtime.clear()
    warm.forget()


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Everything is looked up again, in an empty store."""
    for name, value in (("ATTNKIT_TUNE", "replay"), ("ATTNKIT_TUNE_STORE", str(tmp_path / "user"))):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(lookup, "_HERE", tmp_path / "nowhere" / "attnkit")
    lookup.shipped.cache_clear()
    forget()
    yield Folder(tmp_path / "user")
    forget()
    lookup.shipped.cache_clear()


def tuned(
    direction: Direction = "forward",
    lengths: tuple[int, int] = (64, 128),
    spec: KernelSpec = SPEC,
    **config: int,
) -> Entry:
    """An entry in which a config is twice as fast as the default."""
    default = default_config(of_direction(CPU.space(spec), direction))
    prints = lookup.fingerprint(CPU)
    assert prints is not None
    key = key_of("cpu", spec, direction, lengths, *prints)
    return entry(
        key,
        {"threads": 2},
        [
            Measurement.of(default, 0, Interval(1.0, 0.99, 1.01, 9), 1e-3),
            Measurement.of(default | config, 0, Interval(0.5, 0.49, 0.51, 9), 5e-4),
        ],
    )


def served(lengths: tuple[int, int] = (50, 100)) -> runtime.Prepared:
    runtime.clear()
    return runtime.prepare(TEXT, "float32", 16, 16, lengths=lengths)


def test_nothing_is_tuned_at_first() -> None:
    found = served()
    assert found.config == default_config(CPU.space(SPEC))
    assert set(found.served.layers.values()) == {"cost model"}


def test_a_bucket_serves_its_lengths_and_no_others(store: Folder) -> None:
    store.put(tuned(tile_q=32))
    for lengths in ((33, 65), (64, 128), (50, 100)):
        assert served(lengths).config["tile_q"] == 32
        assert served(lengths).served.layers == {"forward": "user", "backward": "cost model"}
    for lengths in ((32, 100), (65, 100), (50, 129), (0, 0)):
        assert served(lengths).config["tile_q"] == 96


def test_directions_are_served_apart(store: Folder) -> None:
    store.put(tuned("backward", backward_tile_q=48))
    found = served()
    assert found.config == default_config(CPU.space(SPEC)) | {"backward_tile_q": 48}
    assert found.served.layers == {"forward": "cost model", "backward": "user"}


def test_layers_in_their_order(store: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prints = lookup.fingerprint(CPU)
    assert prints is not None
    packs = tmp_path / "nowhere" / "attnkit" / "autotune" / "packs"
    write_pack(packs / f"{lookup.slug(prints)}.jsonl", [tuned(tile_q=16)])
    assert served().config["tile_q"] == 16
    assert served().served.layers["forward"] == "pack"
    project = tmp_path / "project"
    (project / "tuned").mkdir(parents=True)
    (project / "pyproject.toml").write_text('[tool.attnkit]\ntune-store = "tuned"\n')
    Folder(project / "tuned").put(tuned(tile_q=32))
    assert served().config["tile_q"] == 16, "a project counts only where it is named"
    for named in (project / "tuned", project / "pyproject.toml"):
        monkeypatch.setenv("ATTNKIT_TUNE_PROJECT", str(named))
        assert served().config["tile_q"] == 32
        assert served().served.layers["forward"] == "project"
    store.put(tuned(tile_q=48))
    assert served().config["tile_q"] == 48
    assert served().served.layers["forward"] == "user"


def test_the_working_directory_decides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Folder(tmp_path / "tuned").put(tuned(tile_q=32))
    (tmp_path / "pyproject.toml").write_text('[tool.attnkit]\ntune-store = "tuned"\n')
    monkeypatch.chdir(tmp_path)
    assert served().config["tile_q"] == 96


def test_off_is_the_default(store: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(tuned(tile_q=32))
    monkeypatch.setenv("ATTNKIT_TUNE", "off")
    assert served().config["tile_q"] == 96


def test_pinned_numerics(store: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = tuned(tile_q=32)
    store.put(schedule)
    store.put(tuned(tile_q=48, tile_kv=32))
    store.put(schedule)
    assert served().config["tile_kv"] in (32, 64)
    monkeypatch.setenv("ATTNKIT_PIN_NUMERICS", "1")
    assert served().config == default_config(CPU.space(SPEC)) | {"tile_q": 32}


def test_another_device_is_a_miss(store: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(tuned(tile_q=32))
    monkeypatch.setattr(engine(), "cores", lambda: 7)
    assert served().config["tile_q"] == 96


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ATTNKIT_TUNE", "always"), ("ATTNKIT_PIN_NUMERICS", "yes"), ("ATTNKIT_TUNE_STORE", "here"),
        ("ATTNKIT_TUNE_STORE", ""), ("ATTNKIT_TUNE_PROJECT", "."), ("ATTNKIT_TUNE_PROJECT", "/nowhere/pyproject.toml"),
    ],
)  # fmt: skip
def test_bad_settings(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(AttnkitError, match=re.escape(value) if ".toml" in value else name) as raised:
        served()
    assert raised.value.code == "AK401"


def test_a_pyproject_that_names_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.attnkit]\ntune-store = 3\n")
    monkeypatch.setenv("ATTNKIT_TUNE_PROJECT", str(tmp_path / "pyproject.toml"))
    with pytest.raises(AttnkitError, match="tune-store"):
        served()


def test_kernels_of_equal_configs_are_shared() -> None:
    runtime.clear()
    a = runtime.prepare(TEXT, "float32", 16, 16, lengths=(1, 100))
    b = runtime.prepare(TEXT, "float32", 16, 16, lengths=(1, 1000))
    assert a is not b
    assert a.kernel is b.kernel


# --- as torch sees it ---------------------------------------------------------------------------------------


def explained(call: Callable[[], Any]) -> Any:
    return ak.explain(call).calls[0]


def test_explain_says_who_served_a_call(store: Folder) -> None:
    q, k = torch.randn(1, 2, 50, 16), torch.randn(1, 2, 100, 16)
    report = explained(lambda: ak.attention(q, k, k))
    assert report.tuned == {"forward": "cost model", "backward": "cost model"}
    assert "bucket 64 x 128" in str(report)
    forget()
    store.put(tuned(spec=KernelSpec(parse(report.text), "float32", 16, 16), tile_q=32))
    report = explained(lambda: ak.attention(q, k, k))
    assert report.tuned["forward"] == "user"
    assert report.config["tile_q"] == 32


def test_a_tuned_schedule_changes_no_bit(store: Folder) -> None:
    q, k = torch.randn(1, 2, 50, 16), torch.randn(1, 2, 100, 16)
    before = ak.attention(q, k, k)
    text = explained(lambda: ak.attention(q, k, k)).text
    store.put(tuned(spec=KernelSpec(parse(text), "float32", 16, 16), tile_q=32))
    forget()
    assert explained(lambda: ak.attention(q, k, k)).config["tile_q"] == 32
    assert torch.equal(ak.attention(q, k, k), before)


def test_what_is_beside_a_sequence_decides_nothing(store: Folder) -> None:
    """Keys with lengths of their own have one entry for all lengths, and a sequence the same bits in every batch."""
    q, k = torch.randn(2, 2, 50, 16), torch.randn(2, 2, 100, 16)
    lens = torch.tensor([70, 100], dtype=torch.int32)

    def call(rows: slice = slice(None), room: int = 100) -> Any:
        return ak.attention(q[rows], k[rows, :, :room], k[rows, :, :room], kv_lens=lens[rows])

    report = explained(call)
    assert report.bucket == (64, 0)
    spec = KernelSpec(parse(report.text), "float32", 16, 16)
    store.put(tuned(lengths=(64, 128), spec=spec, tile_q=16))
    forget()
    assert explained(call).config == report.config
    store.put(tuned(lengths=(64, 0), spec=spec, tile_kv=32))
    forget()
    assert explained(call).config["tile_kv"] == 32
    alone = call(slice(0, 1), 70)
    assert torch.equal(call()[:1], alone)


# --- measuring at a first call ------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_missing_entries_are_tuned_at_a_first_call(store: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNKIT_TUNE", "tune-missing")
    bias = torch.randn(2, 50, 100, requires_grad=True)
    q, k = torch.randn(1, 2, 50, 16, requires_grad=True), torch.randn(1, 2, 100, 16)

    def call() -> Any:
        return ak.attention(q, k, k, score=lambda s, b, h, i, j: s + bias[h, i, j])

    expected = torch.softmax(q @ k.mT / 4 + bias, -1) @ k
    assert not store.exists()
    assert "blocks" in str(explained(call)), "explaining measures nothing"
    assert not store.exists()
    with torch.no_grad():
        assert torch.allclose(call(), expected, atol=1e-5)
    assert {e.key.direction for e in store.entries() if isinstance(e, Entry)} == {"forward"}
    (found,) = torch.autograd.grad(call().sum(), q)
    (wanted,) = torch.autograd.grad(expected.sum(), q)
    assert torch.allclose(found, wanted, atol=1e-4)
    assert {e.key.direction for e in store.entries() if isinstance(e, Entry)} == {"forward", "backward"}
    before = list(store.entries())
    forget()
    call().sum().backward()
    assert list(store.entries()) == before, "what is there is not measured again"
    assert set(explained(call).tuned.values()) == {"user"}
    monkeypatch.setenv("ATTNKIT_TUNE", "retune")
    forget()
    with torch.no_grad():
        call()
    assert list(store.entries()) != before


@pytest.mark.usefixtures("quick")
def test_a_call_whose_tuning_cannot_be_kept_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATTNKIT_TUNE", "tune-missing")
    monkeypatch.setenv("ATTNKIT_TUNE_STORE", str(tmp_path / "file" / "store"))
    q = torch.randn(1, 2, 50, 16)
    with pytest.warns(RuntimeWarning, match="not kept") as said:
        found = ak.attention(q, q, q)
    assert len(said) == 1
    assert torch.allclose(found, torch.softmax(q @ q.mT / 4, -1) @ q, atol=1e-5)


def test_replay_never_measures(store: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*arguments: Any) -> Any:
        raise AssertionError("measured")

    monkeypatch.setattr(pairs, "paired", measure)
    q = torch.randn(1, 2, 50, 16)
    ak.attention(q, q, q)
    assert not store.exists()
