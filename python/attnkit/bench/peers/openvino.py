"""OpenVINO: its `scaled_dot_product_attention` alone in a model, on the CPU plug-in."""

from __future__ import annotations

from functools import cache
from typing import Any

from attnkit.bench.peers.base import Call, Peer, beyond_plain, folded, installed_version, unfolded
from attnkit.bench.workloads import Inputs, Workload


def _refuses(workload: Workload) -> str | None:
    return beyond_plain(workload, "float32", "bfloat16")


@cache
def _model(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], dtype: str, causal: bool, threads: int) -> Any:  # fmt: skip
    """Parameters have the inputs' own type: bf16 computed from float32 parameters is 10 to 20 % slower."""
    import openvino as ov
    from openvino import opset13 as ops

    element = _element(dtype)
    parameters = [ops.parameter(list(shape), element) for shape in (q, k, v)]
    attention = ops.scaled_dot_product_attention(*parameters, causal=causal)
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": element,
        "PERFORMANCE_HINT": "LATENCY",
    }
    return ov.Core().compile_model(ov.Model([attention], parameters), "CPU", settings)


def _element(dtype: str) -> Any:
    import openvino as ov

    return {"float32": ov.Type.f32, "bfloat16": ov.Type.bf16}[dtype]


def _sdpa(inputs: Inputs) -> Call:
    """Inputs and output are torch's memory: nothing is copied. Grouped heads are folded."""
    import openvino as ov
    import torch

    w = inputs.workload
    f = folded(inputs)
    o = torch.empty(*f.q.shape[:3], w.shape.dv, dtype=f.q.dtype)

    def shared(tensor: Any) -> Any:
        array = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
        return ov.Tensor(array, list(tensor.shape), _element(w.dtype))

    given = (f.q, f.k, f.v)
    shapes = (tuple(x.shape) for x in given)
    model = _model(*shapes, w.dtype, "causal" in w.parameters, torch.get_num_threads())
    request = model.create_infer_request()
    for i, tensor in enumerate(given):
        request.set_input_tensor(i, shared(tensor))
    request.set_output_tensor(0, shared(o))

    def run(kept_alive: Any = given) -> Any:
        request.infer()
        return o

    return Call(run, lambda o: unfolded(o, w))


OPENVINO = Peer("openvino", lambda: installed_version("openvino"), _refuses, _sdpa, extra="peers")
