"""Who is measured: attnkit's own backend and its rivals, each a row of data.

A new rival is one more `Peer` in `PEERS`: what it is called, which version is installed, which workloads it can express,
and how to prepare a call. Preparation (masks, reshapes) is outside the time measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import attnkit
from attnkit.bench.workloads import Inputs, Workload
from attnkit.variants import dense


@dataclass(frozen=True)
class Peer:
    """Somebody who computes attention.

    ``installed()`` is the version or None; ``refuses(workload)`` says why a workload cannot be expressed, or None;
    ``prepare(inputs)`` gives the call to be timed, which returns o ``[B, Hq, Sq, Dv]``; ``config(call)`` is what it runs with.
    """

    name: str
    installed: Callable[[], str | None]
    refuses: Callable[[Workload], str | None]
    prepare: Callable[[Inputs], Callable[[], Any]]
    config: Callable[[Callable[[], Any]], dict[str, int]] = lambda call: {}


def installed_version(distribution: str) -> str | None:
    """The version of an installed package, None if it is not there."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


# --- attnkit ----------------------------------------------------------------------------------------------


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


def _attnkit(inputs: Inputs) -> Callable[[], Any]:
    mods = torch_mods(inputs.workload)
    return lambda: attnkit.attention(inputs.q, inputs.k, inputs.v, backend="cpu", **mods)


def _config(call: Callable[[], Any]) -> dict[str, int]:
    from attnkit.ops.report import explain

    return explain(call).calls[0].config


CPU = Peer("cpu", lambda: attnkit.__version__, lambda workload: None, _attnkit, _config)


# --- torch ------------------------------------------------------------------------------------------------


def _sdpa_refuses(workload: Workload) -> str | None:
    return "softcap cannot be written as a mask" if "softcap" in workload.parameters else None


def _sdpa(inputs: Inputs) -> Callable[[], Any]:
    """torch's own fused attention; masks and biases are tensors made beforehand, as its users make them."""
    import torch

    w, s = inputs.workload, inputs.workload.shape
    arguments: dict[str, Any] = {"enable_gqa": s.hq != s.hkv}
    if w.parameters == {"causal": True} and s.sq == s.skv:
        arguments["is_causal"] = True
    elif "alibi_slopes" in w.parameters:
        bias = torch.from_numpy(dense.added_bias(s.sq, s.skv, **w.parameters)).to(inputs.q.dtype)
        seen = torch.from_numpy(dense.visible(s.sq, s.skv, **w.parameters))
        arguments["attn_mask"] = bias.masked_fill(~seen, float("-inf"))[None]
    elif w.parameters:
        arguments["attn_mask"] = torch.from_numpy(dense.visible(s.sq, s.skv, **w.parameters))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return lambda: sdpa(inputs.q, inputs.k, inputs.v, **arguments)


TORCH = Peer("torch", lambda: installed_version("torch"), _sdpa_refuses, _sdpa)

# The first that can run a workload is its baseline.
PEERS: tuple[Peer, ...] = (TORCH,)
