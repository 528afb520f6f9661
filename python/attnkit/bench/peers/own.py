"""attnkit's own backends, measured as its peers are."""

from __future__ import annotations

from functools import partial
from typing import Any

import attnkit
from attnkit import backends
from attnkit.bench.peers.base import Call, Peer
from attnkit.bench.workloads import Inputs, Workload
from attnkit.errors import error
from attnkit.variants import dense


def torch_mods(workload: Workload) -> dict[str, Any]:
    """``score=`` and ``mask=`` of a workload for `attnkit.attention`; arrays are torch tensors."""
    import torch

    def tensors(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(tensors(x) for x in value)
        return torch.from_numpy(value) if hasattr(value, "__array__") else value

    parameters: dense.Parameters = {k: tensors(v) for k, v in workload.parameters.items()}  # type: ignore[assignment]
    score, mask = dense.mods(**parameters)
    return {"score": score, "mask": mask}


def _attnkit(inputs: Inputs, backend: str) -> Call:
    """Only this backend's kernel counts: where torch would stand in for it, that is a refusal.

    Raises:
        AttnkitError: AK5xx.
    """
    from attnkit.ops import report

    mods, held = torch_mods(inputs.workload), _held(inputs)

    def call() -> Any:
        return attnkit.attention(inputs.q, *held, backend=backend, **mods)

    runs = report.explain(call).calls[0]
    if runs.backend != backend:
        raise error("AK502", given=f"{runs.backend}: {'; '.join(runs.notes)}")
    return Call(call, config=runs.config, meant=held[0].dequantize if inputs.workload.codec else None)


def _held(inputs: Inputs) -> tuple[Any, ...]:
    """Keys and values as attention takes them: tensors, or a cache."""
    import torch

    shape, pages = inputs.workload.shape, inputs.workload.pages
    if pages is None:
        return inputs.k, inputs.v
    plain = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}[inputs.k.dtype]
    codec = inputs.workload.codec or plain
    cache = attnkit.KVCache(
        shape.b, shape.hkv, shape.d, shape.dv, max_len=shape.skv, codec=codec, page_size=pages or None
    )
    table = cache.segment.page_table
    if table is not None and inputs.workload.shuffled:
        generator = torch.Generator().manual_seed(inputs.workload.seed)
        table.copy_(torch.randperm(table.numel(), generator=generator).view(table.shape))
    cache.append(inputs.k, inputs.v)
    return (cache,)


def _own(name: str) -> Peer:
    def missing(workload: Workload) -> str | None:
        return backends.get(name).available()

    return Peer(name, lambda: attnkit.__version__, missing, partial(_attnkit, backend=name))


CPU, TRITON = _own("cpu"), _own("triton")
