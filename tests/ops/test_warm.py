"""The short way of a call: who watches the dispatcher still sees it, and what is kept is kept for what it was found for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

import attnkit as ak
from attnkit import _engine, runtime
from attnkit.ops import attend_cache, warm
from attnkit.ops.warm import is_plain, is_unwatched
from attnkit.runtime import prepare
from attnkit.tune.key import bucket


def _qkv(*, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(5)
    return tuple(torch.randn(2, 4, 9, 16, generator=gen).requires_grad_(grad) for _ in range(3))  # type: ignore[return-value]


def _eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * q.shape[3] ** -0.5, -1) @ v


def test_plain_tensors() -> None:
    x = torch.randn(3)
    assert is_plain((x, torch.nn.Parameter(x), x.bfloat16(), x[::2]))
    with torch.inference_mode():
        assert is_plain((torch.randn(3), x))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(3, dtype=torch.complex64).conj().imag,
        lambda: torch._efficientzerotensor((3,)),
        lambda: torch.zeros(3, device="meta"),
        lambda: torch.zeros(3).to_sparse(),
        lambda: torch.nested.nested_tensor([torch.zeros(3)], layout=torch.jagged),
        lambda: torch.zeros(3).as_subclass(type("Sub", (Tensor,), {})),
        lambda: torch._to_functional_tensor(torch.zeros(3)),
    ],
    ids=["negated", "zero", "meta", "sparse", "nested", "subclass", "functional"],
)
def test_tensors_that_are_not_plain(make: Callable[[], Tensor]) -> None:
    assert not is_plain((torch.zeros(3), make()))


class _Functions(TorchFunctionMode):
    seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= "attnkit" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["dispatch mode", "function mode", "profiler"])
def sees(request: pytest.FixtureRequest, dispatched: Any) -> Callable[[Callable[[], Any]], bool]:
    def dispatch_mode(call: Callable[[], Any]) -> bool:
        with dispatched() as seen:
            call()
        return "attnkit.attend.default" in seen

    def function_mode(call: Callable[[], Any]) -> bool:
        with _Functions() as functions:
            call()
        return functions.seen

    def profiler(call: Callable[[], Any]) -> bool:
        with torch.autograd.profiler.profile() as profile:
            call()
        return any(event.name == "attnkit::attend" for event in profile.function_events)

    of_name = {"dispatch mode": dispatch_mode, "function mode": function_mode, "profiler": profiler}
    return of_name[request.param]


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_watchers_see_the_op(sees: Callable[[Callable[[], Any]], bool], grad: bool) -> None:
    q, k, v = _qkv(grad=grad)
    assert is_unwatched((q, k, v))
    assert sees(lambda: ak.attention(q, k, v))
    assert sees(lambda: ak.scaled_dot_product_attention(q, k, v))


def test_below_autograd_nothing_is_recorded() -> None:
    q, k, v = _qkv(grad=True)
    with torch._C._AutoDispatchBelowAutograd():
        o = ak.scaled_dot_product_attention(q, k, v)
    assert not o.requires_grad


def test_saved_tensors_of_another_shape_are_refused() -> None:
    q, k, v = _qkv(grad=True)
    with saved_tensors_hooks(lambda t: t, lambda t: t[:1]):
        o = ak.scaled_dot_product_attention(q, k, v)
        with pytest.raises(ak.AttnkitError, match="AK403"):
            o.sum().backward()


def test_second_derivatives_are_refused() -> None:
    """Of a graph that holds the cotangent and of one that does not: first derivatives are no constants."""
    q, k, v = _qkv(grad=True)
    d_o = torch.ones_like(q)
    for cotangent in (d_o, d_o.clone().requires_grad_()):
        o = ak.scaled_dot_product_attention(q, k, v)
        first = torch.autograd.grad(o, (q, k, v), cotangent, create_graph=True)
        expected = torch.autograd.grad(_eager(q, k, v), (q, k, v), d_o)
        for d, e in zip(first, expected, strict=True):
            assert torch.allclose(d, e, atol=1e-5)
            with pytest.raises(RuntimeError, match="no second derivatives"):
                (q.sum() + d.square().sum()).backward(retain_graph=True)


def test_the_engine_reads_tensors_as_they_are_said_to_lie() -> None:
    """By DLPack: the same as their addresses, sizes and strides; a parameter, a view, a dtype of its own."""
    program = prepare(_TEXT, "float32", 16, 16).kernel.program  # type: ignore[attr-defined]
    q, k, v = _qkv()
    others = None, 0.25, None, None, [], [], None, 2, 96, 64, 1024
    expected = torch.empty_like(q)
    spoken = [(t.data_ptr(), 0, t.shape, t.stride()) for t in (q, k, v, expected)]
    assert _engine.attend(program, *spoken, *others) == (0, -1)
    o = torch.full((2, 9, 4, 16), torch.nan).transpose(1, 2)
    view = k.mT.contiguous().mT
    assert _engine.attend(program, torch.nn.Parameter(q), view, v, o, *others) == (0, -1)
    assert torch.equal(o, expected)
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        _engine.attend(program, q.double(), k.double(), v.double(), o.double(), *others)
    with pytest.raises(ValueError, match="differ in dtype"):
        _engine.attend(program, q, k.half(), v, o, *others)
    for wrong in (q.to("meta"), q.to_sparse(), q.numpy()):
        with pytest.raises(TypeError):
            _engine.attend(program, wrong, k, v, o, *others)


def test_lse_that_nobody_asked_for_is_no_output() -> None:
    q, k, v = _qkv(grad=True)
    o, lse = ak.attention(q, k, v, return_lse=True)
    plain = ak.attention(q, k, v)
    assert isinstance(plain, Tensor)
    assert torch.equal(o, plain)
    d_o = torch.ones_like(o)
    alone, beside = (torch.autograd.grad(x, (q, k, v), d_o, retain_graph=True) for x in (plain, o))
    assert all(map(torch.equal, alone, beside))
    (d_q,) = torch.autograd.grad(lse.sum(), q)
    (expected,) = torch.autograd.grad((q @ k.mT * 0.25).logsumexp(-1).sum(), q)
    assert torch.allclose(d_q, expected, atol=1e-5)


def test_default_dtype_does_not_matter() -> None:
    q, k, v = _qkv()
    torch.set_default_dtype(torch.float64)
    try:
        o, lse = ak.attention(q, k, v, return_lse=True)
        assert (o.dtype, lse.dtype) == (torch.float32, torch.float32)
        assert torch.ops.attnkit.attend(q, k, v, _TEXT, [], [], None, False)[1].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


_TEXT = (
    "attnkit 1\nprogram (q: bhsd, k: bhsd, v: bhsd) {\n  o, lse = attend(q, k, v, scale = default) {\n"
    "    normalizer = softmax\n  }\n  return o, lse\n}\n"
)


def test_what_is_cleared_is_prepared_anew() -> None:
    """Whatever knows a kernel by a key of its own forgets it too."""
    q, k, v = _qkv()
    cache = ak.KVCache(2, k.shape[1], 16, max_len=64, codec="int8")
    cache.append(k, v)

    def call() -> None:
        ak.attention(q, k, v)
        ak.attention(q, cache)

    call()
    before, of_cache = warm.ready(_TEXT, q, k, v), dict(attend_cache._ready)
    call()
    assert warm.ready(_TEXT, q, k, v) is before
    assert attend_cache._ready == of_cache
    runtime.clear()
    assert attend_cache._ready == {}
    call()
    assert warm.ready(_TEXT, q, k, v).prepared is not before.prepared
    assert len(attend_cache._ready) == 1


def test_one_entry_for_all_calls_alike() -> None:
    q, k, v = _qkv()
    warm.forget()
    first = warm.ready(_TEXT, q, k, v)
    assert warm.ready(_TEXT, q + 1, k.mT.contiguous().mT, v) is first
    assert warm.ready(_TEXT, q.bfloat16(), k.bfloat16(), v.bfloat16()) is not first
    longer = [torch.cat([x, x[:, :, :3]], 2) for x in (k, v)]
    assert warm.ready(_TEXT, q, *longer) is first  # a decoder has one key more at every step
    assert warm.ready(_TEXT, q[:, :, :1], k, v).shape == (2, 4, 1, 16)
    with pytest.raises(ak.AttnkitError, match="AK403"):
        warm.ready(_TEXT, q, k, v[:, :, :3])
    with pytest.raises(ak.AttnkitError, match="AK404"):
        warm.ready(_TEXT, q, k.bfloat16(), v)
    assert len(warm._ready) == 3


def test_tensors_are_known_at_a_glance(dispatched: Any) -> None:
    """By the engine, as `ready` knows them: by type, dtype, shape and bucket of keys; never tensors that somebody watches."""
    q, k, v = _qkv()
    found = warm.ready(_TEXT, q, k, v)
    assert warm.known(_TEXT, q + 1, k.mT.contiguous().mT, torch.nn.Parameter(v)) is found
    for n in (1, 2, 8, 9, 16, 17):
        k_n, v_n = (torch.randn(2, 4, n, 16) for _ in range(2))
        assert (warm.known(_TEXT, q, k_n, v_n) is found) == (bucket(n) == bucket(9))
    views = torch.zeros(2, 4, 9, 16, dtype=torch.complex64).conj().imag, torch._efficientzerotensor(q.shape)
    wrapped = q.as_subclass(type("Sub", (Tensor,), {})), torch._to_functional_tensor(q)
    for other in (*views, *wrapped, q.to("meta"), q.to_sparse(), q[0], q.bfloat16(), q[:, :, :, :8], None):
        for tensors in ((other, k, v), (q, other, v), (q, k, other)):
            assert warm.known(_TEXT, *tensors) is None  # type: ignore[arg-type]
    assert warm.known(_TEXT, q, k, v[:, :, :3]) is None
    assert warm.known(_TEXT + "\n", q, k, v) is None
    seen = [warm.known(_TEXT, q, k, v)]
    torch.func.vmap(lambda x: seen.append(warm.known(_TEXT, x, k, v)) or x)(q[None])
    with torch.autocast("cpu"):
        seen.append(warm.known(_TEXT, q, k, v))
    with dispatched():
        seen.append(warm.known(_TEXT, q, k, v))
    assert seen == [found, None, None, None]


def test_memory_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "_MAX_ENTRIES", 8)
    q, k, v = _qkv()
    for n in range(1, 10):
        for m in range(1, 4):
            o = ak.scaled_dot_product_attention(q[:, :, :m], k[:, :, :n], v[:, :, :n])
            assert torch.allclose(o, _eager(q[:, :, :m], k[:, :, :n], v[:, :, :n]), atol=1e-5)
            assert len(warm._ready) <= 8
