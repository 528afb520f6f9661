"""torch's scaled_dot_product_attention, in attnkit's terms: top-left causal, broadcasting masks, any finite scale."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnkit import backends
from attnkit.errors import error
from attnkit.ops.at_once import at_once
from attnkit.ops.check import FLOAT32_MAX, autocast, check_flag, check_number, check_probability, check_tensor
from attnkit.ops.registry import attend
from attnkit.ops.seeds import draw
from attnkit.ops.warm import is_unwatched

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INDEX = ("b", "h", "q_idx", "kv_idx")


class Form(NamedTuple):
    """One call of torch's op as a program over ``[B, H, S, D]`` tensors."""

    q: Tensor
    k: Tensor
    v: Tensor
    text: str
    buffers: list[Tensor]
    dropout_p: float


def at_a_glance(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor | None:
    """A call, by `at_once`; None where that is not to be. Not for dynamo to look into."""
    if attn_mask is not None or dropout_p != 0.0:
        return None
    return at_once(_cached_text(is_causal, scale, 0.0, None, None), query, key, value, share=enable_gqa)


def express(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Form | str:
    """The program of a call, or why attnkit does not take it."""
    reason = _declined(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if reason is not None:
        return reason
    index: tuple[str, ...] | None = None
    if attn_mask is not None:
        broadcast = _broadcast(
            attn_mask, (*query.shape[-4:-1], key.shape[-2]), query.dim(), query.dtype, query.device
        )
        if isinstance(broadcast, str):
            return broadcast
        attn_mask, index = broadcast
    kind = None if attn_mask is None else "bool" if attn_mask.dtype == torch.bool else "f32"
    text = _cached_text(is_causal, scale, dropout_p, kind, index)
    q, k, v = (_four_dimensional(t) for t in (query, key, value))
    return Form(q, k, v, text, [] if attn_mask is None else [attn_mask], dropout_p)


def _declined(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> str | None:
    """Why attnkit does not take a call, its mask's shape apart; None if it does."""
    if not 0.0 <= dropout_p <= 1.0:
        return "dropout_p outside 0..1"
    if not query.dtype == key.dtype == value.dtype:
        return "mixed dtypes"
    if query.dtype not in _DTYPES:
        return f"dtype {query.dtype}"
    if not (query.is_cpu and key.is_cpu and value.is_cpu):
        device = next(t.device for t in (query, key, value) if not t.is_cpu)
        one = query.device == key.device == value.device
        if device.type != "cuda" or not one or backends.get("triton").available() is not None:
            return f"device {device.type}"
    if not query.layout == key.layout == value.layout == torch.strided:
        return "layout that is not strided"
    if scale is not None and not abs(scale) <= FLOAT32_MAX:
        return "scale that is not finite in float32"
    if is_causal and attn_mask is not None:
        return "mask beside is_causal"
    return _shapes_declined(query.shape, key.shape, value.shape, enable_gqa)


def _shapes_declined(q: torch.Size, k: torch.Size, v: torch.Size, enable_gqa: bool) -> str | None:
    if not 3 <= len(q) <= 5 or len(q) != len(k) or len(q) != len(v):
        return "rank"
    if q[-1] != k[-1] or k[-2] != v[-2]:
        return "shapes that do not go together"  # torch has the better message for its own op
    if 0 in q or 0 in k or 0 in v:
        return "empty tensors"
    if q[:-3] != k[:-3] or k[:-2] != v[:-2] or not _heads_match(q[-3], k[-3], enable_gqa):
        return "broadcasting q, k or v"
    return None


def _heads_match(heads: int, kv_heads: int, enable_gqa: bool) -> bool:
    return heads == kv_heads or (enable_gqa and heads % kv_heads == 0)


def _broadcast(
    mask: Tensor, full: tuple[int, ...], rank: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, tuple[str, ...]] | str:
    """The mask without leading dimensions of size 1, and how a program indexes it; or why it cannot.

    ``full`` are the sizes [B, H, L, S] that it broadcasts to (without B for ``rank`` 3).
    """
    if mask.dtype not in (torch.bool, torch.float32, dtype):
        return f"mask of dtype {mask.dtype}"
    if mask.device != device:
        return "mask on another device"
    if mask.layout != torch.strided:
        return "layout that is not strided"
    if not 2 <= mask.dim() <= rank:
        return "mask of another rank"
    # The two leading dimensions of a 5-D q are one in the program: its mask may have neither.
    if rank == 5 and mask.dim() >= 4:
        if mask.shape[-4] != 1:
            return "mask of more than four dimensions"
        while mask.dim() > 3 and mask.shape[0] == 1:
            mask = mask[0]
    if mask.dim() > len(full) or any(
        m not in (1, n) for m, n in zip(mask.shape[::-1], full[::-1], strict=False)
    ):
        return "mask that does not broadcast"
    # A dimension of size 1 or stride 0 is the same everywhere: index it with 0, and a padding mask costs a row.
    # A gradient is not: each element has its own.
    names, repeats = _INDEX[4 - mask.dim() :], not mask.requires_grad
    dims = zip(names, mask.shape, mask.stride(), strict=True)
    return mask, tuple(["0" if n == 1 or (repeats and stride == 0) else name for name, n, stride in dims])


def _four_dimensional(t: Tensor) -> Tensor:
    if t.dim() == 4:
        return t
    return t.unsqueeze(0) if t.dim() == 3 else t.flatten(0, 1)


_MAX_TEXTS = 1024  # a model has a handful; the bound only stops a leak
_texts: dict[Any, str] = {}


def _cached_text(*key: Any) -> str:
    """`_text`, kept: a call under no compiler should not format strings."""
    if torch.compiler.is_compiling():
        return _text(*key)
    text = _texts.get(key)
    if text is None:
        if len(_texts) >= _MAX_TEXTS:
            _texts.clear()
        text = _texts.setdefault(key, _text(*key))
    return text


def _text(
    is_causal: bool, scale: float | None, dropout_p: float, mask: str | None, index: tuple[str, ...] | None
) -> str:
    load = f"b0[{', '.join(index)}]" if index is not None else ""
    lines = []
    factor = "default" if scale is None else repr(float(scale))
    score = "s"
    if scale is not None and scale <= 0:  # a program's scale is positive; torch allows any
        factor, score = "1.0", f"s * {float(scale)!r}"
    if mask == "f32":
        score += f" + {load}"
    if score != "s":
        lines.append(f"score = {score}")
    if is_causal:
        lines.append("mask = kv_idx <= q_idx")
    elif mask == "bool":
        lines.append(f"mask = {load}")
    lines.append("normalizer = softmax")
    body = "\n    ".join(lines)
    attributes = (
        f"scale = {factor}" if dropout_p == 0.0 else f"scale = {factor}, dropout = {float(dropout_p)!r}"
    )
    buffers = f" buffers(b0: {mask}[{len(index)}])" if index is not None else ""
    return (
        f"attnkit 1\nprogram (q: bhsd, k: bhsd, v: bhsd){buffers} {{\n"
        f"  o, lse = attend(q, k, v, {attributes}) {{\n    {body}\n  }}\n  return o, lse\n}}\n"
    )


def run(form: Form, query: Tensor, unwatched: bool) -> Tensor:
    """Compute a form; the result has the query's leading dimensions. ``unwatched``: see `attend`."""
    seed = draw(form.dropout_p, form.q)
    o, _ = attend(form.q, form.k, form.v, form.text, form.buffers, [], False, seed, unwatched)
    return o if query.dim() == 4 else o.reshape(*query.shape[:-1], form.v.shape[-1])


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, computed by attnkit or not at all.

    ``query [..., Hq, L, E]``, ``key [..., H, S, E]``, ``value [..., H, S, Ev]`` of 3 to 5 dimensions, float32,
    bfloat16 or float16 on the CPU; ``attn_mask`` broadcasts to ``[..., Hq, L, S]``: bool (True = visible), float32 or
    the query's dtype (added to the logits).
    Causal is top-left aligned, as torch's is. A row that sees nothing gives 0. ``dropout_p`` drops weights as torch does,
    by other random numbers: one is drawn from torch's default generator for each call. ``scale`` and ``enable_gqa`` are torch's.

    Returns:
        ``[..., Hq, L, Ev]`` in the query's dtype.

    Raises:
        AttnkitError: AK401, AK402, an argument is no such number, flag or tensor; AK504, a form that attnkit does not take,
            with the reason; AK503, derivatives in forward mode are required and torch's op cannot stand in.
    """
    check_flag("is_causal", is_causal)
    check_flag("enable_gqa", enable_gqa)
    dropout_p = check_probability("dropout_p", dropout_p)
    if scale is not None:
        scale = check_number("scale", scale)
    how = attn_mask, dropout_p, is_causal, scale, enable_gqa
    compiles = torch.compiler.is_compiling()
    if not compiles and (o := at_a_glance(query, key, value, *how)) is not None:
        return o
    tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    unwatched = not compiles and is_unwatched(tensors)
    if not unwatched:
        for name, t in zip(("query", "key", "value", "attn_mask"), tensors, strict=False):
            check_tensor(name, t)
        query, key, value = autocast(query, key, value)
    form = express(query, key, value, *how)
    if isinstance(form, str):
        raise error(
            "AK504",
            where="scaled_dot_product_attention",
            what="this form of the call is not taken by attnkit",
            given=form,
            allowed="float32, bfloat16 or float16 CPU tensors of 3 to 5 dimensions",
            hint="torch.nn.functional.scaled_dot_product_attention computes it; attnkit.install() goes there and counts it",
        )
    return run(form, query, unwatched)
