"""Calls that were met before go past everything but the kernel: the same bits, the same errors, nothing unseen."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils.checkpoint import checkpoint

import attnkit as ak
from attnkit.ops import at_once as module
from attnkit.ops.functional import plain_text

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _qkv(dtype: torch.dtype = torch.float32, kv_heads: int = 4) -> list[Tensor]:
    gen = torch.Generator().manual_seed(7)
    heads = 4, kv_heads, kv_heads
    return [torch.randn(2, h, 9, 16, generator=gen).to(dtype).requires_grad_() for h in heads]


def _goes_at_once(o: Tensor) -> bool:
    return type(o.grad_fn).__name__ == "_AtOnceBackward"


_CALLS: dict[str, Callable[..., Any]] = {
    "attention": ak.attention,
    "attention, causal": lambda q, k, v: ak.attention(q, k, v, mask=ak.causal()),
    "attention, softcap": lambda q, k, v: ak.attention(q, k, v, score=ak.softcap(5.0), scale=0.5),
    "sdpa": lambda q, k, v: ak.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    "sdpa, causal": lambda q, k, v: ak.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
}


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("call", _CALLS.values(), ids=_CALLS.keys())
def test_the_same_bits_as_the_long_way(call: Callable[..., Any], kv_heads: int, dtype: torch.dtype) -> None:
    qkv = _qkv(dtype, kv_heads)
    d_o = torch.randn(2, 4, 9, 16).to(dtype)
    ak.runtime.clear()
    found = []
    for _ in range(2):
        o = call(*qkv)
        found.append((o, *torch.autograd.grad(o, qkv, d_o)))
    first, second = found
    assert not _goes_at_once(first[0])
    assert _goes_at_once(second[0])
    assert all(map(torch.equal, first, second))
    assert [t.stride() for t in first] == [t.stride() for t in second]
    with torch.no_grad():
        assert torch.equal(call(*qkv), second[0])


def test_the_override_goes_at_once() -> None:
    qkv = _qkv()
    with ak.installed():
        sdpa(*qkv)
        o = sdpa(*qkv)
        assert _goes_at_once(o)
        o.sum().backward()
        assert (ak.installed_report().attnkit, ak.installed_report().kernel_runs) == (2, 3)


def test_shared_heads_are_still_to_be_asked_for() -> None:
    qkv = _qkv(kv_heads=2)
    for _ in range(2):
        ak.scaled_dot_product_attention(*qkv, enable_gqa=True)
        with pytest.raises(ak.AttnkitError, match="AK504"):
            ak.scaled_dot_product_attention(*qkv)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_gradients_of_some(wanted: tuple[int, ...]) -> None:
    qkv = [t.detach() for t in _qkv()]
    ak.attention(*qkv)
    leaves = [t.requires_grad_() if i in wanted else t for i, t in enumerate(qkv)]
    o = ak.attention(*leaves)
    assert _goes_at_once(o)
    o.square().sum().backward()
    reference = [t.detach().clone().requires_grad_(i in wanted) for i, t in enumerate(qkv)]
    sdpa(*reference).square().sum().backward()
    for t, r in zip(leaves, reference, strict=True):
        assert (t.grad is None) == (r.grad is None)
        assert t.grad is None or torch.allclose(t.grad, r.grad, atol=1e-5)


def _warm() -> tuple[list[Tensor], Tensor]:
    qkv = _qkv()
    ak.attention(*qkv)
    o = ak.attention(*qkv)
    assert _goes_at_once(o)
    return qkv, o


def test_a_backward_that_is_watched_is_seen(dispatched: Any) -> None:
    qkv, o = _warm()
    with dispatched() as seen:
        torch.autograd.grad(o, qkv, torch.ones_like(o))
    assert "attnkit.attend_backward.default" in seen


def test_several_cotangents_at_once() -> None:
    qkv, o = _warm()
    d_o = torch.randn(3, *o.shape)
    together = torch.autograd.grad(o, qkv, d_o, is_grads_batched=True, retain_graph=True)
    apart = [torch.autograd.grad(o, qkv, d, retain_graph=True) for d in d_o]
    for t, each in zip(together, zip(*apart, strict=True), strict=True):
        assert torch.equal(t, torch.stack(each))


def test_second_derivatives_are_refused() -> None:
    qkv, o = _warm()
    first = torch.autograd.grad(o, qkv, torch.ones_like(o), create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        first[0].square().sum().backward()


def test_saved_tensors_of_another_shape_are_refused() -> None:
    qkv, _ = _warm()
    with saved_tensors_hooks(lambda t: t, lambda t: t[:1]):
        o = ak.attention(*qkv)
        assert _goes_at_once(o)
        with pytest.raises(ak.AttnkitError, match="AK403"):
            o.sum().backward()


def test_an_output_that_was_written_to_is_noticed() -> None:
    _, o = _warm()
    with torch.no_grad():
        o.mul_(2.0)
    with pytest.raises(RuntimeError, match="inplace operation"):
        o.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool) -> None:
    qkv, o = _warm()
    expected = torch.autograd.grad(o.sum(), qkv)
    again = checkpoint(ak.attention, *qkv, use_reentrant=reentrant)
    again.sum().backward()
    assert all(torch.equal(t.grad, e) for t, e in zip(qkv, expected, strict=True) if t.grad is not None)
    assert all(t.grad is not None for t in qkv)


def test_a_kernel_that_was_forgotten_meanwhile() -> None:
    qkv, o = _warm()
    expected = torch.autograd.grad(o.sum(), qkv, retain_graph=True)
    ak.runtime.clear()
    assert all(map(torch.equal, torch.autograd.grad(o.sum(), qkv), expected))


def test_what_the_engine_refuses_is_said_by_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory at an odd address is known by its value alone: tensors like it were met."""
    qkv = [t.detach() for t in _qkv()]
    ak.attention(*qkv)
    size = qkv[0].numel() * 4
    q = torch.frombuffer(bytearray(size + 1), dtype=torch.float32, offset=1, count=size // 4).view(
        2, 4, 9, 16
    )
    with pytest.raises(ak.AttnkitError, match="AK607"):
        ak.attention(q, *qkv[1:])
    monkeypatch.setattr(module, "run", lambda *_: (_ for _ in ()).throw(AssertionError("the long way")))
    with pytest.raises(AssertionError, match="the long way"):
        module.at_once(plain_text(None), q, *qkv[1:])


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own, in forward mode
def test_forward_derivatives_are_not_lost() -> None:
    q, k, v = (t.detach() for t in _qkv())
    ak.attention(q, k, v)
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        found, expected = (forward_ad.unpack_dual(of(dual, k, v)).tangent for of in (ak.attention, sdpa))
    assert found is not None
    assert torch.equal(found, expected)
