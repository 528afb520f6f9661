"""What the engine's analysis knows of captured tensors, long ones and maps of pairs, against all of their elements."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

import attnkit as ak
from attnkit.analysis.structure import EMPTY, FULL, PARTIAL

DTYPES = (torch.int32, torch.int64, torch.float32, torch.bool)


def kinds(visible: torch.Tensor, q_block: int, kv_block: int) -> torch.Tensor:
    """The exact kind of every block of bool ``[B, H, q_len, kv_len]``."""
    bands = [
        torch.stack([p.any(-1).any(-1).int() + p.all(-1).all(-1).int() for p in band.split(kv_block, -1)], -1)
        for band in visible.split(q_block, -2)
    ]
    return torch.stack(bands, -2).to(torch.uint8)


def check(
    mask: Callable[..., Any], sizes: tuple[int, ...], q_block: int, kv_block: int, exact: Any = True
) -> None:
    index = [torch.arange(n).view([-1 if at == k else 1 for k in range(4)]) for at, n in enumerate(sizes)]
    want = kinds(torch.as_tensor(mask(*index)).expand(sizes), q_block, kv_block)
    found = ak.block_mask(mask, *sizes, q_block=q_block, kv_block=kv_block).to_dense()
    wrong = (found != want) & ((found != PARTIAL) | torch.tensor(exact))
    assert not wrong.any(), f"block {wrong.nonzero()[0].tolist()}: {found[wrong][0]}, is {want[wrong][0]}"


def values(draw: st.DrawFn, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Stretches of equal values and noise, NaN and infinity among the floats; as a view with other strides or not."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    step = draw(st.sampled_from([1, 1, 3]))
    full = (*shape[:-1], shape[-1] * step)
    x = torch.randint(-3, 4, full, generator=generator)
    if draw(st.booleans()):
        x = x.sort(-1).values
    noisy = torch.rand(full, generator=generator) < draw(st.sampled_from([0.0, 0.01, 1.0]))
    x = torch.where(noisy, x, x[..., :1])
    if dtype == torch.float32:
        x = torch.where(x == 3, torch.inf, torch.where(x == -3, torch.nan, x.float()))
        if draw(st.integers(0, 5)) == 0:
            x[..., : shape[-1] // 2] = torch.nan
    x = x.to(dtype)[..., ::step]
    if len(shape) > 1 and draw(st.booleans()):
        x = x.mT.contiguous().mT
    return x


def truth_of(x: Any, threshold: int) -> Any:
    return x if x.dtype in (torch.bool, "bool") else x > threshold


@st.composite
def lines(draw: st.DrawFn) -> Any:
    dtype, length = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([1, 64, 65, 300, 2100, 5000]))
    return values(draw, dtype, length), draw(st.integers(-3, 3)), draw(st.sampled_from([7, 64, 128, 1000]))


@given(lines(), st.booleans())
def test_lines(drawn: Any, queries: bool) -> None:
    x, threshold, block = drawn
    sizes = (1, 1, len(x), 1) if queries else (1, 1, 1, len(x))
    exact = not x.isnan().any()  # of a stretch that holds NaN nothing is known to be always true
    check(lambda b, h, i, j: truth_of(x[i] if queries else x[j], threshold), sizes, block, block, exact)
    check(lambda b, h, i, j: ~truth_of(x[i] if queries else x[j], threshold), sizes, block, block, exact)


@given(st.data(), st.sampled_from([torch.int32, torch.int64]), st.sampled_from([1, 300, 700]))
def test_pairs_of_ids(data: st.DataObject, dtype: torch.dtype, q_len: int) -> None:
    ids = data.draw(st.composite(lambda draw: values(draw, dtype, 2, 900))())
    check(lambda b, h, i, j: ids[b, i + 100] == ids[b, j], (2, 1, q_len, 900), 64, 128, exact=False)


@given(st.data(), st.sampled_from(DTYPES), st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 3)]))
def test_maps_of_pairs(data: st.DataObject, dtype: torch.dtype, shared: tuple[int, int]) -> None:
    x = data.draw(st.composite(lambda draw: values(draw, dtype, *shared, 90, 210))())
    q_block, kv_block = data.draw(st.sampled_from([(16, 16), (64, 7), (100, 300), (1, 210)]))

    def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
        return truth_of(x[b if shared[0] > 1 else 0, h if shared[1] > 1 else 0, i, j], 0)

    check(mask, (2, 3, 90, 210), q_block, kv_block, exact=not x.isnan().any())


@given(st.data(), st.sampled_from([(32, 16), (30, 50), (128, 128)]))
def test_maps_of_blocks(data: st.DataObject, cell: tuple[int, int]) -> None:
    rows, columns = -(-200 // cell[0]), -(-333 // cell[1])
    x = data.draw(st.composite(lambda draw: values(draw, torch.bool, 1, 2, rows, columns))())
    q_block, kv_block = data.draw(st.sampled_from([cell, (16, 16), (64, 100)]))
    check(lambda b, h, i, j: x[0, h, i // cell[0], j // cell[1]], (1, 2, 200, 333), q_block, kv_block)


def test_indices_that_are_no_lines() -> None:
    """Two dimensions that vary with the key, or with the query."""
    table = torch.arange(40 * 8).view(40, 8) % 37
    check(lambda b, h, i, j: table[j // 8, j % 8] < 12, (1, 1, 10, 320), 10, 64, exact=False)
    check(lambda b, h, i, j: table[i // 8, i % 8] < 12, (1, 1, 320, 10), 64, 10)
    check(lambda b, h, i, j: table[i // 8, (i + j) % 8] < 12, (1, 1, 320, 50), 64, 10, exact=False)
    distance = torch.arange(-99, 100).abs()
    check(lambda b, h, i, j: distance[i - j + 99] < 30, (1, 1, 100, 100), 16, 16)
    hops = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    check(lambda b, h, i, j: hops[hops[j]] < 150, (1, 1, 1, 300), 1, 100, exact=False)


def test_all_of_a_kind() -> None:
    """A map of pairs that is FULL or EMPTY everywhere is one run a row, however it is laid out."""
    for fill, kind in ((True, FULL), (False, EMPTY)):
        for x in (
            torch.full((256, 256), fill),
            torch.full((256, 512), fill)[:, ::2],
            torch.tensor(fill).expand(256, 256),
        ):
            found = ak.block_mask(lambda b, h, i, j, x=x: x[i, j], 1, 1, 256, 256)
            assert (found.to_dense() == kind).all()
            assert len(found.structure.runs) == 2 * fill


def test_nothing_is_kept_between_calls() -> None:
    """The contents of a captured tensor are those of this call, not of the last one."""
    ids = torch.zeros(1024, dtype=torch.int64)
    mask = ak.document(ids)
    assert ak.block_mask(mask, 1, 1, 1024, 1024).counts.full == 64
    ids[512:] = 1
    assert ak.block_mask(mask, 1, 1, 1024, 1024).counts == (32, 32, 0)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_attention_over_maps_and_documents(threads: int, rng: Any) -> None:
    """The tiles of a call, by the same analysis: as if every pair had been looked at, on any number of threads."""
    q, k, v = (torch.from_numpy(rng.standard_normal((2, 4, 700, 16), dtype="float32")) for _ in range(3))
    ids = torch.from_numpy(rng.integers(0, 9, (2, 700))).sort(-1).values
    blocks = torch.from_numpy(rng.random((4, 22, 22)) < 0.5)
    pairs = torch.from_numpy(rng.random((700, 700)) < 0.5).tril()
    v[:, :, 3] = torch.nan  # a key that some see: whoever does not must not notice
    v[:, :, 650] = torch.inf

    def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (ids[b, i] == ids[b, j]) & blocks[h, i // 32, j // 32] | pairs[i, j] & (j > 200) & (j != 3) & (
            j != 650
        )

    torch.set_num_threads(threads)
    o = ak.attention(q, k, v, mask=mask)
    index = [
        torch.arange(n).view([-1 if at == k else 1 for k in range(4)])
        for at, n in enumerate((2, 4, 700, 700))
    ]
    z = (q.double() @ k.double().mT / 4).masked_fill(~mask(*index), -torch.inf)
    weights = z.softmax(-1).nan_to_num(0.0)
    finite = v.double().nan_to_num(0.0, 0.0)
    seen = mask(*index).expand(2, 4, 700, 700)
    want = weights @ finite
    bad = seen[..., 3] | seen[..., 650]
    torch.testing.assert_close(o[~bad].double(), want[~bad], atol=2e-6, rtol=1e-5)
    assert not torch.isfinite(o[bad]).any()
