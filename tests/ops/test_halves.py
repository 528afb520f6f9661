"""bfloat16 and float16 through torch's own op, under autocast, and as a dtype that torch's machinery asks about."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import attnkit as ak
import attnkit.ops  # defines torch.ops.attnkit

sdpa = F.scaled_dot_product_attention
HALVES = [torch.bfloat16, torch.float16]
EVERY = pytest.mark.parametrize("dtype", HALVES, ids=str)
SHAPE = (2, 3, 9, 8)
CAUSAL = (
    "attnkit 1\nprogram (q: bhsd, k: bhsd, v: bhsd) {\n  o, lse = attend(q, k, v, scale = default) {\n"
    "    mask = kv_idx <= q_idx\n  }\n  return o, lse\n}\n"
)


@pytest.fixture
def compare(three_ways: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Callable[..., None]:
    """Our function and the override against torch's own, both judged by torch's in float64."""

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **keywords: Any) -> None:
        ours, torchs, expected = three_ways(q, k, v, mask, **keywords)
        assert (ours.shape, ours.dtype) == (torchs.shape, torchs.dtype) == (torchs.shape, q.dtype)
        one_rounding = torch.finfo(q.dtype).eps / 2 * expected.abs().max()
        assert (ours - expected).abs().max() <= 2 * (torchs - expected).abs().max() + one_rounding
        assert torch.equal((ours == 0).all(-1), (expected == 0).all(-1))  # rows that see nothing

    return run


# --- torch's op -----------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("lead", [(3,), (2, 3), (2, 2, 3)], ids=["3-D", "4-D", "5-D"])
@pytest.mark.parametrize(("length", "kv_len", "dim", "v_dim"), [(9, 9, 8, 8), (5, 17, 7, 3), (1, 33, 16, 16)])
def test_shapes(
    lead: tuple[int, ...],
    length: int,
    kv_len: int,
    dim: int,
    v_dim: int,
    dtype: torch.dtype,
    randn: Any,
    compare: Any,
) -> None:
    q, k, v = (randn(*lead, n, d).to(dtype) for n, d in ((length, dim), (kv_len, dim), (kv_len, v_dim)))
    compare(q, k, v)
    compare(q, k, v, is_causal=True)
    compare(q, k, v, scale=0.3)
    visible = randn(length, kv_len) > -1
    visible[0] = False
    compare(q, k, v, visible)
    for mask_dtype in (dtype, torch.float32):  # what torch takes beside a 16-bit query
        compare(q, k, v, randn(length, kv_len).to(mask_dtype))
        compare(q, k, v, torch.zeros(length, kv_len, dtype=mask_dtype).masked_fill(~visible, -math.inf))


@EVERY
def test_masks_that_broadcast_and_grouped_heads(dtype: torch.dtype, randn: Any, compare: Any) -> None:
    q, k, v = (randn(2, h, n, 8).to(dtype) for h, n in ((6, 7), (2, 11), (2, 11)))
    compare(q, k, v, enable_gqa=True, is_causal=True)
    for shape in ((2, 6, 7, 11), (1, 6, 1, 11), (2, 1, 7, 1), (7, 11), (6, 1, 11)):
        compare(q, k, v, randn(*shape).to(dtype), enable_gqa=True)
        compare(q, k, v, randn(*shape) > -0.5, enable_gqa=True)


@EVERY
def test_masks_that_torch_refuses_stay_refused(dtype: torch.dtype, randn: Any) -> None:
    q = randn(*SHAPE).to(dtype)
    for mask in (randn(9, 9).double(), randn(9, 9).to(HALVES[dtype == HALVES[0]])):
        for context in (torch.no_grad, ak.installed):
            with context(), pytest.raises(RuntimeError, match="attn_mask dtype"):
                sdpa(q, q, q, mask)
        with pytest.raises(ak.AttnkitError, match="AK504"):
            ak.scaled_dot_product_attention(q, q, q, mask)
    with pytest.raises(RuntimeError, match="attn_mask dtype"), ak.installed():  # nor 16 bits beside float32
        sdpa(q.float(), q.float(), q.float(), randn(9, 9).to(dtype))


@EVERY
@pytest.mark.parametrize("masked", [False, True])
def test_gradients(masked: bool, dtype: torch.dtype, randn: Any) -> None:
    """At most three times the error of torch's own, plus a rounding; FlashAttention's rule."""
    tensors = [randn(2, 3, 40, 16).to(dtype) for _ in range(3)]
    mask = (randn(40, 40) > -1) | torch.eye(40).bool() if masked else None
    weight = randn(2, 3, 40, 16).to(dtype)

    def gradients(to: torch.dtype) -> list[Tensor]:
        fresh = [t.to(to).requires_grad_() for t in tensors]
        o = sdpa(*fresh, attn_mask=mask, is_causal=not masked)
        return [o.detach(), *torch.autograd.grad((o * weight.to(to)).sum(), fresh)]

    torchs, exact = gradients(dtype), gradients(torch.float64)
    with ak.installed():
        ours = gradients(dtype)
        assert ak.installed_report().torch == {}
    for got, their, want in zip(ours, torchs, exact, strict=True):
        assert got.dtype == dtype
        one_rounding = torch.finfo(dtype).eps / 2 * want.abs().max()
        assert (got - want).abs().max() <= 3 * (their - want).abs().max() + one_rounding


# --- torch's machinery ----------------------------------------------------------------------------------------


def arguments(tensors: list[Tensor], need_lse: bool) -> tuple[Any, ...]:
    return (*tensors, CAUSAL, [], [], None, need_lse)


@EVERY
@pytest.mark.parametrize("need_lse", [False, True], ids=["o", "o, lse"])
def test_opcheck(need_lse: bool, dtype: torch.dtype, randn: Any) -> None:
    attend = torch.ops.attnkit.attend.default
    tensors = [randn(*SHAPE).to(dtype) for _ in range(3)]
    torch.library.opcheck(attend, arguments(tensors, need_lse))
    torch.library.opcheck(attend, arguments([t.mT.contiguous().mT for t in tensors], need_lse))
    real = attend(*arguments(tensors, need_lse))
    with FakeTensorMode() as mode:
        fake = attend(*arguments([mode.from_tensor(t) for t in tensors], need_lse))
    for f, r in zip(fake, real, strict=True):
        assert (f.dtype, f.shape, f.stride()) == (r.dtype, r.shape, r.stride())
    assert (real[0].dtype, real[1].dtype) == (dtype, torch.float32)


@EVERY
def test_reference(dtype: torch.dtype, randn: Any) -> None:
    """The checking backend takes them, too: float64, rounded once."""
    q, k, v, bias = (randn(*shape).to(dtype) for shape in (*[SHAPE] * 3, (9, 9)))
    o, lse = ak.attention(q, k, v, score=ak.bias(bias), backend="reference", return_lse=True)
    logits = q.double() @ k.double().mT / math.sqrt(8) + bias.double()
    torch.testing.assert_close(o, (logits.softmax(-1) @ v.double()).to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(lse, logits.logsumexp(-1).float())


# --- autocast -------------------------------------------------------------------------------------------------

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "installed": lambda *qkv: sdpa(*qkv, is_causal=True),
    "sdpa": lambda *qkv: ak.scaled_dot_product_attention(*qkv, is_causal=True),
    "attention": lambda *qkv: ak.attention(*qkv, mask=ak.causal()),
    "dense": lambda *qkv: ak.dense_attention(*qkv, causal=True, alibi_slopes=torch.zeros(3)),
    "flex": lambda *qkv: ak.flex_attention(*qkv, block_mask=ak.block_mask(ak.causal(), 1, 1, 9, 9)),
    "op": lambda *qkv: torch.ops.attnkit.attend(*arguments(list(qkv), False))[0],
}
MIXED = [(torch.float32,) * 3, (torch.bfloat16, torch.float32, torch.float16), (torch.float16,) * 3]


@EVERY
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("given", MIXED, ids=str)
def test_autocast(given: tuple[torch.dtype, ...], name: str, dtype: torch.dtype, randn: Any) -> None:
    """q, k, v are cast as torch's own op casts them, and the result is that of the call with cast tensors."""
    tensors = [randn(*SHAPE).to(d) for d in given]
    with ak.installed():
        expected = FUNCTIONS[name](*(t.to(dtype) for t in tensors))
        with torch.autocast("cpu", dtype):
            actual = FUNCTIONS[name](*tensors)
            with torch.autocast("cpu", enabled=False):
                plain = FUNCTIONS[name](*(t.float() for t in tensors))
        assert ak.installed_report().torch == {}
    with torch.autocast("cpu", dtype):
        assert sdpa(*tensors).dtype == dtype == actual.dtype
    assert torch.equal(actual, expected)
    assert plain.dtype == torch.float32


