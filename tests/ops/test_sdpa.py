"""torch's scaled_dot_product_attention: our function and the installed override against torch's own."""

import itertools
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_map_only

import attnkit as ak

sdpa = F.scaled_dot_product_attention
EPSILON = torch.finfo(torch.float32).eps


@pytest.fixture
def compare(three_ways: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Callable[..., None]:
    """Our function and the override against torch's own, both judged by torch's in float64.

    The bound is FlashAttention's: at most twice the error of the other float32 implementation, plus a rounding.
    """

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **keywords: Any) -> None:
        ours, torchs, expected = three_ways(q, k, v, mask, **keywords)
        assert (ours.shape, ours.dtype) == (torchs.shape, torchs.dtype)
        allowed = 2 * (torchs - expected).abs().max() + 4 * EPSILON * v.abs().max()
        assert (ours - expected).abs().max() <= allowed
        assert torch.equal(ours == 0, expected == 0)  # rows that see nothing

    return run


# --- forms that attnkit takes -------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(3,), (2, 3), (2, 2, 3)], ids=["3-D", "4-D", "5-D"])
@pytest.mark.parametrize(
    ("length", "kv_len", "dim", "v_dim"), [(9, 9, 8, 8), (5, 17, 8, 3), (17, 5, 4, 12), (1, 33, 16, 16)]
)
def test_shapes(
    lead: tuple[int, ...], length: int, kv_len: int, dim: int, v_dim: int, randn: Any, compare: Any
) -> None:
    q, k, v = randn(*lead, length, dim), randn(*lead, kv_len, dim), randn(*lead, kv_len, v_dim)
    compare(q, k, v)
    compare(q, k, v, is_causal=True)  # top-left aligned
    compare(q, k, v, randn(length, kv_len) > 0)
    compare(q, k, v, randn(length, kv_len))


BROADCASTS = {full[at:] for full in itertools.product(*[(n, 1) for n in (2, 3, 7, 11)]) for at in range(3)}


@pytest.mark.parametrize("shape", sorted(BROADCASTS), ids=str)
def test_every_mask_that_broadcasts(shape: tuple[int, ...], randn: Any, compare: Any) -> None:
    q, k, v = randn(2, 3, 7, 8), randn(2, 3, 11, 8), randn(2, 3, 11, 5)
    compare(q, k, v, randn(*shape))
    compare(q, k, v, randn(*shape) > -0.5)
    compare(q, k, v, torch.where(randn(*shape) > 0.3, -math.inf, randn(*shape)))


def test_masks_of_other_ranks(randn: Any, compare: Any) -> None:
    q, k, v = randn(3, 7, 8), randn(3, 11, 8), randn(3, 11, 8)
    for shape in ((3, 7, 11), (3, 1, 11), (1, 7, 11), (7, 1), (1, 11)):
        compare(q, k, v, randn(*shape) > -0.5)
        compare(q, k, v, randn(*shape))
    q, k, v = randn(2, 2, 3, 7, 8), randn(2, 2, 3, 11, 8), randn(2, 2, 3, 11, 8)
    for shape in ((3, 7, 11), (1, 1, 1, 7, 11), (1, 1, 3, 1, 11), (1, 3, 7, 1), (7, 11)):
        compare(q, k, v, randn(*shape) > -0.5)
        compare(q, k, v, randn(*shape))


@pytest.mark.parametrize("shape", [(), (1,), (11,), (1, 3, 7, 11), (1, 1, 1, 7, 11)], ids=str)
def test_masks_of_odd_ranks_are_torchs_business(shape: tuple[int, ...], randn: Any) -> None:
    """Torch takes some and refuses others, by the path that it chooses: installed, the outcome is the same."""

    def outcome(*tensors: Tensor) -> Any:
        try:
            return sdpa(*tensors)
        except (RuntimeError, IndexError) as exc:
            return type(exc)

    for lead in ((3,), (2, 3), (2, 2, 3)):
        tensors = randn(*lead, 7, 8), randn(*lead, 11, 8), randn(*lead, 11, 8), randn(*shape)
        if len(shape) == len(lead) + 1:
            continue
        expected = outcome(*tensors)
        with ak.installed():
            actual = outcome(*tensors)
        if isinstance(expected, Tensor):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
        else:
            assert actual is expected


