"""Gradients where memory ends, where nothing is seen, and whatever else is in the call.

The sweep between guard pages runs in a process of its own: this file run as a script, ``python test_gradients.py ISA``.
"""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit import _engine
from attnkit.errors import AttnkitError
from attnkit.runtime import prepare

HEADS, KV_HEADS, DIM, WIDTH = 4, 2, 16, 20
POISONS = {"nan": float("nan"), "inf": float("inf"), "huge": 1e38}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tensors(q_len: int, kv_len: int, batch: int = 2) -> list[Tensor]:
    """q, k, v and the cotangent of o."""
    return [
        normal(1, batch, HEADS, q_len, DIM), normal(2, batch, KV_HEADS, kv_len, DIM),
        normal(3, batch, KV_HEADS, kv_len, WIDTH), normal(4, batch, HEADS, q_len, WIDTH),
    ]  # fmt: skip


def gradients(
    q: Tensor, k: Tensor, v: Tensor, d_o: Tensor, others: tuple[Tensor, ...] = (), **how: Any
) -> list[Tensor]:
    q, k, v = (t.clone().requires_grad_() for t in (q, k, v))
    o = ak.attention(q, k, v, **how)
    return list(torch.autograd.grad(o, (q, k, v, *others), d_o))


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


# --- what is not seen ---------------------------------------------------------------------------------------

MASKS: dict[str, Callable[..., Any]] = {
    "causal": lambda b, h, i, j: j <= i,
    "stripes": lambda b, h, i, j: (j <= i) & (j % 4 != 1) & (i % 5 != 3),
    "late": lambda b, h, i, j: (j > 20) & (i > 7),
    "one head": lambda b, h, i, j: (h == 1) & (j <= i),
}
SCORES: dict[str, Callable[..., Any] | None] = {
    "plain": None,
    "softcap": lambda s, b, h, i, j: 3.0 * torch.tanh(s / 3.0),
    "square": lambda s, b, h, i, j: s * s - 0.5 * abs(i - j),
}


@DTYPES
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("mask", MASKS)
def test_what_no_pair_reads_reaches_no_gradient(
    mask: str, poison: str, score: str, dtype: torch.dtype, isa: str
) -> None:
    q_len, kv_len = 107, 131
    clean = [t.to(dtype) for t in tensors(q_len, kv_len)]
    b, h, i, j = torch.meshgrid(*(torch.arange(n) for n in (2, HEADS, q_len, kv_len)), indexing="ij")
    visible = MASKS[mask](b, h, i, j).expand(2, HEADS, q_len, kv_len)
    dead_q = ~visible.any(3)
    dead_kv = ~visible.unflatten(1, (KV_HEADS, -1)).any(3).any(2)
    assert mask == "one head" or (dead_q.any() or dead_kv.any())
    dirty = [t.clone() for t in clean]
    for t, dead in zip(dirty, (dead_q, dead_kv, dead_kv, dead_q), strict=True):
        t[dead] = POISONS[poison]
    how = {"mask": MASKS[mask], "score": SCORES[score]}
    want, got = gradients(*clean, **how), gradients(*dirty, **how)
    if dtype == torch.float32:
        assert all(map(torch.equal, got, want))
    for g, w in zip(got, want, strict=True):  # such tiles may be computed in float32
        assert (g - w).abs().max() <= 2**-6 * w.abs().max()
    for g, dead in zip(got, (dead_q, dead_kv, dead_kv), strict=True):
        assert not g[dead].any()
        assert g[~dead].any()


@pytest.mark.parametrize("poison", ["nan", "inf"])
def test_what_a_pair_reads_reaches_its_gradients(poison: str, isa: str) -> None:
    """A cotangent that is not finite spoils the row that it belongs to, what that row sees, and nothing else."""
    q, k, v, d_o = tensors(40, 40)
    d_o[:, :, 17] = POISONS[poison]
    clean = gradients(*tensors(40, 40), mask=MASKS["causal"])
    dq, dk, dv = gradients(q, k, v, d_o, mask=MASKS["causal"])
    spoilt = [torch.arange(40) == 17, torch.arange(40) <= 17, torch.arange(40) <= 17]
    for g, want, rows in zip((dq, dk, dv), clean, spoilt, strict=True):
        assert not g[:, :, rows].isfinite().any()
        assert torch.equal(g[:, :, ~rows], want[:, :, ~rows])


# --- what else is in the call --------------------------------------------------------------------------------

LENGTHS = [(1, 1), (130, 97), (0, 5), (16, 33), (7, 0), (96, 200)]


def packed() -> tuple[list[Tensor], Tensor, Tensor]:
    q_lens, kv_lens = zip(*LENGTHS, strict=True)
    cu = [torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32) for n in (q_lens, kv_lens)]
    return tensors(sum(q_lens), sum(kv_lens), batch=1), cu[0], cu[1]


@pytest.mark.parametrize("score", SCORES)
def test_packed_sequences_are_what_they_are_alone(score: str, isa: str) -> None:
    (q, k, v, d_o), cu_q, cu_kv = packed()
    how = {"mask": MASKS["causal"], "score": SCORES[score]}
    dq, dk, dv = gradients(q, k, v, d_o, cu_seqlens_q=cu_q, cu_seqlens_kv=cu_kv, **how)
    for n, (q_len, kv_len) in enumerate(LENGTHS):
        rows, keys = slice(int(cu_q[n]), int(cu_q[n + 1])), slice(int(cu_kv[n]), int(cu_kv[n + 1]))
        alone = gradients(q[:, :, rows], k[:, :, keys], v[:, :, keys], d_o[:, :, rows], **how)
        for part, want in zip((dq[:, :, rows], dk[:, :, keys], dv[:, :, keys]), alone, strict=True):
            assert torch.equal(part, want), (q_len, kv_len)


