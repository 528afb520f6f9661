"""Those who compute attention on an NVIDIA GPU: torch's fused kernels one by one, FlexAttention, libraries if they are there.

They take full and causal attention; what one of them cannot do it says itself, when its first call is made.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from attnkit.bench.peers.base import Call, Peer, folded, installed_version, unfolded
from attnkit.bench.peers.flex import FLEX_GPU
from attnkit.bench.workloads import Inputs, Workload


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


def _xformers(inputs: Inputs) -> Call:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    q, k, v = _by_token(inputs)
    bias = LowerTriangularMask() if inputs.workload.parameters else None
    return Call(lambda: memory_efficient_attention(q, k, v, attn_bias=bias), _heads_first)


def _flashinfer(inputs: Inputs) -> Call:
    import flashinfer

    q, k, v = (t[0] for t in _by_token(inputs))
    if inputs.workload.direction == "decode":
        return Call(lambda: flashinfer.single_decode_with_kv_cache(q[0], k, v), lambda o: o[None, :, None])
    causal = bool(inputs.workload.parameters)
    return Call(
        lambda: flashinfer.single_prefill_with_kv_cache(q, k, v, causal=causal),
        lambda o: _heads_first(o[None]),
    )


def _flashinfer_refuses(workload: Workload) -> str | None:
    return "one sequence at a time" if workload.shape.b > 1 else _refuses(workload, gradients=False)


def _ungrouped(workload: Workload) -> str | None:
    """xformers takes grouped heads in another shape; and gradients of tensors that are views by token."""
    return "grouped heads" if workload.shape.hq != workload.shape.hkv else _refuses(workload, gradients=False)


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
    _package("xformers", "xformers", _ungrouped, _xformers),
    _package("flashinfer", "flashinfer-python", _flashinfer_refuses, _flashinfer),
)
FOLDED_GPU = Peer("flash2-folded", lambda: installed_version("torch"), _folded_refuses, _folded)
