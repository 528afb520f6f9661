"""What can be read off the weights of attention, as ops, kernels and the public function name it."""

from __future__ import annotations

from typing import Any, NamedTuple

WANT = ("column_sum", "column_max", "row_max", "entropy", "topk", "rows")


class Results(NamedTuple):
    """Where a kernel writes what is wanted: None, or contiguous and holding what rows and columns without a pair have.

    Float32: by key ``[B, Hq, Skv]``, by query ``[B, Hq, Sq]``, ``best [B, Hq, Sq, k]``, ``weights [B, Hq, R, Skv]``; int64
    ``best_keys``, like best; int32 ``rows [R]``, the queries that the weights are of, ascending.
    """

    column_sum: Any = None
    column_max: Any = None
    row_max: Any = None
    entropy: Any = None
    best: Any = None
    best_keys: Any = None
    weights: Any = None
    rows: Any = None
