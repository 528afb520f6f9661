"""Ready-made masks and scores, with FlexAttention's signatures.

Masks compose with ``&``, ``|`` and ``~``, also with plain functions. The lengths that some need come from the
trace, so these run on proxies only. None is a closure, but a function of this file that is partially applied: they can be
pickled, and the copy of a model holds masks and scores of its own tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from attnkit.errors import error
from attnkit.ir.program import NORMALIZERS
from attnkit.ir.trace import Param

_FLOAT32_MAX, _FLOAT32_TINY = float.fromhex("0x1.fffffep+127"), 2.0**-149

MaskFunction = Callable[[Any, Any, Any, Any], Any]
ScoreFunction = Callable[[Any, Any, Any, Any, Any], Any]
Mod = Callable[..., Any]  # either


class Mask:
    """A mask ``(b, h, q_idx, kv_idx) -> visible`` that composes with ``&``, ``|``, ``~``."""

    def __init__(self, function: MaskFunction) -> None:
        self.function = function

    def __call__(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return self.function(b, h, q_idx, kv_idx)

    def __and__(self, other: MaskFunction) -> Mask:
        return Mask(partial(_all, (self, other)))

    def __or__(self, other: MaskFunction) -> Mask:
        return Mask(partial(_either, self, other))

    def __rand__(self, other: MaskFunction) -> Mask:
        return Mask(partial(_all, (other, self)))

    def __ror__(self, other: MaskFunction) -> Mask:
        return Mask(partial(_either, other, self))

    def __invert__(self) -> Mask:
        return self.logical_not()

    def logical_not(self) -> Mask:
        """``~mask``, also where a mask is made under torch.compile: dynamo knows ``~`` of tensors alone."""
        return Mask(partial(_not, self))


def _either(first: MaskFunction, second: MaskFunction, *index: Any) -> Any:
    return first(*index) | second(*index)


def _not(mask: MaskFunction, *index: Any) -> Any:
    return mask(*index).logical_not()


@dataclass(frozen=True)
class Weighting:
    """How scores become weights: a normaliser of docs/ir.md, and what happens to the score before it.

    ``sink`` is a float32 tensor ``[Hq]`` of extra logits, or None.
    """

    kind: str = "softmax"
    sink: Any = None
    score: ScoreFunction | None = None

    @property
    def has_lse(self) -> bool:
        """Whether there is a logarithm of a sum."""
        return NORMALIZERS[self.kind].lse


def softmax(sink: Any = None) -> Weighting:
    """The normalizer ``softmax``, optionally with a learned sink.

    ``sink [Hq]`` (float32) is one logit per query head that takes part in the denominator and has no value.
    """
    return Weighting(sink=sink)


def sigmoid(bias: float | None = None) -> Weighting:
    """Weights ``sigmoid(score + bias)``, each by itself (arXiv 2409.04431); None is ``-log(kv_len)``. No lse.

    AK402 if bias is no number, AK401 if it is none that float32 can hold.
    """
    if bias is not None and (isinstance(bias, bool) or not isinstance(bias, (int, float))):
        raise error("AK402", where="bias", given=type(bias).__name__, allowed="a number or None")
    if bias is not None and not -_FLOAT32_MAX <= bias <= _FLOAT32_MAX:
        raise error("AK401", where="bias", given=f"{bias}", allowed="a finite float32 number")
    return Weighting("none", score=partial(_sigmoid, bias))


def _sigmoid(bias: float | None, s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    if bias is not None:
        return (s + bias).sigmoid()
    return (s - kv_idx.context.variable("kv_len").log()).sigmoid()


def signed_softmax() -> Weighting:
    """Weights ``sign(score) * softmax(|score|)`` (Cog attention, arXiv 2411.07176); lse is that of ``|score|``."""
    return Weighting("signed_softmax")


def softmax_over_queries() -> Weighting:
    """Each key's weights sum to 1 over the queries that see it. Looks at the whole sequence, so it has no lse."""
    return Weighting("softmax_over_queries")


