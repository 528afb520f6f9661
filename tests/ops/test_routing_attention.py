"""ak.routing_attention: the worked numbers, limits and laws of the family, and the traps others fell into."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit.variants import routing

pytestmark = pytest.mark.shows
Randn = Callable[..., Tensor]
FORMS: list[dict[str, Any]] = [
    {"cluster_size": 40}, {"cluster_size": 45, "causal": True}, {"cluster_size": 30, "qk_norm": "layer", "causal": True},
    {"cluster_size": 40, "qk_norm": "none", "scale": 0.3}, {"cluster_size": 20, "membership": "prefix"},
]  # fmt: skip


def near(found: Tensor, exact: Any, tolerance: float = 3e-6) -> None:
    assert np.abs(found.detach().double().numpy() - exact).max() < tolerance


def doubles(*tensors: Tensor) -> list[Any]:
    return [t.detach().double().numpy() for t in tensors]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("lengths", [(129, 129), (50, 190)], ids=str)
def test_is_the_equation(form: dict[str, Any], lengths: tuple[int, int], randn: Randn) -> None:
    q, k, v = randn(2, 2, lengths[0], 16), randn(2, 2, lengths[1], 16), randn(2, 2, lengths[1], 12)
    mu = randn(2, 5, 16)
    for dtype, tolerance in ((torch.float32, 3e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        given = [x.to(dtype) for x in (q, k, v)]
        exact = routing.naive(*doubles(*given, mu), **form)
        o = ak.routing_attention(*given, mu, **form)
        assert o.dtype == dtype
        near(o, exact, tolerance)
        assert not o[exact == 0].any()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradients(form: dict[str, Any], randn: Randn) -> None:
    """By q, k and v, the choice held fast; none by centroids. Central differences on the float64 equation."""
    q, k, v = (randn(1, 2, 140, 8).requires_grad_() for _ in range(3))
    mu = randn(2, 3, 8).requires_grad_()
    o = ak.routing_attention(q, k, v, mu, **form)
    d_o = randn(*o.shape)
    *found, of_mu = torch.autograd.grad(o, (q, k, v, mu), d_o, allow_unused=True)
    assert of_mu is None
    whole, step = doubles(q, k, v, mu), 1e-6
    for at, gradient in enumerate(found):
        direction = randn(1, 2, 140, 8).double().numpy()
        sides = []
        for sign in (1, -1):
            moved = list(whole)
            moved[at] = moved[at] + sign * step * direction
            sides.append(float((routing.naive(*moved, **form) * d_o.double().numpy()).sum()))
        slope = float((gradient.double().numpy() * direction).sum())
        assert abs((sides[0] - sides[1]) / (2 * step) - slope) < 1e-4 * (1 + abs(slope))


def test_worked_numbers() -> None:
    x = torch.tensor([[1.0, 0], [0, 1], [0.8, 0.6], [-1, 0]])[None, None]
    mu = torch.eye(2)[None]
    queries, keys = torch.ops.attnkit.route(x, x, mu, 2, "l2", 0)
    assert queries.tolist() == keys.tolist() == [[[[0, 2], [1, 2]]]]
    v = torch.eye(4)[None, None]
    both = [torch.softmax(x[0, 0, members] @ x[0, 0, 2] * 2**-0.5, 0) for members in ([0, 2], [1, 2])]
    expected = torch.zeros(4)
    expected[[0, 2]] += both[0] / 2
    expected[[1, 2]] += both[1] / 2
    for dtype, tolerance in ((torch.float32, 1e-7), (torch.bfloat16, 4e-3)):
        tokens, values = x.to(dtype), v.to(dtype).requires_grad_()
        o = ak.routing_attention(tokens, tokens, values, mu, cluster_size=2)
        (d_v,) = torch.autograd.grad(o, values, v.to(dtype))  # which are the weights again
        for weights in (o[0, 0], d_v[0, 0].mT):
            assert (weights[3] == 0).all()
            assert torch.allclose(weights[2].float(), expected, atol=tolerance)


def alike(one: Tensor, other: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """A result and its gradients, but for rounding."""
    d_o = torch.randn_like(one)
    found, expected = ((o, *torch.autograd.grad(o, inputs, d_o)) for o in (one, other))
    for x, y in zip(found, expected, strict=True):
        assert (x - y).norm() <= (2e-6 if x.dtype == torch.float32 else 1e-2) * y.norm()


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize("causal", [False, True])
def test_one_cluster_of_all_is_dense(dtype: torch.dtype, causal: bool, randn: Randn) -> None:
    q, k, v = (randn(1, 2, 150, 32).to(dtype).requires_grad_() for _ in range(3))
    dense = ak.dense_attention(q, k, v, causal=causal)
    for size in (150, 10_000):  # w > N is all of them
        o = ak.routing_attention(q, k, v, randn(2, 1, 32), cluster_size=size, causal=causal)
        assert torch.equal(o, dense)
        for one, other in zip(
            *(torch.autograd.grad(x.float().sum(), (q, k, v), retain_graph=True) for x in (o, dense)),
            strict=True,
        ):
            # of bfloat16 o, what was subtracted was rounded
            assert torch.allclose(
                one,
                other,
                rtol=1e-2 if dtype == torch.bfloat16 else 1e-5,
                atol=5e-3 if dtype == torch.bfloat16 else 1e-5,
            )


@DTYPES
def test_names_of_clusters_do_not_matter(dtype: torch.dtype, randn: Randn) -> None:
    q, k, v = (randn(1, 2, 100, 8).to(dtype).requires_grad_() for _ in range(3))
    mu = randn(2, 4, 8)
    one, other = (ak.routing_attention(q, k, v, m, cluster_size=40, causal=True) for m in (mu, mu.flip(1)))
    alike(one, other, (q, k, v))


@DTYPES
def test_disjoint_clusters_are_dense_blocks(dtype: torch.dtype, randn: Randn) -> None:
    side = torch.arange(64) % 2
    x = (torch.eye(2)[side] * (1 + torch.rand(64, 1)))[None, None].to(dtype).requires_grad_()
    v = randn(1, 1, 64, 8).to(dtype).requires_grad_()
    found = ak.routing_attention(x, x, v, torch.eye(2)[None], cluster_size=32)
    alike(found, ak.attention(x, x, v, mask=ak.document(side.int())), (x, v))


def test_members_are_counted(randn: Randn) -> None:
    """Every cluster has w; o is zero exactly where a token is in none."""
    q, k, v = (randn(1, 1, 90, 8) for _ in range(3))
    mu = randn(1, 3, 8)
    queries, _ = torch.ops.attnkit.route(q, k, mu, 20, "l2", 0)
    counts = torch.bincount(queries.flatten().long(), minlength=90)
    assert counts.sum() == 3 * 20
    o = ak.routing_attention(q, k, v, mu, cluster_size=20)
    assert torch.equal((o[0, 0] != 0).any(1), counts > 0)


# --- traps ------------------------------------------------------------------------------------------------


def test_ties_go_to_the_first_token(randn: Randn) -> None:
    same = torch.ones(1, 1, 100, 8)
    for w in (1, 7, 16, 99):
        queries, _ = torch.ops.attnkit.route(same, same, torch.ones(1, 2, 8), w, "l2", 0)
        assert queries[0, 0].tolist() == [list(range(w))] * 2
    numbers = torch.randint(-3, 4, (1, 1, 333, 1)).float()  # many ties, both zeros
    numbers[0, 0, ::7] *= -0.0
    for w in (5, 100, 200):
        found = torch.ops.attnkit.route(numbers, numbers, torch.ones(1, 1, 1), w, "none", 0)[0][0, 0, 0]
        right = np.sort(np.argsort(-numbers[0, 0, :, 0].numpy() + 0.0, kind="stable")[:w])
        assert found.tolist() == right.tolist()


def test_zero_vectors_and_nan_are_no_trouble_to_others(randn: Randn) -> None:
    """A token of zeros has affinity 0 to all; one that is NaN comes last."""
    q, k, v = (randn(1, 1, 40, 8) for _ in range(3))
    mu = randn(1, 2, 8)
    q[0, 0, 3] = k[0, 0, 3] = 0
    for norm in ("l2", "layer"):
        form: dict[str, Any] = {"cluster_size": 15, "qk_norm": norm}
        near(ak.routing_attention(q, k, v, mu, **form), routing.naive(*doubles(q, k, v, mu), **form))
    q[0, 0, 5] = torch.nan
    queries, _ = torch.ops.attnkit.route(q, k, mu, 39, "l2", 0)
    assert 5 not in queries


def test_a_cluster_of_later_keys_gives_zero_and_counts() -> None:
    """The query's two clusters: in one it sees itself, the other holds keys that come later."""
    q = torch.tensor([[1.0, 1.0], [-1, -1], [-1, -1], [-1, -1]])[None, None]
    k = torch.tensor([[1.0, 0.0], [-1, -1], [0, 1], [-1, -1]])[None, None]
    v = torch.arange(1.0, 5).view(1, 1, 4, 1)
    o = ak.routing_attention(q, k, v, torch.eye(2)[None], cluster_size=1, causal=True)
    assert o[0, 0, :, 0].tolist() == [0.5, 0, 0, 0]
    q.requires_grad_()
    o = ak.routing_attention(q, k, v, torch.eye(2)[None], cluster_size=1, causal=True)
    assert torch.isfinite(torch.autograd.grad(o.sum(), q)[0]).all()


