"""attnkit as an attention implementation of transformers: import this, then ``attn_implementation="attnkit"``.

Two things are registered: the function that computes attention, and the one that makes the masks (without the second,
transformers would hand over no mask at all, and causality would be lost). Masks stay functions of one query and key:
nothing of size ``[Sq, Skv]`` is made, and the pattern is found by the kernel.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from attnkit.errors import CODES, AttnkitTypeError, error
from attnkit.ir.mods import bias, causal
from attnkit.ops import KVCache, dense_attention
from attnkit.ops.traced import SettledMask

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import causal_mask_function, sdpa_mask
    from transformers.utils import output_capturing
    from transformers.utils.import_utils import is_tracing

    if "q_offset" not in inspect.signature(sdpa_mask).parameters:
        raise ImportError("its mask functions take no q_offset")
except ImportError as exc:
    raise error(
        "AK501",
        where="attnkit.integrations.transformers",
        what="transformers is not installed, or too old",
        given=str(exc),
        hint="pip install -U transformers",
    ) from exc

MaskFunction = Callable[[Any, Any, Any, Any], Any]
Shape = tuple[int, int, int, int]
_collector = getattr(output_capturing, "_active_collector", None)

# What models or callers may ask of an attention function, and this one cannot do: ignoring it would change results.
_REFUSED = {
    "output_attentions": "attention weights are never computed as a whole",
    "head_mask": "masks of whole heads are not supported",
    "layer_head_mask": "masks of whole heads are not supported",
    "cu_seq_lens_q": "packed lengths are not taken from the model's arguments; position_ids that restart do the same",
    "cu_seq_lens_k": "packed lengths are not taken from the model's arguments; position_ids that restart do the same",
    "cache": "paged caches of continuous batching are not supported",
    "indices": "keys selected by an indexer are not supported",
    "block_indices": "blocks selected by an indexer are not supported",
    "sinks": "sinks that differ from query to query are not supported",
}


class ModelMask:
    """What a model hands from its mask function to its layers: ``function(b, h, q_idx, kv_idx)`` is True where seen.

    It has the ``shape [B, 1, Sq, Skv]`` of the tensor that it stands for, and is not one: a model that computes with
    its mask gets AK416.
    """

    dtype = torch.bool
    ndim = 4

    def __init__(self, function: MaskFunction, shape: Shape) -> None:
        self.function = function
        self.shape = shape

    def contiguous(self) -> ModelMask:
        """The mask itself: `generate` asks for it."""
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise _not_a_tensor(getattr(func, "__name__", "a torch function"))

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(name) if name.startswith("__") else _not_a_tensor(f".{name}")

    def _refuse(self, *operands: Any) -> NoReturn:
        raise _not_a_tensor("an operator")

    # Tensor's own operators take a TypeError of __torch_function__ for "not mine" and turn to these.
    __getitem__ = __invert__ = __and__ = __rand__ = __or__ = __ror__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse


class CachedTokens:
    """What `transformers_cache` hands to a layer's attention in the place of k or v: a cache, of which it has the shape."""

    def __init__(self, cache: KVCache, shape: Shape, dtype: torch.dtype) -> None:
        self.cache = cache
        self.shape = shape
        self.dtype = dtype


class NotATensor(AttnkitTypeError, AttributeError):
    """AK416. An AttributeError too, so that asking a mask whether it has an attribute is no error."""


def _not_a_tensor(given: str) -> NotATensor:
    row = CODES["AK416"]
    return NotATensor(
        "AK416", row.summary, "attention_mask", given, "what attnkit's attention does", row.hint
    )


