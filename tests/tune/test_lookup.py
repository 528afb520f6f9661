"""Which config a call runs with, and where it says it comes from."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import attnkit as ak
from attnkit import backends, runtime
from attnkit.errors import AttnkitError
from attnkit.ir.text import parse
from attnkit.plan.space import Direction, default_config, of_direction
from attnkit.plan.spec import KernelSpec
from attnkit.tune import lookup
from attnkit.tune.entry import Entry, Measurement, entry
from attnkit.tune.key import key_of
from attnkit.tune.statistics import Interval
from attnkit.tune.store import Folder, write_pack
from attnkit.variants import dense

TEXT = dense.program()[0]
CPU = backends.get("cpu")
SPEC = KernelSpec(parse(TEXT), "float32", 16, 16)


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Everything is looked up again, in an empty store."""
    from attnkit.ops import warm

    def forget() -> None:
        runtime.clear()
        warm._ready.clear()

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
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(7)))
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
    runtime.clear()
    from attnkit.ops import warm

    warm._ready.clear()
    store.put(tuned(spec=KernelSpec(parse(report.text), "float32", 16, 16), tile_q=32))
    report = explained(lambda: ak.attention(q, k, k))
    assert report.tuned["forward"] == "user"
    assert report.config["tile_q"] == 32


def test_a_tuned_schedule_changes_no_bit(store: Folder) -> None:
    from attnkit.ops import warm

    q, k = torch.randn(1, 2, 50, 16), torch.randn(1, 2, 100, 16)
    before = ak.attention(q, k, k)
    text = explained(lambda: ak.attention(q, k, k)).text
    store.put(tuned(spec=KernelSpec(parse(text), "float32", 16, 16), tile_q=32))
    runtime.clear()
    warm._ready.clear()
    assert explained(lambda: ak.attention(q, k, k)).config["tile_q"] == 32
    assert torch.equal(ak.attention(q, k, k), before)


def test_sequences_of_many_lengths_keep_their_sums(store: Folder) -> None:
    q, k = torch.randn(2, 2, 50, 16), torch.randn(2, 2, 100, 16)
    lens = torch.tensor([70, 100], dtype=torch.int32)

    def call() -> Any:
        return ak.attention(q, k, k, kv_lens=lens)

    report = explained(call)
    assert report.bucket == (64, 0)
    spec = KernelSpec(parse(report.text), "float32", 16, 16)
    store.put(tuned(lengths=(64, 0), spec=spec, tile_kv=32))
    store.put(tuned(lengths=(64, 128), spec=spec, tile_q=16))
    runtime.clear()
    from attnkit.ops import warm

    warm._ready.clear()
    assert explained(call).config == report.config
