"""Single pairs chosen by a connectivity of low rank: the definition, forwards and backwards, by hand and beside other masks."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit.backends.reference import gradients
from attnkit.errors import AttnkitError
from attnkit.ir.text import parse
from attnkit.ops.sparsifiner import sparsifiner
from attnkit.variants.block_select import sparsifiner_naive, sparsifiner_program

pytestmark = pytest.mark.shows
RULES: list[dict[str, Any]] = [{"top_k": 7}, {"top_k": 500}, {"threshold": 0.8}]


def tensors(rng: np.random.Generator, q_len: int = 70, kv_len: int = 90) -> list[Tensor]:
    """q, k, v, low, up."""
    sizes = ((4, q_len, 16), (2, kv_len, 16), (2, kv_len, 8), (4, q_len, 3), (2, kv_len, 3))
    return [torch.from_numpy(rng.standard_normal((2, *size), dtype=np.float32)) for size in sizes]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_is_the_equation(
    dtype: torch.dtype, rule: dict[str, Any], causal: bool, rng: np.random.Generator
) -> None:
    for lengths in ((70, 90), (1, 40), (90, 70)):
        q, k, v, low, up = tensors(rng, *lengths)
        q, k, v = (x.to(dtype) for x in (q, k, v))
        select = sparsifiner(low, up, **rule, causal=causal)
        o, lse = ak.attention(q, k, v, select=select, return_lse=True)
        arrays = [x.double().numpy() for x in (q, k, v, low, up)]
        expected = sparsifiner_naive(*arrays, **rule, causal=causal)
        limit = 3e-6 if dtype == torch.float32 else 1e-2
        for found, exact in zip((o, lse), expected, strict=True):
            np.testing.assert_allclose(found.double().numpy(), exact, atol=limit, rtol=limit)
        wide = [x.double() for x in (q, k, v)]
        of_reference = ak.attention(*wide, select=select, backend="reference")
        np.testing.assert_allclose(of_reference.numpy(), expected[0], atol=1e-12)


def test_by_hand() -> None:
    low, up = (torch.tensor(x).view(1, 1, -1, 1) for x in ([1.0, -1], [3.0, 1, 2]))
    q, k, v = torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 3, 1), torch.eye(3)[None, None]
    o = ak.attention(q, k, v, select=sparsifiner(low, up, top_k=2))
    assert o[0, 0].tolist() == [[0.5, 0, 0.5], [0, 0.5, 0.5]]
    o = ak.attention(q, k, v, select=sparsifiner(low, up, threshold=1.5))
    assert o[0, 0].tolist() == [[0.5, 0, 0.5], [0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients(dtype: torch.dtype, rng: np.random.Generator) -> None:
    """Those of the pairs that were chosen; what chose them gets none."""
    *qkv, low, up = (x.requires_grad_() for x in tensors(rng))
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in qkv)
    o = ak.attention(q, k, v, select=sparsifiner(low, up, top_k=7, causal=True))
    d_o = torch.from_numpy(rng.standard_normal(o.shape)).to(dtype)
    *found, of_low, of_up = torch.autograd.grad(o, (q, k, v, low, up), d_o, allow_unused=True)
    assert of_low is None
    assert of_up is None
    text, buffers = sparsifiner_program(top_k=7, causal=True)
    inputs = [x.detach().double().numpy() for x in (q, k, v, low, up)]
    cotangents = [d_o.double().numpy(), np.zeros(o.shape[:3])]
    exact = gradients(parse(text), inputs, cotangents, buffers).inputs
    for one, other in zip(found, exact, strict=False):
        limit = 3e-6 if dtype == torch.float32 else 1e-2
        assert np.linalg.norm(one.double().numpy() - other) <= limit * np.linalg.norm(other)


def test_it_composes(rng: np.random.Generator) -> None:
    q, k, v, low, up = tensors(rng, 90, 90)
    seen = torch.zeros(2, 4, 90, 90, dtype=torch.bool)
    seen.scatter_(3, (low @ up.repeat_interleave(2, 1).mT).topk(20).indices, True)
    call: dict[str, Any] = {"score": ak.softcap(2.0), "normalizer": ak.softmax(torch.rand(4)), "scale": 0.4}
    select = sparsifiner(low, up, top_k=20)
    o = ak.attention(q, k, v, select=select, mask=ak.window(30, 30), **call)
    near = ak.window(30, 30) & (lambda b, h, i, j: seen[b, h, i, j])
    torch.testing.assert_close(o, ak.attention(q, k, v, mask=near, **call), atol=2e-6, rtol=1e-5)
    compiled = torch.compile(
        lambda q, k, v, low, up: ak.attention(q, k, v, select=sparsifiner(low, up, top_k=20)),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    torch.testing.assert_close(compiled(q, k, v, low, up), ak.attention(q, k, v, select=select))


@pytest.mark.parametrize(
    ("code", "make"),
    [
        ("AK408", lambda q, k, v, low, up: sparsifiner(low, up)),
        ("AK408", lambda q, k, v, low, up: sparsifiner(low, up, top_k=1, threshold=0.0)),
        ("AK401", lambda q, k, v, low, up: sparsifiner(low, up, top_k=0)),
        ("AK401", lambda q, k, v, low, up: sparsifiner(low, up, threshold=float("nan"))),
        ("AK402", lambda q, k, v, low, up: sparsifiner(low, None, top_k=1)),  # type: ignore[arg-type]
        ("AK404", lambda q, k, v, low, up: sparsifiner(low, up.half(), top_k=1)),
        ("AK404", lambda q, k, v, low, up: sparsifiner(low.int(), up.int(), top_k=1)),
        ("AK402", lambda q, k, v, low, up: sparsifiner(low, up, top_k=1, causal=1)),  # type: ignore[arg-type]
        ("AK403", lambda q, k, v, low, up: ak.attention(q, k, v, select=sparsifiner(low[:, :2], up, top_k=1))),
        ("AK403", lambda q, k, v, low, up: ak.attention(q, k, v, select=sparsifiner(low, up[..., :2], top_k=1))),
        ("AK408", lambda q, k, v, low, up: ak.attention(q, k, v, select=sparsifiner(low, up, top_k=1),
                                                        kv_lens=torch.tensor([5, 9], dtype=torch.int32))),
    ],
)  # fmt: skip
def test_errors(code: str, make: Any, rng: np.random.Generator) -> None:
    with pytest.raises(AttnkitError) as caught:
        make(*tensors(rng))
    assert caught.value.code == code
