"""Arguments that are nonsense are errors that name them: none is taken for something else, and none ends inside."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit.variants import vision

B, H, HKV, S, D = 2, 4, 2, 6, 8
Q, K = torch.ones(B, H, S, D), torch.ones(B, HKV, S, D)
GATE, Z = -torch.ones(B, HKV, S), torch.zeros(B, HKV, D)
STATE = torch.zeros(B, HKV, D, D)
META = torch.zeros(S, device="meta")
CENTROIDS = torch.ones(H, 2, D)
BITS = torch.ones(2, 2, dtype=torch.bool)
ONE = torch.ones(())


def attend(**others: Any) -> Any:
    return ak.attention(Q, K, K, **others)


def linear(**others: Any) -> Any:
    return ak.linear_attention(Q, K, K, **others)


def sdpa(*tensors: Any, **others: Any) -> Any:
    return ak.scaled_dot_product_attention(*tensors, **others)


def factorizable(**others: Any) -> Any:
    return ak.factorizable_attention(Q, K, K, **others)


def aaren(query: Any = Q[0, :, 0], k: Any = Q, v: Any = Q) -> Any:
    return ak.aaren_attention(query, k, v)


def additive(k: Any, v: Any = Q) -> Any:
    return ak.additive_attention(Q, k, v, Q[0, :, 0])


def cache(**others: Any) -> ak.KVCache:
    return ak.KVCache(**{"batch": B, "num_kv_heads": HKV, "head_dim": D, "max_len": 64, **others})


def tune(**others: Any) -> Any:
    return ak.tune_sparge(**{"samples": [(Q, K, K)], "bound": 0.5, **others})


def quantized() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that they will go
        return torch.quantize_per_tensor(K, 0.1, 0, torch.qint8)


def reads_meta(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return s + META[kv_idx]


GRID = vision.Windows((2, 3), (2, 3), (0, 0))
WRONG: dict[str, tuple[str, str, Callable[[], Any]]] = {
    # flags, and numbers that are none
    "return_lse": ("AK402", "return_lse", lambda: attend(return_lse=1)),
    "return_lse of a cache": ("AK402", "return_lse", lambda: ak.attention(Q.bfloat16(), cache(), return_lse="no")),  # type: ignore[arg-type]
    "causal": ("AK402", "causal", lambda: ak.dense_attention(Q, K, K, causal="no")),  # type: ignore[arg-type]
    "is_causal": ("AK402", "is_causal", lambda: sdpa(Q, Q, Q, is_causal="no")),
    "enable_gqa": ("AK402", "enable_gqa", lambda: sdpa(Q, K, K, enable_gqa=1)),
    "flex": ("AK402", "return_lse", lambda: ak.flex_attention(Q, Q, Q, return_lse="no")),  # type: ignore[arg-type]
    "dropout_p": ("AK402", "dropout_p", lambda: attend(dropout_p=True)),
    "dropout_p of several": ("AK402", "dropout_p", lambda: attend(dropout_p=np.ones(2))),
    "scale": ("AK402", "scale", lambda: attend(scale=True)),
    "softcap": ("AK402", "softcap", lambda: ak.dense_attention(Q, K, K, softcap=True)),
    "similarity": ("AK401", "similarity", lambda: ak.sparge_attention(Q, K, K, similarity=math.nan)),
    "sigmoid": ("AK401", "bias", lambda: ak.sigmoid(math.nan)),
    "prefix": ("AK401", "n", lambda: ak.prefix(-1)),
    "prefix bool": ("AK402", "n", lambda: ak.prefix(True)),
    "order": ("AK402", "order", lambda: factorizable(order=2.0)),
    "coefficients": ("AK401", "coefficients", lambda: factorizable(coefficients=(1e300, 1.0, 0.5))),
    "chunk_size": ("AK401", "chunk_size", lambda: linear(chunk_size=2**64)),
    "feature_map": ("AK401", "feature_map", lambda: linear(feature_map=["elu1"])),
    "param": ("AK402", "value", lambda: ak.param("cap", "x")),  # type: ignore[arg-type]
    "param beyond float": ("AK401", "value", lambda: ak.param("cap", 10**400)),
    "name of a param": ("AK402", "name", lambda: ak.param(3)),  # type: ignore[arg-type]
    "program": ("AK402", "text", lambda: ak.parse(None)),  # type: ignore[arg-type]
    "explain": ("AK402", "function", lambda: ak.explain("attention", Q, K, K)),  # type: ignore[arg-type]
    # functions of another number of arguments
    "score": ("AK402", "score", lambda: attend(score=lambda s, b, h: s)),
    "mask": ("AK402", "mask", lambda: attend(mask=lambda: True)),
    "mask among others": ("AK402", "mask", lambda: attend(mask=ak.causal() & ak.bias(torch.ones(S, S)))),
    # dtypes
    "gate": ("AK404", "gate", lambda: linear(gate=GATE.to(torch.complex64))),
    "beta": ("AK404", "beta", lambda: linear(gate=GATE, beta=GATE > 0)),
    "bonus": ("AK404", "bonus", lambda: linear(gate=GATE, bonus=torch.ones(HKV, D).int())),
    "state": ("AK404", "initial_state", lambda: linear(gate=GATE, initial_state=STATE.to(torch.complex64))),
    "moments": ("AK404", "initial_state", lambda: factorizable(initial_state=(STATE.int(), Z.int()))),
    "aaren's values": ("AK404", "v", lambda: aaren(v=Q.int())),
    "additive's keys": ("AK404", "k", lambda: additive(Q.double())),
    "documents": ("AK404", "q_ids", lambda: ak.document(torch.ones(S))),
    "lengths of prefixes": ("AK404", "n", lambda: ak.prefix(torch.ones(B))),
    "bias of bools": ("AK404", "bias", lambda: ak.bias(torch.ones(S, S) > 0)),
    "slopes of bools": ("AK404", "slopes", lambda: ak.alibi(torch.ones(H) > 0)),
    "table": ("AK404", "table", lambda: ak.window_bias(torch.ones(H, 3, 5).int(), GRID)),
    # no tensors, or none of this kind
    "query": ("AK402", "query", lambda: sdpa(None, Q, Q)),
    "half a state": ("AK402", "initial_state", lambda: linear(initial_state=(STATE, None))),
    "cu_seqlens": ("AK402", "cu_seqlens", lambda: linear(cu_seqlens=[0, S])),
    "quantized": ("AK402", "k", lambda: ak.linear_attention(Q, quantized(), K)),
    "from_torch": ("AK402", "blocks", lambda: ak.BlockMask.from_torch(BITS)),
    "mask of blocks": ("AK402", "mask", lambda: ak.BlockMask.from_dense(BITS, mask=3)),  # type: ignore[arg-type]
    "check": ("AK402", "q", lambda: ak.block_mask(None, None, None, S, S).check(None, K)),  # type: ignore[arg-type]
    # devices: a result would be what nobody has written
    "captured by a selection": ("AK405", "captured tensor b0", lambda: attend(score=ak.selective(0, reads_meta))),
    "captured within groups": (
        "AK405",
        "captured tensor b0",
        lambda: ak.attention(Q, Q, Q, score=reads_meta, select=ak.groups(torch.tensor([[0, 1]], dtype=torch.int32))),
    ),
    "aaren's keys": ("AK405", "v", lambda: aaren(k=Q.to("meta"))),
    "additive's values": ("AK405", "v", lambda: additive(Q, Q.to("meta"))),
    "tree": ("AK606", "parents", lambda: ak.tree(META.int())),
    "groups": ("AK606", "queries", lambda: ak.groups(META.int()[None])),
    "blocks": ("AK606", "blocks", lambda: ak.BlockMask.from_dense(BITS.to("meta"))),
    # caches
    "device": ("AK401", "device", lambda: cache(device="abc")),
    "no device": ("AK401", "device", lambda: cache(device=None)),
    "max_len": ("AK401", "max_len", lambda: cache(max_len=2**63)),
    "memory": ("AK603", "KVCache", lambda: cache(batch=2**31 - 1, num_kv_heads=2**31 - 1)),
    "k_scale": ("AK401", "k_scale", lambda: cache(codec="fp8", k_scale=1e300)),
    "k_scale bool": ("AK402", "k_scale", lambda: cache(codec="fp8", k_scale=True)),
    "k_scale without values": ("AK606", "k_scale", lambda: cache(codec="fp8", k_scale=ONE.to("meta"))),
    "append": ("AK402", "k", lambda: cache().append(K.to_sparse(), K)),
    "lossy": ("AK402", "lossy", lambda: cache().truncate(1, lossy="no")),  # type: ignore[arg-type]
    # the search of thresholds
    "bound": ("AK401", "bound", lambda: tune(bound=math.inf)),
    "pv_bound": ("AK401", "pv_bound", lambda: tune(pv_bound=math.inf)),
    "causal of a search": ("AK402", "causal", lambda: tune(causal=np.bool_(False))),
    "path": ("AK402", "path", lambda: tune(path=3)),
    "progress": ("AK402", "progress", lambda: tune(progress=None)),
    "samples": ("AK402", "samples", lambda: tune(samples=Q)),
    "samples without values": ("AK606", "samples", lambda: tune(samples=[(Q.to("meta"),) * 3])),
    "samples of two layers": ("AK403", "samples", lambda: tune(samples=[(Q, K, K), (K, K, K)])),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_argument(name: str) -> None:
    code, where, call = WRONG[name]
    with pytest.raises(ak.AttnkitError) as caught:
        call()
    found = caught.value
    assert (found.code, found.where) == (code, where)
    assert found.given
    assert found.allowed


def test_huge_numbers_that_mean_something() -> None:
    """More tokens of a cluster than there are are all of them; forgetting what comes after many tokens forgets nothing."""
    v = torch.arange(S * D, dtype=torch.float32).view(1, 1, S, D).expand(B, H, S, D)
    huge, all_of_them = (ak.routing_attention(Q, Q, v, CENTROIDS, cluster_size=n) for n in (2**64, S))
    assert torch.equal(huge, all_of_them)
    kept = cache()
    kept.append(K, K)
    kept.truncate(2**64)
    assert kept.lengths.tolist() == [S, S]


def test_errors_of_a_users_function_are_its_own() -> None:
    def score(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return len(3)  # type: ignore[arg-type]

    with pytest.raises(TypeError, match="has no len") as caught:
        attend(score=score)
    assert not isinstance(caught.value, ak.AttnkitError)
