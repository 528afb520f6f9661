"""How long a config should take, from what it computes and what it moves: enough to put candidates in order.

A pair costs its multiply-adds and an exponential, on whole vectors of lanes; a tile of keys, that every output is scaled anew;
what does not fit the first level of cache is loaded; the last tasks leave threads without work. Masks are not looked at. Times are
in multiply-adds of one lane: only ratios of them mean anything.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from typing import NamedTuple

from attnkit.plan.space import Config, Space, configs, default_config, rank
from attnkit.tune.key import buckets
from attnkit.tune.problem import Problem

_LEAST_HEADS = 4  # for each thread: more of them repeat what these do
# What looks so much worse than the best is not measured.
PRUNED = 1.2


class Machine(NamedTuple):
    """What a processor does beside its multiply-adds, in units of one of them."""

    lanes: int = 16
    vectors: int = 3  # of lanes that a product holds in registers
    lonely: float = 1.8  # what a vector costs by itself: keys are loaded for it alone
    element: float = 16.0  # an exponential, and what is around it
    rescale: float = 8.0  # an output element, once for each tile of keys
    tile: float = 4000.0  # starting a tile
    task: float = 20000.0  # starting a task
    load: float = 4.0  # a byte of a tile that is too large for the first level of cache
    cache: int = 48 << 10


def candidates(space: Space, problem: Problem, pruned: float = PRUNED) -> list[Config]:
    """The configs of a space that may be the best, the default first, then the most promising."""
    machine = Machine()
    estimate = _ESTIMATES.get((problem.spec.device, problem.direction))
    default = default_config(space)
    if estimate is None:
        return list(_different(space, problem))
    times = [(estimate(c, problem, machine), rank(space, c), c) for c in _different(space, problem)]
    least = min(time for time, _, _ in times)
    promising = [c for time, _, c in sorted(times, key=lambda t: t[:2]) if time <= pruned * least]
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
    d, spec = problem.dims, problem.spec
    tile_kv, widths = min(config["tile_kv"], d.kv_len), spec.head_dim + spec.v_head_dim
    tiles, stretches = _ceil(d.kv_len, tile_kv), _ceil(d.kv_len, config["split_kv"])

    def task(queries: int) -> float:
        lanes = _lanes(queries, machine)
        pairs = lanes * d.kv_len * (widths + machine.element)
        rows = (tiles + stretches) * machine.rescale * lanes * spec.v_head_dim
        spilled = max(0.0, 4 * lanes * tile_kv - machine.cache)
        return pairs + rows + tiles * (machine.tile + machine.load * spilled) + machine.task

    return _shared(
        [task(n) for n in _blocks(d.q_len, config["tile_q"])], d.batch * d.q_heads, problem.threads
    )


def _backward(config: Config, problem: Problem, machine: Machine) -> float:
    d, widths = problem.dims, problem.spec.head_dim + problem.spec.v_head_dim

    def tile(queries: int, keys: int) -> float:
        pairs = queries * keys * (2.5 * widths + 2 * machine.element)
        spilled = max(0, 8 * queries * keys - machine.cache)
        return pairs + 2 * machine.rescale * (queries + keys) * widths + machine.tile + machine.load * spilled

    rows, group = _blocks(d.q_len, config["backward_tile_q"]), d.q_heads // d.kv_heads
    tasks = [
        group * sum(tile(n, keys) for n in rows) + machine.task
        for keys in _blocks(d.kv_len, config["backward_tile_kv"])
    ]
    return _in_turn(tasks, d.batch * d.kv_heads, problem.threads)


def _blocks(n: int, size: int) -> list[int]:
    return [min(size, n - first) for first in range(0, n, size)]


def _lanes(queries: int, machine: Machine) -> float:
    """Vectors of queries, in lanes; those that are left over cost more."""
    vectors = _ceil(queries, machine.lanes)
    over = vectors % machine.vectors
    price = machine.lonely - (machine.lonely - 1) * (over - 1) / (machine.vectors - 1)
    return machine.lanes * (vectors - over + over * price)


def _shared(tasks: list[float], times: int, threads: int) -> float:
    """How long threads take that go on with the next task when they are done with one; half of the last keeps others waiting."""
    longest = max(tasks)
    idle = longest * (threads - 1) / (2 * threads)
    return max(sum(tasks) * times / threads, longest) + idle


def _in_turn(tasks: list[float], times: int, threads: int) -> float:
    """As `_shared`, where a task cannot be done before the one before it: blocks of keys add to gradients of queries in order."""
    simulated = min(times, _LEAST_HEADS * threads)
    free = [0.0] * threads
    for _ in range(simulated):
        before = 0.0
        for task in tasks:
            start = heapq.heappop(free)
            before = max(start + task, before)
            heapq.heappush(free, before)
    return max(free) * times / simulated


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


Estimate = Callable[[Config, Problem, Machine], float]
_ESTIMATES: dict[tuple[str, str], Estimate] = {("cpu", "forward"): _forward, ("cpu", "backward"): _backward}