@DTYPES
def test_padded_batches_are_what_they_are_alone(dtype: torch.dtype, isa: str) -> None:
    q, k, v, d_o = (t.to(dtype) for t in tensors(50, 150, batch=4))
    lens = [150, 1, 0, 97]
    for b, n in enumerate(lens):
        k[b, :, n:] = v[b, :, n:] = float("nan")
    found = gradients(q, k, v, d_o, kv_lens=torch.tensor(lens, dtype=torch.int32), mask=ak.window(40, 60))
    for b, n in enumerate(lens):
        one = slice(b, b + 1)
        alone = gradients(q[one], k[one, :, :n], v[one, :, :n], d_o[one], mask=ak.window(40, 60))
        for part, want in zip(
            (found[0][one], found[1][one, :, :n], found[2][one, :, :n]), alone, strict=True
        ):
            assert torch.equal(part, want)
        assert not found[1][one, :, n:].any()
        assert not found[2][one, :, n:].any()


@DTYPES
def test_strides_change_no_bit(dtype: torch.dtype, isa: str) -> None:
    plain = [
        torch.cat([t, t, t, t], -1)[..., :64].to(dtype) for t in tensors(70, 70)
    ]  # whole vectors of any kind
    want = gradients(*plain, mask=MASKS["stripes"])
    turned = [t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for t in plain]
    merged = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in plain]
    odd = [
        torch.nn.functional.pad(t, (1, 0))[..., 1:] for t in plain
    ]  # pairs of channels are aligned in no row
    for form in (turned, merged, odd):
        q, k, v = (t.detach().requires_grad_() for t in form[:3])
        o = ak.attention(q, k, v, mask=MASKS["stripes"])
        assert all(map(torch.equal, torch.autograd.grad(o, (q, k, v), form[3]), want))


def test_loads_outside_of_a_buffer_are_errors_only_where_a_pair_exists(isa: str) -> None:
    q, k, v, d_o = tensors(40, 40)
    table = torch.zeros(30, requires_grad=True)

    def score(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return s + table[i - j]

    found = gradients(q, k, v, d_o, (table,), score=score, mask=lambda b, h, i, j: (j <= i) & (i - j < 30))
    assert found[3].count_nonzero() == 30
    with pytest.raises(AttnkitError, match="AK601"):
        gradients(q, k, v, d_o, (table,), score=score, mask=MASKS["causal"])


# --- memory --------------------------------------------------------------------------------------------------

SIZES = [1, 15, 16, 17, 48, 95, 96, 97, 129]
TEXT = """attnkit 1
program (q: bhsd, k: bhsd, v: bhsd) buffers(b0: f32[1]) {
  o, lse = attend(q, k, v, scale = default) {
    score = s + b0[kv_idx]
    mask = kv_idx <= q_idx + (kv_len - q_len)
    normalizer = softmax
  }
  return o, lse
}
"""


@pytest.mark.parametrize("level", _engine.isa_levels())
def test_nothing_outside_the_tensors_is_touched(level: str) -> None:
    done = subprocess.run(
        [sys.executable, __file__], env={**os.environ, "ATTNKIT_ISA": level}, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == f"{level} {len(SIZES) ** 2 * 4 * 2 * 2}\n"


def sweep() -> None:
    from test_memory import Guarded

    _engine.set_poison(True)
    places = [Guarded(2 * HEADS * max(SIZES) * 64 * 4) for _ in range(10)]
    count = 0
    cases = itertools.product(SIZES, SIZES, (7, 16, 33, 64), ("left", "right"), ("float32", "bfloat16"))
    for q_len, kv_len, dim, side, dtype in cases:
        q, k, v, d_o = (
            normal(s, 1, h, n, dim).to(getattr(torch, dtype))
            for s, h, n in ((1, 2, q_len), (2, 1, kv_len), (3, 1, kv_len), (4, 2, q_len))
        )
        bias, lse, o = normal(5, kv_len), torch.empty(1, 2, q_len), torch.empty_like(d_o)
        kernel: Any = prepare(TEXT, dtype, dim, dim, backend="cpu").kernel
        kernel(q, k, v, o, lse, [bias], [], 2)
        zeros = [torch.zeros_like(t) for t in (q.float(), k, v, bias)]
        everything = (q, k, v, o, lse, bias, d_o, *zeros)
        held = [place.hold(t, side) for place, t in zip(places, everything[:10], strict=True)]
        q, k, v, o, lse, bias, d_o, dq, dk, dv = held
        kernel.backward(q, k, v, o, lse, [bias], [], d_o, None, dq, dk, dv, [zeros[3]], 2)
        assert all(place.intact() for place in places), (q_len, kv_len, dim, side)
        assert all(t.isfinite().all() for t in (dq, dk, dv))
        count += 1
    sys.stdout.write(f"{_engine.last_isa()} {count}\n")


if __name__ == "__main__":
    sweep()
