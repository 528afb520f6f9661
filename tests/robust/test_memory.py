"""Memory: nothing outside a tensor is touched, offsets are 64 bits wide, and strides change no bit.

The sweep over sizes between guard pages runs in a process of its own, so that a fault is a failed test and not the end
of all tests: this file run as a script, ``python test_memory.py guards|empty ISA``.
"""

import ctypes
import itertools
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit import _engine
from attnkit.errors import AttnkitError
from attnkit.ops.traced import Traceable, bind
from attnkit.runtime import prepare

PAGE = mmap.PAGESIZE
PROT_NONE = 0
MAP_NORESERVE = 0x4000
LENGTHS = [1, 2, 15, 16, 17, 33, 47, 48, 49, 95, 96, 97, 127, 128, 129]
DIMS = [1, 7, 16, 33, 64]
HEADS, KV_HEADS = 2, 1
CANARY = 0xA5
BIG = 2**31

Fill = Callable[[tuple[int, ...]], Tensor]


def attend(text: str, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, buffers: list[Tensor]) -> None:
    """Run the kernel of a program on memory of our own, outputs among it."""
    prepared = prepare(text, str(q.dtype).removeprefix("torch."), q.shape[3], v.shape[3], backend="cpu")
    prepared.kernel(q, k, v, o, lse, buffers, [], 2)


def text_of(score: Any, mask: Any, captured: list[Tensor]) -> str:
    """The text of a program; its buffers are ``captured``, in their order."""
    bound = bind(Traceable(score, mask))
    assert [id(b) for b in bound.buffers] == [id(b) for b in captured]
    return bound.text


# --- guard pages -----------------------------------------------------------------------------------------