@EVERY
def test_autocast_of_masks(dtype: torch.dtype, randn: Any) -> None:
    tensors = [randn(*SHAPE) for _ in range(3)]
    with torch.autocast("cpu", dtype):
        for mask in (randn(9, 9), randn(9, 9) > -1, randn(9, 9).bfloat16(), randn(9, 9).half()):
            torchs = sdpa(*tensors, mask)
            with ak.installed():
                ours = sdpa(*tensors, mask)
                assert ak.installed_report().torch == {}
            torch.testing.assert_close(ours, torchs, rtol=0, atol=torch.finfo(dtype).eps)
        # Captured tensors stay as they are: float32 is float32 in a score.
        bias = randn(9, 9)
        score = ak.attention(*tensors, score=ak.bias(bias))
        expected = ak.attention(*(t.to(dtype) for t in tensors), score=ak.bias(bias))
        assert torch.equal(score, expected)
        o, lse = ak.attention(*tensors, normalizer=ak.softmax(torch.zeros(3)), return_lse=True)
        assert (o.dtype, lse.dtype) == (dtype, torch.float32)
        assert ak.attention(*tensors, backend="reference").dtype == dtype


def test_autocast_leaves_float64_alone(randn: Any) -> None:
    tensors = [randn(*SHAPE).double() for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16), ak.installed():
        assert sdpa(*tensors).dtype == torch.float64
        assert list(ak.installed_report().torch) == ["dtype torch.float64"]
        with pytest.raises(ak.AttnkitError, match="AK502"):
            ak.attention(*tensors)
        with pytest.raises(ak.AttnkitError, match="AK404"):
            ak.attention(tensors[0], tensors[1].float(), tensors[2])


