"""Caches of transformers over `ak.KVCache`: ``model.generate(..., past_key_values=QuantizedCache(model.config, "int4"))``.

The model's attention must be attnkit's (``attn_implementation="attnkit"``), which reads codes where they lie: what a layer
hands to it in the place of keys and values stands for the cache, and is no tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit.errors import error
from attnkit.integrations import transformers as implementation
from attnkit.ops.kv_cache import KVCache

from transformers.cache_utils import Cache, CacheLayerMixin  # isort: skip -- the line above says it if there is none

_DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


class CachedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer: an `ak.KVCache` that is made when the first tokens come, of their sizes."""

    is_sliding = False
    is_croppable = True

    def __init__(self, codec: Any, max_len: int, **options: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._codec, self._max_len, self._options = codec, max_len, options
        self.cache: KVCache | None = None
        self._length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the cache for tokens like these, ``[B, Hkv, T, D]``."""
        codec = _DTYPES[key_states.dtype] if self._codec is None else self._codec
        batch, heads, _, dim = key_states.shape
        self.cache = KVCache(
            batch, heads, dim, value_states.shape[3], max_len=self._max_len, codec=codec, device=key_states.device,
            **self._options,
        )  # fmt: skip
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Append tokens, and return what stands for all of them.

        Raises:
            AttnkitError: AK602, the cache is full.
        """
        if self.cache is None:
            self.lazy_initialization(key_states, value_states)
        assert self.cache is not None
        self.cache.append(key_states, value_states)
        self._length += key_states.shape[2]
        k, v = self.cache.head_dims
        shape = (self.cache.batch, self.cache.num_kv_heads, self._length)
        held = implementation.CachedTokens(self.cache, (*shape, k), self.dtype)
        return held, implementation.CachedTokens(self.cache, (*shape, v), self.dtype)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys there will be, and the position of the first."""
        return self._length + query_length, 0

    def get_seq_length(self) -> int:
        """How many tokens there are."""
        return self._length

    def get_max_length(self) -> int:
        """How many there can be."""
        return self._max_len

    get_max_cache_shape = get_max_length  # as it was called before

    def reset(self) -> None:
        """Forget all tokens, and their sizes."""
        self.cache, self._length, self.is_initialized = None, 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Take the newest tokens back, given as a negative number.

        Raises:
            AttnkitError: AK401, they are more than the codec can take back; AK504, a positive number.
        """
        if tokens_to_remove > 0:
            raise error(
                "AK504", where="crop", given=str(tokens_to_remove), allowed="a negative number of tokens"
            )
        if tokens_to_remove < 0 and self.cache is not None:
            self._length = max(self._length + tokens_to_remove, 0)
            self.cache.truncate(self._length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row b becomes what row ``beam_idx[b]`` was."""
        if self.cache is not None:
            self.cache.reorder(beam_idx.to("cpu"))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """AK504: the batch of a cache is what it was made for."""
        if repeats != 1 and self._length > 0:
            raise error("AK504", where="batch_repeat_interleave", given=str(repeats), allowed="1")

    def batch_select_indices(self, indices: Tensor) -> None:
        """AK504, as `batch_repeat_interleave`."""
        raise error(
            "AK504", where="batch_select_indices", given=str(indices.shape[0]), allowed="all of the batch"
        )


class QuantizedCache(Cache):
    """Keys and values of a model as codes.

    Args:
        config: the model's; its ``max_position_embeddings`` is what ``max_len`` is if nobody says.
        codec: as of `ak.KVCache`; None keeps tokens in the model's dtype.
        max_len: tokens that a row can hold. Memory that holds none is not touched.
        options: ``group_size``, ``residual``, ``page_size`` and the others of `ak.KVCache`.
    """

    def __init__(
        self,
        config: Any,
        codec: str | tuple[str, str] | None = "int8",
        *,
        max_len: int | None = None,
        **options: Any,
    ) -> None:
        text = config.get_text_config(decoder=True)
        room = int(text.max_position_embeddings if max_len is None else max_len)
        super().__init__(layers=[CachedLayer(codec, room, **options) for _ in range(text.num_hidden_layers)])

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values of all layers."""
        held = (getattr(layer, "cache", None) for layer in self.layers)
        return sum(cache.nbytes for cache in held if cache is not None)
