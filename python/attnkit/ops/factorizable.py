"""``ak.factorizable_attention``: attention by a polynomial of the dot product, whose state is moments, as programs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from attnkit.errors import error
from attnkit.ir.text import parse
from attnkit.ops.check import FLOAT32_MAX, check_count, check_flag, check_float, check_number, check_tensor
from attnkit.ops.recur import recur
from attnkit.ops.tracing import kept
from attnkit.variants import factorizable

State = tuple[Tensor, Tensor]
_CHUNK = 64
_SERIES = (1.0, 1.0, 0.5)  # of the exponential


def factorizable_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    order: int = 2,
    causal: bool = False,
    qk_norm: str | None = "l2",
    temperature: float = 1.0,
    coefficients: tuple[float, ...] | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, State]:
    """Attention by ``f(x) = a0 + a1 x + a2 x^2`` instead of the exponential: FAST (Fastmax), Based. Time linear in tokens.

    With q and k after ``qk_norm``, ``x_ij = q_i . k_j / temperature``, over j <= i if ``causal``, else over every j::

        o_i = sum_j f(x_ij) v_j / sum_j f(x_ij)

    Args:
        q: ``[B, Hq, S, D]``, float32, bfloat16 or float16 on the CPU, any strides; sums and states are float32. Under
            ``torch.autocast`` q, k and v are cast to its dtype.
        k: ``[B, H, S, D]``; Hq is a multiple of H, consecutive query heads share a head of keys.
        v: ``[B, H, S, Dv]``.
        order: 1 or 2: the last power. Order 1 needs ``qk_norm="l2"`` and a temperature of at least 1, or weights could be
            negative.
        causal: whether token i sees tokens up to i alone.
        qk_norm: ``"l2"``, ``"layer"`` or None, on each token of q and k.
        temperature: finite and positive.
        coefficients: ``(a0, a1)`` or ``(a0, a1, a2)``; None is (1, 1, 1/2) up to the order.
        initial_state: the pair M float32 ``[B, H, F, Dv]`` and z ``[B, H, F]``, F = 1 + D, or 1 + D + D * D of order 2: the
            sums of (1, k, k (x) k), of values and of 1. What an earlier call returned as its state.
        return_state: also return the state after the last token.

    Returns:
        ``o [B, Hq, S, Dv]`` in q's dtype, or ``(o, (M, z))``. Where weights sum to 0, o is 0.

    Raises:
        AttnkitError: AK4xx, an argument is wrong; AK502, AK503, no kernel for these tensors; AK603, out of memory.
    """
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, t)
    for name, flag in (("causal", causal), ("return_state", return_state)):
        check_flag(name, flag)
    check_count("order", order, 1, 2)
    if qk_norm not in (None, "none", "l2", "layer"):
        raise error("AK401", where="qk_norm", given=repr(qk_norm), allowed="'l2', 'layer', None",
                    hint="a norm over the whole sequence would let every token see every other")  # fmt: skip
    temperature = check_number("temperature", temperature)
    if not (0 < temperature < math.inf):
        raise error("AK401", where="temperature", given=str(temperature), allowed="a finite number above 0")
    if order == 1 and (qk_norm != "l2" or temperature < 1):
        given = f"qk_norm={qk_norm!r}, temperature={temperature}"
        raise error("AK408", what="weights of order 1 could be negative", where="order", given=given,
                    allowed="qk_norm='l2' and a temperature of at least 1")  # fmt: skip
    if k.dim() == 4 and v.dim() == 4 and k.shape[1] != v.shape[1]:
        given = f"{k.shape[1]} and {v.shape[1]} heads"
        raise error("AK407", where="k, v", given=given, allowed="k and v of the same heads")
    held = _state(initial_state)
    text = program_text(_numbers(coefficients, order), qk_norm or "none", temperature, causal, bool(held))
    o, state, norm = recur(q, k, v, held, text, [], _CHUNK)
    return (o, (state, norm)) if return_state else o


def _numbers(coefficients: Any, order: int) -> tuple[float, ...]:
    if coefficients is None:
        return _SERIES[: order + 1]
    if not isinstance(coefficients, (tuple, list)) or len(coefficients) != order + 1:
        raise error("AK401", where="coefficients", given=repr(coefficients), allowed=f"{order + 1} numbers")
    numbers = tuple(check_number("coefficients", a) for a in coefficients)
    if not all(abs(a) <= FLOAT32_MAX for a in numbers):
        raise error("AK401", where="coefficients", given=repr(coefficients), allowed="finite float32 numbers")
    return numbers


def _state(initial_state: Any) -> list[Tensor]:
    if initial_state is None:
        return []
    if not isinstance(initial_state, (tuple, list)) or len(initial_state) != 2:
        raise error(
            "AK402", where="initial_state", given=type(initial_state).__name__, allowed="the pair (M, z)"
        )
    for t in initial_state:
        check_float("initial_state", t)
    return [t.float() for t in initial_state]


@kept
def program_text(
    coefficients: tuple[float, ...], qk_norm: str, temperature: float, causal: bool, initial: bool
) -> str:
    """The canonical text of a member of the family."""
    held: Any = {"initial_state": (np.zeros((1, 1, 1, 1)), np.zeros((1, 1, 1)))} if initial else {}
    text, _ = factorizable.program(
        **held, coefficients=coefficients, qk_norm=qk_norm, temperature=temperature, causal=causal
    )
    return parse(text).text
