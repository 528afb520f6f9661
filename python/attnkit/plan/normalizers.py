"""Normalisers that no kernel has, as two attentions that kernels have.

First the sums, an attention of which only the lse is wanted; then one whose scores are the weights (``normalizer = none``), which reads
that lse as a buffer::

    signed_softmax         l_i = lse_j |z_ij|,    o_i = sum_j sign(z_ij) exp(|z_ij| - l_i) v_j
    softmax_over_queries   l_j = lse_i z_ij,      o_i = sum_j exp(z_ij - l_j) v_j

where the second's sums are those of the same attention with queries and keys in each other's places. Gradients are those of the two.
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


class Lowered(NamedTuple):
    """The two programs.

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
    swapped = attend.normalizer.kind == "softmax_over_queries"
    coded = any(layout.codec is not None for layout in program.inputs)
    if not (program.is_attention and attend.single) or coded or attend.normalizer.epsilon is not None or (
        swapped and k.kind == "paged"
    ):  # fmt: skip
        given = f"{attend.normalizer.kind} of a program with more than a score and a mask, or over a cache"
        raise error("AK502", where="normalizer", given=given, allowed="plain tensors")
    gone = make("eq", attend.score, const(-math.inf))
    last = len(program.buffers)
    if swapped:
        sums = _swap(program)
        place, own = k.lengths if k.kind == "packed" else None, var("kv_idx")
        size = attend.score
    else:
        size = make("where", gone, const(-math.inf), make("abs", attend.score))
        sums = _with(program, Attend(attend.operands, attend.scale, score=size, mask=attend.mask))
        place, own = q.lengths if q.kind == "packed" else None, var("q_idx")
    of_row = load(last, var("b"), var("h"), own)
    if place is not None:  # tokens lie one sequence after the other
        of_row = load(last, const(0), var("h"), make("add", load(place, var("b"), dtype="int"), own))
    weight = make("exp", make("sub", size, of_row))
    if not swapped:
        weight = make("mul", weight, _sign(attend.score))
    unnormalized = Attend(
        attend.operands, attend.scale, dropout=attend.dropout, score=weight, mask=attend.mask,
        normalizer=Normalizer("none"),
    )  # fmt: skip
    return Lowered(sums, swapped, _with(program, unnormalized, Buffer("f32", 3)))


def _with(program: Program, attend: Attend, *buffers: Buffer) -> Program:
    first = len(program.inputs)
    return Program(
        program.inputs, (*program.buffers, *buffers), program.num_params, (attend, Return((first,)))
    )


def _swap(program: Program) -> Program:
    """Keys attend to queries. Those that do not exist see nothing."""
    attend, (q, k, _) = program.attend, program.inputs
    names = dict(_SWAPPED)
    if k.kind == "padded" and k.lengths is not None:
        names[var("kv_len")] = load(k.lengths, var("b"), dtype="int")
    masks = [] if attend.mask is None else [substitute(attend.mask, names)]
    if k.kind == "padded":
        masks.append(make("lt", var("q_idx"), names[var("kv_len")]))
    mask = reduce(lambda a, b: make("and", a, b), masks) if masks else None
    score = substitute(attend.score, names)
    keys = k if k.kind == "packed" else Layout()
    swapped = Attend((0, 1, 2), attend.scale, score=score, mask=mask)
    return Program((keys, q, q), program.buffers, program.num_params, (swapped, Return((3,))))


def _sign(x: Expr) -> Expr:
    zero = const(0.0)
    negative = make("where", make("lt", x, zero), const(-1.0), zero)
    return make("where", make("gt", x, zero), const(1.0), negative)
