"""Who is measured: attnkit's own backend and its rivals, each a row of data.

A new rival is a module with one more `Peer`: what it is called, which version is installed, which workloads it can
express, and how to prepare a call. Preparation (masks, layouts, compilation) is outside the time measured. Those that
are not part of torch are the extra ``peers``; nothing but `attnkit bench --suite cpu` asks for them.
"""

from __future__ import annotations

from attnkit.bench.peers.base import Call, Peer, installed_version
from attnkit.bench.peers.flex import FLEX
from attnkit.bench.peers.onnxruntime import GQA, MHA
from attnkit.bench.peers.openvino import OPENVINO
from attnkit.bench.peers.own import CPU, torch_mods
from attnkit.bench.peers.torch import FOLDED, TORCH
from attnkit.bench.peers.zentorch import ZENTORCH

__all__ = [
    "CPU", "FLEX", "FOLDED", "GQA", "MHA", "OPENVINO", "TORCH", "ZENTORCH", "Call", "Peer", "installed_version",
    "torch_mods",
]  # fmt: skip