def test_autocast_gradients_have_the_dtype_of_the_inputs(randn: Any) -> None:
    for function in FUNCTIONS.values():
        tensors = [randn(*SHAPE).requires_grad_() for _ in range(3)]
        with torch.autocast("cpu", torch.bfloat16):
            try:
                o = function(*tensors)
            except ak.AttnkitNotImplementedError as exc:  # what torch cannot stand in for
                assert exc.code == "AK503"  # noqa: PT017
                continue
            assert o.dtype == torch.bfloat16
        grads = torch.autograd.grad(o.float().square().sum(), tensors)
        exact = [t.detach().double().requires_grad_() for t in tensors]
        expected = torch.autograd.grad(sdpa(*exact, is_causal=True).square().sum(), exact)
        for grad, want in zip(grads, expected, strict=True):
            assert grad.dtype == torch.float32
            assert (grad - want).norm() <= 0.03 * want.norm()


@pytest.mark.parametrize("name", ["installed", "attention", "op"])
def test_autocast_compiles_without_a_break(name: str, randn: Any) -> None:
    tensors = [randn(*SHAPE) for _ in range(3)]
    counter = CompileCounterWithBackend("aot_eager")
    with ak.installed():
        compiled = torch.compile(FUNCTIONS[name], backend=counter, fullgraph=True)
        with torch.autocast("cpu", torch.bfloat16):
            expected, actual = FUNCTIONS[name](*tensors), compiled(*tensors)
        assert torch.equal(actual, expected)
        assert actual.dtype == torch.bfloat16
        assert torch.equal(compiled(*tensors), FUNCTIONS[name](*tensors))
    assert counter.frame_count == 2
    torch._dynamo.reset()


def test_a_layer_under_autocast(randn: Any) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        32, 4, 64, dropout=0.0, batch_first=True
    )  # in training no path avoids sdpa
    x = randn(2, 19, 32)
    exact = layer.double()(x.double())
    layer.float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torchs = layer(x)
        with ak.installed():
            ours = layer(x)
            report = ak.installed_report()
    assert (report.attnkit, report.torch) == (1, {})
    assert (ours - exact).abs().max() <= 2 * (torchs - exact).abs().max()


@pytest.mark.parametrize("dim", [7, 16, 24])
@pytest.mark.parametrize("flush", [False, True], ids=["", "flush"])
@pytest.mark.parametrize("length", [1, 40])
def test_a_token_alone_is_its_value(isa: str, length: int, flush: bool, dim: int) -> None:
    """Every float16, also those that are subnormal where the processor flushes what is."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    v = torch.cat([every, every[: -(2**16) % dim]]).view(-1, 1, 1, dim)
    before = torch.tensor([1e-40]).add(0).item() == 0
    torch.set_flush_denormal(flush)
    try:
        o = ak.attention(torch.zeros(len(v), 1, length, dim, dtype=v.dtype), torch.zeros_like(v), v)
    finally:
        torch.set_flush_denormal(before)
    torch.testing.assert_close(o, v.expand_as(o), rtol=0, atol=0, equal_nan=True)
