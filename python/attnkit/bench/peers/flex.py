"""torch's FlexAttention, compiled: what a user of torch writes for a score or mask of his own."""

from __future__ import annotations

import time
from typing import Any

from attnkit.bench.peers.base import Call, Peer, installed_version
from attnkit.bench.workloads import Inputs, Workload


def _refuses(workload: Workload) -> str | None:
    return "no backward on CPU" if workload.needs_grad else None


def mods(workload: Workload) -> tuple[Any, Any]:
    """``score_mod`` and ``mask_mod`` in plain torch, None where there is nothing to do."""
    import torch

    p: Any = workload.parameters
    shift = workload.shape.skv - workload.shape.sq
    cap = p.get("softcap")
    slopes = torch.from_numpy(p["alibi_slopes"]) if "alibi_slopes" in p else None
    left, right = (None if x == -1 else x for x in p.get("window", (None, None)))
    q_ids, kv_ids = (torch.from_numpy(x) for x in p["document"]) if "document" in p else (None, None)

    def score(s: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        if cap is not None:
            s = cap * torch.tanh(s / cap)
        return s if slopes is None else s - slopes[h] * (q + shift - kv).abs()

    def mask(b: Any, h: Any, q: Any, kv: Any) -> Any:
        seen = kv >= 0
        if p.get("causal"):
            seen = kv <= q + shift
            if "prefix" in p:
                seen = seen | (kv < p["prefix"])
        if left is not None:
            seen = seen & (kv >= q + shift - left)
        if right is not None:
            seen = seen & (kv <= q + shift + right)
        return seen if q_ids is None or kv_ids is None else seen & (q_ids[q] == kv_ids[kv])

    masked = p.keys() & {"causal", "window", "document"}
    return None if cap is None and slopes is None else score, mask if masked else None


def _flex(inputs: Inputs) -> Call:
    """Compiled afresh, without torch's caches: ``compile_ms`` is the first call, which is not among those timed."""
    import torch
    from torch._inductor.utils import fresh_cache
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    s = inputs.workload.shape
    score_mod, mask_mod = mods(inputs.workload)
    block_mask = (
        None
        if mask_mod is None
        else create_block_mask(mask_mod, None, None, s.sq, s.skv, device=inputs.q.device)
    )
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def call() -> Any:
        return compiled(
            inputs.q, inputs.k, inputs.v,
            score_mod=score_mod, block_mask=block_mask, enable_gqa=s.hq != s.hkv,
        )  # fmt: skip

    start = time.perf_counter()
    with fresh_cache():
        call()
    return Call(call, config={"compile_ms": round(1e3 * (time.perf_counter() - start))})


def compiled(q: Any, k: Any, v: Any, block_mask: Any) -> Any:
    """A call without arguments of the compiled function on these blocks; it is compiled here."""
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()
    function = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    with torch.no_grad():
        function(q, k, v, block_mask=block_mask)
    return lambda: function(q, k, v, block_mask=block_mask)


FLEX_GPU = Peer("flex", lambda: installed_version("torch"), lambda workload: None, _flex)
FLEX = Peer("flex", lambda: installed_version("torch"), _refuses, _flex)
