"""Attention by the definition: every score is materialised, one head of one sequence at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from attnkit.backends.reference.evaluate import Evaluation
from attnkit.errors import error
from attnkit.ir.program import Attend, Layout, Program


class _Segment(NamedTuple):
    """One sequence: where it lies in memory, and its number ``b`` in score and mask."""

    b: int
    batch: int
    q: slice
    kv: slice


def attend(
    program: Program, q: Any, k: Any, v: Any, buffers: Sequence[Any] = (), params: Sequence[float] = ()
) -> tuple[Any, Any]:
    """Run the attention of ``program`` in float64.

    Args:
        program: a verified program.
        q: numpy array ``[B, Hq, Sq, D]``; packed: ``[1, Hq, total, D]``.
        k: ``[B, Hkv, Skv, D]``, where ``Hq`` is a multiple of ``Hkv``.
        v: ``[B, Hkv, Skv, Dv]``.
        buffers: the captured arrays, in the order of the program's buffers.
        params: the run-time scalars.

    Returns:
        ``o [B, Hq, Sq, Dv]`` and ``lse [B, Hq, Sq]``, float64. A row that sees nothing has ``o`` 0 and
        ``lse`` -inf (with a sink: the sink). A masked pair does not exist, whatever its key and value hold.

    Raises:
        AttnkitError: AK401 (number of buffers or params), AK403 and AK407 (shapes), AK601 (a load leaves its
            buffer at a visible pair), AK602 (lengths).
    """
    op = program.attend
    q, k, v = (np.asarray((q, k, v)[i], dtype=np.float64) for i in (op.q, op.k, op.v))
    _check(program, q, k, v, buffers, params)
    group = q.shape[1] // max(k.shape[1], 1)
    o = np.zeros((*q.shape[:3], v.shape[3]))
    lse = np.full(q.shape[:3], -np.inf)
    for segment in _segments(program.inputs[op.q], program.inputs[op.k], q, k, buffers):
        for h in range(q.shape[1]):
            q_head = q[segment.batch, h, segment.q]
            k_head, v_head = (x[segment.batch, h // group, segment.kv] for x in (k, v))
            z, visible = _logits(op, q_head, k_head, segment.b, h, buffers, params)
            sink = None if op.normalizer.sink is None else float(buffers[op.normalizer.sink][h])
            o_head, lse_head = _softmax(z, visible, v_head, sink)
            o[segment.batch, h, segment.q], lse[segment.batch, h, segment.q] = o_head, lse_head
    return o, lse


def _logits(
    op: Attend, q: Any, k: Any, b: int, h: int, buffers: Sequence[Any], params: Sequence[float]
) -> tuple[Any, Any]:
    """Scores and visibility of all pairs, both ``[q_len, kv_len]``."""
    shape = (q.shape[0], k.shape[0])
    scale = q.shape[1] ** -0.5 if op.scale is None else op.scale
    with np.errstate(all="ignore"):
        s = scale * (q @ k.T)
    variables = {
        "s": s,
        "b": b,
        "h": h,
        "q_idx": np.arange(shape[0])[:, None],
        "kv_idx": np.arange(shape[1])[None, :],
        "q_len": shape[0],
        "kv_len": shape[1],
    }
    values = Evaluation(op.roots, variables, buffers, params)
    visible = np.ones(shape, dtype=bool)
    if op.mask is not None:
        visible = np.broadcast_to(values[op.mask], shape)
    for name, root in (("score", op.score), ("mask", op.mask)):
        if root is not None and np.any(values.outside(root) & visible):
            raise error("AK601", where=f"{name}, at a visible pair", given=repr(root))
    return np.broadcast_to(values[op.score], shape), visible


def _softmax(z: Any, visible: Any, v: Any, sink: float | None) -> tuple[Any, Any]:
    """Weighted values ``[q_len, Dv]`` and log-sum-exp ``[q_len]`` of visible logits ``z``."""
    live = visible & (z != -np.inf)  # a score of -inf has weight 0
    with np.errstate(all="ignore"):
        top = np.max(np.where(live, z, -np.inf), axis=1, initial=-np.inf)
        if sink is not None:
            top = np.maximum(top, sink)
        pivot = np.where(top == -np.inf, 0.0, top)
        weight = np.where(live, np.exp(z - pivot[:, None]), 0.0)
        total = weight.sum(axis=1)
        if sink is not None:
            total = total + np.exp(sink - pivot)
        lse = pivot + np.log(total)
        o = weight @ np.where(np.isfinite(v), v, 0.0)
        for j in np.flatnonzero(
            ~np.isfinite(v).all(axis=1)
        ):  # reaches the rows that see it, whatever their weight
            bad = ~np.isfinite(v[j])
            o[:, bad] += np.where(visible[:, j, None], weight[:, j, None] * v[j, bad], 0.0)
        return np.where(total[:, None] == 0, 0.0, o / total[:, None]), lse


def _segments(
    q_layout: Layout, kv_layout: Layout, q: Any, k: Any, buffers: Sequence[Any]
) -> Iterator[_Segment]:
    if q_layout.lengths is not None and kv_layout.lengths is not None:  # packed
        q_ends = _lengths(buffers[q_layout.lengths], q.shape[2])
        kv_ends = _lengths(buffers[kv_layout.lengths], k.shape[2])
        if len(q_ends) != len(kv_ends):
            given = f"{len(q_ends)} and {len(kv_ends)} entries"
            raise error("AK602", what="cu_seqlens of q and of k differ in length", given=given)
        for b in range(len(q_ends) - 1):
            yield _Segment(b, 0, slice(q_ends[b], q_ends[b + 1]), slice(kv_ends[b], kv_ends[b + 1]))
        return
    kv_lens = np.full(k.shape[0], k.shape[2])
    if kv_layout.lengths is not None:  # padded
        kv_lens = np.asarray(buffers[kv_layout.lengths])
        if len(kv_lens) != k.shape[0] or np.any(kv_lens < 0) or np.any(kv_lens > k.shape[2]):
            allowed = f"{k.shape[0]} lengths from 0 to {k.shape[2]}"
            raise error("AK602", where="kv_lens", given=str(kv_lens), allowed=allowed)
    for b in range(q.shape[0]):
        yield _Segment(b, b, slice(0, q.shape[2]), slice(0, int(kv_lens[b])))


def _lengths(cu_seqlens: Any, total: int) -> list[int]:
    ends = np.asarray(cu_seqlens).tolist()
    if not ends or ends[0] != 0 or ends[-1] > total or any(a > b for a, b in pairwise(ends)):
        allowed = f"from 0, never falling, to at most {total}"
        raise error("AK602", where="cu_seqlens", given=str(ends), allowed=allowed)
    return list(ends)


def _check(program: Program, q: Any, k: Any, v: Any, buffers: Sequence[Any], params: Sequence[float]) -> None:
    if len(buffers) != len(program.buffers) or len(params) != program.num_params:
        allowed = f"{len(program.buffers)} buffers, {program.num_params} params"
        raise error("AK401", given=f"{len(buffers)} buffers, {len(params)} params", allowed=allowed)
    shapes = [x.shape for x in (q, k, v)]
    given = " ".join(map(str, shapes))
    if any(len(shape) != 4 for shape in shapes) or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        allowed = "q [B, Hq, Sq, D], k [B, Hkv, Skv, D], v [B, Hkv, Skv, Dv]"
        raise error("AK403", where="q, k, v", given=given, allowed=allowed)
    if q.shape[0] != k.shape[0] or (program.inputs[program.attend.q].kind == "packed" and q.shape[0] != 1):
        raise error("AK403", where="batch of q, k, v", given=given, allowed="equal; 1 if packed")
    if q.shape[1] % max(k.shape[1], 1) or (q.shape[1] and not k.shape[1]):
        raise error("AK407", where="q, k", given=f"{q.shape[1]} and {k.shape[1]} heads")
