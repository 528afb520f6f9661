"""What one writes in torch for attention within clusters and windows: gather or cut, torch's own attention, and back."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def members(x: Tensor, centroids: Tensor, cluster_size: int) -> Tensor:
    """``[B, H, C, w]``: the tokens of largest affinity to each centroid, ascending."""
    affinity = torch.einsum("bhsd,hcd->bhcs", functional.normalize(x, dim=-1), centroids)
    return affinity.topk(cluster_size, dim=-1).indices.sort(-1).values


def within(q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, causal: bool = False) -> Tensor:
    """The mean over the clusters that a token is in."""
    batch, heads, count, w = queries.shape

    def gathered(x: Tensor, lists: Tensor) -> Tensor:
        index = lists.reshape(batch, heads, count * w, 1).expand(-1, -1, -1, x.shape[3])
        return x.gather(2, index).view(batch, heads * count, w, x.shape[3])

    mask = None
    if causal:
        mask = (keys[..., None, :] <= queries[..., None]).view(batch, heads * count, w, w)
    o = functional.scaled_dot_product_attention(
        gathered(q, queries), gathered(k, keys), gathered(v, keys), mask
    )
    o = torch.nan_to_num(o) if causal else o  # a query whose cluster holds only later keys
    index = queries.reshape(batch, heads, count * w, 1)
    summed = o.new_zeros(batch, heads, q.shape[2], v.shape[3]).scatter_add_(
        2, index.expand(-1, -1, -1, v.shape[3]), o.reshape(batch, heads, count * w, v.shape[3])
    )
    counts = o.new_zeros(batch, heads, q.shape[2], 1).scatter_add_(
        2, index, torch.ones_like(index, dtype=o.dtype)
    )
    return summed / counts.clamp(min=1)


def routing(
    q: Tensor, k: Tensor, v: Tensor, centroids: Tensor, cluster_size: int, causal: bool = False
) -> Tensor:
    """As ak.routing_attention."""
    lists = [members(x.detach(), centroids, cluster_size) for x in (q, k)]
    return within(q, k, v, lists[0], lists[1], causal)


def windows(q: Tensor, k: Tensor, v: Tensor, side: int, window: int, bias: Tensor | None = None) -> Tensor:
    """Square windows over a square image as a batch of small attentions; ``bias [H, window**2, window**2]``."""
    (batch, heads, _, _), parts = q.shape, side // window

    def cut(x: Tensor) -> Tensor:
        tiles = x.view(batch, heads, parts, window, parts, window, x.shape[3]).permute(0, 2, 4, 1, 3, 5, 6)
        return tiles.reshape(batch * parts**2, heads, window**2, x.shape[3])

    o = functional.scaled_dot_product_attention(cut(q), cut(k), cut(v), None if bias is None else bias[None])
    tiles = o.view(batch, parts, parts, heads, window, window, v.shape[3]).permute(0, 3, 1, 4, 2, 5, 6)
    return tiles.reshape(batch, heads, side**2, v.shape[3])
