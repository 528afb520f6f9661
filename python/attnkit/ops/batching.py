"""``torch.vmap`` over the ops, and several cotangents at once (``is_grads_batched``): one call for each example.

A program may read ``b``, and captured tensors may differ between examples, so these do not become entries of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from attnkit.errors import error
from attnkit.ops import (  # noqa: F401 -- which define the ops
    attend_cache,
    attend_groups,
    carried,
    carried_cache,
    gradients,
    readouts,
    recur,
    registry,
    routed,
    select,
)

_lib: Any = torch.library.Library("attnkit", "FRAGMENT")  # type: ignore[no-untyped-call]
# All but those that write to their arguments: of `kv_append` examples would write to one cache.
OPS = (
    "attend", "attend_backward", "attend_cache", "attend_carried", "attend_carried_backward", "attend_carried_cache",
    "attend_groups", "attend_groups_backward", "readout", "recur", "recur_backward", "route", "select",
)  # fmt: skip


def _one_by_one(op: Any) -> Callable[..., tuple[Any, Any]]:
    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        flat, tree = tree_flatten(args)
        dims, _ = tree_flatten(in_dims)

        def example(i: int) -> Any:
            return tree_unflatten(
                [x if d is None else x.select(d, i) for x, d in zip(flat, dims, strict=True)], tree
            )

        if info.batch_size == 0:  # nobody says what shapes the results have
            raise error("AK403", where="torch.vmap", given="no examples", allowed="one or more")
        results = [op(*example(i)) for i in range(info.batch_size)]
        return tree_map(lambda *each: torch.stack(each), *results), tree_map(lambda _: 0, results[0])

    return rule


def _of_cotangents(rule: Callable[..., tuple[Any, Any]]) -> Callable[..., Any]:
    """The rule for the batched tensors of ``torch.autograd.grad(..., is_grads_batched=True)``, which are not those of `torch.vmap`."""

    def run(*args: Any) -> Any:
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()

        def whole(t: Any, examples: int) -> Any:  # the examples of t, or so many times t
            return torch._remove_batch_dim(t, level, examples, 0) if isinstance(t, Tensor) else t

        found = {len(whole(t, 1)) for t in tree_flatten(args)[0] if isinstance(t, Tensor)} - {1}
        examples = found.pop() if found else 1
        held = tree_map(lambda t: whole(t, examples), args)
        dims = tree_map(lambda t: 0 if isinstance(t, Tensor) else None, args)
        results, _ = rule(SimpleNamespace(batch_size=examples), dims, *held)
        return tree_map(lambda t: torch._add_batch_dim(t, 0, level), results)

    return run


for _name in OPS:
    _rule = _one_by_one(getattr(torch.ops.attnkit, _name))
    torch.library.register_vmap(f"attnkit::{_name}", _rule, lib=_lib)
    if _name.endswith("_backward"):
        _lib.impl(_name, _of_cotangents(_rule), "Batched")
