"""``ak.sparge_attention``: tiles predicted from pooled queries and keys, attended to with int8 operands (variants/sparge.py)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnkit.errors import error
from attnkit.ir.mods import MaskFunction, causal as causal_mask
from attnkit.ir.text import parse
from attnkit.ops import block_choice
from attnkit.ops.block_choice import Operands
from attnkit.ops.check import FLOAT32_MAX, autocast, check_flag, check_number, check_qkv, check_scale
from attnkit.ops.registry import attend
from attnkit.ops.tracing import assume_constant, kept
from attnkit.variants.sequences import CAUSAL
from attnkit.variants.sparge import KV_TILE, Q_TILE

Numbers = float | Sequence[float | None]  # one for all heads, or one for each


class Prediction(NamedTuple):
    """What decides which tiles a head keeps: a share of them, or of the predicted mass; and what is predicted at all."""

    topk: float | None
    cdf: float | None
    similarity: float

    @property
    def keeps_all(self) -> bool:
        """Whether it says so, whatever is predicted: then nothing has to be."""
        return self.similarity >= 1 or self.topk == 1 or self.cdf == 1


def sparge_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    topk: Numbers | None = None,
    cdf: Numbers | None = None,
    similarity: Numbers | None = None,
    pv_threshold: float | None = None,
    int8: bool = True,
    smooth_k: bool = True,
    scale: float | None = None,
    return_density: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sparse attention whose tiles, 128 queries by 64 keys, are chosen by pooled queries and keys (SpargeAttn, arXiv 2502.18137).

    A tile of tokens is coherent if the mean cosine of all its pairs exceeds ``similarity``. Of the coherent tiles of keys a
    tile of queries keeps those of the largest ``softmax(D**-0.5 * mean(q) . mean(k))``; incoherent tiles are always kept.
    Queries and keys are multiplied as int8, with a step per tile (SageAttention).

    Args:
        q: ``[B, Hq, Sq, D]``, float32, bfloat16 or float16 on the CPU, any strides. Under ``torch.autocast`` q, k and v are
            cast to its dtype.
        k: ``[B, Hkv, Skv, D]``; Hq is a multiple of Hkv.
        v: ``[B, Hkv, Skv, Dv]``.
        causal: bottom-right aligned, exact for every pair. Smoothed int8 keys then know the whole sequence: a prefill method,
            which a warning says once.
        topk: the share of all tiles of keys that a tile of queries keeps, in (0, 1], rounded down, at least one; 1 keeps all.
            Like cdf and similarity one number, or a list of them, or None, for each query head.
        cdf: or as many of the best as together hold no more than so much of the softmax, in (0, 1], at least one; 1 keeps all.
            If neither is given ``topk = 0.5``.
        similarity: None is -0.1 with topk, 0.6 with cdf; from 1 on nothing is coherent and all is kept.
        pv_threshold: 16 queries leave out a tile, all its mass, where every largest logit lies so many powers of two below the
            largest met before; not the first tile of a row, nor the last two. Above 0; None leaves out nothing.
        int8: False multiplies queries and keys as they are.
        smooth_k: take the mean key from keys before all this, and give it back to the logits.
        scale: finite and positive; None is ``D ** -0.5``. Prediction has its own.
        return_density: also return how much was kept.

    Returns:
        ``o [B, Hq, Sq, Dv]`` in q's dtype, or ``(o, density)``: float32 ``[B, Hq]``, the share of the tiles in which a pair
        may exist that were attended to. Gradients pass straight through the choice and the rounding of codes.

    Raises:
        AttnkitError: AK4xx, an argument is wrong; AK502, no kernel for these tensors; AK503, gradients are required beside a
            pv_threshold; AK603, out of memory.
    """
    q, k, v = autocast(q, k, v)
    check_qkv(q, k, v)
    _check_flags(causal=causal, int8=int8, smooth_k=smooth_k, return_density=return_density)
    predictions = predictions_of(q.shape[1], topk, cdf, similarity)
    if pv_threshold is not None:
        pv_threshold = _threshold(pv_threshold)
    if causal and int8 and smooth_k:
        _warn_once(_PREFILL)
    past = k.shape[2] - q.shape[2] if causal else 0
    chosen = None
    if not all(p.keeps_all for p in predictions):
        chosen = choose(q, k, predictions, causal=causal, smooth=smooth_k)
    text = attend_text(
        chosen is not None, causal, int8, smooth_k, pv_threshold is not None, check_scale(scale)
    )
    params = [] if pv_threshold is None else [pv_threshold]
    o, _ = attend(q, k, v, text, [] if chosen is None else [chosen], params, False)
    if not return_density:
        return o
    return o, density_of(chosen, q.shape, k.shape[2], past if causal else None)