def test_masks_of_any_strides(randn: Any, compare: Any) -> None:
    q, k, v = (randn(2, 3, 9, 8) for _ in range(3))
    wide = randn(2, 3, 20, 20)
    for mask in (
        wide[:, :, 1:10, ::2][..., :9],
        wide[:, :, :9, :9].mT,
        wide[0, 0, 0, :9].expand(2, 3, 9, 9),
        wide[:, :1, :1, :9].expand(2, 3, 9, 9),
    ):
        compare(q, k, v, mask)
        compare(q, k, v, mask > 0)


@pytest.mark.parametrize(
    "blocked", [None, -math.inf, torch.finfo(torch.float32).min, -1e30, -1e20, -1e10, -1e9], ids=str
)
def test_rows_that_see_nothing(blocked: float | None, randn: Any, compare: Any) -> None:
    """-inf and False are nothing; a large negative number is a score, and such a row is an average."""
    q, k, v = randn(2, 3, 9, 8), randn(2, 3, 70, 8), randn(2, 3, 70, 8)
    visible = randn(2, 1, 9, 70) > 0
    visible[0, :, 2] = visible[1, :, :3] = visible[1, :, 8] = False
    compare(q, k, v, visible if blocked is None else torch.zeros(2, 1, 9, 70).masked_fill(~visible, blocked))


