"""AMD's plug-in for torch on EPYC, inference only.

It runs in our process: importing it adds operators of its own and lowerings for them, and changes none of torch's
operators, threads or environment variables. It loads into the one minor version of torch that it was built for.
"""

from __future__ import annotations

from attnkit.bench.peers.base import Call, Peer, beyond_plain, folded, installed_version, unfolded
from attnkit.bench.workloads import Inputs, Workload


def _refuses(workload: Workload) -> str | None:
    return beyond_plain(workload, "float32", "bfloat16")


def _sdpa(inputs: Inputs) -> Call:
    import torch
    import zentorch  # noqa: F401 -- registers the operator

    w, f = inputs.workload, folded(inputs)
    sdpa = torch.ops.zentorch.zentorch_sdpa
    causal = "causal" in w.parameters
    return Call(lambda: sdpa(f.q, f.k, f.v, 0.0, causal), lambda raw: unfolded(raw[0], w))


ZENTORCH = Peer("zentorch", lambda: installed_version("zentorch"), _refuses, _sdpa, extra="peers")
