"""Random valid calls of the public functions, and what they must give: the equation in float64, on whole tensors."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import attnkit as ak
from attnkit.backends import reference
from attnkit.ir.text import parse
from attnkit.ops.traced import Traceable, bind

Rng = np.random.Generator


def of(rng: Rng, choices: Any) -> Any:
    return choices[rng.integers(len(choices))]


def randn(rng: Rng, *shape: int) -> Tensor:
    return torch.from_numpy(np.asarray(rng.standard_normal(shape, dtype=np.float32)))


def i32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


class Sizes(NamedTuple):
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    dim: int
    width: int


class Called(NamedTuple):
    """One call: which function, its arguments by name, the sizes they were made for, and what they mean.

    ``meaning`` are the arguments of `attention` that say the same as the text of a call of the op; ``original`` are
    the arguments before any was made worse.
    """

    name: str
    arguments: dict[str, Any]
    sizes: Sizes
    meaning: dict[str, Any]
    original: dict[str, Any]


# --- valid calls -----------------------------------------------------------------------------------------


def _some_sizes(rng: Rng) -> Sizes:
    kv_heads = of(rng, [1, 1, 2])
    return Sizes(
        of(rng, [1, 2]), kv_heads * of(rng, [1, 2, 3]), kv_heads, of(rng, [1, 3, 6, 17, 50]), of(rng, [1, 4, 6, 19, 70]),
        of(rng, [1, 4, 8, 17]), of(rng, [1, 4, 16, 20]),
    )  # fmt: skip


def _cuts(rng: Rng, total: int, parts: int) -> Tensor:
    return i32(0, *sorted(rng.integers(0, total + 1, parts - 1).tolist()), total)


# Scores and masks that mean the same on proxies and on whole tensors of indices.


def _some_score(rng: Rng, s: Sizes) -> Any:
    bias, row = randn(rng, s.q_len, s.kv_len), randn(rng, s.heads)
    cap = ak.param("cap", float(rng.uniform(1, 50)))

    def capped(z: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        c = cap.value if isinstance(z, Tensor) else cap
        return (z / c).tanh() * c

    return of(rng, [
        capped, lambda z, b, h, i, j: z + bias[i, j], lambda z, b, h, i, j: z - row[h].abs() * (i - j).abs(),
        lambda z, b, h, i, j: torch.where(i >= j, z, -z), lambda z, b, h, i, j: z * 0.5 + (b + 1) * 0.1,
    ])  # fmt: skip


def _some_mask(rng: Rng, s: Sizes) -> Any:
    keep = torch.from_numpy(rng.random(s.kv_len) < 0.7)
    ids = torch.from_numpy(rng.integers(0, 3, max(s.q_len, s.kv_len)))
    n = int(rng.integers(1, 9))
    return of(rng, [
        lambda b, h, i, j: j <= i, lambda b, h, i, j: (i - j).abs() <= n, lambda b, h, i, j: keep[j],
        lambda b, h, i, j: ids[i] == ids[j], lambda b, h, i, j: (j + h) % 3 != b, lambda b, h, i, j: j >= 0,
    ])  # fmt: skip


def valid(rng: Rng) -> Called:
    """A call that must succeed."""
    name = of(rng, ["attention", "attention", "dense_attention", "sdpa", "op"])
    s, packed = _some_sizes(rng), name != "sdpa" and rng.integers(4) == 0
    s = s._replace(batch=1 if packed else s.batch, kv_heads=s.heads if name == "sdpa" else s.kv_heads)
    a: dict[str, Any] = {
        "q": randn(rng, s.batch, s.heads, s.q_len, s.dim),
        "k": randn(rng, s.batch, s.kv_heads, s.kv_len, s.dim),
        "v": randn(rng, s.batch, s.kv_heads, s.kv_len, s.width),
    }
    if rng.integers(4) == 0:
        a["scale"] = float(rng.uniform(0.01, 2))
    if name == "sdpa":
        keep = torch.from_numpy(rng.random((s.heads, 1, s.kv_len)) < 0.7)
        a["attn_mask"] = of(rng, [None, randn(rng, s.q_len, s.kv_len), keep])
        a["is_causal"] = a["attn_mask"] is None and bool(rng.integers(2))
        return Called(name, a, s, a, dict(a))
    if packed:
        parts = int(rng.integers(1, 4))
        a["cu_seqlens_q"], a["cu_seqlens_kv"] = _cuts(rng, s.q_len, parts), _cuts(rng, s.kv_len, parts)
    elif rng.integers(4) == 0:
        a["kv_lens"] = torch.from_numpy(rng.integers(0, s.kv_len + 1, s.batch, dtype=np.int32))
    if rng.integers(2):
        a["mask"] = _some_mask(rng, s)
    if rng.integers(2):
        a["score"] = _some_score(rng, s)
    sink = randn(rng, s.heads) if rng.integers(3) == 0 else None
    if name == "dense_attention":
        a |= {"sink": sink, "causal": bool(rng.integers(2)), "window": of(rng, [None, None, (3, 1), (None, 2), (5, None)]),
              "softcap": of(rng, [None, None, 7.0]), "alibi_slopes": of(rng, [None, None, randn(rng, s.heads).abs()])}  # fmt: skip
        return Called(name, a, s, a, dict(a))
    a["normalizer"] = None if sink is None else ak.softmax(sink)
    if name == "attention":
        a["backend"] = of(rng, ["auto", "cpu", "reference"])
    arguments = a if name == "attention" else _op_arguments(a)
    return Called(name, arguments, s, a, dict(arguments))


def _op_arguments(a: dict[str, Any]) -> dict[str, Any]:
    sink = None if a["normalizer"] is None else a["normalizer"].sink
    optional = (a.get(name) for name in ("cu_seqlens_q", "cu_seqlens_kv", "kv_lens"))
    bound = bind(Traceable(a.get("score"), a.get("mask"), a.get("scale"), "softmax", sink, *optional))
    params = [p.current() for p in bound.params]
    tensors = {name: a[name] for name in "qkv"}
    return {
        **tensors,
        "program": bound.text,
        "buffers": bound.buffers,
        "params": params,
        "seed": None,
        "need_lse": True,
    }


# --- what they give --------------------------------------------------------------------------------------


def compare(called: Called, result: Any) -> str:
    """Assert that a result is right as far as that can be told; returns how far."""
    a = called.arguments
    q, v = a["q"], a["v"]
    o = result if isinstance(result, Tensor) else result[0]
    lse = None if called.name == "sdpa" else result[1]
    assert o.dtype == q.dtype
    assert o.shape == (*q.shape[:-1], v.shape[-1])
    if o.device.type == "meta":
        return "meta"
    if o.numel() == 0:
        return "empty"
    found = _of_a_program(a) if called.name == "op" and _changed(called) else _of_a_call(called)
    if found is None:
        return "not comparable"
    want, want_lse, wrong = found
    if not wrong < 1e30:
        return "overflows"
    largest = float(v.detach().double().abs().max()) if v.numel() else 0.0
    dropped = float(a.get("dropout_p") or 0.0)  # a call that was taken has one from 0 to 1
    largest = largest / (1 - dropped) if dropped < 1 else 0.0
    o = o.detach().double().reshape(want.shape)
    assert o.isfinite().all()
    assert o.abs().max() <= largest * 1.0001, "a weighted mean cannot leave the range of its values"
    if wrong > 0.02 or dropped:
        return "within bounds"
    torch.testing.assert_close(o, want, rtol=0, atol=(math.expm1(2 * wrong) + 1e-5) * largest + 1e-37)
    if lse is not None and lse.numel():
        torch.testing.assert_close(lse.detach().double(), want_lse, rtol=1e-5, atol=2 * wrong + 1e-5)
    return "right"


Found = tuple[Tensor, Tensor, float] | None  # o, lse, how wrong a float32 logit may be


def _changed(called: Called) -> bool:
    return any(
        called.arguments[name] is not called.original[name] for name in ("program", "buffers", "params")
    )


def _of_a_program(a: dict[str, Any]) -> Found:
    """By the reference backend: nobody else knows what a damaged text means."""
    tensors = [a[name].double().numpy(force=True) for name in "qkv"]
    if any(b.numel() > 1e6 for b in a["buffers"]):
        return None
    buffers = [b.numpy(force=True) for b in a["buffers"]]
    if not all(
        np.isfinite(x).all() for x in (*tensors, *(b for b in buffers if b.dtype.kind == "f"), a["params"])
    ):
        return None
    program = parse(a["program"])
    o, lse = reference.attend(program, *tensors, buffers, a["params"])
    if not np.isfinite(o).all() or np.isnan(lse).any() or np.isposinf(lse).any():
        return None  # a score overflows
    scale = program.attend.scale or tensors[0].shape[3] ** -0.5
    logits = scale * max(float(abs(x).max(initial=0)) for x in tensors[:2]) ** 2 * tensors[0].shape[3]
    most = float(abs(lse[np.isfinite(lse)]).max(initial=0))
    return torch.from_numpy(o), torch.from_numpy(lse), _rounding(tensors[0].shape[3], logits + most)


def _rounding(dim: int, logits: float) -> float:
    return 4 * 2.0**-24 * (dim + 16) * (1 + logits)


def _of_a_call(called: Called) -> Found:
    a = {
        **called.meaning,
        **{name: x for name, x in called.arguments.items() if name in called.meaning or called.name != "op"},
    }
    q, k, v = (_four(a[name].detach().double()) for name in "qkv")
    sink = a.get("sink") if a.get("normalizer") is None else a["normalizer"].sink
    numbers = [q, k, v, *([] if sink is None else [sink])]
    if not all(x.isfinite().all() for x in numbers):
        return None
    scale = q.shape[3] ** -0.5 if a.get("scale") is None else float(a["scale"])
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    o, lse = q.new_zeros((*q.shape[:3], v.shape[3])), q.new_full(q.shape[:3], -math.inf)
    largest = 0.0
    for b, batch, rows, keys in _segments(a, q.shape[0]):
        q_, k_, v_ = q[batch, :, rows], k[batch, :, keys], v[batch, :, keys]
        z = scale * (q_ @ k_.mT)
        index = _Index(
            torch.tensor(b),
            torch.arange(z.shape[0])[:, None, None],
            torch.arange(z.shape[1])[:, None],
            torch.arange(z.shape[2]),
        )
        try:
            z, seen = (_score if called.name != "sdpa" else _sdpa_score)(a, z, index)
        except Exception:  # a hostile function that runs on proxies alone
            return None
        if not z[seen].isfinite().all():
            return None
        largest = max(
            largest,
            float((scale * (q_.abs() @ k_.abs().mT)).max() if z.numel() else 0),
            float(z[seen].abs().max() if seen.any() else 0),
        )
        z = z.masked_fill(~seen, -math.inf)
        if sink is not None:
            z = torch.cat([z, sink.detach().double().view(-1, 1, 1).expand(-1, z.shape[1], 1)], 2)
        lse[batch, :, rows] = z.logsumexp(2)
        weights = (z - z.logsumexp(2, keepdim=True)).exp().nan_to_num(0.0)
        o[batch, :, rows] = weights[..., : v_.shape[1]] @ v_
    return o, lse, _rounding(q.shape[3], largest)


class _Index(NamedTuple):
    b: Tensor
    h: Tensor
    i: Tensor
    j: Tensor


def _four(t: Tensor) -> Tensor:
    return t[None] if t.dim() == 3 else t.flatten(0, 1) if t.dim() == 5 else t


def _segments(a: dict[str, Any], batch: int) -> Iterator[tuple[int, int, slice, slice]]:
    """(number, batch entry, rows, keys) of every sequence."""
    if a.get("cu_seqlens_q") is not None:
        cu_q, cu_kv = a["cu_seqlens_q"].tolist(), a["cu_seqlens_kv"].tolist()
        for n in range(len(cu_q) - 1):
            yield n, 0, slice(*cu_q[n : n + 2]), slice(*cu_kv[n : n + 2])
        return
    lens = [None] * batch if a.get("kv_lens") is None else a["kv_lens"].tolist()
    for b, n in enumerate(lens):
        yield b, b, slice(None), slice(n)


def _score(a: dict[str, Any], z: Tensor, at: _Index) -> tuple[Tensor, Tensor]:
    """Logits after every modifier, and which pairs exist."""
    position = at.i + z.shape[2] - z.shape[1]
    if a.get("softcap"):
        z = (z / a["softcap"]).tanh() * a["softcap"] if math.isfinite(a["softcap"]) else z
    if a.get("alibi_slopes") is not None:
        slopes = a["alibi_slopes"].detach().double()
        slopes = slopes[at.b] if slopes.dim() == 2 else slopes
        z = z - slopes.view(-1, 1, 1) * (position - at.j).abs()
    if a.get("score") is not None:
        z = torch.as_tensor(a["score"](z, *at)).double().expand(z.shape)
    seen = torch.ones_like(z, dtype=torch.bool)
    if a.get("causal"):
        seen &= at.j <= position
    left, right = a.get("window") or (None, None)
    if left is not None and left >= 0:
        seen &= at.j >= position - left
    if right is not None and right >= 0:
        seen &= at.j <= position + right
    if a.get("mask") is not None:
        seen &= torch.as_tensor(a["mask"](*at)).expand(z.shape)
    return z, seen


def _sdpa_score(a: dict[str, Any], z: Tensor, at: _Index) -> tuple[Tensor, Tensor]:
    seen = at.j <= at.i if a.get("is_causal") else torch.tensor(True)
    mask = a.get("attn_mask")
    if mask is not None:
        mask = mask[at.b] if mask.dim() == 4 else mask
        z, seen = (z, seen & mask) if mask.dtype == torch.bool else (z + mask, seen)
    return z, seen.expand(z.shape)
