"""A config is used on a device after it computed what float64 computes; the interpreter is the device here."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from attnkit.backends.triton import admission, check, launch
from attnkit.backends.triton.backend import space
from attnkit.backends.triton.kernel import PHASES, Phase, TritonKernel
from attnkit.errors import AttnkitError
from attnkit.ir.text import parse
from attnkit.plan.spec import Config, KernelSpec

LIKE = torch.empty(0)
# Few, large tiles, as the interpreter wants them.
CONFIG = {"tile_q": 64, "tile_kv": 64, "decode_tile_q": 16, "decode_tile_kv": 64, "split_kv": 256}
CONFIG |= {f"{kind}_tile_{x}": 64 for kind in ("dq", "dkv", "pairs") for x in ("q", "kv")}


@pytest.fixture(autouse=True)
def _nothing_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ATTNKIT_KERNEL_CACHE", str(tmp_path / "kernels"))
    admission._known.clear()
    yield
    admission._known.clear()


def spec_of(name: str, dtype: str = "float32", dims: tuple[int, int] = (16, 24)) -> tuple[KernelSpec, Config]:
    spec = KernelSpec(check.program(name), dtype, *dims, "cuda")
    return spec, {n: field.default for n, field in space(spec, 90).items()} | CONFIG


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch) -> list[Phase]:
    """What is tried, rather than remembered."""
    found: list[Phase] = []
    tried = admission._tried

    def counted(spec: KernelSpec, config: Config, phase: Phase, like: Any) -> str:
        found.append(phase)
        return tried(spec, config, phase, like)

    monkeypatch.setattr(admission, "_tried", counted)
    return found


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``broken(entry, name, by, tiles)``: a compiler that makes one wrong number where a kernel's tiles have such a width."""

    def plant(entry: str, name: str, by: float, tiles: tuple[int, ...]) -> None:
        right = launch.ready

        def ready(program: launch.Program, target: Any, grid: tuple[int, ...], values: Any) -> launch.Launch:
            run = right(program, target, grid, values)
            at = next((i for i, (n, _) in enumerate(program.arguments) if n == name), 0)

            def wrong(args: Any) -> None:
                run(args)
                if program.entry == entry and dict(program.constants)["TILE_KV"] in tiles:
                    args[at].view(-1)[-1] += by

            return wrong

        monkeypatch.setattr(launch, "ready", ready)

    return plant


@pytest.mark.parametrize("name", [n for n in check.PROGRAMS if n not in ("causal", "window", "bias")])
def test_every_class_is_right_here(name: str) -> None:
    spec, config = spec_of(name)
    for phase in PHASES:
        if phase != "backward" or name not in check.FORWARD:
            assert admission.admitted(spec, config, phase, LIKE) == config


@pytest.mark.parametrize("codecs", [("int8(token, 0)", ""), ("", "fp8(head, 0)")])
def test_elements_beside_codes(codecs: tuple[str, str]) -> None:
    text = "attnkit 1\nprogram (q: bhsd, k: bhsd {}, v: bhsd {}) {{\no, lse = attend(q, k, v) {{\n}}\nreturn o, lse\n}}\n"
    spec = KernelSpec(parse(text.format(*codecs)), "float32", 16, 24, "cuda")
    config = {n: field.default for n, field in space(spec, 90).items()} | CONFIG
    for phase in PHASES[:2]:
        assert admission.admitted(spec, config, phase, LIKE) == config


@pytest.mark.parametrize("phase", PHASES)
def test_float16(phase: Phase) -> None:
    spec, config = spec_of("causal", "float16", (64, 64))
    assert admission.admitted(spec, config, phase, LIKE.half()) == config


def test_representatives() -> None:
    """One for every kind of program, whatever its numbers; what is asked of a class is asked once."""
    alike = [admission.representative(check.program(name)) for name in ("causal", "window")]
    assert alike[0] is alike[1]
    names = [n for n in check.PROGRAMS if n not in ("window", "bias")]
    assert len({admission.representative(check.program(name)) for name in names}) == len(names)


def test_an_answer_is_kept(tries: list[Phase]) -> None:
    spec, config = spec_of("causal")
    for _ in range(2):
        admission.admitted(spec, config, "forward", LIKE)
        admission.admitted(spec_of("window")[0], config, "forward", LIKE)
        assert tries == ["forward"]
        admission._known.clear()  # as another process
    admission.admitted(spec, config | {"tile_kv": 32}, "forward", LIKE)
    assert tries == ["forward"] * 2  # another config
    for file in launch.kernel_cache().glob("admission-*.json"):
        file.write_text("{")
    admission._known.clear()
    admission.admitted(spec, config, "forward", LIKE)
    assert tries == ["forward"] * 3  # damage is no answer


@pytest.mark.parametrize(
    ("phase", "entry", "name"),
    [("forward", "attend", "o"), ("forward", "attend", "lse"), ("decode", "attend", "tops"), ("backward", "attend_dkv", "dv")],
)  # fmt: skip
def test_a_wrong_config_is_not_used(phase: Phase, entry: str, name: str, broken: Callable[..., None]) -> None:
    """Narrower tiles are taken where these are right, with a warning; where they are not, nothing runs."""
    broken(entry, name, 0.01, (64,))
    spec, config = spec_of("causal")
    with pytest.warns(RuntimeWarning, match="narrower tiles"):
        found = admission.admitted(spec, config, phase, LIKE)
    assert found == admission.narrower(config, phase)
    assert found != config
    broken(entry, name, 0.01, (32,))
    admission._known.clear()
    for file in launch.kernel_cache().glob("admission-*.json"):
        file.unlink()
    with pytest.raises(AttnkitError) as raised:
        admission.admitted(spec, config, phase, LIKE)
    assert raised.value.code == "AK505"
    assert "off by" in raised.value.given


def test_what_is_no_number_is_wrong(broken: Callable[..., None]) -> None:
    broken("attend", "o", float("nan"), (32, 64))
    with pytest.raises(AttnkitError, match="AK505"):
        admission.admitted(*spec_of("causal"), "forward", LIKE)


def test_a_compiler_that_fails_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def ready(*args: Any) -> Any:
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(launch, "ready", ready)
    with pytest.raises(AttnkitError, match="out of shared memory") as raised:
        admission.admitted(*spec_of("causal"), "forward", LIKE)
    assert raised.value.code == "AK505"


def test_a_graph_that_is_captured(monkeypatch: pytest.MonkeyPatch, tries: list[Phase]) -> None:
    """Nothing is tried then; what is known goes on."""
    spec, config = spec_of("full")
    monkeypatch.setattr(launch, "capturing", lambda: True)
    with pytest.raises(AttnkitError) as raised:
        admission.admitted(spec, config, "forward", LIKE)
    assert raised.value.code == "AK506"
    assert "once" in str(raised.value)
    monkeypatch.undo()


def test_kernels_ask_once_for_each_direction(tries: list[Phase]) -> None:
    spec, config = spec_of("causal")
    kernel = TritonKernel(spec, config, admission.admitted)
    for q_len, kv_len in ((70, 70), (70, 80), (1, 300), (1, 300)):
        q, k, v = (torch.randn(1, h, n, d) for h, n, d in ((2, q_len, 16), (1, kv_len, 16), (1, kv_len, 24)))
        o, lse = torch.empty(1, 2, q_len, 24), torch.empty(1, 2, q_len)
        kernel(q, k, v, o, lse, [], [])
    assert tries == ["forward", "decode"]
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    for _ in range(2):
        kernel.backward(q, k, v, o, lse, [], [], torch.randn_like(o), None, *gradients, [])
    assert tries == ["forward", "decode", "backward"]
