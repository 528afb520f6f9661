"""Those who compute attention on an NVIDIA GPU: torch's fused kernels one by one, FlexAttention, libraries if they are there.

They take full and causal attention; what one of them cannot do it says itself, when its first call is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from attnkit.bench.peers.base import Call, Peer, folded, installed_version, unfolded
from attnkit.bench.peers.flex import FLEX_GPU
from attnkit.bench.workloads import Inputs, Workload

_WORKSPACE_BYTES = 128 << 20  # what FlashInfer recommends


def _refuses(workload: Workload, *, gradients: bool = True) -> str | None:
    """Why the libraries of this file cannot express a workload, or None."""
    s = workload.shape
    if workload.needs_grad and not gradients:
        return "inference only"
    if not workload.parameters:
        return None
    if workload.parameters != {"causal": True}:
        return "full and causal attention only"
    return None if s.sq == s.skv else "their causal masks differ where there are more keys than queries"


def _fused(inputs: Inputs, kernel: str) -> Call:
    """`scaled_dot_product_attention` with one kernel allowed and no other."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    s, allowed = inputs.workload.shape, SDPBackend.__members__[kernel]
    causal, sdpa = bool(inputs.workload.parameters), torch.nn.functional.scaled_dot_product_attention

    def call() -> Any:
        with sdpa_kernel(allowed):
            return sdpa(inputs.q, inputs.k, inputs.v, is_causal=causal, enable_gqa=s.hq != s.hkv)

    return Call(call, config={"kernel": kernel})


def _folded_refuses(workload: Workload) -> str | None:
    s = workload.shape
    return "folds grouped heads of full attention only" if workload.parameters or s.hq == s.hkv else None


def _folded(inputs: Inputs) -> Call:
    """The query heads of a kv head as its queries: what a user of torch who knows writes for decoding."""
    call = _fused(folded(inputs), "FLASH_ATTENTION")
    return Call(call.run, lambda o: unfolded(o, inputs.workload), call.config)


def _by_token(inputs: Inputs) -> tuple[Any, Any, Any]:
    """q, k, v as ``[B, S, H, D]``, in memory too."""
    found = (t.detach().transpose(1, 2).contiguous() for t in (inputs.q, inputs.k, inputs.v))
    q, k, v = (t.requires_grad_(inputs.workload.needs_grad) for t in found)
    return q, k, v


def _heads_first(o: Any) -> Any:
    return o.transpose(1, 2)


def _flash_attn(inputs: Inputs) -> Call:
    from flash_attn import flash_attn_func

    q, k, v = _by_token(inputs)
    causal = bool(inputs.workload.parameters)
    return Call(lambda: flash_attn_func(q, k, v, causal=causal), _heads_first)


def _fla(inputs: Inputs) -> Call:
    """Its softmax attention: its linear attention has nobody to stand beside on a GPU."""
    from fla.ops.attn import parallel_attn

    q, k, v = _by_token(inputs)
    return Call(lambda: parallel_attn(q, k, v), _heads_first)


def _fla_refuses(workload: Workload) -> str | None:
    return _refuses(workload, gradients=False) if workload.parameters else "causal attention only"


def _xformers(inputs: Inputs) -> Call:
    """Grouped heads as ``[B, S, Hkv, G, D]``, with keys and values that are broadcast."""
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    s = inputs.workload.shape
    q, k, v = _by_token(inputs)
    if s.hq != s.hkv:
        q = q.unflatten(2, (s.hkv, -1))
        k, v = (t[:, :, :, None].expand(-1, -1, -1, s.hq // s.hkv, -1) for t in (k, v))
    bias = LowerTriangularMask() if inputs.workload.parameters else None
    return Call(
        lambda: memory_efficient_attention(q, k, v, attn_bias=bias),
        lambda o: _heads_first(o.reshape(s.b, s.sq, s.hq, s.dv)),
    )


def _flashinfer(inputs: Inputs) -> Call:
    """As it serves a batch, planned beforehand: sequences one after the other, or caches in pages."""
    import flashinfer
    import torch

    s = inputs.workload.shape
    q, k, v = _by_token(inputs)
    workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
    sequences = torch.arange(s.b + 1, dtype=torch.int32, device=q.device)
    how = {"q_data_type": q.dtype, "kv_data_type": k.dtype}
    if inputs.workload.direction == "decode":
        page = math.gcd(s.skv, 16)
        starts, last = sequences * (s.skv // page), torch.full_like(sequences[1:], page)
        pages = torch.arange(s.b * s.skv // page, dtype=torch.int32, device=q.device)
        decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, use_tensor_cores=s.hq != s.hkv)
        decode.plan(starts, pages, last, s.hq, s.hkv, s.d, page, **how)
        cache = tuple(t.view(-1, page, s.hkv, s.d) for t in (k, v))
        return Call(lambda: decode.run(q[:, 0], cache), lambda o: o[:, :, None])
    prefill = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace)
    causal = bool(inputs.workload.parameters)
    prefill.plan(sequences * s.sq, sequences * s.skv, s.hq, s.hkv, s.d, causal=causal, **how)
    packed = tuple(t.flatten(0, 1) for t in (q, k, v))
    return Call(lambda: prefill.run(*packed), lambda o: _heads_first(o.unflatten(0, (s.b, s.sq))))


def _torch(name: str, kernel: str) -> Peer:
    return Peer(name, lambda: installed_version("torch"), _refuses, partial(_fused, kernel=kernel))


def _package(name: str, distribution: str, refuses: Callable[[Workload], str | None], prepare: Any) -> Peer:
    return Peer(name, lambda: installed_version(distribution), refuses, prepare)


FUSED = (
    _torch("cudnn", "CUDNN_ATTENTION"),
    _torch("flash2", "FLASH_ATTENTION"),
    _torch("efficient", "EFFICIENT_ATTENTION"),
    FLEX_GPU,
    _package("flash_attn", "flash-attn", partial(_refuses, gradients=False), _flash_attn),
    _package("xformers", "xformers", partial(_refuses, gradients=False), _xformers),
    _package("flashinfer", "flashinfer-python", partial(_refuses, gradients=False), _flashinfer),
    _package("fla", "fla-core", _fla_refuses, _fla),
)
FOLDED_GPU = Peer("flash2-folded", lambda: installed_version("torch"), _folded_refuses, _folded)
