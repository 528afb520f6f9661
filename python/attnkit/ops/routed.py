"""``ak.routing_attention``, ``ak.routing``, ``ak.groups``: attention within clusters of tokens, and within lists of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnkit.backends.cpu import groups as engine
from attnkit.errors import error
from attnkit.ir.intervals import INT32_MAX
from attnkit.ir.mods import Mod, all_of, causal as causal_mask
from attnkit.ops.attend_groups import attend_groups
from attnkit.ops.check import (
    autocast,
    below_autograd,
    check_absent,
    check_captured,
    check_count,
    check_flag,
    check_float,
    check_qkv,
    check_scale,
    check_tensor,
    check_values_of,
    shape_of,
)
from attnkit.ops.traced import Traceable, bind
from attnkit.ops.tracing import assume_constant
from attnkit.variants.vision import GridPattern, Windows

_lib: Any = torch.library.Library("attnkit", "FRAGMENT")  # type: ignore[no-untyped-call]
_lib.define(
    "route(Tensor q, Tensor k, Tensor centroids, int cluster_size, str qk_norm, int block) -> (Tensor queries, Tensor keys)",
    tags=(torch.Tag.pt2_compliant_tag,),
)

BLOCK = 128  # of positions, with membership="prefix"
_MEMBERSHIPS = ("whole", "prefix")


@dataclass(frozen=True)
class Routing:
    """What `routing` gives: who belongs to which cluster, decided anew from q and k at each call."""

    centroids: Tensor
    cluster_size: int
    qk_norm: str
    membership: str


@dataclass(frozen=True)
class Groups:
    """What `groups` gives. ``shared``: some query is in several groups of a head."""

    queries: Tensor
    keys: Tensor
    shared: bool


def routing(
    centroids: Tensor, *, cluster_size: int, qk_norm: str = "l2", membership: str = "whole"
) -> Routing:
    """Tokens meet those of their clusters: for ``ak.attention(q, k, v, select=ak.routing(...))``.

    Args:
        centroids: ``[Hq, C, D]``, floating point; no gradient reaches them. `attnkit.nn.Centroids` learns them.
        cluster_size: w: a cluster has the w queries, and the w keys, of largest affinity to its centroid, ties to the first;
            more than there are tokens is all of them.
        qk_norm: ``"l2"``, ``"layer"`` or ``"none"``: of the tokens whose affinities are computed, not of the logits.
        membership: ``"whole"``: chosen from the whole sequence, so not for decoding. ``"prefix"``: strictly causal. A query
            belongs to the cluster of largest affinity, and sees the w best keys of that cluster among those before its block
            of 128 positions, and the keys of its block up to itself.

    Raises:
        AttnkitError: AK401, AK402, AK403, AK404, an argument is wrong.
    """
    check_float("centroids", centroids)
    if centroids.dim() != 3 or 0 in centroids.shape:
        raise error("AK403", where="centroids", given=shape_of(centroids), allowed="[Hq, C, D]")
    check_count("cluster_size", cluster_size, 1)
    for name, given, allowed in (
        ("qk_norm", qk_norm, engine.NORMS),
        ("membership", membership, _MEMBERSHIPS),
    ):
        if given not in allowed:
            raise error("AK401", where=name, given=repr(given), allowed=", ".join(map(repr, allowed)))
    return Routing(centroids, cluster_size, qk_norm, membership)


def groups(queries: Tensor, keys: Tensor | None = None) -> Groups:
    """Lists of tokens that attend to each other: an index map, for ``ak.attention(q, k, v, select=ak.groups(...))``.

    A query's result is the mean over the groups that list it; 0 if none does. Score and mask see the tokens' own indices.

    Args:
        queries: int32 ``[groups, most]``, or ``[B or 1, Hkv or 1, groups, most]``: each group's queries in ascending order,
            then -1.
        keys: the same for keys; None: each group's queries are its keys too.

    Raises:
        AttnkitError: AK402, AK403, AK404, what is given are no such tensors; AK606, they have no values; AK608, a list is
            not ascending.
    """
    keys = queries if keys is None else keys
    for name, t in (("queries", queries), ("keys", keys)):
        check_tensor(name, t)
        check_values_of(name, t)
        if t.dtype != torch.int32:
            raise error("AK404", where=name, given=str(t.dtype), allowed="torch.int32")
        if t.dim() not in (2, 4):
            raise error(
                "AK403", where=name, given=shape_of(t), allowed="[groups, most], or [B or 1, Hkv or 1, ...]"
            )
    if queries.dim() == 2:
        queries = queries[None, None]
    if keys.dim() == 2:
        keys = keys[None, None]
    queries, keys = queries.contiguous(), keys.contiguous()
    found = [engine.look_at(t, int(t.max()) + 1 if t.numel() else 0) for t in (queries, keys)]
    for name, facts in zip(("queries", "keys"), found, strict=True):
        if not facts.valid:
            given = "numbers that do not ascend, or a negative one before the end"
            raise error("AK608", where=name, given=given, allowed="ascending tokens, then -1")
    return Groups(queries, keys, found[0].shared)


def window_bias(table: Tensor, windows: Windows) -> Mod:
    """Swin's learned bias of the offset from key to query, as a score within ``select=windows``.

    What `attnkit.variants.vision.relative_bias` adds, by a token's place in its window: one short row of memory for each
    query, where offsets in the whole image would have to be looked up pair by pair.

    Args:
        table: float32 ``[Hq, 2 w0 - 1, 2 w1 - 1, ...]`` for windows ``w0 x w1 x ...``; it takes a gradient.
        windows: an `attnkit.variants.vision.Windows`.

    Raises:
        AttnkitError: AK402, AK403, AK404, an argument is wrong.
    """
    check_float("table", table)
    if not isinstance(windows, Windows):
        raise error("AK402", where="windows", given=type(windows).__name__, allowed="vision.Windows")
    sizes = tuple(2 * w - 1 for w in windows.window)
    if tuple(table.shape[1:]) != sizes:
        raise error(
            "AK403", where="table", given=shape_of(table), allowed=f"[Hq, {', '.join(map(str, sizes))}]"
        )
    place, offsets = _places(windows)
    bias = table.flatten(1)[:, offsets]
    return lambda s, b, h, q_idx, kv_idx: s + bias[h, place[q_idx], place[kv_idx]]


@lru_cache(maxsize=256)
def _places(windows: Windows) -> tuple[Tensor, Tensor]:
    """Of each token its place in its window, and of two places where their offset is in a table."""
    at = windows.places()
    n = prod(windows.window)
    own = np.stack(np.unravel_index(np.arange(n), windows.window))
    middle = np.array(windows.window)[:, None, None] - 1
    offsets = np.ravel_multi_index(
        tuple(own[:, :, None] - own[:, None] + middle), tuple(2 * w - 1 for w in windows.window)
    )
    return torch.from_numpy(at), torch.from_numpy(offsets)


@lru_cache(maxsize=256)
def _found(pattern: GridPattern) -> tuple[Tensor, Tensor, bool]:
    queries, keys, exact = pattern.groups()
    return torch.from_numpy(queries)[None, None], torch.from_numpy(keys)[None, None], not exact


@assume_constant
def of_pattern(pattern: GridPattern) -> tuple[Tensor, Tensor, bool]:
    """Lists of the queries and keys of a pattern over a grid, and whether the pattern is a mask besides."""
    return _found(pattern)


def routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    centroids: Tensor,
    *,
    cluster_size: int,
    causal: bool = False,
    qk_norm: str = "l2",
    membership: str = "whole",
    scale: float | None = None,
) -> Tensor:
    """Attention within clusters of tokens (Routing Transformer): ``O(S * cluster_size)`` where ``C * cluster_size`` is S.

    ``o_i`` is the mean of the softmax attentions of query i over the keys of the clusters that it is in, 0 if it is in none.
    Logits are ``scale * q . k`` of q and k as given.

    Args:
        q: ``[B, H, Sq, D]``, float32, bfloat16 or float16 on the CPU, any strides. Under ``torch.autocast`` q, k and v are cast
            to its dtype.
        k: ``[B, H, Skv, D]``: as many heads as q.
        v: ``[B, H, Skv, Dv]``.
        centroids: as in `routing`, like cluster_size, qk_norm and membership.
        cluster_size: see centroids.
        causal: key j only for queries i with ``j <= i + Skv - Sq``, by the tokens' true indices. With ``membership="prefix"``
            always.
        qk_norm: see centroids.
        membership: see centroids.
        scale: finite and positive; None is ``D ** -0.5``.

    Returns:
        ``o [B, H, Sq, Dv]`` in q's dtype.

    Raises:
        AttnkitError: AK4xx, an argument is wrong; AK407, q and k differ in heads; AK502, AK503, no kernel for these tensors;
            AK603, out of memory.

    Source: Roy et al. 2020, arXiv 2003.05997; docs/variants/routing.md says where we differ.
    """
    check_flag("causal", causal)
    select = routing(centroids, cluster_size=cluster_size, qk_norm=qk_norm, membership=membership)
    o, _ = within(select, q, k, v, None, causal_mask() if causal else None, check_scale(scale))
    return o


def within(
    select: Any, q: Tensor, k: Any, v: Any, score: Mod | None, mask: Mod | None, scale: float | None, need_lse: bool = False,
    **others: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention within what ``select`` says, and its lse where each query is in one group at most. ``others`` must be None.

    Raises:
        AttnkitError: as `routing_attention`; AK221, lse is asked for where a result is a mean over groups; AK504, one of the
            others is not None.
    """
    check_absent(others, "not built yet beside groups of tokens", "AK504")
    q, k, v = autocast(q, k, v)
    check_qkv(q, k, v)
    if q.device.type not in ("cpu", "meta"):
        raise error("AK502", where="select", given=f"tensors on {q.device}", allowed="tensors on the CPU")
    if isinstance(select, Routing):
        shared = select.membership == "whole"
        block = 0 if shared else BLOCK
        size = min(select.cluster_size, INT32_MAX)  # than which there are no more tokens
        how = select.centroids.detach(), size, select.qk_norm, block
        queries, keys = torch.ops.attnkit.route(q, k, *how)
        if not shared:
            mask = all_of(causal_mask(), mask)
    else:
        is_mask, shared = False, False
        if isinstance(select, GridPattern):
            tokens = prod(select.shape)
            if not q.shape[2] == k.shape[2] == tokens:
                given = f"q {shape_of(q)}, k {shape_of(k)} and a grid of {tokens} tokens"
                raise error("AK403", where="select", given=given, allowed="tokens of the grid")
            queries, keys, is_mask = of_pattern(select)
        else:
            queries, keys, shared = select.queries, select.keys, select.shared
        if is_mask:
            mask = all_of(select, mask)
    if need_lse and shared:
        raise error(
            "AK221", where="return_lse", given="queries in several groups", allowed="one group for each"
        )
    text, buffers, params = bind(Traceable(score, mask, scale), q)
    check_captured(buffers, q)
    numbers = [p.current() for p in params]
    o, lse, _ = attend_groups(q, k, v, queries, keys, shared, text, buffers, numbers, need_lse)
    return o, lse


