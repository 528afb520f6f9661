"""Centroids that follow the tokens routed to them (spherical k-means on the fly), and heads that route beside local ones.

With ``n`` the tokens after `qk_norm`, ``c(i)`` the centroid of largest ``n_i . mu_c``, and the mean over the tokens of a step::

    loss = commitment * mean_i |n_i - mu_c(i)|^2          gradient to the tokens alone
    mu_c = decay * mu_c + (1 - decay) * norm(mean of n_i with c(i) = c)          unchanged if there are none

Source: Roy et al. 2020, arXiv 2003.05997. As in lucidrains' routing-transformer the mean of a step is normalised and the
centroid is not; the counts and sums of google's, which start at 0 and 1, give early centroids very large norms.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import attnkit as ak
from attnkit.errors import error
from attnkit.ops.check import check_tensor, shape_of

_LLOYD_STEPS = 10


class Centroids(nn.Module):
    """The centroids of a routing attention.

    In training, ``loss = centroids(q, k)`` remembers where tokens went; ``centroids.update()``, once a step after the
    optimiser's, moves the centroids there. Nothing is remembered in evaluation, nor while a backward recomputes a forward
    (``torch.utils.checkpoint``). Micro-batches add up to one update; in data-parallel training, where `update` is to be
    called on every rank, it sums over all ranks of ``process_group`` (that of all, if ``torch.distributed`` runs). The first
    update of new centroids is a k-means of its tokens from random ones; until then they are random directions, good enough
    to be evaluated with.

    Args:
        num_heads: H.
        num_clusters: C.
        head_dim: D.
        decay: of the moving average, from 0 to 1.
        qk_norm: as in `attnkit.routing`.
        commitment: the factor of the loss.
        process_group: of `torch.distributed`.

    State: ``centroids`` float32 ``[H, C, D]``, and whether they have been ``initialized``.
    """

    centroids: Tensor
    initialized: Tensor
    _sums: Tensor
    _counts: Tensor

    def __init__(
        self, num_heads: int, num_clusters: int, head_dim: int, *, decay: float = 0.999, qk_norm: str = "l2",
        commitment: float = 1e-4, process_group: dist.ProcessGroup | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if not 0 <= decay <= 1:
            raise error("AK401", where="decay", given=str(decay), allowed="0..1")
        ways = ("l2", "layer", "none")
        if qk_norm not in ways:
            raise error("AK401", where="qk_norm", given=repr(qk_norm), allowed=", ".join(map(repr, ways)))
        self.decay, self.qk_norm, self.commitment, self.process_group = (
            decay,
            qk_norm,
            commitment,
            process_group,
        )
        start = _normal(torch.randn(num_heads, num_clusters, head_dim, dtype=torch.float32), qk_norm)
        self.register_buffer("centroids", start)
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        self.register_buffer("_sums", torch.zeros_like(start), persistent=False)
        self.register_buffer("_counts", torch.zeros(start.shape[:2], dtype=torch.float32), persistent=False)

    def forward(self, *tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """The commitment loss of ``tokens``, each ``[B, H, S, D]``: q and k, or what they share.

        ``mask [B, S]`` is False where a token is padding, which neither counts nor moves anything.

        Raises:
            AttnkitError: AK402, AK403, tokens are no such tensors.
        """
        heads, _, dim = self.centroids.shape
        for t in tokens:
            check_tensor("tokens", t)
            if t.dim() != 4 or t.shape[1] != heads or t.shape[3] != dim:
                raise error("AK403", where="tokens", given=shape_of(t), allowed=f"[B, {heads}, S, {dim}]")
        with torch.autocast(self.centroids.device.type, enabled=False):
            x = torch.cat([t.float().transpose(0, 1).flatten(1, 2) for t in tokens], 1)  # [H, tokens, D]
            alive = x.new_ones(x.shape[1])
            if mask is not None:
                alive = torch.cat([mask.reshape(-1).float()] * len(tokens))
                x = torch.where(alive[:, None] > 0, x, 0)  # what padding holds may be NaN
            n = _normal(x, self.qk_norm)
            if (
                self.training and torch._C._current_graph_task_id() == -1
            ):  # not inside a backward, which recomputes
                with torch.no_grad():
                    self._remember(n, alive)
            nearest = self.centroids.gather(1, _nearest(n, self.centroids)[..., None].expand(n.shape))
            distance = (n - nearest).square().sum(-1) * alive
            return self.commitment * distance.sum() / (alive.sum() * heads).clamp(min=1)

    @torch.no_grad()
    def update(self) -> None:
        """Move the centroids towards the means of the tokens since the last update."""
        if dist.is_available() and dist.is_initialized():
            for t in (self._sums, self._counts):
                dist.all_reduce(t, group=self.process_group)
        there = self._counts > 0
        if there.any():
            means = _normal(self._sums / self._counts.clamp(min=1)[..., None], self.qk_norm)
            decay = self.decay if self.initialized else 0.0
            moved = torch.where(
                there[..., None], decay * self.centroids + (1 - decay) * means, self.centroids
            )
            self.centroids.copy_(moved)
            self.initialized.fill_(True)
        self._sums.zero_()
        self._counts.zero_()

    def _remember(self, n: Tensor, alive: Tensor) -> None:
        centroids = self.centroids
        if not self.initialized and not self._counts.any():
            centroids = self._first(n, alive)
        sums, counts = _gathered(n, alive, centroids)
        self._sums += sums
        self._counts += counts

    def _first(self, n: Tensor, alive: Tensor) -> Tensor:
        """Lloyd's algorithm on the first tokens, from some of them: the same ones on every rank of the same seed."""
        living = torch.where(alive > 0)[0]
        if len(living) == 0:
            return self.centroids
        heads, count, _ = self.centroids.shape
        chosen = torch.stack(
            [living[torch.randperm(len(living), device=n.device)[:count]] for _ in range(heads)]
        )
        centroids = self.centroids.clone()
        centroids[:, : chosen.shape[1]] = n.gather(1, chosen[..., None].expand(-1, -1, n.shape[2]))
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(
                centroids,
                dist.get_global_rank(self.process_group, 0) if self.process_group else 0,
                group=self.process_group,
            )
        for _ in range(_LLOYD_STEPS):
            sums, counts = _gathered(n, alive, centroids)
            if dist.is_available() and dist.is_initialized():
                for t in (sums, counts):
                    dist.all_reduce(t, group=self.process_group)
            means = _normal(sums / counts.clamp(min=1)[..., None], self.qk_norm)
            centroids = torch.where(counts[..., None] > 0, means, centroids)
        self.centroids.copy_(centroids)
        return centroids