def test_whole_membership_looks_ahead_and_prefix_does_not(randn: Randn) -> None:
    q, k, v = (randn(1, 2, 300, 8) for _ in range(3))
    mu, t = randn(2, 4, 8), 200
    changed = [torch.cat([x[:, :, :t], 5 * randn(1, 2, 100, 8)], 2) for x in (q, k, v)]
    whole: dict[str, Any] = {"cluster_size": 30, "causal": True}
    prefix: dict[str, Any] = {"cluster_size": 30, "membership": "prefix"}
    results = [
        [ak.routing_attention(*x, mu, **form)[:, :, :t] for x in ((q, k, v), changed)]
        for form in (whole, prefix)
    ]
    assert not torch.allclose(*results[0])
    assert torch.equal(*results[1])


def test_prefix_in_steps(randn: Randn) -> None:
    """Chunks and single queries beside all keys so far give what the whole gives; w = S is dense causal attention."""
    q, k, v = (randn(1, 2, 300, 8) for _ in range(3))
    mu = randn(2, 4, 8)
    form: dict[str, Any] = {"cluster_size": 30, "membership": "prefix"}
    whole = ak.routing_attention(q, k, v, mu, **form)
    for first, end in ((0, 1), (127, 130), (200, 300), (299, 300)):
        step = ak.routing_attention(q[:, :, first:end], k[:, :, :end], v[:, :, :end], mu, **form)
        assert torch.allclose(step, whole[:, :, first:end], atol=1e-6)
    everything = ak.routing_attention(q, k, v, mu, cluster_size=300, membership="prefix")
    assert torch.allclose(everything, ak.dense_attention(q, k, v, causal=True), atol=1e-6)


