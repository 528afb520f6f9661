"""llama.cpp: decoding by its library ggml on a CPU, alone in a graph, with its flash attention and without.

The package ggml-python is compiled where it is installed, for that machine's instructions, as llama.cpp itself is; the
wheels that hold ggml have AVX2 at most. Keys and values lie a head after the other, which it reads much faster than
its own order, a token after the other.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from attnkit.bench.peers.base import Call, Peer, beyond_plain, installed_version
from attnkit.bench.workloads import Inputs, Shape, Workload

# Its kind of cache for each codec of ours. Elements are float16: its bfloat16 takes half as long again, or twice as long.
_KINDS = {None: "F16", "int8": "Q8_0", "int4": "Q4_0"}
_ARENA = 1 << 20  # bytes: far more than a graph of three nodes and its tensors need

Tensor = Callable[..., Any]  # (data, kind, *shape) -> a tensor in ggml's graph, its fastest dimension first


def _refuses(workload: Workload, *, flash: bool) -> str | None:
    s = workload.shape
    if flash and workload.dtype == "float16" and workload.codec is None:
        return "sums float16 values in float16: off by 2 % after 32,768 of them"
    if workload.codec not in _KINDS:
        return f"keeps nothing like {workload.codec}"
    if workload.direction != "decode" or s.sq != 1 or workload.pages:
        return "decoding over a cache without pages only"
    if s.d % 32 or s.dv % 32:
        return "its codes are in blocks of 32 channels"
    return beyond_plain(workload, "float16", "bfloat16")


@cache
def _threads(count: int) -> Any:
    """It polls for a while, as it does by default: never, or always, is slower."""
    import ggml

    ggml.ggml_cpu_init()
    parameters = ggml.ggml_threadpool_params_default(count)
    return ggml.ggml_threadpool_new(ctypes.byref(parameters))


def _floats(x: Any) -> Any:
    return ctypes.cast(x.data_ptr(), ctypes.POINTER(ctypes.c_float))


def _encoded(x: Any, kind: int) -> Any:
    """``x [..., n]`` by ggml's own quantiser, as bytes ``[rows, bytes of a row]``."""
    import ggml
    import torch

    n = x.shape[-1]
    floats = x.float().contiguous().view(-1, n)
    codes = torch.empty(len(floats), ggml.ggml_row_size(kind, n), dtype=torch.uint8)
    ggml.ggml_quantize_chunk(kind, _floats(floats), codes.data_ptr(), 0, len(floats), n, None)
    return codes


def _decoded(codes: Any, kind: int, shape: tuple[int, ...]) -> Any:
    """What codes mean, float32."""
    import ggml
    import torch

    x = torch.empty(shape)
    ggml.ggml_get_type_traits(kind).contents.to_float(codes.data_ptr(), _floats(x), x.numel())
    return x


def _flash(context: Any, tensor: Tensor, q: Any, k: Any, v: Any, kinds: tuple[int, int], s: Shape) -> Any:
    import ggml

    given = (
        tensor(q, ggml.GGML_TYPE_F32, s.d, 1, s.hq, s.b),
        tensor(k, kinds[0], s.d, s.skv, s.hkv, s.b),
        tensor(v, kinds[1], s.dv, s.skv, s.hkv, s.b),
    )
    return ggml.ggml_flash_attn_ext(context, *given, None, s.d**-0.5, 0.0, 0.0)


def _products(context: Any, tensor: Tensor, q: Any, k: Any, v: Any, kinds: tuple[int, int], s: Shape) -> Any:
    """Grouped heads are folded; ``v`` is transposed."""
    import ggml

    queries = tensor(q, ggml.GGML_TYPE_F32, s.d, s.hq // s.hkv, s.hkv, s.b)
    scores = ggml.ggml_mul_mat(context, tensor(k, kinds[0], s.d, s.skv, s.hkv, s.b), queries)
    weights = ggml.ggml_soft_max_ext(context, scores, None, s.d**-0.5, 0.0)
    return ggml.ggml_mul_mat(context, tensor(v, kinds[1], s.skv, s.dv, s.hkv, s.b), weights)


def _call(inputs: Inputs, *, flash: bool) -> Call:
    """All memory is torch's. Without flash attention llama.cpp keeps no codes of values: they are float16, transposed."""
    import ggml
    import torch

    w, s, count = inputs.workload, inputs.workload.shape, torch.get_num_threads()
    names = (_KINDS[w.codec], _KINDS[w.codec] if flash else "F16")
    kinds = tuple(getattr(ggml, f"GGML_TYPE_{name}") for name in names)
    values = inputs.v if flash else inputs.v.mT
    q, k, v = inputs.q.float().contiguous(), _encoded(inputs.k, kinds[0]), _encoded(values, kinds[1])
    arena = ctypes.create_string_buffer(_ARENA)
    context = ggml.ggml_init(ggml.ggml_init_params(_ARENA, ctypes.addressof(arena), True))
    held = [arena, q, k, v]

    def tensor(data: Any, kind: int, *shape: int) -> Any:
        made = ggml.ggml_new_tensor_4d(context, kind, *shape)
        made.contents.data = data.data_ptr()
        return made

    result = (_flash if flash else _products)(context, tensor, q, k, v, kinds, s)
    graph = ggml.ggml_new_graph(context)
    ggml.ggml_build_forward_expand(graph, result)
    for i in range(ggml.ggml_graph_n_nodes(graph)):
        node = ggml.ggml_graph_node(graph, i).contents
        held.append(torch.empty(ggml.ggml_nbytes(ctypes.byref(node)), dtype=torch.uint8))
        node.data = held[-1].data_ptr()
    o = held[-1].view(torch.float32).view(s.b, s.hq, 1, s.dv)  # of one token: either order of the two is this
    plan = ggml.ggml_graph_plan(graph, count, _threads(count))
    held += [plan, torch.empty(max(1, plan.work_size), dtype=torch.uint8)]
    plan.work_data = ctypes.cast(held[-1].data_ptr(), ctypes.POINTER(ctypes.c_uint8))
    compute, by_reference = ggml.ggml_graph_compute, ctypes.byref(plan)

    def run(kept_alive: Any = held) -> Any:
        compute(graph, by_reference)
        return o

    def meant() -> tuple[Any, Any]:
        of_values = _decoded(v, kinds[1], values.shape)
        return _decoded(k, kinds[0], inputs.k.shape), of_values if flash else of_values.mT

    config = {"ggml": ggml.ggml_version().decode(), "keys": names[0].lower(), "values": names[1].lower()}
    return Call(run, config=config, meant=meant if w.codec else None)


def _peer(name: str, *, flash: bool) -> Peer:
    refuses, prepare = partial(_refuses, flash=flash), partial(_call, flash=flash)
    return Peer(name, lambda: installed_version("ggml-python"), refuses, prepare, extra="peers")


LLAMA, LLAMA_PRODUCTS = _peer("llama.cpp", flash=True), _peer("llama.cpp-products", flash=False)
