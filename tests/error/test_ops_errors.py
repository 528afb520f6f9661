"""Bad calls: every code of arguments, capability and run time is provoked."""

import math
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest

import attnkit as ak
import attnkit.ops  # defines torch.ops.attnkit
from attnkit.errors import CODES
from attnkit.runtime import prepare
from attnkit.variants import vision

B, H, HKV, S, D = 2, 4, 2, 6, 8
PLAIN = ak.trace(lambda b, h, q_idx, kv_idx: kv_idx <= q_idx).text
DROPOUT = """attnkit 1
program (q: bhsd, k: bhsd, v: bhsd) params(p0: f32) {
  o, lse = attend(q, k, v, dropout = p0) { normalizer = softmax }
  return o, lse
}
"""
NO_ATTENTION = """attnkit 1
program (q: bhsd, k: bhsd) {
  chosen = select(q, k, scale = 1.0, top_k = 2)
  return chosen
}
"""


def rand(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, math.prod(shape)).view(shape)


def i32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def misaligned(*shape: int) -> Tensor:
    """Floats that begin at an odd address, as a slice of a file may."""
    return torch.frombuffer(bytearray(4 * math.prod(shape) + 1), dtype=torch.float32, offset=1).view(shape)


def nested(*parts: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it is a prototype
        return torch.nested.as_nested_tensor(list(parts))


def without_memory(t: Tensor) -> Tensor:
    """Sizes that promise elements, and a storage that was given away, as sharded trainers do."""
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def backward(**other: Any) -> Any:
    arguments = {"d_o": Q, "d_lse": None, "q": Q, "k": K, "v": V, "o": Q, "lse": torch.zeros(B, H, S), "program": PLAIN, "buffers": [],
                 "params": [], "seed": None, "wanted": [], **other}  # fmt: skip
    return torch.ops.attnkit.attend_backward(*arguments.values())


SEED = torch.tensor(1)
Q, K, V = rand(B, H, S, D), rand(B, HKV, S, D), rand(B, HKV, S, D)
SINK = torch.zeros(H)
BLOCKS = torch.ones(2, 2, dtype=torch.bool)


def attention(q: Any = Q, k: Any = K, v: Any = V, **keywords: Any) -> Any:
    return ak.attention(q, k, v, **keywords)


def dense(**keywords: Any) -> Any:
    return ak.dense_attention(Q, K, V, **keywords)


def flex(query: Any = Q, key: Any = K, value: Any = V, **keywords: Any) -> Any:
    return ak.flex_attention(query, key, value, enable_gqa=True, **keywords)


def packed(**keywords: Any) -> Any:
    return ak.attention(Q[:1], K[:1], V[:1], **keywords)


def op(
    *,
    q: Any = Q,
    k: Any = K,
    v: Any = V,
    text: Any = PLAIN,
    buffers: Any = (),
    params: Any = (),
    seed: Any = None,
) -> Any:
    return torch.ops.attnkit.attend(q, k, v, text, list(buffers), list(params), seed, True)


def program(body: str, buffers: str = "", **layouts: str) -> str:
    q, kv = layouts.get("q", "bhsd"), layouts.get("kv", "bhsd")
    return (
        f"attnkit 1\nprogram (q: {q}, k: {kv}, v: {kv}) buffers({buffers}) {{\n"
        f"o, lse = attend(q, k, v, scale = default) {{ {body} }}\nreturn o, lse\n}}"
    )


# --- one call for every way to be wrong ---------------------------------------------------------------------

# name -> (code, the argument that the message names, the call)
Call = Callable[[], Any]
CALLS: dict[str, tuple[str, str, Call]] = {
    # programs
    "no attention": ("AK502", "program", lambda: op(text=NO_ATTENTION)),
    "no attention, with gradients": ("AK502", "program", lambda: op(q=Q.clone().requires_grad_(), text=NO_ATTENTION)),
    "no attention, backwards": ("AK502", "program", lambda: backward(program=NO_ATTENTION)),
    "no attention, on fake tensors": ("AK502", "program", lambda: op(q=Q.to("meta"), k=K.to("meta"), v=V.to("meta"), text=NO_ATTENTION)),
    # values
    "scale nan": ("AK401", "scale", lambda: attention(scale=math.nan)),
    "scale inf": ("AK401", "scale", lambda: attention(scale=math.inf)),
    "scale 0": ("AK401", "scale", lambda: attention(scale=0.0)),
    "scale -1": ("AK401", "scale", lambda: attention(scale=-1)),
    "scale beyond float": ("AK401", "scale", lambda: attention(scale=10**400)),
    "dropout above 1": ("AK401", "dropout_p", lambda: attention(dropout_p=1.5)),
    "dropout below 0": ("AK401", "dropout_p", lambda: attention(dropout_p=-0.1)),
    "dropout of torch's function": ("AK401", "dropout_p", lambda: ak.scaled_dot_product_attention(Q, Q, Q, dropout_p=1.1)),
    "causal of torch's function": ("AK402", "is_causal", lambda: ak.scaled_dot_product_attention(Q, Q, Q, is_causal=[])),
    "gqa of torch's function": ("AK402", "enable_gqa", lambda: ak.scaled_dot_product_attention(Q, Q, Q, enable_gqa="no")),
    "causal of another alignment": ("AK402", "causal", lambda: dense(causal="top_left")),
    "causal over a cache": ("AK402", "causal", lambda: ak.quantized_kv_attention(Q, ak.KVCache(B, HKV, D, max_len=S), causal="no")),
    "dropout param above 1": ("AK401", "dropout", lambda: op(text=DROPOUT, params=[1.5], seed=SEED)),
    "seed and no dropout": ("AK408", "seed", lambda: op(seed=SEED)),
    "dropout and no seed": ("AK402", "seed", lambda: op(text=DROPOUT, params=[0.5])),
    "seed of another dtype": ("AK404", "seed", lambda: op(text=DROPOUT, params=[0.5], seed=SEED.int())),
    "two seeds": ("AK403", "seed", lambda: op(text=DROPOUT, params=[0.5], seed=SEED.expand(2))),
    "no seed backwards": ("AK402", "seed", lambda: backward(program=DROPOUT, params=[0.5])),
    "dropout nan": ("AK401", "dropout_p", lambda: attention(dropout_p=math.nan)),
    "softcap": ("AK401", "softcap", lambda: dense(softcap=-3.0)),
    "softcap nan": ("AK401", "softcap", lambda: dense(softcap=math.nan)),
    "window distance": ("AK401", "left", lambda: dense(window=(-2, 0))),
    "param beyond float32": ("AK401", "param p0", lambda: attention(score=ak.softcap(ak.param("cap", 1e300)))),
    "param without value": ("AK401", "cap", lambda: attention(score=ak.softcap(ak.param("cap")))),
    "number of buffers": ("AK401", "buffers", lambda: op(buffers=[SINK])),
    "number of params": ("AK401", "params", lambda: op(params=[1.0])),
    # types
    "q None": ("AK402", "q", lambda: attention(q=None)),
    "q array": ("AK402", "q", lambda: attention(q=Q.numpy())),
    "k list": ("AK402", "k", lambda: attention(k=K.tolist())),
    "v None": ("AK402", "v", lambda: attention(v=None)),
    "sparse q": ("AK402", "q", lambda: attention(q=Q.to_sparse())),
    "sparse k": ("AK402", "k", lambda: attention(k=K.to_sparse())),
    "nested q": ("AK402", "q", lambda: attention(q=nested(Q[0], Q[1]))),
    "nested slopes": ("AK402", "slopes", lambda: dense(alibi_slopes=nested(SINK, SINK))),
    "sparse captured": ("AK402", "b0", lambda: attention(score=ak.bias(rand(S, S).to_sparse()))),
    "scale str": ("AK402", "scale", lambda: attention(scale="0.3")),
    "scale complex": ("AK402", "scale", lambda: attention(scale=1j)),
    "dropout str": ("AK402", "dropout_p", lambda: attention(dropout_p="0.1")),
    "dropout None": ("AK402", "dropout_p", lambda: attention(dropout_p=None)),
    "softcap str": ("AK402", "softcap", lambda: dense(softcap="3")),
    "window of str": ("AK402", "left", lambda: dense(window=("a", 0))),
    "window of float": ("AK402", "left", lambda: dense(window=(1.5, 0))),
    "mask tensor": ("AK402", "mask", lambda: attention(mask=rand(S, S) > 0)),
    "mask number": ("AK402", "mask", lambda: dense(mask=3)),
    "score tensor": ("AK402", "score", lambda: attention(score=rand(S, S))),
    "score str": ("AK402", "score", lambda: dense(score="s", softcap=3.0)),
    "normalizer": ("AK402", "normalizer", lambda: attention(normalizer="softmax")),
    "sink number": ("AK402", "sink", lambda: attention(normalizer=ak.softmax(3))),
    "sink list": ("AK402", "sink", lambda: dense(sink=[0.0] * H)),
    "sink array": ("AK402", "sink", lambda: dense(sink=SINK.numpy())),
    "alibi list": ("AK402", "slopes", lambda: dense(alibi_slopes=[0.5] * H)),
    "captured array": ("AK402|AK306", "", lambda: attention(score=ak.bias(rand(S, S).numpy()))),
    "kv_lens list": ("AK402", "kv_lens", lambda: attention(kv_lens=[S, S])),
    "cu_seqlens list": ("AK402", "cu_seqlens_q", lambda: packed(cu_seqlens_q=[0, S], cu_seqlens_kv=i32(0, S))),
    "trace of no function": ("AK402", "function", lambda: ak.trace(3)),  # type: ignore[arg-type]
    "trace of a builtin": ("AK402", "function", lambda: ak.trace(max)),
    "trace of three arguments": ("AK402", "function", lambda: ak.trace(lambda a, b, c: a)),
    # shapes
    "q 3-D": ("AK403", "q", lambda: attention(q=Q[0])),
    "k 5-D": ("AK403", "k", lambda: attention(k=K[None])),
    "batch": ("AK403", "q, k, v", lambda: attention(q=Q[:1])),
    "k and v lengths": ("AK403", "k, v", lambda: attention(v=V[:, :, :3])),
    "k and v heads": ("AK403", "k, v", lambda: attention(v=V[:, :1])),
    "head_dim": ("AK403", "q, k", lambda: attention(q=Q[..., :4])),
    "head_dim 0": ("AK403", "q, v", lambda: attention(q=Q[..., :0], k=K[..., :0])),
    "v_head_dim 0": ("AK403", "q, v", lambda: attention(v=V[..., :0])),
    "sink rank": ("AK403", "sink", lambda: dense(sink=SINK[None])),
    "sink heads": ("AK403", "sink", lambda: dense(sink=SINK[:3])),
    "alibi heads": ("AK403", "alibi_slopes", lambda: dense(alibi_slopes=torch.ones(H + 1))),
    "alibi rank": ("AK403", "slopes", lambda: dense(alibi_slopes=torch.ones(1, 1, H))),
    "bias rank": ("AK403", "bias", lambda: ak.bias(SINK)),
    "document rank": ("AK403", "q_ids", lambda: ak.document(rand(1, 1, S))),
    "prefix rank": ("AK403", "n", lambda: ak.prefix(rand(1, S))),
    "kv_lens rank": ("AK403", "kv_lens", lambda: attention(kv_lens=i32(S, S)[None])),
    "buffer rank": ("AK403", "b0", lambda: op(text=program("score = s + b0[h]", "b0: f32[1]"), buffers=[SINK[None]])),
    # dtypes
    "k float64": ("AK404", "k", lambda: attention(k=K.double())),
    "v float16": ("AK404", "v", lambda: attention(v=V.half())),
    "all int": ("AK404", "q", lambda: attention(Q.int(), K.int(), V.int())),
    "all bool": ("AK404", "q", lambda: attention(Q > 0, K > 0, V > 0)),
    "all complex": ("AK404", "q", lambda: attention(Q.cfloat(), K.cfloat(), V.cfloat())),
    "sink dtype": ("AK404|AK403", "sink", lambda: dense(sink=SINK.double())),
    "kv_lens int64": ("AK404", "kv_lens", lambda: attention(kv_lens=torch.tensor([S, S]))),
    "cu_seqlens int64": ("AK404", "cu_seqlens_kv", lambda: packed(cu_seqlens_q=i32(0, S), cu_seqlens_kv=torch.tensor([0, S]))),
    "buffer dtype": ("AK404", "b0", lambda: op(text=program("score = s + b0[h]", "b0: f32[1]"), buffers=[SINK.double()])),
    # devices
    "k elsewhere": ("AK405", "k", lambda: attention(k=K.to("meta"))),
    "q elsewhere": ("AK405", "k", lambda: attention(q=Q.to("meta"))),
    "captured elsewhere": ("AK405", "b0", lambda: attention(score=ak.bias(rand(S, S).to("meta")))),
    "kv_lens elsewhere": ("AK405", "b0|kv_lens", lambda: attention(kv_lens=i32(S, S).to("meta"))),
    "buffer elsewhere": (
        "AK405", "b0", lambda: op(text=program("score = s + b0[h]", "b0: f32[1]"), buffers=[SINK.to("meta")]),
    ),
    "sink elsewhere": ("AK405", "b0|sink", lambda: dense(sink=SINK.to("meta"))),
    # the rest of the arguments
    "window int": ("AK406", "window", lambda: dense(window=3)),
    "window triple": ("AK406", "window", lambda: dense(window=(1, 2, 3))),
    "heads": ("AK407", "q, k", lambda: attention(q=rand(B, 3, S, D))),
    "no heads": ("AK407", "q, k", lambda: attention(q=Q[:, :0])),
    "no kv heads": ("AK407", "q, k", lambda: attention(k=K[:, :0], v=V[:, :0])),
    "half packed": ("AK408", "cu_seqlens_q, cu_seqlens_kv", lambda: packed(cu_seqlens_q=i32(0, S))),
    "packed and padded": (
        "AK408", "kv_lens", lambda: packed(cu_seqlens_q=i32(0, S), cu_seqlens_kv=i32(0, S), kv_lens=i32(S)),
    ),
    # block masks
    "block_mask": ("AK402", "block_mask", lambda: attention(block_mask=object())),
    "block_mask map": ("AK402", "block_mask", lambda: attention(block_mask=torch.ones(1, 1, dtype=torch.bool))),
    "block_mask of no function": ("AK402", "mask", lambda: ak.block_mask(3, 1, 1, S, S)),
    "block_mask size": ("AK402", "q_len", lambda: ak.block_mask(ak.causal(), 1, 1, 6.0, S)),
    "block_mask empty": ("AK401", "kv_len", lambda: ak.block_mask(ak.causal(), 1, 1, S, 0)),
    "block_mask block": ("AK401", "q_block", lambda: ak.block_mask(ak.causal(), 1, 1, S, S, q_block=0)),
    "block_mask batch": ("AK401", "B", lambda: ak.block_mask(ak.causal(), -1, 1, S, S)),
    "block_mask of tiny blocks": ("AK401", "q_block", lambda: ak.block_mask(ak.causal(), 1, 1, 2**31 - 1, S, q_block=1)),
    "block_mask length": ("AK409", "block_mask", lambda: attention(block_mask=ak.block_mask(ak.causal(), 1, 1, S, S + 1))),
    "block_mask queries": ("AK409", "block_mask", lambda: attention(block_mask=ak.block_mask(ak.causal(), 1, 1, 2, S))),
    "block_mask of a batch": ("AK410", "block_mask", lambda: attention(block_mask=ak.block_mask(None, B + 1, 1, S, S))),
    "block_mask of heads": ("AK410", "block_mask", lambda: attention(block_mask=ak.block_mask(None, 1, HKV, S, S))),
    "block_mask packed": (
        "AK408", "block_mask",
        lambda: packed(cu_seqlens_q=i32(0, S), cu_seqlens_kv=i32(0, S), block_mask=ak.block_mask(None, 1, 1, S, S)),
    ),
    "map of floats": ("AK404", "blocks", lambda: ak.BlockMask.from_dense(torch.ones(2, 2))),
    "map with blocks of 0": ("AK401", "kv_block", lambda: ak.BlockMask.from_dense(BLOCKS, kv_block=0)),
    "map 1-D": ("AK403", "blocks", lambda: ak.BlockMask.from_dense(BLOCKS[0])),
    "map of other lengths": ("AK403", "blocks", lambda: ak.BlockMask.from_dense(BLOCKS, 100, 256)),
    "map of partial blocks": ("AK411", "blocks", lambda: ak.BlockMask.from_dense(BLOCKS.to(torch.uint8))),
    "map of other kinds": ("AK411", "blocks", lambda: ak.BlockMask.from_dense(3 * BLOCKS.to(torch.uint8))),
    "indptr": ("AK403", "indptr", lambda: ak.BlockMask.from_bcsr(i32(0, 1), i32(0), 256, 256)),
    "indptr of floats": ("AK404", "indptr", lambda: ak.BlockMask.from_bcsr(SINK, i32(0), 256, 256)),
    "indptr falls": ("AK411", "indptr", lambda: ak.BlockMask.from_bcsr(i32(0, 2, 1), i32(0), 256, 256)),
    "indptr too long": ("AK411", "indptr", lambda: ak.BlockMask.from_bcsr(i32(0, 1, 2), i32(0), 256, 256)),
    "indices": ("AK411", "indices", lambda: ak.BlockMask.from_bcsr(i32(0, 1, 2), i32(0, 2), 256, 256)),
    "indices negative": ("AK411", "indices", lambda: ak.BlockMask.from_bcsr(i32(0, 1, 2), i32(0, -1), 256, 256)),
    "indices 2-D": ("AK403", "indices", lambda: ak.BlockMask.from_bcsr(i32(0, 1, 2), i32(0, 1)[None], 256, 256)),
    "indices of bools": ("AK404", "indices", lambda: ak.BlockMask.from_bcsr(i32(0, 1, 2), BLOCKS[0], 256, 256)),
    "full of ints": ("AK404", "full", lambda: ak.BlockMask.from_bcsr(i32(0, 1, 2), i32(0, 1), 256, 256, full=i32(0, 1))),
    # capability
    "no such backend": ("AK501", "backend", lambda: attention(backend="abacus")),
    "backend None": ("AK501|AK402", "backend", lambda: attention(backend=None)),
    "backend list": ("AK501|AK402", "backend", lambda: attention(backend=[])),
    "float64": ("AK502", "backend", lambda: attention(Q.double(), K.double(), V.double())),
    "scale beyond float32": ("AK502", "backend", lambda: attention(scale=1e300)),
    "head_dim too large": ("AK502", "backend", lambda: attention(rand(1, 1, 1, 4097), rand(1, 1, 1, 4097), rand(1, 1, 1, 1))),
    "gradients by a transform": (
        "AK503", "attend", lambda: torch.func.grad(lambda q: ak.dense_attention(q, K, V, softcap=3.0).sum())(Q),
    ),
    "d_o of another shape": ("AK403", "d_o", lambda: backward(d_o=rand(1, 1, 1, 1))),
    "d_o of another dtype": ("AK404", "d_o", lambda: backward(d_o=Q.double())),
    "d_lse of another shape": ("AK403", "d_lse", lambda: backward(d_lse=rand(1))),
    "o of another shape": ("AK403", "o", lambda: backward(o=rand(1, 1, 1, 1))),
    "lse of another shape": ("AK403", "lse", lambda: backward(lse=rand(1))),
    "lse of another dtype": ("AK404", "lse", lambda: backward(lse=rand(*Q.shape[:3]).double())),
    "gradients of no buffer": ("AK401", "wanted", lambda: backward(wanted=[True])),
    "select": ("AK402", "select", lambda: attention(select=object())),
    "sdpa in float64": (
        "AK504", "scaled_dot_product_attention", lambda: ak.scaled_dot_product_attention(Q.double(), Q.double(), Q.double()),
    ),
    # run time
    "bias too small": ("AK601", "score or mask", lambda: attention(score=ak.bias(rand(S - 1, S)))),
    "document too small": ("AK601", "score or mask", lambda: attention(mask=ak.document(torch.arange(S - 1)))),
    "negative index": ("AK601", "score or mask", lambda: attention(score=lambda s, b, h, i, j: s + SINK[i - 1])),
    "empty table": ("AK601", "score or mask", lambda: attention(score=lambda s, b, h, i, j: s + SINK[:0][h])),
    "on the reference": ("AK601", "score", lambda: attention(score=ak.bias(rand(S - 1, S)), backend="reference")),
    "kv_lens number": ("AK602", "kv_lens", lambda: attention(kv_lens=i32(S))),
    "kv_lens negative": ("AK602", "kv_lens", lambda: attention(kv_lens=i32(S, -1))),
    "kv_lens too long": ("AK602", "kv_lens", lambda: attention(kv_lens=i32(S, S + 1))),
    "cu_seqlens falls": ("AK602", "cu_seqlens_q", lambda: packed(cu_seqlens_q=i32(0, 4, 3, S), cu_seqlens_kv=i32(0, 2, 3, S))),
    "cu_seqlens from 1": ("AK602", "cu_seqlens_kv", lambda: packed(cu_seqlens_q=i32(0, S), cu_seqlens_kv=i32(1, S))),
    "cu_seqlens negative": ("AK602", "cu_seqlens_q", lambda: packed(cu_seqlens_q=i32(-2, S), cu_seqlens_kv=i32(0, S))),
    "cu_seqlens too long": ("AK602", "cu_seqlens_q", lambda: packed(cu_seqlens_q=i32(0, S + 1), cu_seqlens_kv=i32(0, S))),
    "cu_seqlens too short": ("AK602", "cu_seqlens_kv", lambda: packed(cu_seqlens_q=i32(0, S), cu_seqlens_kv=i32(0, S - 1))),
    "cu_seqlens empty": ("AK602", "cu_seqlens_q", lambda: packed(cu_seqlens_q=i32(), cu_seqlens_kv=i32())),
    "cu_seqlens of two sizes": (
        "AK602", "cu_seqlens_q, cu_seqlens_kv", lambda: packed(cu_seqlens_q=i32(0, S), cu_seqlens_kv=i32(0, 2, S)),
    ),
    "no room for the result": ("AK603", "o, lse", lambda: attention(*(x[:1].expand(2**40, -1, -1, -1) for x in (Q, K, V)))),
    "too long": ("AK502", "backend", lambda: attention(Q[:1, :1, :1], *(x[:1, :1, :1].expand(1, 1, 2**31, D) for x in (K, V)))),
    "q without memory": ("AK606", "q", lambda: attention(q=without_memory(Q))),
    "q without memory, with gradients": ("AK606", "q", lambda: attention(q=without_memory(Q).requires_grad_())),
    "v without memory, on the reference": ("AK606", "v", lambda: attention(v=without_memory(V), backend="reference")),
    "captured without memory": ("AK606", "b0", lambda: attention(score=ak.bias(without_memory(rand(S, S))))),
    "kv_lens without memory": ("AK606", "kv_lens", lambda: attention(kv_lens=without_memory(i32(S, S)))),
    "misaligned q": ("AK607", "q", lambda: attention(q=misaligned(B, H, S, D))),
    "misaligned v": ("AK607", "v", lambda: attention(v=misaligned(B, HKV, S, D))),
    "misaligned sink": ("AK607", "sink", lambda: dense(sink=misaligned(H))),
    "misaligned captured": ("AK607", "b0", lambda: attention(score=ak.bias(misaligned(S, S)))),
    "lists fall": ("AK608", "queries", lambda: ak.groups(i32(2, 1)[None])),
    "lists go on after their end": ("AK608", "keys", lambda: ak.groups(i32(0, 1)[None], i32(-1, 1)[None])),
    "lists name no token": ("AK608", "queries", lambda: attention(select=ak.groups(i32(0, S)[None]))),
    "lists of floats": ("AK404", "queries", lambda: ak.groups(rand(2, 2))),
    "lists of three dimensions": ("AK403", "keys", lambda: ak.groups(i32(0)[None], i32(0)[None, None])),
    "lists of other heads": ("AK403", "queries", lambda: attention(select=ak.groups(torch.zeros(1, 3, 1, 1, dtype=torch.int32)))),
    "lists of other groups": ("AK403", "queries, keys", lambda: attention(select=ak.groups(i32(0, 1)[:, None], i32(0)[None]))),
    "lists and no tensor": ("AK402", "queries", lambda: ak.groups([0])),
    "lse of shared groups": ("AK221", "return_lse", lambda: attention(select=ak.groups(i32(0, 0)[:, None]), return_lse=True)),
    "groups and dropout": ("AK504", "dropout_p", lambda: attention(select=ak.groups(i32(0)[None]), dropout_p=0.5)),
    "groups and a cache": ("AK402", "k", lambda: ak.attention(Q, ak.KVCache(B, HKV, D, max_len=S), select=ak.groups(i32(0)[None]))),
    "window bias of a halo": ("AK402", "windows", lambda: ak.window_bias(rand(1, 3, 3), vision.Halo((4, 4), (2, 2), 1))),
    "window bias of another window": ("AK403", "table", lambda: ak.window_bias(rand(1, 3, 3), vision.Windows((4, 4), (2, 3), (0, 0)))),
    "a grid of other tokens": ("AK403", "select", lambda: attention(select=vision.Windows((2, 2), (2, 2), (0, 0)))),
    "routing scale": ("AK401", "scale", lambda: ak.routing_attention(Q, Q, Q, rand(H, 2, D), cluster_size=2, scale=-1.0)),
    "groups of double": ("AK502", "backend", lambda: attention(*(x.double() for x in (Q, K, V)), select=ak.groups(i32(0)[None]))),
    "routing heads": ("AK407", "q, k", lambda: ak.routing_attention(Q, K, V, rand(H, 2, D), cluster_size=2)),
    "routing centroids": ("AK403", "centroids", lambda: ak.routing_attention(Q, Q, Q, rand(H, 2, 3), cluster_size=2)),
    "routing no centroids": ("AK403", "centroids", lambda: ak.routing(rand(H, 0, D), cluster_size=2)),
    "routing int centroids": ("AK404", "centroids", lambda: ak.routing(i32(0)[None, None], cluster_size=2)),
    "routing cluster size": ("AK401", "cluster_size", lambda: ak.routing(rand(H, 2, D), cluster_size=0)),
    "routing cluster size of floats": ("AK402", "cluster_size", lambda: ak.routing(rand(H, 2, D), cluster_size=2.0)),
    "routing norm": ("AK401", "qk_norm", lambda: ak.routing(rand(H, 2, D), cluster_size=2, qk_norm="l1")),
    "routing membership": ("AK401", "membership", lambda: ak.routing(rand(H, 2, D), cluster_size=2, membership="all")),
    "routing causal": ("AK402", "causal", lambda: ak.routing_attention(Q, Q, Q, rand(H, 2, D), cluster_size=2, causal=1)),
    "packed batch": ("AK602", "q", lambda: attention(cu_seqlens_q=i32(0, S), cu_seqlens_kv=i32(0, S))),
    "tree with a cycle": ("AK414", "parents", lambda: ak.tree(i32(-1, 2, 1))),
    "flex heads": ("AK407", "query, key", lambda: ak.flex_attention(Q, K, V)),
    "flex scale": ("AK401", "scale", lambda: flex(scale=math.nan)),
    "flex scale None": ("AK402", "scale", lambda: flex(scale="1")),
    "flex score": ("AK402", "score", lambda: flex(score_mod=SINK)),
    "flex block mask": ("AK402", "block_mask", lambda: flex(block_mask=BLOCKS)),
    "flex block mask is a function": ("AK402", "block_mask", lambda: flex(block_mask=lambda b, h, i, j: i > j)),
    "flex batches": ("AK403", "query, key, block_mask", lambda: flex(key=K[:1], value=V[:1], block_mask=ak.block_mask(None, 3, 1, S, S))),
    "flex batches without a mask": ("AK403", "q, k, v", lambda: flex(key=K[:1], value=V[:1])),
    "flex options": ("AK402", "kernel_options", lambda: flex(kernel_options=[1])),
    "flex aux": ("AK402", "return_aux", lambda: flex(return_aux=True)),
    "flex aux and lse": ("AK408", "return_lse, return_aux", lambda: flex(return_aux=AuxRequest(), return_lse=True)),
    "flex maxima": ("AK504", "return_aux", lambda: flex(return_aux=AuxRequest(max_scores=True))),
    "flex rank": ("AK403", "q", lambda: flex(query=Q[0])),
    "flex None": ("AK402", "k", lambda: flex(key=None)),
    "integer overflow": ("AK604", "score or mask", lambda: attention(mask=lambda b, h, i, j: (i + 1) * 2**30 * 4 > j)),
    "division by zero": ("AK605", "score or mask", lambda: attention(mask=lambda b, h, i, j: i // j == 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_every_way_to_be_wrong(name: str) -> None:
    codes, where, call = CALLS[name]
    with pytest.raises(ak.AttnkitError) as caught:
        call()
    exc = caught.value
    assert exc.code in codes.split("|"), exc
    assert re.search(where, exc.where), exc  # it names the argument,
    assert exc.given or exc.code >= "AK6" or exc.what != CODES[exc.code].summary, (
        exc
    )  # what was given, or says what is the matter,
    assert exc.allowed or exc.hint, exc  # and what to do instead
    assert isinstance(exc, CODES[exc.code].error)


def test_every_code_has_a_call() -> None:
    elsewhere = {"AK416", "AK505", "AK506"}  # in tests/models, tests/kernels
    provoked = {code for codes, _, _ in CALLS.values() for code in codes.split("|")} | elsewhere
    assert {code for code in CODES if code >= "AK4"} <= provoked


@pytest.mark.parametrize(
    "lazy", [torch._neg_view(Q), torch._efficientzerotensor(Q.shape)], ids=["neg", "zero"]
)
def test_lazy_views_are_resolved(lazy: Tensor) -> None:
    want = attention(q=lazy.clone())
    for backend in ("auto", "cpu", "reference"):
        torch.testing.assert_close(attention(q=lazy, backend=backend), want)


def test_a_cap_that_float32_cannot_hold_caps_nothing() -> None:
    assert torch.equal(dense(softcap=1e300), dense())
    q = rand(B, H, S, D)
    assert torch.equal(ak.scaled_dot_product_attention(q, q, q, scale=None), ak.attention(q, q, q))
    with pytest.raises(ak.AttnkitError, match="AK504"):
        ak.scaled_dot_product_attention(q, q, q, scale=-1e300)


@pytest.mark.parametrize("ids", [i32(0).expand(2**40).as_strided((2**20, 2**20), (0, 0)), torch.zeros(2**20).int().as_strided((2**19, 2**19), (1, 1))],
                         ids=["expanded", "overlapping"])  # fmt: skip
def test_repeated_elements_are_not_scanned_one_by_one(ids: Tensor) -> None:
    """The analysis reads what an index can be; it must not read 2^38 elements in 2^20."""
    assert torch.equal(attention(mask=lambda b, h, i, j: ids[i, j] == 0), attention())


def test_nothing_is_computed_or_changed_by_a_bad_call() -> None:
    before = ak.installed_report().kernel_runs
    for name, (code, _, call) in CALLS.items():
        if code < "AK6":
            with pytest.raises(ak.AttnkitError):
                call()
            assert ak.installed_report().kernel_runs == before, name
    assert torch.equal(Q, rand(B, H, S, D))


OUT_OF_MEMORY = """
import resource
from pathlib import Path
import torch
import attnkit as ak
torch.set_num_threads(1)
wide = [torch.ones(1, 1, 1, 4096) for _ in range(3)]
small = [t[..., :8] for t in wide]
expected = ak.attention(*small)
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 19), resource.RLIM_INFINITY))
try:
    ak.attention(*wide)
except ak.AttnkitError as exc:
    print(exc.code, exc.where)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert torch.equal(ak.attention(*small), expected)
assert (ak.attention(*wide) == 1).all()
print("and goes on")
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_out_of_memory() -> None:
    """AK603, in a process that may not grow; the next call works."""
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.splitlines() == ["AK603 backend cpu", "and goes on"], done.stderr


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("met", [False, True], ids=["not met", "met"])
def test_the_drop_in_leaves_what_is_not_aligned_to_torch(met: bool, grad: bool) -> None:
    ak.runtime.clear()
    if met:  # tensors like these, but for where they lie
        ak.scaled_dot_product_attention(*[torch.zeros(B, H, S, D)] * 3)
    q = misaligned(B, H, S, D).requires_grad_(grad)
    with ak.installed():
        o = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        report = ak.installed_report()
    assert not o.any()
    assert o.requires_grad == grad
    assert report.attnkit == 0
    assert list(report.torch) == ["tensor that is not aligned"]


def test_a_tensor_without_memory() -> None:
    """AK606, whoever gives it to the kernel: here torch's own functional wrapper, past the dispatcher."""
    kernel = prepare(PLAIN, "float32", D, D).kernel
    with pytest.raises(ak.AttnkitError) as caught:
        kernel(torch._to_functional_tensor(Q), K, V, Q.clone(), None, [], [], 1)
    assert caught.value.code == "AK606"


@pytest.mark.parametrize(
    "wrong", [{"q": None}, {"buffers": [3]}, {"text": 5}, {"params": ["x"]}, {"seed": "x"}], ids=str
)
def test_not_tensors_at_the_op_are_torchs_error(wrong: dict[str, Any]) -> None:
    with pytest.raises((RuntimeError, TypeError)):
        op(**wrong)


def test_a_mask_of_other_arguments_is_pythons_error() -> None:
    """Nobody can tell a function's own TypeError from a wrong number of arguments: it comes through as it is."""
    with pytest.raises(TypeError, match="positional argument"):
        attention(mask=lambda q_idx: q_idx)
