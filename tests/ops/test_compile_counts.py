"""torch.compile(fullgraph=True, dynamic=True): no graph breaks, and at most two compilations over ten lengths."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask

import attnkit as ak

pytestmark = pytest.mark.shows

LENGTHS = (7, 12, 19, 24, 33, 40, 51, 64, 77, 98)
H = 4
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
BIAS = torch.sin(torch.arange(H * 100 * 100.0)).view(H, 100, 100)
IDS = torch.arange(100) // 9
CAP = ak.param("cap", 30.0)
Call = Callable[[Tensor, Tensor, Tensor, int], Any]


def third(q: Tensor) -> int:
    """A number that nobody but the compiler knows."""
    return q.shape[2] // 3


def own_length(q: Tensor, k: Tensor, v: Tensor, n: int) -> Any:
    q_ids, kv_ids = IDS[: q.shape[2]], IDS[: k.shape[2]]
    return ak.attention(q, k, v, mask=lambda b, h, i, j: q_ids[i] == kv_ids[j])


def from_a_shape(q: Tensor, k: Tensor, v: Tensor, n: int) -> Any:
    length = q.shape[2]
    window, prefix = length // 3, length // 5

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        near = (q_idx - kv_idx < window) & (q_idx >= kv_idx)
        return near | (kv_idx < prefix) | (kv_idx == length - 1) | (q_idx - 2 * window >= 0)

    return ak.attention(q, k, v, mask=mask, return_lse=True)


def scaled_by_a_shape(q: Tensor, k: Tensor, v: Tensor, n: int) -> Any:
    length = q.shape[2]
    return ak.attention(
        q, k, v, score=lambda s, b, h, i, j: s * (1.0 / length) + (i - j) / length - (i // length)
    )


def changing_windows(q: Tensor, k: Tensor, v: Tensor, n: int) -> Any:
    return ak.dense_attention(q, k, v, causal=True, window=(n, None))


def flex(q: Tensor, k: Tensor, v: Tensor, n: int) -> Any:
    def score(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return torch.where(q_idx - kv_idx <= n, s + SLOPES[h] * kv_idx, -torch.inf)

    return ak.flex_attention(q, k, v, score, enable_gqa=True)


def flex_with_a_mask(q: Tensor, k: Tensor, v: Tensor, n: int) -> Any:
    blocks = ak.BlockMask.from_dense(torch.ones(1, 1, 1, 1, dtype=torch.bool), q_block=128, kv_block=128,
                                     q_len=q.shape[2], kv_len=k.shape[2], mask=lambda b, h, i, j: i >= j)  # fmt: skip
    return ak.flex_attention(q, k, v, block_mask=blocks, enable_gqa=True)


CALLS: dict[str, Call] = {
    "causal": lambda q, k, v, n: ak.attention(q, k, v, mask=ak.causal()),
    "a causal function": lambda q, k, v, n: ak.attention(q, k, v, mask=lambda b, h, i, j: i >= j),
    "the other way": lambda q, k, v, n: ak.attention(q, k, v, mask=ak.causal().logical_not()),
    "not of the values": lambda q, k, v, n: ak.attention(q, k, v, mask=lambda b, h, i, j: ~ak.causal()(b, h, i, j)),
    "a captured window": lambda q, k, v, n: ak.attention(q, k, v, mask=lambda b, h, i, j: (i >= j) & (i - j < n)),
    "ready-made": lambda q, k, v, n: ak.attention(q, k, v, mask=ak.window(n) | ak.prefix(n // 2)),
    "windows": changing_windows,
    "softcap": lambda q, k, v, n: ak.attention(q, k, v, score=ak.softcap(CAP)),
    "a softcap function": lambda q, k, v, n: ak.attention(q, k, v, score=lambda s, *_: CAP * torch.tanh(s / CAP)),
    "a float": lambda q, k, v, n: ak.attention(q, k, v, score=lambda s, *_: s * (n / 7) + n**-0.5),
    "documents": lambda q, k, v, n: ak.attention(q, k, v, mask=ak.document(IDS) & ak.causal()),
    "documents of their own length": own_length,
    "alibi": lambda q, k, v, n: ak.attention(q, k, v, score=ak.alibi(SLOPES)),
    "alibi as an argument": lambda q, k, v, n: ak.dense_attention(q, k, v, causal=True, alibi_slopes=SLOPES),
    "bias slices": lambda q, k, v, n: ak.attention(q, k, v, score=ak.bias(BIAS[:, : q.shape[2], : k.shape[2]])),
    "from the end": lambda q, k, v, n: ak.attention(q, k, v, score=lambda s, b, h, i, j: s + BIAS[h, -1, j] + BIAS[h, n, -n]),
    "a number from a shape": from_a_shape,
    "a factor from a shape": scaled_by_a_shape,
    "a helper's number": lambda q, k, v, n: ak.attention(q, k, v, mask=lambda b, h, i, j: j <= i + third(q)),
    "bits": lambda q, k, v, n: ak.attention(q, k, v, score=lambda s, b, h, i, j: s + ((i ^ j) & 7) + (j >> 1) // n),
    "flex_attention": flex,
    "flex_attention with a mask": flex_with_a_mask,
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_ten_lengths_compile_twice_at_most(name: str, randn: Any) -> None:
    call, counter = CALLS[name], CompileCounter()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    for turn, length in enumerate(LENGTHS):
        q, k, v = randn(1, H, length, 8), randn(1, 2, length + turn % 3, 8), randn(1, 2, length + turn % 3, 8)
        CAP.value = 10.0 + turn
        expected, actual = call(q, k, v, 3 + turn), compiled(q, k, v, 3 + turn)
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=1e-6)
    assert counter.frame_count <= 2


def test_changing_trees_compile_twice_at_most(randn: Any) -> None:
    counter = CompileCounter()

    def call(q: Tensor, k: Tensor, mask: Any) -> Any:
        return ak.attention(q, k, k, mask=mask)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    for n in LENGTHS:
        mask = ak.tree(torch.arange(n) // 2 - 1)
        q, k = randn(1, H, n, 8), randn(1, H, n + 9, 8)
        assert torch.equal(compiled(q, k, mask), call(q, k, mask))
    assert counter.frame_count <= 2


def test_changing_block_masks_compile_twice_at_most(randn: Any) -> None:
    counter = CompileCounter()

    def call(q: Tensor, blocks: Any) -> Any:
        return ak.flex_attention(q, q, q, block_mask=blocks)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    for n in LENGTHS:
        blocks = create_block_mask(lambda b, h, i, j: i >= j, None, None, n, n, device="cpu", BLOCK_SIZE=8)
        q = randn(1, H, n, 8)
        assert torch.equal(compiled(q, blocks), call(q, blocks))
    assert counter.frame_count <= 2
