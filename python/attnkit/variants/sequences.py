"""What the families share: which queries and keys belong to each other, and the first lines of a program.

Sequences lie in a batch in three ways: one per batch entry, packed end to end (``cu_seqlens_q``, ``cu_seqlens_kv``:
N + 1 offsets each), or padded (``kv_lens``: how many keys of each batch entry exist).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Float64 = NDArray[np.float64]

# The mask of a query that sees the keys up to its own position, the last query standing at the last key.
CAUSAL = "kv_idx <= q_idx + (kv_len - q_len)"

_TYPES = {"float32": "f32", "float64": "f32", "int32": "i32", "int64": "i64", "bool": "bool"}


class Lengths(TypedDict, total=False):
    """How sequences lie in a batch; nothing given is one per batch entry."""

    cu_seqlens_q: Any
    cu_seqlens_kv: Any
    kv_lens: Any


class Piece(NamedTuple):
    """One sequence: its number, its batch entry, and where its queries and keys are."""

    b: int
    batch: int
    rows: slice
    keys: slice

    @property
    def q_len(self) -> int:
        """How many queries it has."""
        return int(self.rows.stop - self.rows.start)

    @property
    def kv_len(self) -> int:
        """How many keys it has."""
        return int(self.keys.stop - self.keys.start)

    @property
    def position(self) -> Array:
        """Where each query stands among the keys, ``[q_len, 1]``."""
        return np.arange(self.q_len)[:, None] + self.kv_len - self.q_len


def sequences(q: Array, k: Array, **lengths: Unpack[Lengths]) -> Iterator[Piece]:
    """The sequences of ``q [B, H, Sq, D]`` and ``k [B, Hkv, Skv, D]`` (packed: ``[1, H, total, D]``)."""
    if "cu_seqlens_q" in lengths:
        q_ends, kv_ends = (np.asarray(lengths[f"cu_seqlens_{name}"]).tolist() for name in ("q", "kv"))  # type: ignore[literal-required]
        for b in range(len(q_ends) - 1):
            yield Piece(b, 0, slice(q_ends[b], q_ends[b + 1]), slice(kv_ends[b], kv_ends[b + 1]))
        return
    kv_lens = np.asarray(lengths.get("kv_lens", [k.shape[2]] * q.shape[0])).tolist()
    for b in range(q.shape[0]):
        yield Piece(b, b, slice(0, q.shape[2]), slice(0, kv_lens[b]))


def layouts(buffers: list[Any], **lengths: Unpack[Lengths]) -> tuple[str, str]:
    """The layouts of queries and of keys, as text; the lengths that they name are appended to ``buffers``."""
    if "cu_seqlens_q" in lengths:
        buffers += [lengths["cu_seqlens_q"], lengths["cu_seqlens_kv"]]
        return f"packed[b{len(buffers) - 2}]", f"packed[b{len(buffers) - 1}]"
    if "kv_lens" in lengths:
        buffers.append(lengths["kv_lens"])
        return "bhsd", f"padded[b{len(buffers) - 1}]"
    return "bhsd", "bhsd"


def write(inputs: Sequence[str], lines: Sequence[str], buffers: Sequence[Any] = (), params: int = 0) -> str:
    """The text of a program: ``inputs`` such as ``"q: bhsd"``, the ``lines`` between its braces."""
    kinds = [f"b{i}: {_TYPES[np.asarray(x).dtype.name]}[{np.ndim(x)}]" for i, x in enumerate(buffers)]
    names = [f"p{i}: f32" for i in range(params)]
    head = f"program ({', '.join(inputs)}) buffers({', '.join(kinds)}) params({', '.join(names)}) {{"
    return "\n".join(["attnkit 1", head, *lines, "}"])
