"""The public functions: every parameter against the oracle, gradients, what is float32 beside any default."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attnkit as ak
from attnkit.nn import Centroids
from attnkit.ops.block_means import BlockMeans

HEADS = 4
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])


def check(actual: Any, expected: tuple[Tensor, Tensor]) -> None:
    """o and lse (or o alone) equal the float64 oracle within a few float32 roundings."""
    for a, e in zip(actual if isinstance(actual, tuple) else (actual,), expected, strict=False):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=3e-6)


def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return kv_idx <= q_idx


# --- parameters against the oracle ------------------------------------------------------------------------

DENSE: dict[str, tuple[dict[str, Any], Callable[[int, int], dict[str, Any]]]] = {
    "nothing": ({}, lambda m, n: {}),
    "causal": ({"causal": True}, lambda m, n: {"mask": lambda b, h, i, j: j <= i + n - m}),
    "window": ({"window": (3, 1)}, lambda m, n: {"mask": lambda b, h, i, j: (i + n - m - j <= 3) & (j - i - n + m <= 1)}),
    "window, open left": ({"window": (None, 0)}, lambda m, n: {"mask": lambda b, h, i, j: j <= i + n - m}),
    "window, open right": ({"window": [2, -1]}, lambda m, n: {"mask": lambda b, h, i, j: i + n - m - j <= 2}),
    "window, open": ({"window": (-1, None)}, lambda m, n: {}),
    "mask": ({"mask": lambda b, h, i, j: (i + j + h) % 3 != b}, lambda m, n: {"mask": lambda b, h, i, j: (i + j + h) % 3 != b}),
    "softcap": ({"softcap": 2.0}, lambda m, n: {"score": lambda s, *_: 2 * (s / 2).tanh()}),
    "alibi": (
        {"alibi_slopes": SLOPES},
        lambda m, n: {"score": lambda s, b, h, i, j: s - SLOPES[h] * (i + n - m - j).abs()},
    ),
    "alibi per batch": (
        {"alibi_slopes": torch.stack([SLOPES, 2 * SLOPES])},
        lambda m, n: {"score": lambda s, b, h, i, j: s - (b + 1) * SLOPES[h] * (i + n - m - j).abs()},
    ),
    "score": ({"score": lambda s, b, h, i, j: s * (h + 1) - j}, lambda m, n: {"score": lambda s, b, h, i, j: s * (h + 1) - j}),
    "sink": ({"sink": SLOPES * 8}, lambda m, n: {"sink": SLOPES * 8}),
    "scale": ({"scale": 0.7}, lambda m, n: {"scale": 0.7}),
    "integer scale": ({"scale": 1}, lambda m, n: {"scale": 1.0}),
    "softcap, then alibi, then score": (
        {"softcap": 2.0, "alibi_slopes": SLOPES, "score": lambda s, *_: 3 * s, "scale": 0.9},
        lambda m, n: {"scale": 0.9, "score": lambda s, b, h, i, j: 3 * (2 * (s / 2).tanh() - SLOPES[h] * (i + n - m - j).abs())},
    ),
    "every mask": (
        {"causal": True, "window": (4, None), "mask": lambda b, h, i, j: j != 2},
        lambda m, n: {"mask": lambda b, h, i, j: (j <= i + n - m) & (i + n - m - j <= 4) & (j != 2)},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("length", "kv_len"), [(19, 19), (7, 19), (19, 7)], ids=["square", "wide", "tall"])
@pytest.mark.parametrize("name", DENSE)
def test_dense_attention(name: str, length: int, kv_len: int, qkv: Any, oracle: Any) -> None:
    keywords, wanted = DENSE[name]
    q, k, v = qkv(heads=HEADS, length=length, kv_len=kv_len, kv_heads=2, v_head_dim=5)
    expected = oracle(q, k, v, **wanted(length, kv_len))
    check(ak.dense_attention(q, k, v, return_lse=True, **keywords), expected)
    check(ak.dense_attention(q, k, v, **keywords), expected)


def test_every_parameter_is_tested() -> None:
    elsewhere = {"q", "k", "v", "cu_seqlens_q", "cu_seqlens_kv", "kv_lens", "dropout_p", "return_lse"}
    tested = {name for keywords, _ in DENSE.values() for name in keywords}
    assert set(inspect.signature(ak.dense_attention).parameters) == tested | elsewhere


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_grouped_heads(kv_heads: int, qkv: Any, oracle: Any) -> None:
    q, k, v = qkv(heads=8, kv_heads=kv_heads)
    check(ak.attention(q, k, v, mask=causal, return_lse=True), oracle(q, k, v, mask=causal))


def test_any_strides(randn: Any, oracle: Any) -> None:
    shape = (2, HEADS, 13, 8)
    for permutation in ((0, 1, 2, 3), (0, 2, 1, 3), (3, 2, 1, 0), (1, 3, 0, 2)):
        back = tuple(np.argsort(permutation))
        q, k, v = (randn(*(shape[i] for i in permutation)).permute(back) for _ in range(3))
        check(ak.attention(q, k, v, mask=causal), oracle(q, k, v, mask=causal))
    wide = randn(2, HEADS, 26, 16)
    q, k, v = wide[:, :, ::2, 1::2], wide[:, :1, 5:6, 3:11].expand(shape), wide[..., 13:, :8]
    check(ak.attention(q, k, v, mask=causal), oracle(q, k, v, mask=causal))


def test_padded(qkv: Any, oracle: Any) -> None:
    q, k, v = qkv(batch=4)
    lens = torch.tensor([0, 1, 7, 19], dtype=torch.int32)

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (kv_idx < lens[b]) & (kv_idx <= q_idx + lens[b] - 19)

    expected = oracle(q, k, v, mask=mask)
    for b, n in enumerate(lens.tolist()):
        k[b, :, n:], v[b, :, n:] = math.nan, math.inf  # what lies behind the last key reaches nothing
    check(ak.dense_attention(q, k, v, causal=True, kv_lens=lens, return_lse=True), expected)


@pytest.mark.parametrize("same", [True, False], ids=["self", "cross"])
def test_packed(same: bool, randn: Any, oracle: Any) -> None:
    q_lens, kv_lens = [5, 0, 1, 9], [5, 0, 1, 9] if same else [3, 2, 0, 11]
    cu_q, cu_kv = (torch.tensor([0, *np.cumsum(n)], dtype=torch.int32) for n in (q_lens, kv_lens))
    q, k, v = randn(1, HEADS, sum(q_lens), 8), randn(1, 2, sum(kv_lens), 8), randn(1, 2, sum(kv_lens), 6)
    bias = randn(4, HEADS, 9, 11)
    lengths = {"cu_seqlens_q": cu_q, "cu_seqlens_kv": cu_kv}
    o, lse = ak.attention(q, k, v, score=ak.bias(bias), mask=ak.causal(), return_lse=True, **lengths)
    assert (o.shape, lse.shape) == ((1, HEADS, sum(q_lens), 6), (1, HEADS, sum(q_lens)))
    for b, (m, n) in enumerate(zip(q_lens, kv_lens, strict=True)):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_kv[b], cu_kv[b + 1])
        segment = q[:, :, rows], k[:, :, keys], v[:, :, keys]
        expected = oracle(
            *segment,
            score=lambda s, _, h, i, j, b=b: s + bias[b, h, i, j],
            mask=lambda b, h, i, j, m=m, n=n: j <= i + n - m,
        )
        check((o[:, :, rows], lse[:, :, rows]), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reference_backend(dtype: torch.dtype, qkv: Any, oracle: Any) -> None:
    q, k, v = (t.to(dtype) for t in qkv(kv_heads=2, kv_len=11))
    keywords = {"score": ak.alibi(SLOPES), "mask": ak.causal(), "return_lse": True}
    o, lse = ak.attention(q, k, v, backend="reference", **keywords)
    assert (o.dtype, lse.dtype) == (dtype, torch.float32)
    expected = oracle(
        q,
        k,
        v,
        score=lambda s, b, h, i, j: s - SLOPES[h] * (i - 8 - j).abs(),
        mask=lambda b, h, i, j: j <= i - 8,
    )
    torch.testing.assert_close(
        o.double(), expected[0], rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=1e-7
    )
    check(lse, (expected[1],))


def test_backends_by_name(qkv: Any) -> None:
    q, k, v = qkv()
    assert torch.equal(ak.attention(q, k, v, backend="cpu"), ak.attention(q, k, v))
    for name in ("nope", "cuda", "", None):
        with pytest.raises(ak.AttnkitError, match="backend"):
            ak.attention(q, k, v, backend=name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("length", "kv_len", "batch"),
    [(0, 5, 2), (5, 0, 2), (0, 0, 2), (5, 5, 0)],
    ids=["q", "kv", "both", "batch"],
)
def test_nothing_to_see(length: int, kv_len: int, batch: int, qkv: Any) -> None:
    q, k, v = qkv(batch, length=length, kv_len=kv_len, v_head_dim=3)
    o, lse = ak.attention(q, k, v, mask=causal, return_lse=True)
    assert o.shape == (batch, HEADS, length, 3)
    assert (o == 0).all()
    assert (lse == -math.inf).all()


def test_trace_is_the_program() -> None:
    program = ak.trace(lambda s, b, h, q_idx, kv_idx: s + SLOPES[h])
    assert "b0: f32[1]" in program.text
    assert "score = s + b0[h]" in program.text
    assert ak.parse(program.text) is program
    assert ak.trace(causal) is ak.trace(ak.causal("top_left"))


# --- gradients ----------------------------------------------------------------------------------------------

EXPRESSIBLE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "scale": ({"scale": 0.3}, {"scale": 0.3}),
    "causal": ({"causal": True}, {"is_causal": True}),
    "top left": ({"mask": ak.causal("top_left")}, {"is_causal": True}),
    "python": ({"mask": causal}, {"is_causal": True}),
}


def gradients(function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    fresh = [t.clone().requires_grad_() for t in tensors]
    function(*fresh).square().sum().backward()
    return [t.grad for t in fresh if t.grad is not None]


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_gradients_are_torchs(name: str, qkv: Any) -> None:
    ours, torchs = EXPRESSIBLE[name]
    tensors = qkv(heads=8, kv_heads=2)
    before = ak.installed_report()
    actual = gradients(lambda q, k, v: ak.dense_attention(q, k, v, **ours), tensors)
    after = ak.installed_report()
    expected = gradients(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **torchs), tensors
    )
    assert len(actual) == 3
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert after.torch == before.torch
    assert after.kernel_runs == before.kernel_runs + 2


@pytest.mark.parametrize(
    "keywords",
    [
        {"softcap": 3.0}, {"alibi_slopes": SLOPES}, {"sink": SLOPES}, {"window": (3, 0)}, {"return_lse": True},
        {"kv_lens": torch.tensor([3, 4], dtype=torch.int32)}, {"score": lambda s, *_: s * 2}, {"mask": lambda b, h, i, j: j != i},
    ],
    ids=lambda k: next(iter(k)),
)  # fmt: skip
def test_a_call_with_gradients_gives_the_same_bits(keywords: Any, qkv: Any) -> None:
    q, k, v = qkv()
    expected = ak.dense_attention(q, k, v, **keywords)
    for wanting in range(3):
        tensors = [t.clone().requires_grad_(i == wanting) for i, t in enumerate((q, k, v))]
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                torch.testing.assert_close(ak.dense_attention(*tensors, **keywords), expected, rtol=0, atol=0)
        o = ak.dense_attention(*tensors, **keywords)
        loss = o[0].sum() if isinstance(o, tuple) else o.sum()
        assert torch.autograd.grad(loss, tensors[wanting])[0].isfinite().all()


def test_gradients_of_causal_where_it_is_not_torchs(qkv: Any) -> None:
    """Bottom-right and top-left causal part where the lengths differ."""
    q, k, v = qkv(length=5, kv_len=9)
    mask = torch.ones(5, 9, dtype=torch.bool).tril(4)
    for ours, torchs in (
        (ak.causal(), {"attn_mask": mask}), (ak.causal("top_left"), {"is_causal": True})
    ):  # fmt: skip
        pair = [
            gradients(lambda q, k, v, m=ours: ak.attention(q, k, v, mask=m), (q, k, v)),
            gradients(lambda q, k, v, m=torchs: F.scaled_dot_product_attention(q, k, v, **m), (q, k, v)),
        ]
        for a, b in zip(*pair, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_second_derivatives_are_refused(qkv: Any) -> None:
    q, k, v = (t.requires_grad_() for t in qkv())
    (first,) = torch.autograd.grad(ak.attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        first.sum().backward()
    o, lse = ak.attention(q, k, v, return_lse=True)
    text = ak.trace(causal).text
    with pytest.raises(ak.AttnkitNotImplementedError, match="AK503"):
        torch.ops.attnkit.attend_backward(o, None, q, k, v, o, lse, text, [], [], None, [])


def test_gradients_check_what_the_kernel_would_check(qkv: Any) -> None:
    q, k, v = (t.requires_grad_() for t in qkv())
    text = ak.trace(causal).text
    attend = torch.ops.attnkit.attend
    wrong: list[tuple[Any, ...]] = [
        (text, [SLOPES], [], None), (text, [], [1.0], None), (text, [], [], torch.tensor(1)),
    ]  # fmt: skip
    for program, buffers, params, seed in wrong:
        with pytest.raises(ak.AttnkitError):
            attend(q, k, v, program, buffers, params, seed, False)


def test_gradients_on_the_reference_pass_gradcheck(qkv: Any) -> None:
    q, k, v = (t[:, :, :5, :3].double().requires_grad_() for t in qkv())

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return ak.attention(q, k, v, mask=ak.causal(), score=ak.softcap(2.0), backend="reference")

    assert torch.autograd.gradcheck(attention, (q, k, v))


# --- torch's default dtype ----------------------------------------------------------------------------------


def of_fp8(q: Tensor, k: Tensor, v: Tensor) -> Any:
    cache = ak.KVCache(2, HEADS, 8, max_len=16, codec="fp8", k_scale=0.3)
    cache.append(k, v)
    return ak.attention(q, cache)


def of_a_compiled_param(q: Tensor, k: Tensor, v: Tensor) -> Any:
    factor = ak.param("factor", 0.3)
    torch.compiler.reset()
    function = torch.compile(lambda *qkv: ak.attention(*qkv, score=lambda s, *_: s * factor), backend="eager")
    return function(q, k, v)


def of_means(q: Tensor, k: Tensor, v: Tensor) -> Any:
    means = BlockMeans(2, HEADS, 8, block=4, max_len=16)
    means.append(k)
    return means.means()


def of_density(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return ak.sparge_attention(q, k, v, return_density=True)[1]


def of_centroids(q: Tensor, k: Tensor, v: Tensor) -> Any:
    torch.manual_seed(0)
    routes = Centroids(HEADS, 2, 8).train()
    routes(q, k)
    routes.update()
    return routes.centroids


@pytest.mark.parametrize("function", [of_fp8, of_a_compiled_param, of_means, of_density, of_centroids])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_what_is_float32_is_so_beside_any_default(dtype: torch.dtype, function: Any, qkv: Any) -> None:
    """As models are built: torch's default is then theirs."""
    tensors = qkv(2, HEADS, 13, 8)
    expected = function(*tensors)
    assert expected.dtype == torch.float32
    torch.set_default_dtype(dtype)
    try:
        found = function(*tensors)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