# --- the op -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [0, 4])
def test_opcheck(block: int, randn: Randn) -> None:
    q, k = randn(1, 2, 10, 4), randn(1, 2, 12, 4)
    torch.library.opcheck(torch.ops.attnkit.route.default, (q, k, randn(2, 3, 4), 5, "l2", block))
    torch.library.opcheck(
        torch.ops.attnkit.route.default, (q.requires_grad_(), k, randn(2, 3, 4), 5, "l2", block)
    )


def test_compiles_into_one_graph(randn: Randn) -> None:
    q, k, v = (randn(1, 2, 40, 8).requires_grad_() for _ in range(3))
    mu = randn(2, 3, 8)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ak.routing_attention(q, k, v, mu, cluster_size=10, causal=True)

    compiled, plain = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v), call(q, k, v)
    assert torch.equal(compiled, plain)
    for one, other in zip(*(torch.autograd.grad(x.sum(), (q, k, v)) for x in (compiled, plain)), strict=True):
        assert torch.equal(one, other)


def test_bits_do_not_depend_on_threads(randn: Randn) -> None:
    q, k, v = (randn(2, 3, 500, 16) for _ in range(3))
    mu, found = randn(3, 7, 16), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(
            [ak.routing_attention(q, k, v, mu, cluster_size=100, membership=m) for m in ("whole", "prefix")]
        )
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_select_with_score(randn: Randn) -> None:
    q, k, v = (randn(1, 2, 60, 8) for _ in range(3))
    mu = randn(2, 3, 8)
    select = ak.routing(mu, cluster_size=20)
    o = ak.attention(q, k, v, select=select, mask=ak.causal(), score=ak.softcap(1e6))
    assert torch.allclose(o, ak.routing_attention(q, k, v, mu, cluster_size=20, causal=True), atol=1e-5)