class Guarded:
    """Memory between two pages that must not be touched; tensors lie flush against one of them."""

    def __init__(self, size: int) -> None:
        pages = -(-size // PAGE)
        self._map = mmap.mmap(-1, (pages + 2) * PAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        libc = ctypes.CDLL(None, use_errno=True)
        for guard in (address, address + (pages + 1) * PAGE):
            assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(PAGE), PROT_NONE) == 0
        self._bytes = np.frombuffer(self._map, np.uint8)[PAGE : (pages + 1) * PAGE]

    def hold(self, x: Tensor, side: str) -> Tensor:
        """A copy of ``x`` at the left or right end; the rest is filled with canaries."""
        flat = x.contiguous().flatten().view(torch.uint8).numpy()
        self._bytes[:] = CANARY
        at = 0 if side == "left" else len(self._bytes) - flat.nbytes
        self._span = (at, at + flat.nbytes)
        held = self._bytes[at : at + flat.nbytes]
        held[...] = flat
        return torch.from_numpy(held).view(x.dtype).reshape(x.shape)

    def intact(self) -> bool:
        first, end = self._span
        return bool((self._bytes[:first] == CANARY).all() and (self._bytes[end:] == CANARY).all())


def loads(q_len: int, kv_len: int, fill: Fill) -> list[Tensor]:
    """One captured tensor of every dtype: float32 [q, kv], int32 [q], int64 [kv], bool [q, kv]."""
    return [
        fill((q_len, kv_len)), (fill((q_len,)) * 3).int(), (fill((kv_len,)) * 3).long(), fill((q_len, kv_len)) > -1,
    ]  # fmt: skip


def proven_program() -> str:
    """Every load is proven inside before the kernel runs."""
    bias, rows, columns, keep = captured = loads(2, 2, torch.ones)

    def score(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return s + bias[i, j] + rows[i].float() - columns[j].float()

    return text_of(score, lambda b, h, i, j: keep[i, j], captured)


def checked_program(dtype: torch.dtype) -> str:
    """Loads at kv_idx - q_idx, half of which are outside: clamped, where no pair exists."""
    table = torch.ones(2).to(dtype)
    return text_of(lambda s, b, h, i, j: s + table[j - i].float(), lambda b, h, i, j: j >= i, [table])


def guarded_calls() -> Iterator[tuple[str, tuple[Tensor, ...], list[Tensor]]]:
    """(program text, (q, k, v), captured tensors) of the whole sweep."""
    rng = np.random.default_rng(0)

    def fill(shape: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))

    plain, causal, proven = text_of(None, None, []), text_of(None, ak.causal(), []), proven_program()
    checked = {
        dtype: checked_program(dtype) for dtype in (torch.float32, torch.int32, torch.int64, torch.bool)
    }
    for q_len, kv_len, dim in itertools.product(LENGTHS, LENGTHS, DIMS):
        qkv = fill((1, HEADS, q_len, dim)), fill((1, KV_HEADS, kv_len, dim)), fill((1, KV_HEADS, kv_len, dim))
        yield (plain if dim in (1, 16, 64) else causal), qkv, []
        if dim == 7:
            yield proven, qkv, loads(q_len, kv_len, fill)
        if dim == 1:
            dtype = list(checked)[(q_len + kv_len) % 4]
            yield checked[dtype], qkv, [fill((kv_len,)).to(dtype)]
    # Few queries of 16 bits: keys and values are read as they lie, two channels at once.
    for q_len, kv_len, dim in itertools.product((1, 2, 9), LENGTHS, (31, 32, 64)):
        shapes = (HEADS, q_len, dim), (KV_HEADS, kv_len, dim), (KV_HEADS, kv_len, dim)
        q, k, v = (fill((1, *shape)).half() for shape in shapes)
        yield causal, (q, k, v), []


def sweep_between_guards() -> None:
    memory = [Guarded(4 * HEADS * max(LENGTHS) * max(LENGTHS)) for _ in range(9)]
    for text, qkv, captured in guarded_calls():
        q, _, v = qkv
        free = torch.empty(1, HEADS, q.shape[2], v.shape[3], dtype=q.dtype), torch.empty(1, HEADS, q.shape[2])
        attend(text, *qkv, *free, captured)
        assert torch.isfinite(free[0]).all()
        for side in ("left", "right"):
            given = [
                m.hold(x, side)
                for m, x in zip(memory, (*qkv, *map(torch.zeros_like, free), *captured), strict=False)
            ]
            attend(text, *given[:3], given[3], given[4], given[5:])
            where = f"q {tuple(q.shape)}, kv_len {v.shape[2]}, {side}"
            assert all(m.intact() for m, _ in zip(memory, given, strict=False)), where
            assert torch.equal(given[3], free[0]), where
            assert torch.equal(given[4], free[1]), where
            assert all(torch.equal(a, b) for a, b in zip(given, qkv, strict=False)), where


def empty_buffers() -> None:
    """There is nothing to read in a buffer of no elements: AK601 at a pair that exists, fine where none does."""
    q, k, v = torch.ones(1, 2, 5, 4), torch.ones(1, 2, 19, 4), torch.ones(1, 2, 19, 4)
    for dtype in (torch.float32, torch.int32, torch.int64, torch.bool):
        flat, grid = torch.empty(0, dtype=dtype), torch.empty(3, 0, dtype=dtype)
        for load in (lambda b, i, j, t=flat: t[j], lambda b, i, j, t=flat: t[i], lambda b, i, j, t=flat: t[b],
                     lambda b, i, j, t=flat: t[j - i], lambda b, i, j, t=grid: t[0, j], lambda b, i, j, t=grid: t[j, i]):  # fmt: skip

            def score(s: Any, b: Any, h: Any, i: Any, j: Any, load: Any = load) -> Any:
                return s + load(b, i, j).float()

            assert not ak.attention(q, k, v, score=score, mask=lambda b, h, i, j: (i * j) % 2 == 2).any()
            with pytest.raises(AttnkitError) as refused:
                ak.attention(q, k, v, score=score)
            assert refused.value.code == "AK601"


def run_apart(what: str, isa_name: str) -> None:
    command = [sys.executable, str(Path(__file__)), what, isa_name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (
        f"exit code {done.returncode} (-11: a page outside was touched)\n{done.stderr[-3000:]}"
    )


def test_guard_pages_stop_a_process() -> None:
    """What the sweep relies on: one element further is a fault."""
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import numpy, torch, test_memory
x = test_memory.Guarded(100).hold(torch.ones(25), "right")
assert float(x.sum()) == 25
numpy.lib.stride_tricks.as_strided(x.numpy(), (26,)).sum()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=100, check=False)
    assert done.returncode == -11, done.stderr.decode()[-2000:]


def test_nothing_outside_a_tensor_is_touched(isa_name: str) -> None:
    run_apart("guards", isa_name)


def test_loads_from_an_empty_buffer(isa_name: str) -> None:
    run_apart("empty", isa_name)


# --- offsets beyond 2^31 elements ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vast() -> Tensor:
    """A float32 tensor of 2^32 + 2^30 elements, of which only the pages that are written exist."""
    memory = mmap.mmap(-1, 4 * (2 * BIG + 2**30), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32)


def spread(vast: Tensor, x: Tensor, dim: int, offset: int) -> Tensor:
    """``x`` in the vast memory: elements of ``dim`` lie so far apart that the last is 2^32 elements from the first."""
    strides = list(x.contiguous().stride())
    strides[dim] = 2 * BIG // (x.shape[dim] - 1)
    memory = vast if x.dtype == torch.float32 else vast.view(x.dtype)
    return memory.as_strided(x.shape, strides, offset).copy_(x)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


@pytest.mark.parametrize("dim", [0, 1, 2, 3], ids=["batch", "head", "token", "channel"])
@pytest.mark.parametrize(("q_len", "width"), [(19, 20), (2, 32)])
def test_offsets_of_64_bits(
    q_len: int, width: int, dim: int, vast: Tensor, isa: str, rng: np.random.Generator
) -> None:
    before = resident_bytes()
    shapes = [(2, 2, n, width) for n in (q_len, 35, 35)]
    q, k, v = (torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)) for shape in shapes)
    text = text_of(None, ak.causal(), [])
    near, far = [torch.zeros(shapes[0]), torch.zeros(shapes[0][:3])], []
    attend(text, q, k, v, near[0], near[1], [])
    for i, x in enumerate((q, k, v, *map(torch.zeros_like, near))):
        far.append(spread(vast, x, min(dim, x.dim() - 1), i * 2**20))
    assert all((x.shape[d] - 1) * x.stride(d) > BIG for x in far for d in [min(dim, x.dim() - 1)])
    attend(text, far[0], far[1], far[2], far[3], far[4], [])
    assert torch.equal(far[3], near[0])
    assert torch.equal(far[4], near[1])
    assert resident_bytes() - before < 2**30


