"""How long a config should take, from what it computes and what it moves: enough to put candidates in order.

A tile of keys costs its multiply-adds on whole vectors of lanes, a little work for each of its elements and a little for each row
of output that is scaled anew; a task reads the keys and values that it needs; the last tasks leave threads without work. Times are
in multiply-adds of one lane: only ratios of them mean anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from attnkit.plan.space import Config, Space, configs, default_config, rank
from attnkit.tune.key import buckets
from attnkit.tune.problem import Problem

# What is pruned is not measured: a config must look this much worse than the best.
PRUNED = 1.5


class Machine(NamedTuple):
    """What a processor does beside its multiply-adds, in units of one of them."""

    lanes: int = 16
    element: float = 16.0  # an exponential, and what is around it
    rescale: float = 2.0  # an output element, once for each tile of keys
    tile: float = 4000.0  # starting a tile
    task: float = 20000.0  # starting a task
    load: float = 4.0  # a byte from the second level of cache
    cache: int = 48 << 10  # of the first level


def candidates(space: Space, problem: Problem, machine: Machine | None = None) -> list[Config]:
    """The configs of a space that may be the best, the default first, then the most promising."""
    machine = machine or Machine()
    estimate = _ESTIMATES.get((problem.spec.device, problem.direction))
    default = default_config(space)
    if estimate is None:
        return list(configs(space))
    times = [(estimate(c, problem, machine), rank(space, c), c) for c in _different(space, problem)]
    least = min(time for time, _, _ in times)
    promising = [c for time, _, c in sorted(times, key=lambda t: t[:2]) if time <= PRUNED * least]
    return [default, *(c for c in promising if c != default)]


def _different(space: Space, problem: Problem) -> Iterator[Config]:
    """The configs that are not another one's: what is longer than the sequence is as long as it."""
    longest = dict(zip(("q", "kv"), buckets(problem.spec, problem.lengths), strict=True))
    seen = set()
    for config in configs(space):
        same = tuple(min(n, longest[name.rpartition("_")[2]] or n) for name, n in config.items())
        if same not in seen:
            seen.add(same)
            yield config


def _forward(config: Config, problem: Problem, machine: Machine) -> float:
    d, width = problem.dims, problem.spec.head_dim + problem.spec.v_head_dim
    tile_q, tile_kv = min(config["tile_q"], d.q_len), min(config["tile_kv"], d.kv_len)
    lanes = _ceil(tile_q, machine.lanes) * machine.lanes
    tiles = _ceil(d.kv_len, tile_kv)
    per_tile = (
        lanes * tile_kv * (width + machine.element)
        + machine.rescale * lanes * problem.spec.v_head_dim
        + machine.tile
    )
    spilled = max(0, 4 * lanes * tile_kv - machine.cache)
    per_task = tiles * (per_tile + machine.load * spilled) + machine.task + d.kv_len * width * machine.load
    merges = _ceil(d.kv_len, config["split_kv"]) * machine.rescale * lanes * problem.spec.v_head_dim
    tasks = d.batch * d.q_heads * _ceil(d.q_len, tile_q)
    return _rounds(tasks, problem.threads) * (per_task + merges)


def _backward(config: Config, problem: Problem, machine: Machine) -> float:
    d, width = problem.dims, problem.spec.head_dim + problem.spec.v_head_dim
    tile_q, tile_kv = min(config["backward_tile_q"], d.q_len), min(config["backward_tile_kv"], d.kv_len)
    per_tile = (
        2.5 * tile_q * tile_kv * width
        + 2 * machine.element * tile_q * tile_kv
        + machine.rescale * (tile_q + tile_kv) * width
        + machine.tile
    )
    spilled = max(0, 8 * tile_q * tile_kv - machine.cache)
    group = d.q_heads // d.kv_heads
    per_task = group * _ceil(d.q_len, tile_q) * (per_tile + machine.load * spilled) + machine.task
    return _rounds(d.batch * d.kv_heads * _ceil(d.kv_len, tile_kv), problem.threads) * per_task


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _rounds(tasks: int, threads: int) -> float:
    """How many tasks the busiest thread runs."""
    return math.ceil(tasks / threads)


Estimate = Callable[[Config, Problem, Machine], float]
_ESTIMATES: dict[tuple[str, str], Estimate] = {("cpu", "forward"): _forward, ("cpu", "backward"): _backward}
