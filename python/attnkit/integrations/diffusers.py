"""attnkit as an attention backend of diffusers: import this, then ``model.set_attention_backend("attnkit")``.

diffusers finds a backend by its member of a closed enumeration, so `register` adds one; the rest is what diffusers does for its own
backends. Two names are registered: ``"attnkit"`` computes what ``"native"`` does, ``"attnkit_sparge"`` attends to half of the tiles.
Queries, keys and values stay where they are, ``[B, S, H, D]``: kernels read them by strides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from attnkit.errors import error
from attnkit.ops import scaled_dot_product_attention, sparge_attention

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None, float, bool, float | None, bool], Tensor]


def register(name: str, attention: Attention) -> None:
    """Make a function an attention backend of diffusers; again under the same name, it takes the place of the one before.

    Args:
        name: what `set_attention_backend` and `attention_backend` take, in lower case.
        attention: has the arguments of torch's scaled_dot_product_attention, in its order, and like it q ``[B, Hq, Sq, D]``,
            k and v ``[B, H, Skv, D]``, masks that broadcast to ``[B, Hq, Sq, Skv]``, and a result ``[B, Hq, Sq, D]``.

    Raises:
        AttnkitError: AK501, diffusers is not installed, or keeps its backends otherwise. Attention itself: AK504, something is
            asked for that is not built.
    """

    def backend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        return_attn_probs: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        _parallel_config: Any = None,
    ) -> Tensor:
        # diffusers drops what a backend has no name for: these are named, so that none of them is ignored.
        _refuse("return_lse", return_lse, False)
        _refuse("return_attn_probs", return_attn_probs, False)
        _refuse("window_size", window_size, (-1, -1))
        _refuse("softcap", softcap, 0.0)
        _refuse("parallel_config", _parallel_config, None)
        q, k, v = (x.permute(0, 2, 1, 3) for x in (query, key, value))
        if isinstance(attn_mask, Tensor) and attn_mask.shape == (query.shape[0], key.shape[1]):
            attn_mask = attn_mask[:, None, None]  # one row for each entry of the batch, as "native" has it
        return attention(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa).permute(0, 2, 1, 3)

    try:
        from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

        if name not in AttentionBackendName._value2member_map_:
            member = str.__new__(AttentionBackendName, name)
            member._name_, member._value_ = name.upper(), name
            setattr(AttentionBackendName, member.name, member)
            AttentionBackendName._member_names_.append(member.name)
            AttentionBackendName._member_map_[member.name] = member
            AttentionBackendName._value2member_map_[name] = member
        _AttentionBackendRegistry.register(AttentionBackendName(name))(backend)
    except (ImportError, AttributeError, TypeError, ValueError) as exc:
        raise error(
            "AK501",
            where="attnkit.integrations.diffusers",
            what="diffusers is not installed, or keeps its attention backends otherwise",
            given=str(exc),
            hint="pip install 'diffusers>=0.35'",
        ) from exc


def sparge(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    **thresholds: Any,
) -> Tensor:
    """`sparge_attention` in the form that `register` takes.

    Args:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, H, Skv, D]``; heads may be grouped, whatever ``enable_gqa`` says.
        value: like ``key``.
        attn_mask: None: tiles are chosen by means, which would hold what is no key.
        dropout_p: 0.
        is_causal: False.
        scale: as in `sparge_attention`.
        enable_gqa: see ``key``.
        thresholds: what else `sparge_attention` takes, for backends of your own.

    Raises:
        AttnkitError: AK504, a mask, dropout or causal; whatever `sparge_attention` raises.
    """
    _refuse("attn_mask", attn_mask if attn_mask is None else type(attn_mask).__name__, None)
    _refuse("dropout_p", dropout_p, 0.0)
    _refuse("is_causal", is_causal, False)
    found = sparge_attention(query, key, value, scale=scale, **thresholds)
    assert isinstance(found, Tensor)  # no density was asked for
    return found


def _refuse(where: str, given: Any, allowed: Any) -> None:
    if given != allowed:
        raise error("AK504", where=where, given=str(given), allowed=str(allowed))


register("attnkit", scaled_dot_product_attention)
register("attnkit_sparge", sparge)
