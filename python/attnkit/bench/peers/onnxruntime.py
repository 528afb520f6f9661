"""onnxruntime: its own operators MultiHeadAttention and GroupQueryAttention, each alone in a model."""

from __future__ import annotations

from functools import cache
from typing import Any

from attnkit.bench.peers.base import Call, Peer, beyond_plain, folded, installed_version, unfolded
from attnkit.bench.workloads import Inputs, Shape, Workload

_DTYPES = {"float32": "FLOAT", "float16": "FLOAT16"}  # on CPU it has neither operator in bfloat16
_OPSET, _IR = 21, 10


def _installed() -> str | None:
    """Models are built with the package onnx."""
    return installed_version("onnxruntime") if installed_version("onnx") else None


# --- sessions -----------------------------------------------------------------------------------------------


def _session(node: Any, inputs: list[Any], outputs: list[Any], threads: int) -> Any:
    import onnxruntime
    from onnx import helper

    graph = helper.make_graph([node], "attention", inputs, outputs)
    sets = [helper.make_opsetid("", _OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=sets, ir_version=_IR)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Its workers spin during a run, not after it: they would take the next contender's cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


@cache
def _mha(heads: int, q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], dtype: str, causal: bool, threads: int) -> Any:  # fmt: skip
    """``q [B, Sq, H * D]``; ``k``, ``v`` the same way, or ``[B, H, Skv, D]``."""
    from onnx import TensorProto, helper

    element = getattr(TensorProto, _DTYPES[dtype])
    node = helper.make_node(
        "MultiHeadAttention", ["q", "k", "v"], ["o"],
        domain="com.microsoft", num_heads=heads, unidirectional=int(causal),
    )  # fmt: skip
    given = [helper.make_tensor_value_info(n, element, x) for n, x in zip("qkv", (q, k, v), strict=True)]
    made = [helper.make_tensor_value_info("o", element, [*q[:2], heads * _head_dim(v, heads)])]
    return _session(node, given, made, threads)


@cache
def _gqa(shape: Shape, dtype: str, threads: int) -> Any:
    """With ``sq`` new tokens behind ``skv - sq`` of a cache; without a cache where there are only new ones."""
    from onnx import TensorProto, helper

    s, info, element = shape, helper.make_tensor_value_info, getattr(TensorProto, _DTYPES[dtype])
    cache_shape = [s.b, s.hkv, s.skv, s.d]
    new = {"q": [s.b, s.sq, s.hq * s.d], "k": [s.b, s.sq, s.hkv * s.d], "v": [s.b, s.sq, s.hkv * s.d]}
    past = {} if s.sq == s.skv else {"past_k": cache_shape, "past_v": cache_shape}
    node = helper.make_node(
        "GroupQueryAttention", [*new, *(past or ("", "")), "last", "total"], ["o", "present_k", "present_v"],
        domain="com.microsoft", num_heads=s.hq, kv_num_heads=s.hkv,
    )  # fmt: skip
    given = [info(name, element, x) for name, x in {**new, **past}.items()]
    given += [info("last", TensorProto.INT32, [s.b]), info("total", TensorProto.INT32, [])]
    made = [
        info(n, element, x) for n, x in zip(node.output, (new["q"], cache_shape, cache_shape), strict=True)
    ]
    return _session(node, given, made, threads)


def _head_dim(shape: tuple[int, ...], heads: int) -> int:
    return shape[-1] if len(shape) == 4 else shape[-1] // heads


def _bound(session: Any, given: dict[str, Any], made: dict[str, Any]) -> Any:
    """torch's memory bound to a session's inputs and outputs: nothing is copied. Whoever runs it keeps the tensors alive."""
    binding = session.io_binding()
    for bind, tensors in ((binding.bind_input, given), (binding.bind_output, made)):
        for name, t in tensors.items():
            bind(name, "cpu", 0, t.numpy().dtype, list(t.shape), t.data_ptr())
    return binding


# --- adapters -----------------------------------------------------------------------------------------------


def _tokens_first(x: Any) -> Any:
    """``[B, H, S, D]`` as ``[B, S, H * D]``, the operators' layout."""
    return x.transpose(1, 2).flatten(2).contiguous()


def _heads_first(x: Any, heads: int) -> Any:
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _mha_refuses(workload: Workload) -> str | None:
    return beyond_plain(workload, *_DTYPES)


def _mha_call(inputs: Inputs) -> Call:
    """Square problems in the operator's own layout; a cache is read as it lies, with grouped heads folded."""
    import torch

    w, f = inputs.workload, folded(inputs)
    heads = w.shape.hkv
    q, k, v = _tokens_first(f.q), f.k, f.v
    if w.shape.sq == w.shape.skv:
        k, v = _tokens_first(k), _tokens_first(v)
    o = torch.empty(*q.shape[:2], heads * w.shape.dv, dtype=q.dtype)
    shapes = (tuple(x.shape) for x in (q, k, v))
    session = _mha(heads, *shapes, w.dtype, "causal" in w.parameters, torch.get_num_threads())
    given = {"q": q, "k": k, "v": v}
    binding = _bound(session, given, {"o": o})

    def run(kept_alive: Any = given) -> Any:
        session.run_with_iobinding(binding)
        return o

    return Call(run, lambda o: unfolded(_heads_first(o, heads), w))


def _gqa_refuses(workload: Workload) -> str | None:
    s = workload.shape
    if workload.needs_grad:
        return "inference only"
    if workload.dtype not in _DTYPES:
        return f"not in {workload.dtype}"
    if s.d != s.dv:
        return "values as wide as keys only"
    causal = workload.parameters == {"causal": True} and s.sq == s.skv
    return None if causal or (not workload.parameters and s.sq == 1) else "causal attention and decoding only"


def _gqa_call(inputs: Inputs) -> Call:
    """Decoding writes its last token into the cache again at every call, in place, as its users' loops do."""
    import torch

    w, s = inputs.workload, inputs.workload.shape
    new = (inputs.q, inputs.k[:, :, -s.sq :], inputs.v[:, :, -s.sq :])
    given = {name: _tokens_first(x) for name, x in zip("qkv", new, strict=True)}
    o = torch.empty_like(given["q"])
    kept = (inputs.k, inputs.v) if s.sq < s.skv else (torch.empty_like(inputs.k), torch.empty_like(inputs.v))
    if s.sq < s.skv:
        given |= {"past_k": kept[0], "past_v": kept[1]}
    given["last"] = torch.full((s.b,), s.skv - 1, dtype=torch.int32)
    given["total"] = torch.tensor(s.skv, dtype=torch.int32)
    session = _gqa(s, w.dtype, torch.get_num_threads())
    made = {"o": o, "present_k": kept[0], "present_v": kept[1]}
    binding = _bound(session, given, made)

    def run(kept_alive: Any = (given, made)) -> Any:
        session.run_with_iobinding(binding)
        return o

    return Call(run, lambda o: _heads_first(o, s.hq))


MHA = Peer("onnxruntime", _installed, _mha_refuses, _mha_call, extra="peers")
GQA = Peer("onnxruntime-gqa", _installed, _gqa_refuses, _gqa_call, extra="peers")
