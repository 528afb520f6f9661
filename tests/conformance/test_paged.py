"""Keys and values in pages: the same bits as where they lie one after the other, whatever the order of the pages."""

import os
import subprocess
import sys
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
from attnkit.testing import Dims, qkv

CAUSAL: dict[str, Any] = {"mask": lambda p: p.kv_idx <= p.position}
PAGE_SIZES = (16, 32, 64, 128, 1024)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNUSED = (-1, 2**31 - 1)


def paged(
    rng: np.random.Generator, page: int, lens: Tensor, *tensors: Tensor, tokens_first: bool = False
) -> tuple[list[Tensor], Tensor]:
    """The tensors ``[B, H, S, D]`` as pages full of NaN but for tokens that exist, and their table."""
    batch, _, length, _ = tensors[0].shape
    columns = -(-length // page)
    used = torch.from_numpy(rng.permutation(batch * columns + 3))
    table = used[: batch * columns].int().view(batch, columns)
    pages = []
    for x in tensors:
        shape = (
            (len(used), page, x.shape[1], x.shape[3])
            if tokens_first
            else (len(used), x.shape[1], page, x.shape[3])
        )
        held = torch.full(shape, torch.nan, dtype=x.dtype)
        held = held.transpose(1, 2) if tokens_first else held
        for b, n in enumerate(lens.tolist()):
            for j in range(-(-n // page)):
                tokens = x[b, :, j * page : min((j + 1) * page, n)]
                held[table[b, j], :, : tokens.shape[1]] = tokens
        pages.append(held)
    beyond = torch.arange(columns) >= -(-lens[:, None] // page)
    return pages, table.masked_fill(beyond, int(rng.choice(UNUSED)))


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    lens: Tensor,
    score: Any = None,
    mask: Any = None,
    sink: Any = None,
) -> Any:
    text, buffers, _ = bind(Traceable(score, mask, sink=sink, kv_lens=lens, page_table=table), q)
    return torch.ops.attnkit.attend(q, k, v, text, buffers, [], None, True)


def equal(got: tuple[Tensor, Tensor], want: Any) -> None:
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def tensors(rng: np.random.Generator, *dims: int) -> list[Tensor]:
    return [torch.from_numpy(x) for x in qkv("gaussian", rng, Dims(*dims))]


# --- against the equation --------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("q_len", [1, 5, 40])
def test_against_the_oracle(page: int, q_len: int, isa: str, rng: np.random.Generator, compare: Any) -> None:
    lens = torch.tensor([200, 130, 64], dtype=torch.int32)

    def through_pages(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Any:
        (k, v), table = paged(rng, page, lens, k, v)
        return ak.attention(q, ak.KVCache.from_pages(k, v, table, lens), **keywords)

    x = qkv("gaussian", rng, Dims(3, 4, 2, q_len, 200, 32, 48))
    compare(*x, oracle={**CAUSAL, "kv_lens": lens.numpy()}, mask=ak.causal(), function=through_pages)


@pytest.mark.parametrize("page", [16, 64])
def test_the_reference_reads_pages(page: int, rng: np.random.Generator) -> None:
    lens = torch.tensor([100, 0, 64], dtype=torch.int32)
    q, k, v = tensors(rng, 3, 4, 2, 2, 100, 8, 12)
    want = ak.attention(q, k, v, kv_lens=lens, backend="reference", return_lse=True)
    (k, v), table = paged(rng, page, lens, k, v)
    cache = ak.KVCache.from_pages(k, v, table, lens)
    equal(ak.attention(q, cache, backend="reference", return_lse=True), want)  # type: ignore[arg-type]


# --- bit for bit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "dims",
    [(1, 4, 1, 64, 64), (1, 8, 2, 128, 128), (1, 4, 2, 40, 24), (3, 4, 4, 64, 128), (5, 8, 2, 33, 17),
     (16, 4, 1, 64, 64), (40, 2, 2, 64, 64), (130, 2, 1, 128, 64)],
    ids=str,
)  # fmt: skip
def test_pages_change_no_bit(
    dims: tuple[int, ...], dtype: torch.dtype, isa: str, rng: np.random.Generator
) -> None:
    """Decode and prefill; pages smaller and larger than a tile; whichever of heads and tokens comes first in a page."""
    q_len, heads, kv_heads, head_dim, v_head_dim = dims
    lens = torch.tensor([300, 77, 0 if q_len == 1 else 130, 256], dtype=torch.int32)
    q, k, v = (x.to(dtype) for x in tensors(rng, 4, heads, kv_heads, q_len, 300, head_dim, v_head_dim))
    masks: tuple[Any, ...] = (None, ak.causal(), ak.window(70, 0))
    for i, page in enumerate(PAGE_SIZES):
        (k_pages, v_pages), table = paged(rng, page, lens, k, v, tokens_first=i % 2 == 1)
        mask = masks[i % 3]
        want = ak.attention(q, k, v, kv_lens=lens, mask=mask, return_lse=True)
        equal(run(q, k_pages, v_pages, table, lens, mask=mask), want)


def softcap_and_bias(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    return 5 * torch.tanh(s / 5) - (i - j).abs() * 0.01


@pytest.mark.parametrize("q_len", [1, 33])
def test_scores_masks_and_sinks(q_len: int, isa: str, rng: np.random.Generator) -> None:
    lens = torch.tensor([500, 65], dtype=torch.int32)
    q, k, v = tensors(rng, 2, 4, 2, q_len, 500, 32, 32)
    sink = torch.from_numpy(rng.standard_normal(4).astype(np.float32))
    odd = torch.from_numpy(rng.random(500) < 0.5)
    calls: list[dict[str, Any]] = [
        {"score": softcap_and_bias}, {"mask": lambda b, h, i, j: odd[j]}, {"sink": sink},
        {"score": softcap_and_bias, "mask": ak.causal(), "sink": sink},
    ]  # fmt: skip
    (k_pages, v_pages), table = paged(rng, 16, lens, k, v)
    for call in calls:
        keywords = {name: value for name, value in call.items() if name != "sink"}
        if "sink" in call:
            keywords["normalizer"] = ak.softmax(sink)
        want = ak.attention(q, k, v, kv_lens=lens, return_lse=True, **keywords)
        equal(run(q, k_pages, v_pages, table, lens, **call), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_and_batch(dtype: torch.dtype, isa: str, rng: np.random.Generator) -> None:
    """Stretches of 1024 keys shared by threads; each row alone, with a table of its own."""
    lens = torch.tensor([3000, 1100, 17], dtype=torch.int32)
    q, k, v = (x.to(dtype) for x in tensors(rng, 3, 4, 1, 1, 3000, 64, 64))
    (k_pages, v_pages), table = paged(rng, 64, lens, k, v)
    torch.set_num_threads(1)
    want = run(q, k_pages, v_pages, table, lens)
    equal(want, ak.attention(q, k, v, kv_lens=lens, return_lse=True))
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        equal(run(q, k_pages, v_pages, table, lens), want)
    for b in range(3):
        one = slice(b, b + 1)
        equal(run(q[one], k_pages, v_pages, table[one], lens[one]), (want[0][one], want[1][one]))


def test_rows_may_share_pages(isa: str, rng: np.random.Generator) -> None:
    """A common beginning, held once; and a table whose rows and columns lie apart."""
    lens = torch.tensor([128, 128], dtype=torch.int32)
    q, k, v = tensors(rng, 2, 2, 2, 3, 128, 16, 16)
    for x in (k, v):
        x[1, :, :96] = x[0, :, :96]
    (k_pages, v_pages), table = paged(rng, 32, lens, k, v)
    table[1, :3] = table[0, :3]
    apart = torch.full((4, 2, 2), -7, dtype=torch.int32)
    apart[:, :, 1] = table.T
    want = ak.attention(q, k, v, mask=ak.causal(), kv_lens=lens, return_lse=True)
    equal(run(q, k_pages, v_pages, apart[:, :, 1].T, lens, mask=ak.causal()), want)


# --- what is not there -----------------------------------------------------------------------------------


@pytest.mark.parametrize("q_len", [1, 20])
def test_pages_that_do_not_exist(q_len: int, isa_name: str, rng: np.random.Generator) -> None:
    """An entry that a token needs is refused before anything is read; the others may hold anything."""
    lens = torch.tensor([100, 33], dtype=torch.int32)
    q, k, v = tensors(rng, 2, 4, 2, q_len, 100, 32, 32)
    (k_pages, v_pages), table = paged(rng, 16, lens, k, v)
    for b, j in ((0, 0), (0, 6), (1, 2)):
        for wrong in (-1, len(k_pages), 2**31 - 1, -(2**31)):
            broken = table.clone()
            broken[b, j] = wrong
            with pytest.raises(AttnkitError) as refused:
                run(q, k_pages, v_pages, broken, lens)
            assert refused.value.code == "AK602"
            assert f"page_table[{b}, {j}]" in str(refused.value)
            assert str(wrong) in str(refused.value)
            with pytest.raises(AttnkitError, match="AK602"):
                ak.attention(q, ak.KVCache.from_pages(k_pages, v_pages, broken, lens), backend="reference")


def test_wrong_pages(rng: np.random.Generator) -> None:
    lens = torch.tensor([100, 33], dtype=torch.int32)
    q, k, v = tensors(rng, 2, 4, 2, 1, 100, 32, 32)
    (k_pages, v_pages), table = paged(rng, 16, lens, k, v)
    for code, change in {
        "AK403": {"k": k_pages[:, :, :12], "v": v_pages[:, :, :12]},  # not a power of two
        "AK602": {"lens": torch.tensor([113, 33], dtype=torch.int32)},
        "AK210": {"table": table.long()},
        "AK407": {"k": k_pages[:, :1].expand(-1, 3, -1, -1), "v": v_pages[:, :1].expand(-1, 3, -1, -1)},
    }.items():
        given: Any = {"k": k_pages, "v": v_pages, "table": table, "lens": lens, **change}
        with pytest.raises(AttnkitError, match=code):
            run(q, given["k"], given["v"], given["table"], given["lens"])
    with pytest.raises(AttnkitError, match="AK602"):
        run(q, k_pages, v_pages, table[:1], lens)
    with pytest.raises(AttnkitError, match="AK503"):
        run(q.requires_grad_(), k_pages, v_pages, table, lens)


def test_nothing_outside_the_pages_is_touched(isa_name: str, rng: np.random.Generator) -> None:
    """Pages and table between guard pages, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, isa_name], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr[-3000:]}"


def between_guards() -> None:
    sys.path.append(str(Path(__file__).parents[1] / "robust"))
    from test_memory import Guarded

    rng = np.random.default_rng(0)
    for dtype in DTYPES:
        memory = [Guarded(1 << 18) for _ in range(4)]
        for page, q_len, dim in (
            (16, 1, 64),
            (16, 3, 40),
            (32, 20, 64),
            (64, 1, 33),
            (128, 130, 16),
            (16, 100, 64),
        ):
            for kv_len in (1, 16, 33, 130, 257):
                lens = torch.tensor([kv_len], dtype=torch.int32)
                q, k, v = (x.to(dtype) for x in tensors(rng, 1, 2, 1, q_len, kv_len, dim, dim))
                want = ak.attention(q, k, v, kv_lens=lens, mask=ak.causal(), return_lse=True)
                (k, v), table = paged(rng, page, lens, k, v)
                for side in ("left", "right"):
                    held = [m.hold(x, side) for m, x in zip(memory, (q, k, v, table), strict=True)]
                    equal(run(*held, lens, mask=ak.causal()), want)  # type: ignore[arg-type]
    os._exit(0)


if __name__ == "__main__":
    _engine.set_isa(sys.argv[1])

    between_guards()