@dataclass(frozen=True)
class Sparge:
    """See `sparge`."""

    causal: bool
    topk: Numbers | None
    cdf: Numbers | None
    similarity: Numbers | None
    pv_threshold: float | None
    int8: bool
    smooth_k: bool

    @property
    def approximation(self) -> tuple[str, str, float | None]:
        """See `attnkit.ops.traced.Traceable`."""
        return (*(_codecs(self.smooth_k) if self.int8 else ("", "")), self.pv_threshold)

    def over(self, operands: Operands) -> MaskFunction:
        """See `attnkit.ops.block_choice.Choice`.

        Raises:
            AttnkitError: AK408, padded keys: the mean of a tile would hold what is no key; as `sparge_attention`.
        """
        q, k = operands.q, operands.k
        if operands.kv_lens is not None:
            given = "keys of their own lengths"
            raise error("AK408", where="select", given=given, allowed="all keys of the tensor")
        predictions = predictions_of(q.shape[1], self.topk, self.cdf, self.similarity)
        if self.causal and self.int8 and self.smooth_k:
            _warn_once(_PREFILL)
        visible = causal_mask() if self.causal else None
        if all(p.keeps_all for p in predictions):
            return visible or (lambda b, h, q_idx, kv_idx: q_idx >= 0)
        chosen = choose(q, k, predictions, causal=self.causal, smooth=self.smooth_k, backend=operands.backend)

        def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            seen = chosen[b, h, q_idx // Q_TILE, kv_idx // KV_TILE]
            return seen if visible is None else seen & visible(b, h, q_idx, kv_idx)

        return mask


def sparge(
    *, causal: bool = False, topk: Numbers | None = None, cdf: Numbers | None = None, similarity: Numbers | None = None,
    pv_threshold: float | None = None, int8: bool = True, smooth_k: bool = True,
) -> Sparge:  # fmt: skip
    """For ``ak.attention(select=)``: tiles as `sparge_attention` chooses them, beside any score and mask.

    ``causal=True`` leaves tiles of the future out of the choice and future keys out of the tiles; masks of the call do not change
    what is predicted. A score reads the logits of the codes, to which the mean key has been given back.

    Args:
        causal: as in `sparge_attention`, like topk, cdf, similarity, pv_threshold, int8 and smooth_k.
        topk: see causal.
        cdf: see causal.
        similarity: see causal.
        pv_threshold: see causal; not beside dropout or a sink.
        int8: see causal.
        smooth_k: see causal.

    Raises:
        AttnkitError: AK401, AK402, a number is wrong.
    """
    _check_flags(causal=causal, int8=int8, smooth_k=smooth_k)
    if pv_threshold is not None:
        pv_threshold = _threshold(pv_threshold)
    return Sparge(causal, topk, cdf, similarity, pv_threshold, int8, smooth_k)


def predictions_of(heads: int, topk: Any, cdf: Any, similarity: Any) -> list[Prediction]:
    """What the arguments say for each of so many query heads.

    Raises:
        AttnkitError: AK401, AK402, a number is wrong; AK403, another number of them than of heads; AK408, topk beside cdf.
    """
    given = [
        _each(heads, "topk", topk, _share), _each(heads, "cdf", cdf, _share), _each(heads, "similarity", similarity, _cosine)
    ]  # fmt: skip
    found = []
    for share, mass, least in zip(*given, strict=True):
        if share is not None and mass is not None:
            raise error("AK408", where="topk, cdf", given="both", allowed="one of them, or neither")
        usual = -0.1 if mass is None else 0.6
        found.append(
            Prediction(0.5 if share is mass is None else share, mass, usual if least is None else least)
        )
    return found


def _each(heads: int, name: str, given: Any, check: Callable[[str, Any], float]) -> list[float | None]:
    numbers = list(given) if isinstance(given, (list, tuple)) else [given] * heads
    if len(numbers) != heads:
        allowed = f"one, or {heads}: one a query head"
        raise error("AK403", where=name, given=f"{len(numbers)} numbers", allowed=allowed)
    return [None if number is None else check(name, number) for number in numbers]


def _share(name: str, given: Any) -> float:
    return _number(name, given, "a number in (0, 1]", 1.0)


def _cosine(name: str, given: Any) -> float:
    number = check_number(name, given)
    if math.isnan(number):
        raise error("AK401", where=name, given="nan", allowed="a number")
    return number


def _threshold(given: Any) -> float:
    return _number("pv_threshold", given, "a finite number above 0", FLOAT32_MAX)


def _number(name: str, given: Any, allowed: str, most: float) -> float:
    number = check_number(name, given)
    if not 0 < number <= most:
        raise error("AK401", where=name, given=str(number), allowed=allowed)
    return number


def _check_flags(**flags: Any) -> None:
    for name, flag in flags.items():
        check_flag(name, flag)


def choose(
    q: Tensor,
    k: Tensor,
    predictions: Sequence[Prediction],
    *,
    causal: bool,
    smooth: bool,
    backend: str = "auto",
) -> Tensor:
    """The tiles that each head keeps, bool ``[B, Hq, rows, columns]``."""
    past = [torch.full((q.shape[0],), k.shape[2] - q.shape[2], dtype=torch.int32)] if causal else []
    if all(p == predictions[0] for p in predictions):
        return _choose(q, k, predictions[0], past, smooth, backend)
    group = q.shape[1] // k.shape[1]
    return torch.cat(
        [
            _choose(q[:, h : h + 1], k[:, h // group : h // group + 1], p, past, smooth, backend)
            for h, p in enumerate(predictions)
        ],
        dim=1,
    )


def _choose(q: Tensor, k: Tensor, p: Prediction, past: list[Tensor], smooth: bool, backend: str) -> Tensor:
    if p.keeps_all:
        rows, columns = tiles_of(q.shape[2], k.shape[2])
        return torch.ones((q.shape[0], q.shape[1], rows, columns), dtype=torch.bool)
    rule, number = ("top_cdf", p.cdf) if p.topk is None else ("top_fraction", p.topk)
    assert number is not None
    text = select_text(rule, bool(past), smooth)
    return block_choice.choose(q, k, text, past, backend, [number, p.similarity])


def tiles_of(q_len: int, kv_len: int) -> tuple[int, int]:
    """How many rows and columns of tiles there are."""
    return -(-q_len // Q_TILE), -(-kv_len // KV_TILE)


def density_of(chosen: Tensor | None, q_shape: Sequence[int], kv_len: int, past: int | None) -> Tensor:
    """The share of the live tiles that are chosen (None: all), float32 ``[B, Hq]``; ``past`` None: all are live."""
    rows, columns = tiles_of(q_shape[2], kv_len)
    last = (torch.arange(rows) + 1) * Q_TILE
    live = torch.ones((rows, columns), dtype=torch.bool)
    if past is not None:
        live = torch.arange(columns) * KV_TILE < last.clamp(max=q_shape[2])[:, None] + past
    number = live.sum().clamp(min=1)
    if chosen is None:
        return (live.sum() / number).float().expand(q_shape[0], q_shape[1]).clone()
    return (chosen & live).sum(dim=(2, 3)).float() / number


# --- programs ---------------------------------------------------------------------------------------------


@kept
def select_text(rule: str, causal: bool, smooth: bool) -> str:
    """The program that chooses tiles; its params are the rule's number and the similarity."""
    smoothing = [
        f"kmean = pool(k, size = {2**31 - 1}, how = mean)",
        "smooth = map(k, kmean) { value = x - y }",
    ]
    live = f"kv_idx * {KV_TILE} < (q_idx + 1) * {Q_TILE} + b0[b]"
    lines = [
        "attnkit 1",
        f"program (q: bhsd, k: bhsd) buffers({'b0: i32[1]' if causal else ''}) params(p0: f32, p1: f32) {{",
        *(smoothing if smooth else []),
        f"qbar = pool(q, size = {Q_TILE}, how = mean)",
        f"kbar = pool({'smooth' if smooth else 'k'}, size = {KV_TILE}, how = mean)",
        f"chosen = select(qbar, kbar, scale = default, {rule} = p0, incoherent = p1)"
        + (f" {{ mask = {live} }}" if causal else ""),
        "return chosen",
        "}",
    ]
    return parse("\n".join(lines)).text


@kept
def attend_text(
    mapped: bool, causal: bool, int8: bool, smooth: bool, skips: bool, scale: float | None
) -> str:
    """The program that attends to chosen tiles: buffer b0 says which, where some are not; p0 is what it skips."""
    masks = [f"b0[b, h, q_idx // {Q_TILE}, kv_idx // {KV_TILE}]"] * mapped + [f"({CAUSAL})"] * causal
    body = f"mask = {' & '.join(masks)}" if masks else ""
    declared = "buffers(b0: bool[4]) " * mapped + "params(p0: f32)" * skips
    of_q, of_k = _codecs(smooth)
    encodes = [f"q8 = encode(q, {of_q})", f"k8 = encode(k, {of_k})"]
    operands = "q8, k8, v" if int8 else "q, k, v"
    attributes = f"scale = {'default' if scale is None else repr(scale)}{', skip = p0' if skips else ''}"
    lines = [
        "attnkit 1",
        f"program (q: bhsd, k: bhsd, v: bhsd) {declared} {{",
        *(encodes if int8 else []),
        f"o, lse = attend({operands}, {attributes}) {{ {body} }}",
        "return o, lse",
        "}",
    ]
    return parse("\n".join(lines)).text


def _codecs(smooth: bool) -> tuple[str, str]:
    """What `encode` makes of q and of k."""
    return (
        f"codec = int8(tile, {Q_TILE})",
        f"codec = int8(tile, {KV_TILE}), center = {'mean' if smooth else 'none'}",
    )


_PREFILL = (
    "sparge_attention(causal=True) takes the mean of all keys, those to come too, from int8 keys: what their rounding does to an "
    "output depends on later tokens. That suits prefill, not decoding a token at a time; smooth_k=False or int8=False avoids it."
)
_warned: set[str] = set()


@assume_constant
def _warn_once(message: str) -> str:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=3)
    return message
