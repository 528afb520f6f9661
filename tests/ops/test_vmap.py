"""torch.vmap over attnkit's functions, beside a loop over the examples."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit.ops import batching

N = 3
Function = Callable[..., Tensor]


def alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    return ak.attention(q, k, v, score=lambda s, b, h, i, j: s - slopes[h] * (b + 1) * (i - j).abs())


def of_lengths(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    return ak.attention(q, k, v, kv_lens=lengths)


def routed(q: Tensor, k: Tensor, v: Tensor, centroids: Tensor) -> Tensor:
    return ak.routing_attention(q, k, v, centroids, cluster_size=4)


def lse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ak.attention(q, k, v, return_lse=True)[1]


FUNCTIONS: dict[str, Function] = {
    "attention": ak.attention,
    "causal": partial(ak.attention, mask=ak.causal()),
    "lse": lse,
    "sdpa": ak.scaled_dot_product_attention,
    "linear": ak.linear_attention,
    "factorizable": ak.factorizable_attention,
    "selective": ak.selective_attention,
    "sparge": ak.sparge_attention,
}
BESIDE: dict[str, tuple[Function, Callable[[], Tensor]]] = {
    "a bias": (alibi, lambda: torch.rand(N, 4)),
    "a mask": (ak.scaled_dot_product_attention, lambda: torch.rand(N, 2, 1, 8, 8) > 0.3),
    "lengths": (of_lengths, lambda: torch.tensor([[1, 8], [2, 7], [3, 6]], dtype=torch.int32)),
    "centroids": (routed, lambda: torch.nn.functional.normalize(torch.randn(N, 4, 2, 16), dim=-1)),
}


@pytest.fixture
def three(randn: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (randn(N, 2, 4, 8, 16) for _ in range(3))
    return q, k, v


def looped(function: Function, *inputs: Tensor) -> Tensor:
    return torch.stack([function(*(x[i] for x in inputs)) for i in range(N)])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples(name: str, three: tuple[Tensor, Tensor, Tensor]) -> None:
    function = FUNCTIONS[name]
    assert torch.equal(torch.vmap(function)(*three), looped(function, *three))


@pytest.mark.parametrize("name", BESIDE)
def test_what_differs_beside_them(name: str, three: tuple[Tensor, Tensor, Tensor]) -> None:
    """Captured tensors of the examples, whose program reads the batch entry too."""
    function, make = BESIDE[name]
    torch.manual_seed(0)
    other = make()
    assert torch.equal(torch.vmap(function)(*three, other), looped(function, *three, other))


def test_what_examples_share(three: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = three
    found = torch.vmap(ak.attention, in_dims=(1, None, None))(q.movedim(0, 1), k[0], v[0])
    assert torch.equal(found, looped(lambda q: ak.attention(q, k[0], v[0]), q))


def test_two_levels(three: tuple[Tensor, Tensor, Tensor]) -> None:
    found = torch.vmap(torch.vmap(ak.attention))(*(x[None] for x in three))
    assert torch.equal(found[0], looped(ak.attention, *three))


@pytest.mark.parametrize("name", ["attention", "causal", "linear", "selective"])
def test_gradients_of_all_examples(name: str, three: tuple[Tensor, Tensor, Tensor]) -> None:
    inputs = [x.requires_grad_() for x in three]
    found, expected = (
        torch.autograd.grad(run(FUNCTIONS[name], *inputs).square().sum(), inputs)
        for run in (lambda f, *x: torch.vmap(f)(*x), looped)
    )
    assert all(map(torch.equal, found, expected))


@pytest.mark.filterwarnings(
    "ignore:There is a performance drop because we have not yet implemented the batching:UserWarning"
)
def test_gradients_of_each_example(three: tuple[Tensor, Tensor, Tensor]) -> None:
    """Which torch computes itself inside transforms."""
    gradient = torch.func.grad(lambda *x: ak.attention(*x).square().sum())
    assert torch.allclose(torch.vmap(gradient)(*three), looped(gradient, *three), atol=1e-6)


@pytest.mark.parametrize("name", sorted({*FUNCTIONS, *BESIDE} - {"sparge", "a mask", "lengths"}))
def test_several_cotangents(name: str, three: tuple[Tensor, Tensor, Tensor]) -> None:
    """`torch.autograd.grad(..., is_grads_batched=True)`, of which vectorised Jacobians are made."""
    function, beside = FUNCTIONS.get(name), []
    if function is None:
        function, make = BESIDE[name]
        beside = [make()]
    leaves = [x[0].clone().requires_grad_() for x in (*three, *beside)]
    if name == "centroids":
        leaves[3] = leaves[3].detach()
    wanted = [x for x in leaves if x.requires_grad]
    o = function(*leaves)
    d_o = torch.randn(N, *o.shape, generator=torch.Generator().manual_seed(1))
    several = torch.autograd.grad(o, wanted, d_o, retain_graph=True, is_grads_batched=True)
    for i, d in enumerate(d_o):
        for found, expected in zip(
            several, torch.autograd.grad(o, wanted, d, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(found[i], expected, rtol=0, atol=0)
    one = torch.autograd.grad(o, wanted, d_o[:1], is_grads_batched=True)
    for found, expected in zip(one, several, strict=True):
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)


def test_a_vectorised_jacobian(three: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = (x[0] for x in three)
    both = [
        torch.autograd.functional.jacobian(partial(ak.attention, k=k, v=v), q, vectorize=vectorize)
        for vectorize in (False, True)
    ]
    torch.testing.assert_close(*both, rtol=0, atol=0)


def test_no_examples(three: tuple[Tensor, Tensor, Tensor]) -> None:
    with pytest.raises(ak.AttnkitError, match="AK403"):
        torch.vmap(ak.attention)(*(x[:0] for x in three))


def test_dropout_differs_only_where_it_may(three: tuple[Tensor, Tensor, Tensor]) -> None:
    dropped = partial(ak.scaled_dot_product_attention, dropout_p=0.5)
    alike = [x[:1].expand_as(x) for x in three]
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(dropped)(*alike)
    same, different = (torch.vmap(dropped, randomness=r)(*alike) for r in ("same", "different"))
    assert torch.equal(same[0], same[1])
    assert not torch.equal(different[0], different[1])


def test_every_op_has_a_rule() -> None:
    """But for the one that writes to its arguments."""
    names = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("attnkit::")
    }
    assert names - {"kv_append"} == set(batching.OPS)
    for name in batching.OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"attnkit::{name}", "FuncTorchBatched")
