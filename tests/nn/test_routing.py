"""attnkit.nn: centroids move as the equation says, and never where they must not; heads of two kinds."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import attnkit as ak
from attnkit.errors import AttnkitError
from attnkit.nn import Centroids, RoutingAttention

pytestmark = pytest.mark.shows


def settled(heads: int = 2, clusters: int = 3, dim: int = 4, **options: Any) -> Centroids:
    """Centroids that are past their first update."""
    found = Centroids(heads, clusters, dim, **options)
    found.initialized.fill_(True)
    return found


def test_loss_and_update_are_the_equation() -> None:
    routes = settled(decay=0.75, commitment=0.5)
    x = torch.randn(2, 2, 10, 4, requires_grad=True)
    before = routes.centroids.clone()
    loss = routes(x)
    n = torch.nn.functional.normalize(x, dim=-1)
    nearest = torch.einsum("bhsd,hcd->bhsc", n, before).argmax(-1)
    mine = torch.stack([before[h][nearest[:, h]] for h in range(2)], 1)
    expected = 0.5 * (n - mine).square().sum(-1).mean()
    assert torch.allclose(loss, expected)
    assert torch.allclose(*(torch.autograd.grad(each, x)[0] for each in (loss, expected)), atol=1e-7)
    assert torch.equal(routes.centroids, before)  # not before the step has been made
    routes.update()
    for h in range(2):
        for c in range(3):
            own = n[:, h][nearest[:, h] == c]
            moved = (
                before[h, c]
                if len(own) == 0
                else 0.75 * before[h, c] + 0.25 * torch.nn.functional.normalize(own.mean(0), dim=0)
            )
            assert torch.allclose(routes.centroids[h, c], moved, atol=1e-6)


def test_an_empty_cluster_keeps_its_place() -> None:
    routes = settled(1, 2, 2, decay=0.5)
    routes.centroids.copy_(torch.tensor([[[1.0, 0], [-1, 0]]]))
    routes(torch.tensor([[[[2.0, 1], [3, -1]]]]))
    routes.update()
    assert routes.centroids[0, 1].tolist() == [-1, 0]
    assert torch.isfinite(routes.centroids).all()


def test_nothing_moves_in_evaluation_or_without_tokens() -> None:
    for routes in (Centroids(2, 3, 4), settled()):
        before = routes.centroids.clone()
        routes.eval()
        assert torch.isfinite(routes(torch.randn(1, 2, 9, 4)))  # also before the first update
        routes.update()
        routes.train()
        routes.update()
        assert torch.equal(routes.centroids, before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputing_counts_once(reentrant: bool) -> None:
    x = torch.randn(2, 2, 30, 4, requires_grad=True)
    results = []
    for again in (False, True):
        torch.manual_seed(0)
        routes = settled(decay=0.5)
        loss: Any = checkpoint(routes, x, use_reentrant=reentrant) if again else routes(x)
        loss.backward()
        routes.update()
        results.append(routes.centroids)
    assert torch.equal(*results)


def test_micro_batches_are_one_update() -> None:
    x = torch.randn(4, 2, 20, 4)
    results = []
    for parts in (1, 4):
        torch.manual_seed(0)
        routes = settled(decay=0.5)
        for part in x.chunk(parts):
            routes(part)
        routes.update()
        results.append(routes.centroids)
    assert torch.allclose(*results, atol=1e-6)


def test_padding_neither_counts_nor_moves() -> None:
    x = torch.randn(2, 2, 12, 4)
    mask = torch.rand(2, 12) < 0.5
    padded = torch.where(mask[:, None, :, None], x, torch.nan).requires_grad_()
    alone = [settled(decay=0.5) for _ in range(2)]
    alone[1].load_state_dict(alone[0].state_dict())
    loss = alone[0](padded, mask=mask)
    for b in range(2):
        alone[1](x[b : b + 1, :, mask[b]])
    for each in alone:
        each.update()
    assert torch.allclose(*(each.centroids for each in alone), atol=1e-6)
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, padded)[0]).all()


def test_the_first_update_is_k_means() -> None:
    """Three tight bundles of directions are found, whatever the random start."""
    torch.manual_seed(0)
    directions = torch.eye(4)[:3]
    x = (directions.repeat(20, 1) + 0.05 * torch.randn(60, 4))[None, None]
    found = 0
    for seed in range(5):
        torch.manual_seed(seed)
        routes = Centroids(1, 3, 4)
        routes(x)
        routes.update()
        assert routes.initialized
        assert torch.allclose(routes.centroids.norm(dim=-1), torch.ones(1, 3), atol=1e-5)
        found += bool(((routes.centroids[0] @ directions.T).amax(0) > 0.99).all())
    assert found >= 1  # Lloyd's algorithm may stop at a worse place


def _rank(rank: int, path: str, x: Tensor) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    routes = settled(decay=0.5)
    routes(x[rank::2])
    routes.update()
    Path(path, str(rank)).write_text(json.dumps(routes.centroids.tolist()))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_ranks_move_together(tmp_path: Any) -> None:
    x = torch.randn(4, 2, 20, 4)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(_rank, args=(str(tmp_path), x), nprocs=2)
    torch.manual_seed(0)
    routes = settled(decay=0.5)
    routes(x)
    routes.update()
    ranks = [torch.tensor(json.loads((tmp_path / str(rank)).read_text())) for rank in range(2)]
    assert torch.equal(*ranks)
    assert torch.allclose(ranks[0], routes.centroids, atol=1e-6)


def test_local_and_routing_heads() -> None:
    q, k, v = (torch.randn(1, 4, 90, 8, requires_grad=True) for _ in range(3))
    module = RoutingAttention(4, 8, num_clusters=3, cluster_size=30, local_heads=3, window=15)
    o, loss = module(q, k, v)
    assert torch.equal(o[:, :3], ak.dense_attention(q, k, v, causal=True, window=(15, 0))[:, :3])
    routed = ak.routing_attention(
        q[:, 3:], k[:, 3:], v[:, 3:], module.centroids.centroids, cluster_size=30, causal=True
    )
    assert torch.equal(o[:, 3:], routed)
    (o.sum() + loss).backward()
    assert q.grad is not None
    assert set(module.state_dict()) == {"centroids.centroids", "centroids.initialized"}


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: Centroids(1, 2, 4, decay=2), "AK401"), (lambda: Centroids(1, 2, 4, qk_norm="l1"), "AK401"),
        (lambda: RoutingAttention(2, 4, num_clusters=2, cluster_size=4, local_heads=2), "AK401"),
        (lambda: Centroids(1, 2, 4)(torch.zeros(1, 2, 3, 4)), "AK403"), (lambda: Centroids(1, 2, 4)([1]), "AK402"),
    ],
)  # fmt: skip
def test_refuses(make: Any, code: str) -> None:
    with pytest.raises(AttnkitError) as caught:
        make()
    assert caught.value.code == code
