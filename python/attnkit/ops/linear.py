"""``ak.linear_attention``: states that decay, are corrected, written to and read, as programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnkit.errors import error
from attnkit.ir.text import parse
from attnkit.ops.check import FLOAT32_MAX, check_flag, check_float, check_number, check_tensor, shape_of
from attnkit.ops.recur import recur
from attnkit.ops.recur_checks import check_chunk
from attnkit.ops.tracing import kept
from attnkit.variants import linear

State = Tensor | tuple[Tensor, Tensor]
_NAMES = {"initial": "initial_state", "initial_norm": "initial_state"}  # of arguments, where ours differ


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gate: Tensor | None = None,
    beta: Tensor | None = None,
    feature_map: str | Callable[[Tensor], Tensor] | None = None,
    normalize: bool | None = None,
    qk_norm: str | None = None,
    bonus: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
) -> Tensor | tuple[Tensor, State]:
    """Linear attention and its relatives: time linear in the number of tokens, a state of constant size.

    With q and k after ``qk_norm`` and ``feature_map``, for every sequence and head of v::

        S_t = A_t S_{t-1} + kappa_t v_t^T              o_t = S_t^T (scale * q_t)
        A_t = exp(gate_t)                              kappa_t = k_t
        A_t = (I - beta_t k_t k_t^T) exp(gate_t)       kappa_t = beta_t k_t      with beta: the delta rule

    Linear Transformer, RetNet, Lightning, Mamba-2, GLA, RWKV-6, DeltaNet, Gated DeltaNet (gate ``[B, H, S]`` and beta) and
    KDA (gate ``[B, H, S, D]`` and beta) are parameters: docs/variants/linear.md has the table.

    Args:
        q: ``[B, Hq, S, D]``, float32, bfloat16 or float16 on the CPU, any strides; sums and states are float32. Under
            ``torch.autocast`` q, k and v are cast to its dtype.
        k: ``[B, Hk, S, D]``.
        v: ``[B, H, S, Dv]``; H, the heads of the state, are a multiple of Hk, and of Hq and H one is a multiple of the other.
        gate: ``[H]``, ``[B, H, S]`` or ``[B, H, S, D]``: a natural logarithm, at most 0; ``-inf`` forgets everything.
        beta: ``[B, H, S]``, how much of what the state holds for k is replaced: in (0, 1), keys of length 1.
        feature_map: ``"identity"``, ``"elu1"`` (elu + 1), or a function of tensors, which torch applies to q and k. None is
            ``"elu1"`` where there is neither gate, beta nor bonus, else ``"identity"``.
        normalize: divide by the sum of weights; an output whose weights sum to 0 is 0. None is True where there is neither
            gate, beta nor bonus, else False. Not with beta or bonus.
        qk_norm: None, ``"l2"`` or ``"layer"``, on each token of q and k before the feature map.
        bonus: ``[H, D]``: tokens read the state before they decay it and write to it, and of themselves
            ``(bonus * k_t) v_t^T`` (RWKV-6). Not with beta.
        causal: False: every token reads the state of the whole sequence. Not with gate, beta or bonus.
        scale: finite and positive; None is ``D ** -0.5``.
        initial_state: float32 ``[N, H, D, Dv]``, one for each sequence, or the pair of it and of z ``[N, H, D]``, the state
            for a value of 1, where the call is normalised. What an earlier call returned as its state.
        return_state: also return the state after the last token.
        cu_seqlens: int32 ``[N + 1]``: tokens are ``[1, H, total, D]``, packed; no state crosses from one to the next.
        chunk_size: 16, 32, 64 or 128: at most so many tokens are computed together, which orders sums and means nothing else.
            The CPU engine takes 16 of a gate for each channel, or a bonus, and at most 32 where D is at most 64.

    Returns:
        ``o [B, max(Hq, H), S, Dv]`` in q's dtype, or ``(o, state)``; the state is float32 ``[N, H, D, Dv]``, or a pair of it
        and z ``[N, H, D]`` where the call is normalised.

    Raises:
        AttnkitError: AK4xx, an argument is wrong; AK220, they exclude each other; AK502, AK503, no kernel for these tensors;
            AK602, cu_seqlens does not describe the tokens; AK603, out of memory.
    """
    plain = gate is None and beta is None and bonus is None
    feature_map = ("elu1" if plain else "identity") if feature_map is None else feature_map
    normalize = plain if normalize is None else normalize
    initial, initial_norm = _pair(initial_state, normalize)
    given = {"gate": gate, "beta": beta, "bonus": bonus, "initial": initial, "initial_norm": initial_norm}
    check_tensor("q", q)
    held = [(name, t) for name, t in given.items() if t is not None]
    for name, t in held:
        check_float(_NAMES.get(name, name), t)
    if cu_seqlens is not None:
        check_tensor("cu_seqlens", cu_seqlens)
    if gate is not None and gate.dim() not in (1, 3, 4):
        raise error("AK403", where="gate", given=shape_of(gate), allowed="[H], [B, H, S] or [B, H, S, D]")
    for name, flag in (("normalize", normalize), ("causal", causal), ("return_state", return_state)):
        check_flag(name, flag)
    check_chunk(chunk_size)
    q, k, name_of_map = _mapped(q, k, feature_map, qk_norm)
    text = program_text(
        None if gate is None else gate.dim(), beta is not None, bonus is not None, initial is not None,
        initial_norm is not None, cu_seqlens is not None, qk_norm or "none", name_of_map, normalize, causal, _scale(scale),
    )  # fmt: skip
    others = [t if t.dtype is torch.float32 else t.float() for _, t in held]
    buffers = [] if cu_seqlens is None else [cu_seqlens]
    o, state, norm = recur(q, k, v, others, text, buffers, chunk_size)
    if not return_state:
        return o
    return o, ((state, norm) if normalize else state)


def _mapped(q: Any, k: Any, feature_map: Any, qk_norm: Any) -> tuple[Any, Any, str]:
    """q and k, and the name of what is still to be done to them."""
    if qk_norm not in (None, "none", "l2", "layer"):
        raise error("AK401", where="qk_norm", given=repr(qk_norm), allowed="None, 'l2', 'layer'")
    if not callable(feature_map):
        if not isinstance(feature_map, str) or feature_map not in linear.FEATURE_MAPS:
            allowed = ", ".join(map(repr, linear.FEATURE_MAPS)) + ", or a function"
            raise error("AK401", where="feature_map", given=repr(feature_map), allowed=allowed)
        return q, k, feature_map
    if qk_norm not in (None, "none"):
        raise error("AK408", where="qk_norm", given=f"{qk_norm!r} and a function", allowed="None",
                    hint="let feature_map normalise")  # fmt: skip
    return feature_map(q), feature_map(k), "identity"


def _scale(scale: Any) -> float | None:
    if scale is None:
        return None
    value = check_number("scale", scale)
    if not 0 < value <= FLOAT32_MAX:
        raise error("AK401", where="scale", given=str(value), allowed="a finite number above 0")
    return value


def _pair(initial_state: Any, normalize: bool) -> tuple[Any, Any]:
    if isinstance(initial_state, (tuple, list)):
        if len(initial_state) != 2:
            raise error(
                "AK401",
                where="initial_state",
                given=f"{len(initial_state)} tensors",
                allowed="a state, or a pair",
            )
        if not normalize:
            raise error(
                "AK408", where="initial_state", given="a pair, and no normaliser", allowed="one tensor"
            )
        for t in initial_state:
            check_tensor("initial_state", t)
        return initial_state[0], initial_state[1]
    if initial_state is not None and normalize:
        raise error(
            "AK402", where="initial_state", given=type(initial_state).__name__, allowed="the pair (state, z)"
        )
    return initial_state, None


@kept
def program_text(
    gate: int | None, beta: bool, bonus: bool, initial: bool, initial_norm: bool, packed: bool, qk_norm: str,
    feature_map: str, normalize: bool, causal: bool, scale: float | None,
) -> str:  # fmt: skip
    """The canonical text of a member of the family; ``gate`` is its number of dimensions.

    Raises:
        AttnkitError: AK220, what it has does not go together.
    """
    shapes = {"gate": gate, "beta": 3 if beta else None, "bonus": 2 if bonus else None}
    held: Any = {name: np.zeros((1,) * n) for name, n in shapes.items() if n is not None}
    if initial:
        state = np.zeros((1, 1, 1, 1))
        held["initial_state"] = (state, np.zeros((1, 1, 1))) if initial_norm else state
    if packed:
        held["cu_seqlens"] = np.zeros(2, np.int32)
    if scale is not None:
        held["scale"] = scale
    text, _ = linear.program(
        **held, qk_norm=qk_norm, feature_map=feature_map, normalize=normalize, causal=causal
    )
    return parse(text).text
