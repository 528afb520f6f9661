"""``ak.aaren_attention`` and ``ak.additive_attention``: one learned query, and the softmax of every prefix, as a scan.

A running maximum makes the softmax of every prefix a recurrence with a state of one row, which decays by what the maximum
rises::

    m_t = max(m_{t-1}, s_t)      S_t = exp(m_{t-1} - m_t) S_{t-1} + exp(s_t - m_t) v_t      and z_t so of 1;      o_t = S_t / z_t

m is a constant to derivatives: results do not depend on it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnkit.errors import error
from attnkit.ops.check import check_flag, check_float, check_scale, check_tensor, shape_of
from attnkit.ops.dense import dense_attention
from attnkit.ops.linear import linear_attention

State = tuple[Tensor, Tensor]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def aaren_attention(
    query: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, State]:
    """Attention as a recurrent network (Aaren, arXiv 2405.13956): the softmax of every prefix, of one query for all tokens.

    Causal attention whose queries are equal, in linear time and with a state of constant size::

        o_i = sum_{j <= i} exp(s_j - lse_i) v_j        lse_i = log sum_{j <= i} exp(s_j)        s_j = scale * query . k_j

    Args:
        query: ``[H, D]``, one for each head.
        k: ``[B, H, S, D]``, float32, bfloat16 or float16; logits and sums are float32.
        v: ``[B, H, S, Dv]``.
        scale: finite and positive; None is ``D ** -0.5``.
        initial_state: the ``o [B, H, Dv]`` and ``lse [B, H]`` of what came before, float32: an earlier call's state.
        return_state: also return the state after the last token.

    Returns:
        ``o [B, H, S, Dv]`` in v's dtype, or ``(o, (o_S, lse_S))``. States of two stretches combine as `merge` has it.

    Raises:
        AttnkitError: AK4xx, an argument is wrong; AK502, AK503, no kernel for these tensors; AK603, out of memory.
    """
    _check(query, "query", (("k", k), ("v", v)))
    check_flag("return_state", return_state)
    if v.shape[:3] != k.shape[:3]:
        raise error(
            "AK403", where="v", given=shape_of(v), allowed=f"[{', '.join(map(str, k.shape[:3]))}, Dv]"
        )
    scale = check_scale(scale)
    logits = (k.shape[3] ** -0.5 if scale is None else scale) * (k.float() @ query.float()[:, :, None])[
        ..., 0
    ]
    before = _before(initial_state, v)
    with torch.no_grad():
        start = logits.new_full(logits.shape[:2], -math.inf) if before is None else before[1]
        highest = torch.cat([start[..., None], logits], 2).cummax(2).values
        fall = highest[..., :-1] - highest[..., 1:]
        gate = fall.masked_fill(highest[..., 1:] == -math.inf, 0.0)  # as long as nothing has weight
        pivot = highest.masked_fill(highest == -math.inf, 0.0)
    weights = (logits - pivot[..., 1:]).exp()[..., None]
    initial = None if before is None else _state_of(*before, pivot[..., :1])
    o, (state, norm) = linear_attention(
        torch.ones_like(weights[:, :, :1]).expand_as(weights), weights, v.float(), gate=gate,
        feature_map="identity", normalize=True, scale=1.0, initial_state=initial, return_state=True,
    )  # fmt: skip
    o = o.to(v.dtype)
    if not return_state:
        return o
    some = norm > 0
    last = torch.where(some, state[:, :, 0] / norm.where(some, 1.0), 0.0)
    lse = (pivot[..., -1:] + norm.where(some, 1.0).log()).masked_fill(~some, -math.inf)
    return o, (last, lse[..., 0])


def additive_attention(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, *, causal: bool = False, scale: float | None = None
) -> Tensor:
    """Linear additive attention (LadaGAN; the Fastformer family): one softmax over the tokens, then products::

        a_n = softmax_n(scale * w . q_n)        g = sum_n a_n q_n        o_n = k_n * g * v_n        (element-wise)

    Args:
        q: ``[B, H, S, D]``, float32, bfloat16 or float16; k and v alike.
        k: as q.
        v: as q.
        w: ``[H, D]``, one for each head.
        causal: whether token n gets the g of the tokens up to n, which is `aaren_attention` of q.
        scale: finite and positive; None is ``D ** -0.5``.

    Returns:
        ``[B, H, S, D]`` in q's dtype.

    Raises:
        AttnkitError: as `aaren_attention`.
    """
    _check(w, "w", (("q", q), ("k", k), ("v", v)))
    check_flag("causal", causal)
    for name, t in (("k", k), ("v", v)):
        if t.dtype != q.dtype:
            raise error("AK404", where=name, given=str(t.dtype), allowed=f"the dtype of q, {q.dtype}")
        if t.shape != q.shape:
            raise error("AK403", where=name, given=shape_of(t), allowed=f"{shape_of(q)}, as q")
    g: Any
    if causal:
        g = aaren_attention(w, q, q, scale=scale)
    else:
        queries = w.to(q.dtype)[None, :, None].expand(q.shape[0], -1, -1, -1)
        g = dense_attention(queries, q, q, scale=scale)
    products: Tensor = k * g * v
    return products


def _check(query: Tensor, name: str, tokens: tuple[tuple[str, Tensor], ...]) -> None:
    first = tokens[0][1]
    for what, t in (*tokens, (name, query)):
        check_tensor(what, t, getattr(first, "device", None))
        if t.dtype not in _DTYPES:
            raise error("AK404", where=what, given=str(t.dtype), allowed="float32, bfloat16 or float16")
    for what, t in tokens:
        if t.dim() != 4:
            raise error("AK403", where=what, given=shape_of(t), allowed="[B, H, S, D]")
    if query.shape != (first.shape[1], first.shape[3]):
        allowed = f"[{first.shape[1]}, {first.shape[3]}], a row for each head"
        raise error("AK403", where=name, given=shape_of(query), allowed=allowed)


def _before(state: Any, v: Tensor) -> State | None:
    """An initial state, checked."""
    if state is None:
        return None
    if not isinstance(state, (tuple, list)) or len(state) != 2:
        raise error("AK402", where="initial_state", given=type(state).__name__, allowed="the pair (o, lse)")
    sizes = ((*v.shape[:2], v.shape[3]), v.shape[:2])
    for t, size in zip(state, sizes, strict=True):
        check_float("initial_state", t, v.device)
        if t.shape != size:
            raise error("AK403", where="initial_state", given=shape_of(t), allowed=str(list(size)))
    return state[0].float(), state[1].float()


def _state_of(o: Tensor, lse: Tensor, pivot: Tensor) -> State:
    """The recurrence's: what was read, times the sum of its weights over exp(pivot)."""
    norm = (lse[..., None] - pivot).exp()
    return (o * norm)[:, :, None], norm