def create_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = causal_mask_function,
    attention_mask: Tensor | ModelMask | None = None,
    local_size: int | None = None,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> ModelMask | None:
    """The mask of a model as `AttentionMaskInterface` asks for it.

    Args:
        batch_size: B.
        q_length: Sq.
        kv_length: Skv, the keys that the layer's cache will return.
        q_offset: position of the first query; static caches give a 0-d tensor.
        kv_offset: position of the first key.
        mask_function: ``(b, h, q, kv) -> bool`` of absolute positions.
        attention_mask: bool ``[B, positions]``, False where padded; positions beyond its end are padding.
        local_size: the window that ``mask_function`` holds, if it holds one.
        allow_is_bidirectional_skip: None may stand for a mask under which every key is seen.
        device: where the tensors live.
        kwargs: what other implementations need.

    Returns:
        A mask, never None for one that hides anything: nothing is left to the layers' ``is_causal``.

    Raises:
        AttnkitError: AK403, a mask made earlier (by `generate`, for static caches) has other lengths.
    """
    shape = (batch_size, 1, q_length, kv_length)
    if isinstance(attention_mask, ModelMask):
        _check_lengths(attention_mask, shape)
        return attention_mask
    padding = _padding(attention_mask, kv_length, kv_offset)
    if allow_is_bidirectional_skip and padding is None and (local_size is None or kv_length < local_size):
        return None
    # Offsets are 0-d tensors or differences of lengths, never numbers: a new number would be a new program.
    kv_shift = _offset(kv_offset, device)
    from_end = (
        not isinstance(q_offset, Tensor) and q_offset != 0 and q_offset - kv_offset == kv_length - q_length
    )
    if from_end and q_length == 1 and padding is None and mask_function is causal_mask_function:
        return None  # the last query sees every key: decoding traces nothing
    q_shift = kv_shift if from_end else _offset(q_offset, device)

    def visible(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        position = q_idx
        if from_end:
            lengths = q_idx.context
            position = q_idx + (lengths.variable("kv_len") - lengths.variable("q_len"))
        if batch_size == 1:
            b = b.new_zeros(())  # the mask of one sequence broadcasts
        # transformers evaluates its functions for head 0 and lets the result broadcast
        seen = mask_function(b, h.new_zeros(()), _shifted(position, q_shift), _shifted(kv_idx, kv_shift))
        return seen if padding is None else seen & padding[b, kv_idx]

    return ModelMask(SettledMask(visible), shape)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor | CachedTokens,
    value: Tensor,
    attention_mask: Tensor | ModelMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as `AttentionInterface` asks for it.

    Args:
        module: the layer; its ``is_causal`` counts where there is no mask.
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``; Hq is a multiple of Hkv. Or what stands for a cache (`transformers_cache`).
        value: ``[B, Hkv, Skv, Dv]``.
        attention_mask: a `ModelMask`, or a tensor that broadcasts to ``[B, Hq, Sq, Skv]``: bool, or float to be added.
        dropout: the probability with which a weight is dropped, as `dense_attention` has it; models give 0 when not training.
        scaling: of the logits; None is ``D ** -0.5``.
        is_causal: with no mask, query i sees keys up to i (top-left); None asks the module. One query sees all keys.
        softcap: c, of ``c * tanh(s / c)``.
        s_aux: ``[Hq]``, one more logit per head in the denominator.
        position_bias: broadcasts to ``[B, Hq, Sq, Skv]``, added after the softcap.
        sliding_window: already part of the mask; an error where it would matter and there is none.
        kwargs: what models pass along.

    Returns:
        ``[B, Sq, Hq, Dv]``, contiguous, and None: attention weights are never computed.

    Raises:
        AttnkitError: AK504, something is asked for that is not built; AK401, AK403, AK404 for masks that do not fit;
            AK503, derivatives in forward mode are required; whatever `dense_attention` raises.
    """
    _refuse_unsupported(kwargs)
    if query.shape[0] == 1 != key.shape[0]:
        query = query.expand(key.shape[0], -1, -1, -1)  # learned queries serve every entry of the batch
    full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    mask: MaskFunction | None = None
    additive = None if position_bias is None else _checked("position_bias", position_bias, full)
    if attention_mask is None:
        mask = _unmasked(module, is_causal, sliding_window, full)
    elif isinstance(attention_mask, ModelMask):
        _check_lengths(attention_mask, full)
        mask = attention_mask.function
    elif _checked("attention_mask", attention_mask, full).dtype == torch.bool:
        mask = _loaded(attention_mask)
    else:
        additive = attention_mask if additive is None else additive + attention_mask
    k, v = (key.cache, None) if isinstance(key, CachedTokens) else (key, value)
    o = dense_attention(
        query, k, v,
        mask=mask, softcap=softcap, score=None if additive is None else bias(additive),
        sink=None if s_aux is None else s_aux.float(), scale=scaling, dropout_p=dropout,
    )  # fmt: skip
    assert isinstance(o, Tensor)  # lse was not asked for
    return o.transpose(1, 2).contiguous(), None


AttentionInterface.register("attnkit", attention_forward)
AttentionMaskInterface.register("attnkit", create_mask)


def _refuse_unsupported(kwargs: dict[str, Any]) -> None:
    for name in kwargs.keys() & _REFUSED.keys():
        if kwargs[name] is not None and kwargs[name] is not False:
            given = type(kwargs[name]).__name__
            raise error("AK504", where=name, what=_REFUSED[name], given=given, allowed="None")
    # Some models drop output_attentions on the way down, and collect what their layers return.
    collected = None if _collector is None or torch.compiler.is_compiling() else _collector.get()
    if any(name.endswith("attentions") for name in collected or ()):
        what = _REFUSED["output_attentions"]
        raise error("AK504", where="output_attentions", what=what, given="True", allowed="False")


def _offset(offset: int | Tensor, device: torch.device | str) -> Tensor | None:
    if isinstance(offset, Tensor):
        return offset.clone()  # a static cache counts on in place, before the layers look
    return None if offset == 0 else torch.full((), offset, dtype=torch.int64, device=device)


def _shifted(position: Any, offset: Tensor | None) -> Any:
    return position if offset is None else position + offset


def _padding(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    """Which of the layer's keys are no padding, bool ``[B, Skv]``; None if that is known to be all of them."""
    if attention_mask is None:
        return None
    padding = attention_mask[:, kv_offset : kv_offset + kv_length]
    missing = kv_length - padding.shape[1]
    if missing > 0:
        return nn.functional.pad(padding, (0, missing))
    return None if not is_tracing(padding) and bool(padding.all()) else padding


def _unmasked(
    module: nn.Module, is_causal: bool | None, sliding_window: int | None, full: Shape
) -> MaskFunction | None:
    """What a missing mask means, exactly as transformers' sdpa attention has it."""
    if sliding_window is not None and sliding_window < full[3]:
        raise error(
            "AK401",
            where="sliding_window",
            what="there is a window and no mask that holds it",
            given=f"{sliding_window}, attention_mask None, {full[3]} keys",
            allowed="the mask that the model makes for this layer",
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    return causal("top_left") if full[2] > 1 and is_causal else None


def _check_lengths(mask: ModelMask, full: Shape) -> None:
    batch, _, q_len, kv_len = mask.shape
    if batch not in (1, full[0]) or q_len != full[2] or kv_len != full[3]:
        raise error("AK403", where="attention_mask", given=str(list(mask.shape)), allowed=str(list(full)))


def _checked(name: str, mask: Tensor, full: Shape) -> Tensor:
    """A dense mask or bias that broadcasts to ``full``."""
    pairs = zip(mask.shape[::-1], full[::-1], strict=False)
    if not 2 <= mask.dim() <= 4 or any(n not in (1, size) for n, size in pairs):
        allowed = f"what broadcasts to {list(full)}"
        raise error("AK403", where=name, given=str(list(mask.shape)), allowed=allowed)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise error("AK404", where=name, given=str(mask.dtype), allowed="torch.bool or a float dtype")
    return mask


def _loaded(mask: Tensor) -> MaskFunction:
    def visible(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        index = (b, h, q_idx, kv_idx)[4 - mask.dim() :]
        return mask[tuple([0 if n == 1 else i for n, i in zip(mask.shape, index, strict=True)])]

    return visible
