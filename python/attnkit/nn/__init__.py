"""Modules of attention that learns something beside its weights: `Centroids` and `RoutingAttention`."""

from attnkit.nn.routing import Centroids, RoutingAttention

__all__ = ["Centroids", "RoutingAttention"]