def _lists(q: Tensor, k: Tensor, centroids: Tensor, cluster_size: int, block: int) -> tuple[Tensor, Tensor]:
    """Lists of queries and keys, unset."""
    if q.shape[1] != k.shape[1]:
        given = f"q {shape_of(q)}, k {shape_of(k)}"
        raise error(
            "AK407", where="q, k", given=given, allowed="as many kv heads as query heads, to be routed"
        )
    if centroids.shape[0] != q.shape[1] or centroids.shape[2] != q.shape[3]:
        allowed = f"[{q.shape[1]}, C, {q.shape[3]}]"
        raise error("AK403", where="centroids", given=shape_of(centroids), allowed=allowed)
    (batch, heads, q_len, _), kv_len, count = q.shape, k.shape[2], centroids.shape[1]
    if block == 0:
        sizes = [(count, min(cluster_size, n)) for n in (q_len, kv_len)]
    else:
        first = max(kv_len - q_len, 0) // block
        blocks = -(-kv_len // block) - first if q_len > 0 and kv_len > 0 else 0
        sizes = [(blocks * count, block), (blocks * count, min(cluster_size, kv_len) + block)]
    queries, keys = (q.new_empty((batch, heads, *size), dtype=torch.int32) for size in sizes)
    return queries, keys


def _route(
    q: Tensor, k: Tensor, centroids: Tensor, cluster_size: int, qk_norm: str, block: int
) -> tuple[Tensor, Tensor]:
    queries, keys = _lists(q, k, centroids, cluster_size, block)
    mu, threads = centroids.float().contiguous(), torch.get_num_threads()
    if block:
        if queries.numel() > 0:
            w = keys.shape[3] - block
            engine.route_prefix(q, k, mu, qk_norm, w, block, queries, keys, threads)
        return queries, keys
    for x, lists in ((q, queries), (k, keys)):
        if lists.numel() > 0:
            engine.route(x, mu, qk_norm, lists, threads)
    return queries, keys


def _route_fake(
    q: Tensor, k: Tensor, centroids: Tensor, cluster_size: int, qk_norm: str, block: int
) -> tuple[Tensor, Tensor]:
    return _lists(q, k, centroids, cluster_size, block)


_lib.impl("route", _route, "CPU")
_lib.impl("route", below_autograd(torch.ops.attnkit.route.default), "AutogradCPU")
torch.library.register_fake("attnkit::route", _route_fake, lib=_lib)