def _normal(x: Tensor, how: str) -> Tensor:
    """Tokens as `qk_norm` has them; one without a length stays what it is."""
    if how == "none":
        return x
    if how == "layer":
        return nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)
    length = x.square().sum(-1, keepdim=True)
    return torch.where(length > 0, x * torch.where(length > 0, length, 1).rsqrt(), 0)


def _nearest(n: Tensor, centroids: Tensor) -> Tensor:
    return (n.detach() @ centroids.mT).argmax(-1)


def _gathered(n: Tensor, alive: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Of each centroid the sum of the tokens nearest to it, and their number."""
    nearest, (heads, count, dim) = _nearest(n, centroids), centroids.shape
    counts = n.new_zeros(heads, count).scatter_add_(1, nearest, alive.expand(nearest.shape))
    sums = n.new_zeros(heads, count, dim).scatter_add_(1, nearest[..., None].expand(n.shape), n)
    return sums, counts


class RoutingAttention(nn.Module):
    """Attention of which some heads see near tokens and the others those of their clusters.

    Args:
        num_heads: H, both kinds together.
        head_dim: D.
        num_clusters: of each routing head.
        cluster_size: as in `attnkit.routing`, like qk_norm and membership.
        local_heads: how many heads, the first ones, are local.
        window: how many tokens before its own a local head sees, and as many after it unless it is causal.
        causal: as in `attnkit.routing_attention`.
        qk_norm: see cluster_size.
        membership: see cluster_size.
        decay: as in `Centroids`, like commitment.
        commitment: see decay.
    """

    def __init__(
        self, num_heads: int, head_dim: int, *, num_clusters: int, cluster_size: int, local_heads: int = 0, window: int = 256,
        causal: bool = True, qk_norm: str = "l2", membership: str = "whole", decay: float = 0.999, commitment: float = 1e-4,
    ) -> None:  # fmt: skip
        super().__init__()
        if not 0 <= local_heads < num_heads:
            raise error("AK401", where="local_heads", given=str(local_heads), allowed=f"0..{num_heads - 1}")
        self.local_heads, self.window, self.causal = local_heads, (window, 0 if causal else window), causal
        self.cluster_size, self.membership = cluster_size, membership
        self.centroids = Centroids(
            num_heads - local_heads,
            num_clusters,
            head_dim,
            decay=decay,
            qk_norm=qk_norm,
            commitment=commitment,
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """``o [B, H, S, Dv]`` in q's dtype, and the commitment loss, a float32 scalar. q, k and v are ``[B, H, S, D or Dv]``.

        Raises:
            AttnkitError: as `attnkit.routing_attention`.
        """
        n = self.local_heads
        loss = self.centroids(q[:, n:], k[:, n:])
        o = ak.routing_attention(
            q[:, n:], k[:, n:], v[:, n:], self.centroids.centroids, cluster_size=self.cluster_size, causal=self.causal,
            qk_norm=self.centroids.qk_norm, membership=self.membership,
        )  # fmt: skip
        if n > 0:
            local: Any = ak.dense_attention(
                q[:, :n], k[:, :n], v[:, :n], causal=self.causal, window=self.window
            )
            o = torch.cat([local, o], 1)
        return o, loss
