"""Masks of draft trees, for speculative decoding."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnkit.errors import error
from attnkit.ir.mods import Mask
from attnkit.ops.check import check_tensor, check_values_of, shape_of


def tree(parents: Tensor) -> Mask:
    """Queries that are the nodes of a tree: each sees everything before the tree, its ancestors and itself.

    The last ``q_len`` keys are the nodes, in the order of the queries; what stands before them is the committed
    cache. A chain of nodes is causal attention. Make the mask outside of compiled regions: it looks at the values.

    Args:
        parents: ints ``[n]`` or ``[B, n]`` with n at least q_len: each node's parent as an index of a node, -1 for a root.
            Nodes may come in any order, and there may be several roots. Nodes beyond q_len are not used.

    Raises:
        AttnkitError: AK402, AK403, AK404, no such tensor; AK606, it has no values; AK414, an index of no node, or nodes that are their own
            ancestors.
    """
    ancestors = _ancestors(parents)
    return Mask(partial(_visible, ancestors[0] if ancestors.shape[0] == 1 else ancestors))


def _visible(ancestors: Tensor, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    lengths = q_idx.context
    node = kv_idx - (lengths.variable("kv_len") - lengths.variable("q_len"))
    index = (q_idx, node.clamp(min=0))
    return (node < 0) | ancestors[index if ancestors.dim() == 2 else (b, *index)]


def _ancestors(parents: Tensor) -> Tensor:
    """Bool ``[B, n, n]``: whether node j is node i or one of its ancestors."""
    check_tensor("parents", parents)
    check_values_of("parents", parents)
    if parents.is_floating_point() or parents.is_complex() or parents.dtype == torch.bool:
        raise error("AK404", where="parents", given=str(parents.dtype), allowed="ints")
    if parents.dim() not in (1, 2):
        raise error("AK403", where="parents", given=shape_of(parents), allowed="[q_len] or [B, q_len]")
    parents = (parents if parents.dim() == 2 else parents[None]).long()
    n = parents.shape[1]
    wrong = (parents < -1) | (parents >= n)
    if bool(wrong.any()):
        given = f"parent {int(parents[wrong][0])} in a tree of {n} nodes"
        raise error("AK414", where="parents", given=given, allowed=f"-1..{n - 1}")
    found = torch.zeros(len(parents), n, n + 1, dtype=torch.bool, device=parents.device)  # column n: no node
    above = torch.arange(n, device=parents.device).expand_as(parents)
    after = torch.cat([parents, parents.new_full((len(parents), 1), -1)], 1) % (
        n + 1
    )  # -1 is n, whose parent is n
    for _ in range(n + 1):
        found.scatter_(2, above.unsqueeze(2), True)
        above = after.gather(1, above)
        if bool((above == n).all()):
            return found[..., :n]
    node = int((above != n).nonzero()[0, 1])
    raise error("AK414", where="parents", given=f"node {node} below a cycle", allowed="trees")
