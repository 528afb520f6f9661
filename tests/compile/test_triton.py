"""GPU kernels, compiled without a GPU: they fit, spill nothing, and are what they should be by reading them."""

import os
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from attnkit.backends.triton import check, launch, lints
from attnkit.backends.triton.backend import TritonBackend
from attnkit.backends.triton.check import Case
from attnkit.ops.traced import Traceable, bind

CASES = [
    Case("forward", "causal", "bfloat16", 128, 128, 90),
    Case("dq", "alibi", "bfloat16", 64, 64, 90),
    Case("dkv", "causal", "bfloat16", 128, 128, 90),
    Case("decode", "causal", "float16", 128, 128, 80),
    Case("forward", "document", "bfloat16", 64, 64, 100),
    Case("forward", "causal", "float32", 64, 64, 80),
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile, whatever was compiled before."""
    folder = tmp_path / "kernels"
    monkeypatch.setenv("ATTNKIT_KERNEL_CACHE", str(folder))


@pytest.mark.shows
@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"sm_{c.arch}-{c.kernel}-{c.program}-{c.dtype}-{c.head_dim}"
)
def test_default_kernels_fit_and_do_not_spill(case: Case) -> None:
    row = check.check(case)
    assert row.findings == []
    assert row.resources.blocks >= 1
    assert row.resources.stack == 0 or case.kernel == "dkv"


@pytest.mark.slow
@pytest.mark.parametrize("case", list(check.cases()), ids=str)
def test_every_default_kernel(case: Case) -> None:
    assert check.check(case).findings == []


@pytest.mark.slow
def test_products_do_not_wait_for_each_other() -> None:
    for case in CASES[:3]:
        assert lints.serialized(check.compiled(case)[0]) == []


def test_float32_products_say_how_exact_they_are() -> None:
    """A GPU takes TF32 where nothing is said, and the interpreter is exact whatever is said."""
    exact, fast = (
        check.compiled(Case("dq", "causal", "float32", 64, 64, 90, precision))[0]
        for precision in ("highest", "high")
    )
    assert "inputPrecision" not in exact.asm["ttir"]
    assert "tf32" not in exact.asm["ptx"]
    assert "inputPrecision = tf32" in fast.asm["ttir"]
    assert ".tf32" in fast.asm["ptx"]
    assert lints.lint(exact, "float32", "tf32") == ["products are ieee, not tf32"]
    assert lints.lint(fast, "float32", "ieee")[0] == "products are tf32, not ieee"


def test_arguments_that_are_not_aligned_are_found() -> None:
    text = "tt.func public @f(%arg0: !tt.ptr<bf16>, %arg1: i32)"
    assert lints._attributes(text) == [
        "a pointer is not known to be aligned",
        "no stride is known to be aligned",
    ]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What would be launched on a Hopper GPU: (entry, grid, arguments), after compiling it."""
    from triton.compiler import CompiledKernel

    calls: list[Any] = []
    monkeypatch.setattr(
        sys.modules[TritonBackend.__module__], "admitted", lambda spec, config, *where: config
    )
    monkeypatch.setattr(launch, "current_target", lambda warps, stages: launch.Target(90, warps, stages))
    monkeypatch.setattr(
        CompiledKernel,
        "__getitem__",
        lambda self, grid: lambda *args: calls.append((self.name, grid, self, args)),
    )
    launch._compiled.cache_clear()
    yield calls
    launch._compiled.cache_clear()


@pytest.mark.shows
def test_a_call_down_to_the_launch(launched: list[Any]) -> None:
    """What a call on a GPU does but for the launch: tensors here, kernels compiled for a Hopper GPU."""
    from attnkit import backends
    from attnkit.ir.text import parse
    from attnkit.plan.spec import KernelSpec
    from attnkit.tune import default_config

    q, k, v = (torch.randn(2, heads, 256, 64).bfloat16() for heads in (4, 2, 2))
    slopes = torch.rand(4)
    mask = lambda b, h, q_idx, kv_idx: kv_idx <= q_idx  # noqa: E731
    text, buffers, _ = bind(Traceable(lambda s, b, h, i, j: s - slopes[h] * (i - j).abs(), mask), q)
    spec = KernelSpec(parse(text), "bfloat16", 64, 64, "cuda")
    backend = backends.get("triton")
    kernel: Any = backend.build(spec, default_config(backend.space(spec)))
    o, lse = torch.empty_like(q), torch.empty(2, 4, 256)
    kernel(q, k, v, o, lse, list(buffers), [])
    d_slopes = [torch.zeros(4)]
    grads = [torch.empty_like(x) for x in (q, k, v)]
    kernel.backward(q, k, v, o, lse, list(buffers), [], torch.randn_like(o), None, *grads, d_slopes)
    names = [name for name, _, _, _ in launched]
    assert names == ["attend", "delta", "attend_dq", "attend_dq", "attend_dkv", "attend_dkv"]
    assert launched[0][1] == (2 * 2, 4, 1)  # tiles of all sequences, heads
    for _, _, compiled, args in launched:
        assert len(args) == len(compiled.src.signature)
    before = len(launched)
    kernel(q, k, v, o, lse, list(buffers), [])
    assert launched[before][2] is launched[0][2]  # found again, not compiled again


def test_a_table_of_distances_down_to_the_launch(launched: list[Any]) -> None:
    from attnkit import backends
    from attnkit.ir.text import parse
    from attnkit.plan.spec import KernelSpec
    from attnkit.tune import default_config

    q = torch.randn(1, 2, 256, 64).bfloat16()
    table, d_table = torch.rand(2, 7), torch.zeros(2, 7)
    score = lambda s, b, h, i, j: s + table[h, torch.clamp(i - j, -3, 3) + 3]  # noqa: E731
    text, buffers, _ = bind(Traceable(score, None), q)
    spec = KernelSpec(parse(text), "bfloat16", 64, 64, "cuda")
    backend = backends.get("triton")
    kernel: Any = backend.build(spec, default_config(backend.space(spec)))
    grads, lse = [torch.empty_like(q) for _ in range(3)], torch.empty(1, 2, 256)
    kernel.backward(q, q, q, q, lse, list(buffers), [], q, None, *grads, [d_table])
    assert [name for name, _, _, _ in launched][3:] == ["attend_scatter", "attend_dkv", "attend_dkv"]
    ptx = launched[3][2].asm["ptx"]
    assert "atom.global.gpu.relaxed.add.u64" in ptx or "red.relaxed.gpu.global.add.u64" in ptx
    assert "add.f32" not in "".join(line for line in ptx.splitlines() if "atom." in line or "red." in line)


def test_offsets_beyond_32_bits_take_64() -> None:
    """A tensor of the size of no memory: only its shape is looked at."""
    near = torch.empty(1, 4, 64, 64, device="meta")
    far = torch.empty(1, 4, 2**14, 2**16, device="meta")
    arguments = (("b0", "pointer"), *((f"b0_s{d}", "stride") for d in range(4)), ("q_len", "size"))
    for tensor, width in ((near, "i32"), (far, "i64")):
        tensor.data_ptr = lambda: 256
        found = launch.describe(arguments, [tensor, *tensor.stride(), 7])
        assert [each.type for each in found] == ["*fp32", *[width] * 4, "i32"]
        assert [each.divisible for each in found] == [True, True, True, True, False, False]
        assert found[4].one


def test_the_kernel_cache_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnkit.errors import AttnkitError

    folder = tmp_path / "mine"
    monkeypatch.setenv("ATTNKIT_KERNEL_CACHE", str(folder))
    assert launch.kernel_cache() == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(AttnkitError) as raised:
        launch.kernel_cache()
    assert raised.value.code == "AK401"
    monkeypatch.delenv("ATTNKIT_KERNEL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert launch.kernel_cache() == tmp_path / "attnkit/kernels"
    assert os.path.isdir(tmp_path / "attnkit/kernels")  # noqa: PTH112


def test_cpu_tensors_are_refused_with_a_reason() -> None:
    import attnkit as ak
    from attnkit.errors import AttnkitError

    q = torch.randn(1, 1, 8, 16)
    with pytest.raises(AttnkitError) as raised:
        ak.attention(q, q, q, backend="triton")
    assert raised.value.code == "AK502"
    assert "no NVIDIA GPU" in raised.value.given or "tensors are on cpu" in raised.value.given
    report = ak.explain(lambda: ak.attention(q, q, q))
    assert report.calls[0].backend == "cpu"
    assert "triton" in report.calls[0].rejected


@pytest.mark.parametrize(
    ("codec", "page_size"),
    [
        *product(["bf16", "int8", ("fp8", "int8"), ("int8", "bf16")], [None, 16]),
        *product([("int4", "int2")], [None, 32]),  # whole groups
    ],
    ids=str,
)
def test_a_cache_down_to_the_launch(launched: list[Any], codec: Any, page_size: int | None) -> None:
    """Appending and a step of decoding, with the storage that a GPU has: what is compiled takes such strides and types."""
    import attnkit as ak
    from attnkit import backends
    from attnkit.ir.text import parse
    from attnkit.ops.kv_append import append_on_device
    from attnkit.ops.kv_codes import allocate, parts_of
    from attnkit.plan.spec import KernelSpec
    from attnkit.tune import default_config

    cache = ak.KVCache(2, 2, 64, max_len=2048, codec=codec, page_size=page_size)
    outer, inner = (2, 2048) if page_size is None else (4096 // page_size, page_size)
    table = cache._storage[-1] if page_size is not None else None
    scheme, cpu = cache._scheme, torch.device("cpu")
    cache._keep(allocate(scheme, 2, 2, outer, inner, table, (None, None), cpu, True), cache.lengths, scheme)
    new = torch.randn(2, 2, 3, 64).bfloat16()
    for _ in range(2):
        append_on_device(scheme, parts_of(scheme, cache._storage), cache.lengths, new, new, None)
    q = torch.randn(2, 8, 1, 64).bfloat16()
    k, v, lengths, pages, codes = cache.segment
    codecs = None if codes is None else scheme.codecs
    text, buffers, _ = bind(Traceable(None, ak.causal(), kv_lens=lengths, page_table=pages, codecs=codecs), q)
    spec = KernelSpec(parse(text), "bfloat16", 64, 64, "cuda")
    backend = backends.get("triton")
    assert backend.supports(spec) == ()
    kernel: Any = backend.build(spec, default_config(backend.space(spec)))
    k, v, beside = (k, v, {}) if codes is None else codes.on_device
    for _ in range(2):
        kernel(q, k, v, torch.empty_like(q), None, list(buffers), [], 1, None, beside)
    appended = ["encode_k", "encode_v", "append"] if scheme.has_newest else ["append"]
    assert [name for name, _, _, _ in launched] == [*appended * 2, "attend", "merge", "attend", "merge"]
    assert launched[-4][2] is launched[-2][2]