@pytest.mark.parametrize("dim", [0, 1, 2, 3], ids=["batch", "head", "token", "channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_at_offsets_of_64_bits(
    dtype: torch.dtype, dim: int, vast: Tensor, isa: str, rng: np.random.Generator
) -> None:
    """Every tensor of the backward by itself is that far apart: what is read, and what is written."""
    shapes = [(2, 2, n, 20) for n in (19, 35, 35)]
    q, k, v, d_o = (
        torch.from_numpy(rng.standard_normal(s, dtype=np.float32)).to(dtype) for s in (*shapes, shapes[0])
    )
    o, lse, d_lse = torch.zeros_like(q), torch.zeros(shapes[0][:3]), torch.ones(shapes[0][:3])
    text = text_of(None, ak.causal(), [])
    attend(text, q, k, v, o, lse, [])
    kernel = prepare(text, str(dtype).removeprefix("torch."), 20, 20, backend="cpu").kernel

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        kernel.backward(*tensors[:5], [], [], *tensors[5:], [], 2)  # type: ignore[attr-defined]
        return tensors[-3:]

    given = (q, k, v, o, lse, d_o, d_lse, torch.zeros(shapes[0]), torch.zeros_like(k), torch.zeros_like(v))
    far = [spread(vast, x, min(dim, x.dim() - 1), i * 2**22 // x.element_size()) for i, x in enumerate(given)]
    for got, want in zip(run(*far), run(*given), strict=True):
        assert want.any()
        assert torch.equal(got, want)


@pytest.mark.parametrize("dim", [1, 2, 3], ids=["head", "token", "channel"])
def test_segments_of_64_bit_offsets(dim: int, vast: Tensor, isa: str, rng: np.random.Generator) -> None:
    """Packed and padded sequences, and more channels than are summed in one stretch."""
    near = [torch.from_numpy(rng.standard_normal((1, 2, n, 140), dtype=np.float32)) for n in (19, 35, 35)]
    far = [spread(vast, x, dim, i * 2**20) for i, x in enumerate(near)]
    assert all((x.shape[dim] - 1) * x.stride(dim) > BIG for x in far)
    cu_q, cu_kv = (torch.tensor(x, dtype=torch.int32) for x in ([0, 4, 4, 19], [0, 0, 20, 35]))
    for lengths in (
        {"cu_seqlens_q": cu_q, "cu_seqlens_kv": cu_kv},
        {"kv_lens": torch.tensor([21], dtype=torch.int32)},
    ):
        want, got = (ak.attention(*x, return_lse=True, **lengths) for x in (near, far))
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_captured_tensors_of_64_bit_offsets(
    dim: int, dtype: torch.dtype, vast: Tensor, isa: str, rng: np.random.Generator
) -> None:
    q, k, v = (torch.from_numpy(rng.standard_normal((1, 2, n, 20), dtype=np.float32)) for n in (19, 35, 35))
    near = torch.from_numpy(rng.integers(0, 5, (19, 35))).to(dtype)
    strides = list(near.stride())
    elements = {torch.int64: BIG + 2**28, torch.bool: 8 * BIG}.get(dtype, 2 * BIG)
    strides[dim] = elements // (near.shape[dim] - 1)
    far = vast.view(torch.uint8 if dtype == torch.bool else dtype)
    far = (far.view(torch.bool) if dtype == torch.bool else far).as_strided(near.shape, strides).copy_(near)
    want, got = (
        ak.attention(q, k, v, score=lambda s, b, h, i, j, t=t: s + t[i, j].float(), return_lse=True)
        for t in (near, far)
    )
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    # Half the indices are outside and must be clamped in 64 bits too.
    want, got = (
        ak.attention(
            q,
            k,
            v,
            score=lambda s, b, h, i, j, t=t: s + t[18 - i, j - i].float(),
            mask=lambda b, h, i, j: j >= i,
        )
        for t in (near, far)
    )
    assert torch.equal(got, want)


# --- strides ---------------------------------------------------------------------------------------------


def in_every_other(x: Tensor) -> Tensor:
    """Channels lie two apart."""
    wide = torch.full((*x.shape[:3], 2 * x.shape[3]), torch.nan)
    wide[..., ::2] = x
    return wide[..., ::2]


def in_a_larger_one(x: Tensor) -> Tensor:
    large = torch.full([n + 3 for n in x.shape], torch.nan)
    inner = large[1:-2, 2:-1, 1:-2, 2:-1]
    return inner.copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channels before tokens": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "reversed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "every other channel": in_every_other,
    "in a larger one": in_a_larger_one,
}


@pytest.mark.parametrize("dim", [1, 16, 20])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_change_no_bit(layout: str, dim: int, isa: str, rng: np.random.Generator) -> None:
    q, k, v = (
        torch.from_numpy(rng.standard_normal((2, h, n, dim), dtype=np.float32))
        for h, n in ((4, 50), (2, 140), (2, 140))
    )
    bias = torch.from_numpy(rng.standard_normal((2, 4, 50, 140), dtype=np.float32))
    for which in itertools.product((False, True), repeat=4):
        q2, k2, v2, bias2 = (
            LAYOUTS[layout](x) if yes else x for yes, x in zip(which, (q, k, v, bias), strict=True)
        )
        want = ak.attention(q, k, v, score=ak.bias(bias), mask=ak.causal(), return_lse=True)
        got = ak.attention(q2, k2, v2, score=ak.bias(bias2), mask=ak.causal(), return_lse=True)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_expanded_tensors(dim: int, isa: str, rng: np.random.Generator) -> None:
    """Stride 0: all elements of one dimension are the same ones."""
    shapes = [(3, 4, 50, 20), (3, 2, 70, 20), (3, 2, 70, 20)]
    expanded = []
    for shape in shapes:
        one = [1 if d == dim else n for d, n in enumerate(shape)]
        expanded.append(torch.from_numpy(rng.standard_normal(one, dtype=np.float32)).expand(shape))
    assert all(x.stride(dim) == 0 for x in expanded)
    for mask in (None, ak.causal()):
        want = ak.attention(*(x.contiguous() for x in expanded), mask=mask, return_lse=True)
        got = ak.attention(*expanded, mask=mask, return_lse=True)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


# --- large results ---------------------------------------------------------------------------------------


def asked_for_large_pages(t: Tensor) -> bool:
    """Whether the system was told so of the memory in the middle of a tensor."""
    middle, inside = t.data_ptr() + t.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if "-" in name and not name.endswith(":"):
            first, end = (int(x, 16) for x in name.split("-"))
            inside = first <= middle < end
        elif inside and name == "VmFlags:":
            return "hg" in rest
    raise AssertionError("no such memory")


def test_large_results_lie_in_large_pages() -> None:
    """Of 4 MB or more. Smaller ones may lie in memory that was asked for so before."""
    k = torch.ones(1, 1, 1, 64)
    q = torch.ones(1, 1, 2**17 + 2**14, 64, requires_grad=True)
    o = ak.attention(q, k, k)
    (dq,) = torch.autograd.grad(o, q, torch.ones_like(q))
    assert asked_for_large_pages(o)
    assert asked_for_large_pages(dq)
    token = torch.ones(4, 8, 1, 64)
    _, (moments, _) = ak.factorizable_attention(token, token, token, causal=True, return_state=True)  # type: ignore[misc]
    assert asked_for_large_pages(moments)


def test_results_in_large_pages_are_those_in_small_ones() -> None:
    """8 MB of each: the heads by themselves, 1 MB, have memory that nothing is asked for."""
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(1, 8, 4096, 64, generator=generator) for _ in range(4)]

    def results(head: slice) -> list[Tensor]:
        q, k, v, d_o = (t[:, head].clone().requires_grad_() for t in tensors)
        o = ak.attention(q, k, v, mask=ak.causal() & ak.window(5))
        return [o, *torch.autograd.grad(o, (q, k, v), d_o)]

    whole = results(slice(None))
    for h in (0, 3, 7):
        for one, other in zip(whole, results(slice(h, h + 1)), strict=True):
            assert torch.equal(one[:, h : h + 1], other)


if __name__ == "__main__":
    torch.set_num_threads(2)
    _engine.set_poison(True)
    _engine.set_isa(sys.argv[2])
    {"guards": sweep_between_guards, "empty": empty_buffers}[sys.argv[1]]()
    assert _engine.last_isa() == sys.argv[2]
    os._exit(0)  # views of the guarded maps may outlive them
