"""torch's own fused attention, as its users call it."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnkit.bench.peers.base import Call, Peer, folded, installed_version, unfolded
from attnkit.bench.workloads import Inputs, Workload
from attnkit.variants import dense


def _refuses(workload: Workload) -> str | None:
    return "softcap cannot be written as a mask" if "softcap" in workload.parameters else None


def _sdpa(inputs: Inputs) -> Call:
    """Masks and biases are tensors made beforehand."""
    import torch

    w, s = inputs.workload, inputs.workload.shape
    arguments: dict[str, Any] = {"enable_gqa": s.hq != s.hkv}
    if w.parameters == {"causal": True} and s.sq == s.skv:
        arguments["is_causal"] = True
    elif "alibi_slopes" in w.parameters:
        rows = np.array_split(np.arange(s.sq), -(-s.sq // 256))
        arguments["attn_mask"] = torch.cat([_bias(w, r).to(inputs.q.dtype) for r in rows], 1)[None]
    elif w.parameters:
        arguments["attn_mask"] = torch.from_numpy(dense.visible(s.sq, s.skv, **w.parameters))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return Call(lambda: sdpa(inputs.q, inputs.k, inputs.v, **arguments))


def _bias(workload: Workload, rows: Any) -> Any:
    """What is added to the scores of some query rows, ``[Hq, rows, Skv]``: -inf where a pair does not exist."""
    import torch

    s, p = workload.shape, workload.parameters
    seen = dense.visible(s.sq, s.skv, rows, **p)
    return torch.from_numpy(np.where(seen, dense.added_bias(s.sq, s.skv, rows, **p), -np.inf))


def _folded_refuses(workload: Workload) -> str | None:
    s = workload.shape
    return "folds grouped heads of full attention only" if workload.parameters or s.hq == s.hkv else None


def _folded(inputs: Inputs) -> Call:
    """``enable_gqa`` copies keys and values for every query head; whoever knows folds the heads instead."""
    import torch

    f = folded(inputs)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return Call(lambda: sdpa(f.q, f.k, f.v), lambda o: unfolded(o, inputs.workload))


TORCH = Peer("torch", lambda: installed_version("torch"), _refuses, _sdpa)
FOLDED = Peer("torch-folded", lambda: installed_version("torch"), _folded_refuses, _folded)
