"""Who is measured: attnkit's own backend and its rivals, each a row of data.

A new rival is a module with one more `Peer`: what it is called, which version is installed, which workloads it can
express, and how to prepare a call. Preparation (masks, layouts, compilation) is outside the time measured. Those that
are not part of torch are the extra ``peers``; nothing but suites `cpu` and `kv` of `attnkit bench` asks for them.
"""

from __future__ import annotations

from attnkit.bench.peers.base import Call, Peer, installed_version
from attnkit.bench.peers.flex import FLEX, FLEX_GPU
from attnkit.bench.peers.gpu import FOLDED_GPU, FUSED
from attnkit.bench.peers.llamacpp import LLAMA, LLAMA_PRODUCTS
from attnkit.bench.peers.onnxruntime import GQA, MHA
from attnkit.bench.peers.openvino import OPENVINO
from attnkit.bench.peers.own import CPU, TRITON, torch_mods
from attnkit.bench.peers.torch import FOLDED, TORCH
from attnkit.bench.peers.zentorch import ZENTORCH

__all__ = [
    "CPU", "FLEX", "FLEX_GPU", "FOLDED", "FOLDED_GPU", "FUSED", "GQA", "LLAMA", "LLAMA_PRODUCTS", "MHA", "OPENVINO", "TORCH", "TRITON", "ZENTORCH", "Call", "Peer", "installed_version",
    "torch_mods",
]  # fmt: skip