def causal(align: str = "bottom_right") -> Mask:
    """Each query sees the keys up to its own position.

    ``align="bottom_right"``: the last query is at the position of the last key; ``"top_left"``: the first at
    the first. They differ where q_len != kv_len. Anything else is AK401.
    """
    if align not in ("bottom_right", "top_left"):
        raise error("AK401", where="align", given=repr(align), allowed="'bottom_right', 'top_left'")
    return Mask(_causal if align == "bottom_right" else _causal_top_left)


def _causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return kv_idx <= position(q_idx)


def _causal_top_left(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return kv_idx <= q_idx


def window(left: int | None, right: int | None = 0) -> Mask:
    """Each query sees ``left`` keys before its position, its own, and ``right`` after it.

    Positions are bottom-right aligned. None and -1 mean unbounded; other negative distances are AK401.
    """
    for name, distance in (("left", left), ("right", right)):
        if distance is not None and (isinstance(distance, bool) or not isinstance(distance, int)):
            raise error("AK402", where=name, given=type(distance).__name__, allowed="an int or None")
        if distance is not None and distance < -1:
            raise error("AK401", where=name, given=f"{distance}", allowed="a distance, -1 or None")
    return Mask(partial(_window, *(None if distance == -1 else distance for distance in (left, right))))


def _window(left: int | None, right: int | None, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    p = position(q_idx)
    if left is None:
        return kv_idx >= 0 if right is None else kv_idx <= p + right  # the former: always
    visible = kv_idx >= p - left
    return visible if right is None else visible & (kv_idx <= p + right)


def document(q_ids: Any, kv_ids: Any = None) -> Mask:
    """Queries see the keys of their own document: ``q_ids[q_idx] == kv_ids[kv_idx]``.

    Ids are int tensors (else AK404) ``[S]`` or ``[B, S]`` (else AK403); ``kv_ids`` defaults to ``q_ids``.
    """
    kv_ids = q_ids if kv_ids is None else kv_ids
    for name, ids in (("q_ids", q_ids), ("kv_ids", kv_ids)):
        _require_rank(name, ids, (1, 2), "[S] or [B, S]")
        _refuse_dtype(name, ids, _FLOATS, "ints")
    return Mask(partial(_document, q_ids, kv_ids))


def _document(q_ids: Any, kv_ids: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return load(q_ids, b, q_idx) == load(kv_ids, b, kv_idx)


def prefix(n: Any) -> Mask:
    """All queries see the first ``n`` keys; ``n`` is an int of at least 0 (else AK401) or an int tensor ``[B]`` (else AK402 to AK404).

    A prefix language model is ``ak.prefix(n) | ak.causal()``.
    """
    if not isinstance(n, int):
        _require_rank("n", n, (1,), "an int or [B]")
        _refuse_dtype("n", n, (*_FLOATS, "bool"), "ints")
    elif isinstance(n, bool):
        raise error("AK402", where="n", given="bool", allowed="an int, or a tensor [B] of them")
    elif n < 0:
        raise error("AK401", where="n", given=f"{n}", allowed="0 and more")
    return Mask(partial(_prefix, n))


def _prefix(n: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return kv_idx < (n if isinstance(n, int) else load(n, b))


def softcap(c: float | Param) -> ScoreFunction:
    """``c * tanh(s / c)``; ``c`` is a number or an `ak.param`. 0 and what float32 cannot hold leave ``s`` as it is.

    Other numbers that are not positive in float32 are AK401, what is no number AK402.
    """
    if isinstance(c, bool) or not isinstance(c, (int, float, Param)):
        raise error("AK402", where="softcap", given=type(c).__name__, allowed="a number or an ak.param")
    if not isinstance(c, Param) and (c == 0 or c > _FLOAT32_MAX):
        return _unchanged
    if not isinstance(c, Param) and not c >= _FLOAT32_TINY:
        raise error("AK401", where="softcap", given=f"{c}", allowed="a positive number that float32 can hold")
    return partial(_softcap, c)


def _unchanged(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return s


def _softcap(c: float | Param, s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return (s / c).tanh() * c


def alibi(slopes: Any) -> ScoreFunction:
    """``s - slope * distance``, the distance being that of bottom-right aligned positions.

    ``slopes`` is a float32 tensor ``[Hq]`` or ``[B, Hq]`` (else AK403); of bools AK404.
    """
    _require_rank("slopes", slopes, (1, 2), "[Hq] or [B, Hq]")
    _refuse_dtype("slopes", slopes, ("bool",), "float32")
    return partial(_alibi, slopes)


def _alibi(slopes: Any, s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return s - load(slopes, b, h) * (position(q_idx) - kv_idx).abs()


def bias(tensor: Any) -> ScoreFunction:
    """``s + tensor[...]`` for a float32 tensor ``[Sq, Skv]``, ``[H, Sq, Skv]`` or ``[B, H, Sq, Skv]``.

    Dimensions of size 1 broadcast. Other ranks are AK403; of bools, which say who is visible, AK404.
    """
    _require_rank("bias", tensor, (2, 3, 4), "[Sq, Skv], [H, Sq, Skv] or [B, H, Sq, Skv]")
    hint = "as a mask: lambda b, h, q_idx, kv_idx: tensor[q_idx, kv_idx]"
    _refuse_dtype("bias", tensor, ("bool",), "float32", hint)
    return partial(_bias, tensor)


def _bias(tensor: Any, s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return s + load(tensor, b, h, q_idx, kv_idx)


@dataclass(frozen=True)
class Selective:
    """What `selective` returns: no function, for a row depends on those before it."""

    head: int
    score: ScoreFunction | None


def selective(head: int = 0, score: ScoreFunction | None = None) -> Selective:
    """As the score of `ak.attention`: what ``head`` selects against is taken from the logits, as in `ak.selective_attention`.

    ``score`` changes the logits first, a softcap or a bias: the selection reads what it makes of them.
    """
    return Selective(head, score)


def all_of(*masks: MaskFunction | None) -> MaskFunction | None:
    """The mask that is True where all of them are; None where there are none."""
    given = [mask for mask in masks if mask is not None]
    if len(given) < 2:
        return given[0] if given else None
    return partial(_all, tuple(given))


def _all(masks: tuple[MaskFunction, ...], b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    visible = masks[0](b, h, q_idx, kv_idx)
    for each in masks[1:]:
        visible = visible & each(b, h, q_idx, kv_idx)
    return visible


def in_turn(*scores: ScoreFunction | None) -> ScoreFunction | None:
    """The score that applies them one after the other; None where there are none."""
    given = [score for score in scores if score is not None]
    if len(given) < 2:
        return given[0] if given else None
    return partial(_one_after_the_other, tuple(given))


def _one_after_the_other(
    scores: tuple[ScoreFunction, ...], s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any
) -> Any:
    for each in scores:
        s = each(s, b, h, q_idx, kv_idx)
    return s


def position(q_idx: Any) -> Any:
    """The key position that a query stands at."""
    lengths = q_idx.context
    return q_idx + (lengths.variable("kv_len") - lengths.variable("q_len"))


def load(tensor: Any, *index: Any) -> Any:
    """``tensor`` at the last of the indices; dimensions of size 1 broadcast."""
    rank = len(tensor.shape)
    pairs = zip(tensor.shape, index[len(index) - rank :], strict=True)
    return index[-1].context.load(tensor, tuple([0 if size == 1 else i for size, i in pairs]))


def _require_rank(name: str, tensor: Any, ranks: tuple[int, ...], allowed: str) -> None:
    try:
        shape = tensor.shape
    except (AttributeError, RuntimeError):  # the latter: torch's nested tensors
        given = type(tensor).__name__
        raise error("AK402", where=name, given=given, allowed=f"a tensor {allowed}") from None
    if len(shape) not in ranks:
        raise error("AK403", where=name, given=f"rank {len(shape)}", allowed=allowed)


_FLOATS = ("float", "complex")


def _refuse_dtype(name: str, tensor: Any, kinds: tuple[str, ...], allowed: str, hint: str = "") -> None:
    """AK404 for a tensor of these kinds of elements, as the names of dtypes have them."""
    dtype = str(tensor.dtype)
    if any(kind in dtype for kind in kinds):
        raise error("AK404", where=name, given=dtype, allowed=allowed, hint=hint)