@pytest.mark.parametrize("scale", [0.25, 1, 3.0, -0.5, -2, 0, 0.0, -0.0, 1e-30])
def test_any_finite_scale(scale: float, randn: Any, compare: Any) -> None:
    q, k, v = (randn(2, 3, 9, 8) for _ in range(3))
    compare(q, k, v, scale=scale)
    compare(q, k, v, randn(9, 9), scale=scale)
    if scale > 0:
        compare(q, k, v, is_causal=True, scale=scale)
        return
    # torch gives NaN, because it multiplies its mask of -inf too; ours is the equation
    causal = ak.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    expected = sdpa(q, k, v, torch.ones(9, 9).tril().bool(), scale=scale)
    torch.testing.assert_close(causal, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_grouped_heads(kv_heads: int, randn: Any, compare: Any) -> None:
    for lead in ((), (2,), (2, 2)):
        q, k, v = randn(*lead, 6, 9, 8), randn(*lead, kv_heads, 9, 8), randn(*lead, kv_heads, 9, 8)
        compare(q, k, v, is_causal=True, enable_gqa=True)
        compare(q, k, v, randn(6, 9, 9), enable_gqa=True)


def test_any_strides(randn: Any, compare: Any) -> None:
    shape, wide = (2, 3, 9, 8), randn(2, 9, 3, 40)
    q, k, v = (
        wide[..., :8].transpose(1, 2),
        wide[..., 8:24:2].transpose(1, 2),
        wide[:, :1, :1, 30:38].expand(2, 9, 3, 8).transpose(1, 2),
    )
    assert q.shape == k.shape == v.shape == shape
    compare(q, k, v, is_causal=True)
    five = randn(2, 9, 2, 3, 8).permute(0, 2, 3, 1, 4)
    compare(five, five.flip(3), five.mT.contiguous().mT)


def test_transformer_layers(randn: Any) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(24, 3, batch_first=True).eval()
    x, padding = randn(2, 9, 24), torch.arange(9) > torch.tensor([[8], [5]])
    with torch.no_grad():
        for keywords in (
            {},
            {"key_padding_mask": padding},
            {"attn_mask": torch.ones(9, 9).triu(1).bool(), "is_causal": True},
        ):
            expected = layer.train()(x, x, x, need_weights=False, **keywords)[0]
            with ak.installed():
                actual = layer(x, x, x, need_weights=False, **keywords)[0]
                report = ak.installed_report()
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
            assert (report.attnkit, report.torch) == (1, {})


# --- forms that go to torch ---------------------------------------------------------------------------------

SHAPE = (2, 3, 9, 8)
Build = Callable[[Callable[..., Tensor]], tuple[tuple[Any, ...], dict[str, Any]]]


def three(randn: Any, *shape: int, **to: Any) -> tuple[Any, ...]:
    return tuple(randn(*(shape or SHAPE)).to(**to) for _ in range(3))


DECLINED: dict[str, tuple[str, Build]] = {
    "float64": ("float64", lambda r: (three(r, dtype=torch.float64), {})),
    "2-D": ("rank", lambda r: (three(r, 9, 8), {})),
    "6-D": ("rank", lambda r: (three(r, 1, 2, 1, 3, 9, 8), {})),
    "broadcast batch": ("broadcast", lambda r: ((r(2, 3, 9, 8), r(1, 3, 9, 8), r(1, 3, 9, 8)), {})),
    "broadcast query": ("broadcast", lambda r: ((r(1, 3, 9, 8), r(2, 3, 9, 8), r(2, 3, 9, 8)), {})),
    "broadcast heads": ("broadcast", lambda r: ((r(2, 3, 9, 8), r(2, 1, 9, 8), r(2, 1, 9, 8)), {})),
    "broadcast value": ("broadcast", lambda r: ((r(2, 3, 9, 8), r(2, 3, 9, 8), r(1, 3, 9, 8)), {})),
    "no query": ("empty", lambda r: ((r(2, 3, 0, 8), r(2, 3, 9, 8), r(2, 3, 9, 8)), {})),
    "no key": ("empty", lambda r: ((r(2, 3, 9, 8), r(2, 3, 0, 8), r(2, 3, 0, 8)), {})),
    "no batch": ("empty", lambda r: (three(r, 0, 3, 9, 8), {})),
    "5-D mask": ("mask", lambda r: ((*three(r, 2, 2, 3, 9, 8), r(2, 2, 3, 9, 9)), {})),
    "4-D mask of 5-D": ("mask", lambda r: ((*three(r, 2, 2, 3, 9, 8), r(2, 1, 9, 9) > 0), {})),
    "mask beside causal": ("mask", lambda r: ((*three(r), r(9, 9)), {"is_causal": True})),
    "infinite scale": ("scale", lambda r: (three(r), {"scale": math.inf})),
    "scale is not a number": ("scale", lambda r: (three(r), {"scale": math.nan})),
}
REFUSED: dict[str, Build] = {  # torch itself raises
    "head dims": lambda r: ((r(2, 3, 9, 8), r(2, 3, 9, 7), r(2, 3, 9, 8)), {}),
    "head counts": lambda r: ((r(2, 3, 9, 8), r(2, 2, 9, 8), r(2, 2, 9, 8)), {}),
    "head counts, gqa": lambda r: ((r(2, 3, 9, 8), r(2, 2, 9, 8), r(2, 2, 9, 8)), {"enable_gqa": True}),
    "dtypes": lambda r: ((r(*SHAPE), r(*SHAPE).double(), r(*SHAPE)), {}),
    "integers": lambda r: (three(r, dtype=torch.int32), {}),
    "mask shape": lambda r: ((*three(r), r(5, 9)), {}),
    "mask with more heads": lambda r: ((*three(r, 2, 1, 9, 8), r(2, 3, 9, 9)), {}),
    "mask with more dimensions": lambda r: ((*three(r, 3, 9, 8), r(1, 3, 9, 9)), {}),
    "mask dtype": lambda r: ((*three(r), r(9, 9).double()), {}),
    "integer mask": lambda r: ((*three(r), r(9, 9).int()), {}),
    "device": lambda r: ((r(*SHAPE), r(*SHAPE).to("meta"), r(*SHAPE)), {}),
    "dropout above one": lambda r: (three(r), {"dropout_p": 1.5}),
    "1-D": lambda r: (three(r, 8), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", DECLINED)
def test_declined_forms_go_to_torch_and_are_counted(name: str, randn: Any) -> None:
    reason, build = DECLINED[name]
    args, keywords = build(randn)
    torch.manual_seed(0)
    expected = sdpa(*args, **keywords)
    with ak.installed():
        torch.manual_seed(0)
        actual = sdpa(*args, **keywords)
        report = ak.installed_report()
    assert torch.equal(actual.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert actual.stride() == expected.stride()
    assert (report.attnkit, report.kernel_runs, list(report.torch.values())) == (0, 0, [1])
    assert reason in next(iter(report.torch))
    assert next(iter(report.torch)) in str(report)
    with pytest.raises(ak.AttnkitNotImplementedError, match="(?s)AK504.*" + reason):
        ak.scaled_dot_product_attention(*args, **keywords)


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_refuses_stays_refused(name: str, randn: Any) -> None:
    args, keywords = REFUSED[name](randn)
    with pytest.raises(Exception) as torchs:  # noqa: PT011 -- whatever torch raises, it must be that
        sdpa(*args, **keywords)
    with ak.installed():
        with pytest.raises(type(torchs.value)) as installed:
            sdpa(*args, **keywords)
        assert ak.installed_report().kernel_runs == 0
    assert str(installed.value).split("\n")[0] == str(torchs.value).split("\n")[0]
    with pytest.raises(ak.AttnkitError):
        ak.scaled_dot_product_attention(*args, **keywords)


def test_gradients_are_torchs(randn: Any) -> None:
    tensors = three(randn)
    mask = randn(9, 9)
    for wanting in range(4):
        results = []
        for context in (torch.enable_grad, ak.installed):
            fresh = [t.clone().requires_grad_(i == wanting) for i, t in enumerate((*tensors, mask))]
            with context():
                o = sdpa(*fresh)
                report = ak.installed_report()
            o.square().sum().backward()
            results.append((o, fresh[wanting].grad))
        assert report.torch == {}
        assert report.kernel_runs == 1
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_elements_of_an_expanded_mask_have_their_own_gradients(randn: Any) -> None:
    """They share memory, and no gradient: where the mask itself is differentiated, none may lie at another's place."""
    tensors = three(randn)
    mask = randn(9, 9).expand(*tensors[0].shape[:2], 9, 9).requires_grad_()
    found, expected = (
        torch.autograd.grad(f(*tensors, mask).square().sum(), mask)[0]
        for f in (ak.scaled_dot_product_attention, sdpa)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_own_function_with_gradients(randn: Any) -> None:
    tensors = [t.requires_grad_() for t in three(randn)]
    bias = randn(9, 9).requires_grad_()
    forms: list[dict[str, Any]] = [
        {}, {"is_causal": True}, {"scale": 0.3}, {"scale": -0.3}, {"attn_mask": bias}, {"attn_mask": randn(9, 9) > 0},
        {"attn_mask": bias.expand(*tensors[0].shape[:2], 9, 9)},
    ]  # fmt: skip
    for keywords in forms:
        leaves = [*tensors, bias] if keywords.get("attn_mask", bias[0] > 0).is_floating_point() else tensors
        grads = [
            torch.autograd.grad(f(*tensors, **keywords).square().sum(), leaves)
            for f in (ak.scaled_dot_product_attention, sdpa)
        ]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(mode: Any, randn: Any) -> None:
    q, k, v = (t.requires_grad_() for t in three(randn))
    expected = ak.scaled_dot_product_attention(q.detach(), k.detach(), v.detach())
    with ak.installed(), mode():
        assert torch.equal(sdpa(q, k, v), expected)
        assert torch.equal(
            sdpa(*(t + 0 for t in (q, k, v))), expected
        )  # in inference_mode, inference tensors
        report = ak.installed_report()
    assert (report.attnkit, report.torch) == (2, {})


def test_autocast(randn: Any) -> None:
    q, k, v = three(randn)
    with torch.autocast("cpu", torch.bfloat16):
        expected = sdpa(q, k, v)
        with ak.installed():
            actual = sdpa(q, k, v)
            report = ak.installed_report()
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert (report.attnkit, report.torch) == (1, {})
    exact = sdpa(*(t.bfloat16().double() for t in (q, k, v)))
    assert (actual - exact).abs().max() <= 2 * (expected - exact).abs().max()


@pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors:UserWarning",
    "ignore:There is a performance drop because we have not yet implemented the batching rule:UserWarning",
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning",
)
def test_what_lies_beside_plain_tensors(randn: Any) -> None:
    """Nested tensors, vmap, functional and forward gradients go where they went before."""
    import torch.autograd.forward_ad as forward_ad
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = three(randn)
    jagged = torch.nested.nested_tensor([randn(5, 2, 8), randn(7, 2, 8)], layout=torch.jagged).transpose(1, 2)

    def tangent() -> Tensor:
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            return forward_ad.unpack_dual(sdpa(forward_ad.make_dual(q, torch.ones_like(q)), k, v)).tangent

    def jvp() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(lambda q: sdpa(q, k, v), (q,), (torch.ones_like(q),))[1]

    for function in (
        lambda: sdpa(jagged, jagged, jagged).values(),
        lambda: torch.vmap(sdpa)(q, k, v),
        lambda: torch.vmap(lambda q: sdpa(q, k, v))(torch.stack([q, 2 * q])),
        lambda: torch.func.grad(lambda q: sdpa(q, k, v).square().sum())(q),
        lambda: torch.func.functionalize(sdpa)(q, k, v),
        tangent,
        jvp,
    ):
        expected = function()
        with ak.installed():
            actual = function()
        assert isinstance(actual, Tensor)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


class OfTorchAlone(Tensor):
    """A wrapper that passes on the ops it knows: torch's."""

    inner: Tensor

    @staticmethod
    def __new__(cls: type["OfTorchAlone"], inner: Tensor) -> "OfTorchAlone":
        wrapper = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, requires_grad=inner.requires_grad
        )
        wrapper.inner = inner.detach()
        return wrapper  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "aten":
            return NotImplemented
        args, kwargs = tree_map_only(OfTorchAlone, lambda t: t.inner, (args, kwargs or {}))
        return tree_map_only(Tensor, OfTorchAlone, func(*args, **kwargs))


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_a_subclass_that_knows_torchs_ops_alone(grad: bool, randn: Any) -> None:
    q, k, v = three(randn)
    expected = sdpa(q, k, v, is_causal=True)
    wrapped = [OfTorchAlone(t.clone().requires_grad_(grad)) for t in (q, k, v)]
    with ak.installed():
        for _ in range(2):
            o = sdpa(*wrapped, is_causal=True)
            assert torch.equal(o.inner, expected)
        report = ak.installed_report()
    assert (report.attnkit, sum(report.torch.values())) == (0, 2)
    if grad:
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        wanted = torch.autograd.grad(sdpa(*leaves, is_causal=True).sum(), leaves)
        found = torch.autograd.grad(o.sum(), wrapped)
        assert all(torch.equal(f.inner, w) for f, w in zip(found, wanted, strict=True))


# --- install and uninstall ----------------------------------------------------------------------------------


def took_part(randn: Any) -> int:
    """How many kernels one call of torch's function runs."""
    before = ak.installed_report().kernel_runs
    sdpa(*three(randn))
    return ak.installed_report().kernel_runs - before


def test_installs_nest(randn: Any) -> None:
    assert took_part(randn) == 0
    ak.install()
    with ak.installed():
        ak.install()
        assert took_part(randn) == 1
        ak.uninstall()
    assert ak.installed_report().active
    assert took_part(randn) == 1
    ak.uninstall()
    for _ in range(3):
        assert not ak.installed_report().active
        assert took_part(randn) == 0
        ak.uninstall()  # harmless, and no debt: the next install counts
    with ak.installed():
        assert took_part(randn) == 1
    assert took_part(randn) == 0


def test_an_exception_uninstalls(randn: Any) -> None:
    with pytest.raises(KeyError), ak.installed():
        raise KeyError
    assert took_part(randn) == 0


def test_torch_is_left_as_it_was(randn: Any) -> None:
    q, k, v = three(randn)
    before = sdpa(q, k, v, is_causal=True)
    with ak.installed():
        sdpa(q, k, v, is_causal=True)
    assert torch.equal(sdpa(q, k, v, is_causal=True), before)


def test_the_report_starts_anew_with_the_first_install(randn: Any) -> None:
    with ak.installed():
        took_part(randn)
        ak.install()
        assert ak.installed_report().attnkit == 1
        ak.uninstall()
    assert ak.installed_report().attnkit == 1
    with ak.installed():
        report = ak.installed_report()
    assert (report.active, report.attnkit, report.kernel_runs, report.torch) == (True, 0, 0, {})


def test_threads(randn: Any) -> None:
    q, k, v = three(randn)
    torchs, ours = sdpa(q, k, v), ak.scaled_dot_product_attention(q, k, v)
    assert not torch.equal(torchs, ours), "equal to the last bit: this test could not tell them apart"
    wrong: list[str] = []

    def steady() -> None:
        wrong.extend("not attnkit while installed" for _ in range(50) if not torch.equal(sdpa(q, k, v), ours))

    def changing() -> None:
        for _ in range(3):
            with ak.installed():
                if not torch.equal(sdpa(q, k, v), ours):
                    wrong.append("not attnkit in a nested install")

    def run(*functions: Callable[[], None]) -> None:
        threads = [threading.Thread(target=f) for f in functions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)

    with ak.installed():
        run(steady, steady, changing, changing)
        report = ak.installed_report()
    assert wrong == []
    assert report.attnkit == report.kernel_runs == 106
    run(changing, changing, changing)
    assert wrong == []
    assert not ak.installed_report().active
    assert torch.equal(sdpa(q, k, v), torchs)


def test_compiled_graphs_follow_installs(randn: Any) -> None:
    q, k, v = three(randn)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sdpa, backend=counter, fullgraph=True)
    torchs, ours = sdpa(q, k, v), ak.scaled_dot_product_attention(q, k, v)
    for _ in range(2):
        assert torch.equal(compiled(q, k, v), torchs)
        compiles = counter.frame_count
        with ak.installed():
            for _ in range(3):
                assert torch.equal(compiled(q, k, v), ours)
            assert ak.installed_report().kernel_runs == 3
        assert counter.frame_count == compiles + 1
    assert torch.equal(compiled(q, k, v), torchs)


PROCESS = """
import sys, torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
if sys.argv[1] == "installed":
    import attnkit as ak
    ak.install()
q, k, v = torch.linspace(-1, 1, 3 * 2 * 3 * 9 * 8).view(3, 2, 3, 9, 8)
with torch.no_grad():
    compiled, eager = torch.compile(sdpa, fullgraph=True)(q, k, v), sdpa(q, k, v)
torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
print(ak.installed_report().kernel_runs if sys.argv[1] == "installed" else int("attnkit" in sys.modules))
"""


@pytest.mark.slow
def test_graphs_on_disk_are_kept_apart(tmp_path: Path) -> None:
    """What one process compiled and torch kept, another may find: installed or not, it must find its own."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    for order in (("installed", "plain"), ("plain", "installed")):
        shutil.rmtree(tmp_path)
        for which in order:
            command = [sys.executable, "-c", PROCESS, which]
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=300, check=False
            )
            assert done.stdout.split() == ["2" if which == "installed" else "0"], done.stderr


def test_compiled_training(randn: Any) -> None:
    tensors = three(randn)
    compiled = torch.compile(
        lambda q, k, v: sdpa(q, k, v, is_causal=True), backend="aot_eager", fullgraph=True
    )

    def gradients(function: Callable[..., Tensor]) -> list[Tensor]:
        fresh = [t.clone().requires_grad_() for t in tensors]
        return list(torch.autograd.grad(function(*fresh).square().sum(), fresh))

    expected = gradients(lambda q, k, v: sdpa(q, k, v, is_causal=True))
    with ak.installed():
        for actual, wanted in zip(gradients(compiled), expected, strict=True):
            torch.testing.assert_close(actual, wanted)
        report = ak.installed_report()
    assert report.kernel_runs == 2
    assert report.torch == {}


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_training(reentrant: bool, randn: Any) -> None:
    from torch.utils.checkpoint import checkpoint

    q, k, v = (t.requires_grad_() for t in three(randn))
    expected = torch.autograd.grad(sdpa(q, k, v).square().sum(), (q, k, v))
    with ak.installed():
        checkpoint(sdpa, q, k, v, use_reentrant=reentrant).square().sum().backward()
    for tensor, wanted in zip((q, k, v), expected, strict=True):
        torch.testing.assert_close(tensor.grad, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("how", ["script", "trace", "trace, installed"])
def test_torchscript(how: str, randn: Any) -> None:
    q, k, v = three(randn)
    if how == "script":
        function = torch.jit.script(scripted)
    elif how == "trace":
        function = torch.jit.trace(sdpa, (q, k, v))
    else:
        with ak.installed():
            function = torch.jit.trace(sdpa, (q, k, v))
    torchs, ours = sdpa(q, k, v), ak.scaled_dot_product_attention(q, k, v)
    with ak.installed():
        assert torch.equal(function(q, k, v), ours)
    if how != "trace, installed":  # a trace keeps what it saw
        assert torch.equal(function(q, k, v), torchs)


def scripted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


# --- explain ------------------------------------------------------------------------------------------------


def test_explain_runs_no_kernel(randn: Any) -> None:
    q, k, v = three(randn)
    slopes = torch.ones(3)

    def model(x: Tensor) -> Tensor:
        x = x + ak.dense_attention(x, k, v, causal=True, alibi_slopes=slopes)
        return x + ak.scaled_dot_product_attention(x, k, v) + sdpa(x, k, v, is_causal=True)

    with ak.installed():
        before = ak.installed_report().kernel_runs
        report = ak.explain(model, q)
        assert ak.installed_report().kernel_runs == before
        torch.testing.assert_close(model(q), model(q))  # explaining is over
        assert ak.installed_report().kernel_runs == before + 6
    assert [call.backend for call in report.calls] == ["cpu"] * 3
    first, _, last = report.calls
    assert first.shapes == {name: list(SHAPE) for name in "qkv"}
    assert "b0: f32[1]" in first.text
    assert sum(first.blocks.values()) == 1
    assert last.text == ak.parse(last.text).text
    assert "mask = kv_idx <= q_idx\n" in last.text
    assert "reference" in str(report)
    assert report.to_dict()["calls"][0]["backend"] == "cpu"
    assert str(ak.explain(lambda: None)) == "no attention call was made"


def test_explain_returns_zeros(randn: Any) -> None:
    q, k, v = three(randn)
    seen: list[Any] = []
    ak.explain(lambda: seen.extend(ak.attention(q, k, v, return_lse=True)))
    ak.explain(lambda: seen.append(ak.attention(q.requires_grad_(), k, v)))
    assert [t.shape for t in seen] == [q.shape, q.shape[:3], q.shape]
    assert all((t == 0).all() for t in seen)


@pytest.mark.parametrize("name", DECLINED)
def test_explain_of_declined_forms(name: str, randn: Any) -> None:
    reason, build = DECLINED[name]
    args, keywords = build(randn)
    expected = sdpa(*args, **keywords)
    seen: list[Tensor] = []
    with ak.installed():
        report = ak.explain(lambda: seen.append(sdpa(*args, **keywords)))
        assert ak.installed_report().torch == {}  # it was not run, so it is not counted
    assert [call.backend for call in report.calls] == ["torch"]
    assert reason in str(report)
    assert (seen[0].shape, seen[0].dtype) == (expected.shape, expected.dtype)


def test_explain_of_calls_with_gradients(randn: Any) -> None:
    q, k, v = (t.requires_grad_() for t in three(randn))
    for function in (sdpa, ak.attention, ak.scaled_dot_product_attention):
        with ak.installed():
            report = ak.explain(function, q, k, v)
            assert ak.installed_report().torch == {}
        assert [call.backend for call in report.calls] == ["cpu"]
    runs = ak.installed_report().kernel_runs
    report = ak.explain(lambda: ak.attention(q, k, v).sum().backward())
    assert len(report.calls) == 1
    assert ak.installed_report().kernel_runs == runs


def test_explain_of_the_reference(randn: Any) -> None:
    report = ak.explain(ak.attention, *three(randn), backend="reference")
    assert [call.backend for call in report.calls] == ["reference"]


@pytest.mark.parametrize("form", ["taken", "float64", "gradients", "own"])
def test_explain_leaves_no_trace_in_compiled_code(form: str, randn: Any) -> None:
    """A graph compiled while explaining must not keep the zeros that explaining returns."""
    tensors = three(randn, dtype=torch.float64 if form == "float64" else torch.float32)
    tensors = tuple(t.requires_grad_(form == "gradients") for t in tensors)
    function = ak.attention if form == "own" else sdpa
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    with ak.installed():
        expected = function(*tensors)
        report = ak.explain(compiled, *tensors)
        assert torch.equal(compiled(*tensors), expected)
    assert len(report.calls) == 1


def test_explain_in_one_thread_alone(randn: Any) -> None:
    q, k, v = three(randn)
    results: list[Any] = []

    def other() -> None:
        thread = threading.Thread(target=lambda: results.append(ak.attention(q, k, v)))
        thread.start()
        thread.join(60)

    assert ak.explain(other).calls == ()
    assert torch.equal(results[0], ak.attention(q, k, v))
