"""The sparge family: blocks are predicted from pooled queries and keys, then attended to with quantised operands.

For every sequence and query head, in tiles of 128 queries (I) and 64 keys (J), with ``kmean`` the mean key of the
sequence, ``k' = k - kmean`` if smoothed, and ``qbar_I``, ``kbar_J`` the mean query of tile I and the mean k' of tile J::

    coherent(T)  mean of cos(x_a, x_b) over all pairs a, b of tile T  >  similarity
    p_I.         softmax over the coherent tiles J that i in I may see, of D^-1/2 qbar_I . kbar_J
    chosen       the max(1, floor(topk * tiles)) largest of p_I.        or
                 the longest prefix of p_I. in falling order whose sum does not exceed cdf, at least one
                 and every tile whose row I or column J is incoherent
    o, lse       softmax attention over the chosen tiles (and j <= i + kv_len - q_len if causal), where
                 q and k' are int8 per tile:  step = max|x| / 127 + 1e-7 in float32,  code = round(x / step), halves away from 0

The logits are those of k: ``kmean`` is given back to the quantised k', which changes the lse and not o. Pooling ignores
the attention's ``scale``. A token of zeros has no direction: its tile is incoherent.

``pv_threshold`` leaves out what a running softmax finds to be negligible: 16 queries skip a tile, all its mass, if every
one's largest logit there is at least ``pv_threshold`` below the largest it met before, in powers of two. The first tile
and the last two that are chosen are never skipped. It bounds the error and is not reproduced by every backend.

Parameters, with the defaults of `attnkit.sparge_attention`: ``causal`` False; ``topk`` a fraction (0.5 if neither is
given) or ``cdf``; ``similarity`` -0.1 with topk, 0.6 with cdf; ``pv_threshold`` None; ``int8``, ``smooth_k`` True;
``scale``. ``past`` int32 ``[B]`` is each sequence's ``kv_len - q_len``, needed where causal and not 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict, Unpack

import numpy as np

from attnkit.variants.block_sparse import Bool
from attnkit.variants.sequences import CAUSAL, Array, Float64, sequences, write

Q_TILE, KV_TILE, SKIP_ROWS = 128, 64, 16


class Parameters(TypedDict, total=False):
    """What picks a member of the family."""

    causal: bool
    topk: float | None
    cdf: float | None
    similarity: float | None
    pv_threshold: float | None
    int8: bool
    smooth_k: bool
    scale: float | None


class Results(NamedTuple):
    """``o [B, Hq, Sq, Dv]``, ``lse [B, Hq, Sq]``, and ``density [B, Hq]``: the share of the live tiles that are chosen."""

    o: Float64
    lse: Float64
    density: Float64


# --- as programs ------------------------------------------------------------------------------------------


def program(
    *, past: Any = None, tiles: tuple[int, int] = (Q_TILE, KV_TILE), **parameters: Unpack[Parameters]
) -> tuple[str, list[Any]]:
    """Inputs q, k, v; results o, lse, density. ``tiles`` are those of queries and of keys.

    The text, not canonical, and the arrays that its buffers are.
    """
    given = _with_defaults(parameters)
    rows, columns = tiles
    buffers = [] if past is None else [past]
    before = "" if past is None else " + b0[b]"
    center = "mean" if given["smooth_k"] else "none"
    lines = []
    q, k, smooth = "q", "k", "k"
    if given["smooth_k"]:
        lines += [
            "kmean = pool(k, size = 2147483647, how = mean)",
            "smooth = map(k, kmean) { value = x - y }",
        ]
        smooth = "smooth"
    if given["int8"]:
        q, k = "q_int8", "k_int8"
        lines += [
            f"q_int8 = encode(q, codec = int8(tile, {rows}))",
            f"k_int8 = encode(k, codec = int8(tile, {columns}), center = {center})",
        ]
    rule = (
        f"top_fraction = {float(given['topk'])}"
        if given["cdf"] is None
        else f"top_cdf = {float(given['cdf'])}"
    )
    skip = "" if given["pv_threshold"] is None else f", skip = {float(given['pv_threshold'])}"
    scale = "default" if given["scale"] is None else repr(float(given["scale"]))
    causal = given["causal"]
    lines += [
        f"qbar = pool(q, size = {rows}, how = mean)",
        f"kbar = pool({smooth}, size = {columns}, how = mean)",
        f"chosen = select(qbar, kbar, scale = default, {rule}, incoherent = {float(given['similarity'])})"
        + (f" {{ mask = kv_idx * {columns} < (q_idx + 1) * {rows}{before} }}" if causal else ""),
        f"o, lse, density = attend({q}, {k}, v, scale = {scale}, blocks = chosen{skip}, outputs = (o, lse, density))"
        + (f" {{ mask = {CAUSAL} }}" if causal else ""),
        "return o, lse, density",
    ]
    return write(["q: bhsd", "k: bhsd", "v: bhsd"], lines, buffers), buffers


def _with_defaults(parameters: Parameters) -> dict[str, Any]:
    cdf = parameters.get("cdf")
    defaults = {
        "causal": False, "topk": 0.5 if cdf is None else None, "similarity": -0.1 if cdf is None else 0.6,
        "cdf": None, "pv_threshold": None, "int8": True, "smooth_k": True, "scale": None,
    }  # fmt: skip
    return defaults | {name: value for name, value in parameters.items() if value is not None}


# --- as equations -----------------------------------------------------------------------------------------


def naive(
    q: Array,
    k: Array,
    v: Array,
    *,
    tiles: tuple[int, int] = (Q_TILE, KV_TILE),
    **parameters: Unpack[Parameters],
) -> Results:
    """The equations in float64, a tile at a time, with the skipping of values as it is defined.

    ``q [B, Hq, Sq, D]``, ``k [B, Hkv, Skv, D]``, ``v [B, Hkv, Skv, Dv]``.
    """
    given = _with_defaults(parameters)
    o, lse = np.zeros((*q.shape[:3], v.shape[3])), np.full(q.shape[:3], -np.inf)
    density = np.zeros(q.shape[:2])
    for piece in sequences(q, k):
        for h in range(q.shape[1]):
            queries = q[piece.batch, h].astype(np.float64)
            keys, values = (x[piece.batch, h * k.shape[1] // q.shape[1]].astype(np.float64) for x in (k, v))
            kmean = keys.mean(axis=0) if given["smooth_k"] and len(keys) else np.zeros(keys.shape[1])
            visible = np.ones((piece.q_len, piece.kv_len), bool)
            if given["causal"]:
                visible = np.arange(piece.kv_len) <= piece.position
            live = any_in_tiles(visible, tiles)
            chosen = choose(queries, keys - kmean, live, tiles, given)
            density[piece.b, h] = (chosen & live).sum() / max(live.sum(), 1)
            if given["int8"]:
                queries, keys = quantise(queries, tiles[0]), quantise(keys - kmean, tiles[1]) + kmean
            scale = q.shape[3] ** -0.5 if given["scale"] is None else given["scale"]
            whole = np.repeat(np.repeat(chosen, tiles[0], axis=0), tiles[1], axis=1)
            seen = visible & whole[: piece.q_len, : piece.kv_len]
            z = np.where(seen, scale * (queries @ keys.T), -np.inf)
            together = min(SKIP_ROWS, tiles[0])
            for rows in (slice(i, min(i + together, piece.q_len)) for i in range(0, piece.q_len, together)):
                order = np.flatnonzero(chosen[rows.start // tiles[0]])
                o[piece.b, h, rows], lse[piece.b, h, rows] = attend_tiles(
                    z[rows],
                    values,
                    [slice(n * tiles[1], (n + 1) * tiles[1]) for n in order],
                    given["pv_threshold"],
                )
    return Results(o, lse, density)


def any_in_tiles(pairs: Bool, tiles: tuple[int, int]) -> Bool:
    """Which tiles of pairs hold one that is True; those at the end are smaller."""
    rows, columns = (range(0, n, tile) for n, tile in zip(pairs.shape, tiles, strict=True))
    found = np.zeros((len(rows), len(columns)), bool)
    for i, j in np.ndindex(found.shape):
        found[i, j] = pairs[rows[i] : rows[i] + tiles[0], columns[j] : columns[j] + tiles[1]].any()
    return found


def choose(
    queries: Float64, keys: Float64, live: Bool, tiles: tuple[int, int], given: dict[str, Any]
) -> Bool:
    """The tiles that are attended to, ``[q tiles, kv tiles]``."""
    q_tiles, k_tiles = (
        [x[i : i + n] for i in range(0, len(x), n)] for x, n in zip((queries, keys), tiles, strict=True)
    )
    coherent_q, coherent_k = ([is_coherent(x, given["similarity"]) for x in xs] for xs in (q_tiles, k_tiles))
    chosen = np.zeros((len(q_tiles), len(k_tiles)), bool)
    for i, j in np.ndindex(chosen.shape):
        chosen[i, j] = not (coherent_q[i] and coherent_k[j])
    for i in range(len(q_tiles)):
        candidates = [j for j in range(len(k_tiles)) if coherent_k[j] and live[i, j]]
        if not candidates:
            continue
        s = np.array([q_tiles[i].mean(axis=0) @ k_tiles[j].mean(axis=0) for j in candidates])
        s *= queries.shape[1] ** -0.5
        p = np.exp(s - s.max()) / np.exp(s - s.max()).sum()
        falling = sorted(range(len(p)), key=lambda n: (-p[n], n))
        count = (
            prefix_within(p[falling], given["cdf"])
            if given["cdf"]
            else max(1, int(given["topk"] * len(k_tiles)))
        )
        for n in falling[:count]:
            chosen[i, candidates[n]] = True
    return chosen & live


def is_coherent(tile: Float64, similarity: float) -> bool:
    """Whether the mean cosine of all pairs of tokens exceeds ``similarity``; never with a token of zeros."""
    length = np.sqrt((tile**2).sum(axis=1))
    if (length == 0).any():
        return False
    cosines = (tile @ tile.T) / np.outer(length, length)
    return bool(cosines.mean() > similarity)


def prefix_within(falling: Float64, cdf: float) -> int:
    """How many of the falling probabilities make the longest prefix whose sum does not exceed ``cdf``; at least 1."""
    count, total = 0, 0.0
    for p in falling:
        total += p
        if total > cdf:
            break
        count += 1
    return max(count, 1)


def quantise(x: Float64, tile: int) -> Float64:
    """Tokens ``[S, D]`` as int8 with a step per ``tile`` of them, and back."""
    out = np.empty_like(x)
    for i in range(0, len(x), tile):
        step = float(np.float32(abs(x[i : i + tile]).max() / 127 + 1e-7))
        code = np.sign(x[i : i + tile]) * np.floor(abs(x[i : i + tile]) / step + 0.5)
        out[i : i + tile] = step * code
    return out


def attend_tiles(
    z: Float64, values: Float64, tiles: list[slice], threshold: float | None
) -> tuple[Float64, Float64]:
    """A running softmax of a few queries over tiles of keys, ``z`` -inf where there is no pair. ``o`` and ``lse``."""
    top, mass = np.full(len(z), -np.inf), np.zeros(len(z))
    weighted = np.zeros((len(z), values.shape[1]))
    for number, keys in enumerate(tiles):
        here = z[:, keys].max(axis=1)
        behind = np.subtract(here, top, out=np.full(len(z), -np.inf), where=here > -np.inf)
        negligible = threshold is not None and behind.max() * np.log2(np.e) <= -threshold
        risen = np.maximum(top, here)
        pivot = np.where(risen == -np.inf, 0, risen)
        kept, top = np.exp(top - pivot), risen
        mass, weighted = mass * kept, weighted * kept[:, None]
        if not negligible or number == 0 or number >= len(tiles) - 2:
            weights = np.exp(z[:, keys] - pivot[:, None])
            mass, weighted = mass + weights.sum(axis=1), weighted + weights @ values[keys]
    total = np.where(mass == 0, 1, mass)
    return weighted / total[:, None], np.where(mass == 0, -np.inf, top + np.log(total))


CASES: dict[str, Parameters] = {
    "sparge": {},
    "sparge_causal": {"causal": True},
    "sparge_cdf": {"cdf": 0.9, "similarity": 0.0},
    "sparge_cdf_causal": {"cdf": 0.7, "similarity": -1.0, "causal": True, "int8": False},
    "sparge_topk": {"topk": 0.3, "similarity": 0.01, "smooth_k": False},
    "sparge_plain": {"topk": 0.4, "similarity": -1.0, "int8": False, "smooth_k": False, "scale": 0.3},
    "sparge_skip": {"topk": 0.8, "pv_threshold": 20.0},
}
