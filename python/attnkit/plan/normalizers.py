"""What no kernel has, as attentions that kernels have: other normalisers than softmax, and what is read off weights.

``normalizer = none`` makes scores the weights themselves, and a score may read an lse that another attention gave, as a buffer::

    signed_softmax         l_i = lse_j |z_ij|,    o_i = sum_j sign(z_ij) exp(|z_ij| - l_i) v_j
    softmax_over_queries   l_j = lse_i z_ij,      o_i = sum_j exp(z_ij - l_j) v_j
    column_sum             l_i = lse_j z_ij,      c_j = sum_i exp(z_ij - l_i) 1
    entropy                the same,              H_i = -sum_j exp(z_ij - l_i) (z_ij - l_i) 1

Sums over queries are those of the same attention with queries and keys in each other's places. Gradients are those of the attentions.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import NamedTuple

from attnkit.analysis.canonical import substitute
from attnkit.errors import error
from attnkit.ir.expr import Expr, const, load, make, var
from attnkit.ir.program import Attend, Buffer, Layout, Normalizer, Program, Return

LOWERED = ("signed_softmax", "softmax_over_queries")
_SWAPPED = {var(a): var(b) for a, b in (("q_idx", "kv_idx"), ("kv_idx", "q_idx"), ("q_len", "kv_len"), ("kv_len", "q_len"))}  # fmt: skip


def is_unnormalized(program: Program) -> bool:
    """Whether it is attention whose scores are the weights themselves, of plain elements: what kernels know beside softmax."""
    if not program.is_attention or any(layout.codec is not None for layout in program.inputs):
        return False
    return program.attend.single and program.attend.unnormalized


class Lowered(NamedTuple):
    """The two attentions of a normaliser.

    ``sums``: over q, k and anything for v; ``swapped``: over k with all query heads, q and anything. ``weights``: over q, k and v; its
    last buffer is the lse of the sums, float32 ``[B, H, S]``, with 0 for -inf.
    """

    sums: Program
    swapped: bool
    weights: Program


def lower(program: Program) -> Lowered:
    """The two attentions of a program whose normaliser is one of `LOWERED`.

    Raises:
        AttnkitError: AK502, it is more than one attention of plain elements, or keys that queries are to be lie in pages.
    """
    attend, (q, k, _) = program.attend, program.inputs
    if attend.normalizer.kind == "softmax_over_queries":
        _check(program, swapped=True)
        log = _log_weight(program, attend.score, k, "kv_idx")
        return Lowered(_swap(program), True, _unnormalized(program, make("exp", log)))
    _check(program)
    size = make("where", _is_gone(attend.score), const(-math.inf), make("abs", attend.score))
    sums = _with(program, Attend(attend.operands, attend.scale, score=size, mask=attend.mask))
    weight = make("mul", make("exp", _log_weight(program, size, q, "q_idx")), _sign(attend.score))
    return Lowered(sums, False, _unnormalized(program, weight))


def read(program: Program, what: str) -> tuple[Program, bool]:
    """``column_sum`` or ``entropy`` of a softmax attention as an attention to values that are 1.

    Returns:
        The program, whose last buffer is the lse, with 0 for -inf; whether it is over k with all query heads and q.

    Raises:
        AttnkitError: AK502, as `lower`.
    """
    attend = program.attend
    _check(program, swapped=what == "column_sum")
    log = _log_weight(program, attend.score, program.inputs[0], "q_idx")
    if what == "column_sum":
        return _swap(_unnormalized(program, make("exp", log))), True
    of_pair = make("neg", make("mul", make("exp", log), log))
    return _unnormalized(program, make("where", _is_gone(attend.score), const(0.0), of_pair)), False


def _check(program: Program, *, swapped: bool = False) -> None:
    attend, k = program.attend, program.inputs[1]
    coded = any(layout.codec is not None for layout in program.inputs)
    alone = program.is_attention and attend.single and attend.normalizer.epsilon is None
    if not alone or coded or (swapped and k.kind == "paged"):
        given = f"{attend.normalizer.kind} of a program with more than a score and a mask, or over a cache"
        raise error("AK502", where="normalizer", given=given, allowed="plain tensors")


def _log_weight(program: Program, score: Expr, layout: Layout, index: str) -> Expr:
    """The score less the lse of its query (key), which is a buffer after the others."""
    last, own = len(program.buffers), var(index)
    lse = load(last, var("b"), var("h"), own)
    if layout.kind == "packed" and layout.lengths is not None:  # tokens lie one sequence after the other
        start = load(layout.lengths, var("b"), dtype="int")
        lse = load(last, const(0), var("h"), make("add", start, own))
    return make("sub", score, lse)


def _is_gone(score: Expr) -> Expr:
    return make("eq", score, const(-math.inf))


def _sign(x: Expr) -> Expr:
    zero = const(0.0)
    negative = make("where", make("lt", x, zero), const(-1.0), zero)
    return make("where", make("gt", x, zero), const(1.0), negative)


def _unnormalized(program: Program, weight: Expr) -> Program:
    """Attention whose weights are this value. It has one buffer more."""
    attend, none = program.attend, Normalizer("none")
    unnormalized = Attend(
        attend.operands, attend.scale, dropout=attend.dropout, score=weight, mask=attend.mask, normalizer=none
    )
    return _with(program, unnormalized, Buffer("f32", 3))


def _with(program: Program, attend: Attend, *buffers: Buffer) -> Program:
    first = len(program.inputs)
    return Program(
        program.inputs, (*program.buffers, *buffers), program.num_params, (attend, Return((first,)))
    )


def _swap(program: Program) -> Program:
    """Keys attend to queries: softmax, or the weights themselves. Those that do not exist see nothing."""
    attend, (q, k, _) = program.attend, program.inputs
    names = dict(_SWAPPED)
    if k.kind == "padded" and k.lengths is not None:
        names[var("kv_len")] = load(k.lengths, var("b"), dtype="int")
    masks = [] if attend.mask is None else [substitute(attend.mask, names)]
    if k.kind == "padded":
        masks.append(make("lt", var("q_idx"), names[var("kv_len")]))
    mask = reduce(lambda a, b: make("and", a, b), masks) if masks else None
    normalizer = Normalizer("none" if attend.unnormalized else "softmax")
    score = substitute(attend.score, names)
    swapped = Attend((0, 1, 2), attend.scale, score=score, mask=mask, normalizer=normalizer)
    keys = k if k.kind == "packed" else Layout()
    return Program((keys, q, q), program.buffers, program.num_params, (swapped, Return((3,))))
